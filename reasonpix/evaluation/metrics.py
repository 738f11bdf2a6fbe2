"""The metrics of an edit: the paper's five, and others that cost little more.

L1, L2, CLIP-I, DINO and CLIP-T are defined by MagicBrush's evaluation (Zhang et al., 2023), which
Table 3 of the paper uses. The others measure whether the edit follows the captions, what it
preserves, and whether the target can be found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from reasonpix.core.images import pixel_digest, resized, rgb
from reasonpix.core.memory import is_out_of_memory
from reasonpix.core.parallel import THREADS, Report, prefetch, quiet
from reasonpix.errors import ReasonpixError
from reasonpix.evaluation.cases import Benchmark, Case
from reasonpix.evaluation.embedders import (
    Clip,
    ClipOptions,
    Dino,
    DinoOptions,
    Embedding,
    ImageModel,
    PreprocessedImage,
)
from reasonpix.evaluation.grounder_filters import target_found_note
from reasonpix.evaluation.pixel_metrics import distances, psnr, ssim
from reasonpix.generation.components.edit_filters import RegroundedOptions, box_mask, overlaps
from reasonpix.plugin import registry
from reasonpix.plugin.components import Grounder
from reasonpix.plugin.intended_images import IntendedImages, read_intended_images
from reasonpix.plugin.types import Problem

VERSION = "1"
"""Increase it when the same images get other values: earlier scores become stale."""


@dataclass(frozen=True)
class MetricSpec:
    """A metric and how to print it."""

    key: str
    title: str
    better: Literal["lower", "higher"]
    digits: int
    """After the decimal point."""
    meaning: str


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("l1", "L1", "lower", 4, "mean absolute difference from the ground truth"),
    MetricSpec("l2", "L2", "lower", 4, "mean squared difference from the ground truth"),
    MetricSpec("clip_i", "CLIP-I", "higher", 4, "CLIP similarity to the ground truth"),
    MetricSpec("dino", "DINO", "higher", 4, "DINO similarity to the ground truth"),
    MetricSpec("clip_t", "CLIP-T", "higher", 4, "CLIP similarity to the caption of the edit"),
    MetricSpec(
        "clip_direction",
        "CLIP direction",
        "higher",
        4,
        "agreement of the image's change with the captions' change",
    ),
    MetricSpec(
        "psnr_outside", "PSNR outside", "higher", 2, "PSNR to the input outside the edit, in dB"
    ),
    MetricSpec("ssim_outside", "SSIM outside", "higher", 4, "SSIM to the input outside the edit"),
    MetricSpec(
        "target_found", "Target found", "higher", 3, "share of edits with the target in its box"
    ),
)


def _as_options(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class MetricsOptions(BaseModel):
    """The models of the metrics, each a name or a mapping of options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip: Annotated[
        ClipOptions, BeforeValidator(_as_options, json_schema_input_type=str | ClipOptions)
    ] = Field(ClipOptions(), description="Model of CLIP-I, CLIP-T and CLIP direction")
    dino: Annotated[
        DinoOptions, BeforeValidator(_as_options, json_schema_input_type=str | DinoOptions)
    ] = Field(DinoOptions(), description="Model of DINO")


@dataclass
class _Edit:
    """A case with its scores so far, and its images as the models need them."""

    case: Case
    values: dict[str, float] = field(default_factory=dict)
    problem: Problem | None = None
    clip: dict[str, PreprocessedImage] = field(default_factory=dict)
    """By role: edited, truth, input."""
    dino: dict[str, PreprocessedImage] = field(default_factory=dict)
    grounder_input: Image.Image | None = None
    """The edited image in the input's size, if the target is to be found in it."""


class Metrics:
    """Measures edits. With a `grounder`, also whether the target is found.

    The embeddings of inputs, ground truths and captions are cached until `close`, so that further
    edits of the same cases cost less. The values of a case do not depend on other cases.
    """

    def __init__(self, options: MetricsOptions, grounder: Grounder[Any] | None = None) -> None:
        self._clip = Clip(options.clip)
        self._dino = Dino(options.dino)
        self._grounder = grounder
        self._captions: dict[str, Embedding] = {}
        self._batch = max(options.clip.batch_size, options.dino.batch_size)

    @property
    def _models(self) -> list[ImageModel[Any] | Grounder[Any]]:
        return [self._clip, self._dino, *([self._grounder] if self._grounder else [])]

    def check(self) -> None:
        """Raise `ReasonpixError` for problems that are cheap to detect, such as missing models."""
        for part in self._models:
            part.check()

    def made_for(self) -> list[tuple[str, IntendedImages | None]]:
        """What images the embedding models are made for, by their keys in a recipe."""
        models = {"metrics.clip": self._clip, "metrics.dino": self._dino}
        return [(name, read_intended_images(it.options)) for name, it in models.items()]

    def notes(self, benchmark: Benchmark) -> dict[str, list[str]]:
        """By metric, what the reader of its values should know."""
        notes = {"clip_t": list(benchmark.caption_notes)} if benchmark.caption_notes else {}
        if grounder := self.fingerprint_facts()["grounder"]:
            notes["target_found"] = [target_found_note(benchmark.grounder_filters, grounder)]
        return notes

    def load(self) -> None:
        """Load the weights. Raises `WeightsError`."""
        for part in self._models:
            part.load()

    def close(self) -> None:
        """Free what `load` took, and the cached embeddings."""
        self._captions.clear()
        for part in self._models:
            part.close()

    def fingerprint_facts(self) -> dict[str, Any]:
        """Everything that determines the values, except images and captions (JSON values)."""
        grounder = self._grounder
        return {
            "version": VERSION,
            "clip": self._clip.fingerprint_facts(),
            "dino": self._dino.fingerprint_facts(),
            "grounder": grounder
            and registry.fingerprint_facts("grounder", grounder.name, grounder.options),
        }

    def measure(
        self,
        cases: Sequence[Case],
        edited: Sequence[Callable[[], Image.Image]],
        report: Report = quiet,
    ) -> list[dict[str, float] | Problem]:
        """The values of each case's edit, by the keys of `METRICS`.

        Metrics for which a case lacks texts or images are left out. A case gets a `Problem` if an
        image cannot be read or a value is not finite. `edited` return RGB images of any size; each
        is called once, from a thread.
        """
        results: list[dict[str, float] | Problem] = []
        edits = prefetch(lambda pair: self._read(*pair), zip(cases, edited, strict=True), THREADS)
        while some := list(islice(edits, self._batch)):
            self._compare_embeddings(some)
            self._find_targets([edit for edit in some if edit.grounder_input])
            results += [edit.problem or _result(edit) for edit in some]
            report(len(results), len(cases))
        return results

    # -- Each case by itself, in threads ---------------------------------------------------------

    def _read(self, case: Case, read_edited: Callable[[], Image.Image]) -> _Edit:
        """Read the images of a case, and compute the metrics that need no model."""
        try:
            return self._measure_pixels(case, rgb(read_edited()))
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            if is_out_of_memory(error):
                raise
            explained = isinstance(error, ReasonpixError)
            reason = str(error) if explained else f"{case.row}: {type(error).__name__}: {error}"
            return _Edit(case, problem=Problem(status="failed", reason=reason))

    def _measure_pixels(self, case: Case, edited: Image.Image) -> _Edit:
        edit, images = _Edit(case), {"edited": edited}
        if case.read_truth:
            truth = images["truth"] = rgb(case.read_truth())
            edit.values["l1"], edit.values["l2"] = distances(edited, truth)
        if case.box or case.read_mask or _has_direction(case):
            before = images["input"] = rgb(case.read_input())
            after = resized(edited, before.size)
            if (outside := _pixels_outside(case, before.size)) is not None and outside.any():
                edit.values["psnr_outside"] = psnr(after, before, outside)
                edit.values["ssim_outside"] = ssim(after, before, outside)
            if self._grounder and case.box and case.target:
                edit.grounder_input = after
        digests = {role: pixel_digest(image) for role, image in images.items()}
        for model, pictures, roles in (
            (self._clip, edit.clip, _clip_roles(case)),
            (self._dino, edit.dino, ["edited", "truth"] if case.read_truth else []),
        ):
            pictures |= {role: model.preprocess(images[role], digests[role]) for role in roles}
        return edit

    # -- By models, in batches -------------------------------------------------------------------

    def _compare_embeddings(self, edits: Sequence[_Edit]) -> None:
        """Compute the metrics that compare embeddings."""
        clip = _embedded(self._clip, [edit.clip for edit in edits])
        dino = _embedded(self._dino, [edit.dino for edit in edits])
        self._embed_captions([edit.case for edit in edits])
        for edit, by_clip, by_dino in zip(edits, clip, dino, strict=True):
            case, values = edit.case, edit.values
            if edit.problem:
                continue
            if case.read_truth:
                values["clip_i"] = cosine(by_clip["edited"], by_clip["truth"])
                values["dino"] = cosine(by_dino["edited"], by_dino["truth"])
            if case.clip_t_caption:
                wanted = self._captions[case.clip_t_caption]
                values["clip_t"] = cosine(by_clip["edited"], wanted)
            if _has_direction(case):
                values["clip_direction"] = cosine(
                    by_clip["edited"] - by_clip["input"],
                    self._captions[case.edited_caption] - self._captions[case.caption],
                )

    def _embed_captions(self, cases: Sequence[Case]) -> None:
        captions = {
            text
            for case in cases
            for text in (case.caption, case.edited_caption, case.clip_t_caption)
            if text
        }
        if new := sorted(captions - self._captions.keys()):
            self._captions |= zip(new, self._clip.embed_texts(new), strict=True)

    def _find_targets(self, edits: Sequence[_Edit]) -> None:
        if not edits:
            return
        assert self._grounder is not None
        found = overlaps(
            self._grounder,
            [edit.grounder_input for edit in edits if edit.grounder_input],
            [[edit.case.target] for edit in edits if edit.case.target],
            [edit.case.box for edit in edits if edit.case.box],
        )
        for edit, overlap in zip(edits, found, strict=True):
            if isinstance(overlap, Problem):
                edit.problem = overlap
            else:
                is_found = overlap[0] >= RegroundedOptions().overlap
                edit.values["target_found"] = float(is_found)


def is_measurable(case: Case) -> bool:
    """Whether any metric can be computed for a case: not for an image without anything else."""
    return bool(case.read_truth or case.clip_t_caption or case.box or case.read_mask)


def cosine(one: Embedding, other: Embedding) -> float:
    """In [-1, 1]; 0 if either is zero, because no change has no direction."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.clip(one @ other / lengths, -1, 1)) if lengths else 0.0


def _has_direction(case: Case) -> bool:
    return bool(case.caption and case.edited_caption) and case.caption != case.edited_caption


def _clip_roles(case: Case) -> list[str]:
    """The roles of the images that CLIP embeds."""
    roles = {
        "edited": case.read_truth or case.clip_t_caption or _has_direction(case),
        "truth": case.read_truth,
        "input": _has_direction(case),
    }
    return [role for role, is_needed in roles.items() if is_needed]


def _pixels_outside(case: Case, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """(height, width) of the input image: the pixels to preserve; None if they are not known."""
    if case.read_mask:
        within = case.read_mask()
    elif case.box:
        within = box_mask(case.box)
    else:
        return None
    if within.shape != size[::-1]:
        raise ValueError(
            f"its mask or box is for {within.shape[1]}x{within.shape[0]} pixels, "
            f"and the input image has {size[0]}x{size[1]}"
        )
    return ~within


def _embedded(
    model: ImageModel[Any], edits: Sequence[Mapping[str, PreprocessedImage]]
) -> list[dict[str, Embedding]]:
    """Each edit's embeddings by role. Those of the benchmark's own images are cached."""
    keep = {it.digest for edit in edits for role, it in edit.items() if role != "edited"}
    found = model.embed([it for edit in edits for it in edit.values()], keep)
    return [{role: found[it.digest] for role, it in edit.items()} for edit in edits]


def _result(edit: _Edit) -> dict[str, float] | Problem:
    invalid = [key for key, value in edit.values.items() if not np.isfinite(value)]
    if not invalid:
        return edit.values
    reason = f"{edit.case.row}: {', '.join(invalid)}: not a finite number; compute in float32"
    return Problem(status="failed", reason=reason)
