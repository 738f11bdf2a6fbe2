"""What an evaluation measures of an edit: the paper's five metrics, and what is cheap beside them.

L1, L2, CLIP-I, DINO and CLIP-T are defined by MagicBrush's evaluation (Zhang et al., 2023), by
which Table 3 of the paper is made. The others say what these cannot: whether an edit goes the way
the captions go, what it preserved, and whether the target can be found.
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
from reasonpix.evaluation.cases import Case
from reasonpix.evaluation.embedders import (
    Clip,
    ClipOptions,
    Dino,
    DinoOptions,
    Embedding,
    ImageModel,
    PreprocessedImage,
)
from reasonpix.evaluation.pixel_metrics import distances, psnr, ssim
from reasonpix.generation.components.edit_filters import RegroundedOptions, box_mask, overlaps
from reasonpix.plugin import registry
from reasonpix.plugin.components import Grounder
from reasonpix.plugin.types import Problem

VERSION = "1"
"""Raise it when the same images get other values: what was measured before goes stale."""


@dataclass(frozen=True)
class MetricSpec:
    """What a metric is, and how it is shown."""

    key: str
    title: str
    better: Literal["lower", "higher"]
    digits: int
    """Behind the point."""
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
        "how far the image's change goes the way of the captions' change",
    ),
    MetricSpec("psnr_outside", "PSNR outside", "higher", 2, "dB to the input, around the edit"),
    MetricSpec("ssim_outside", "SSIM outside", "higher", 4, "SSIM to the input, around the edit"),
    MetricSpec(
        "target_found", "Target found", "higher", 3, "share of edits with the target in its box"
    ),
)


def _named(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class MetricsOptions(BaseModel):
    """The models that measure, each a name or a mapping of options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip: Annotated[
        ClipOptions, BeforeValidator(_named, json_schema_input_type=str | ClipOptions)
    ] = Field(ClipOptions(), description="Model of CLIP-I, CLIP-T and CLIP direction")
    dino: Annotated[
        DinoOptions, BeforeValidator(_named, json_schema_input_type=str | DinoOptions)
    ] = Field(DinoOptions(), description="Model of DINO")


@dataclass
class _Edit:
    """A case whose images were read: what was measured, and what models are to see."""

    case: Case
    values: dict[str, float] = field(default_factory=dict)
    problem: Problem | None = None
    clip: dict[str, PreprocessedImage] = field(default_factory=dict)
    """By role: edited, truth, input."""
    dino: dict[str, PreprocessedImage] = field(default_factory=dict)
    grounded: Image.Image | None = None
    """Where the grounder is to look: the edited image in the input's size."""


class Metrics:
    """Measures edits. Where there is a `grounder` it looks for the target.

    The embeddings of inputs, ground truths and captions are kept until `close`, so that further
    edits of the same cases cost less. What a case is measured with does not change its values.
    """

    def __init__(self, options: MetricsOptions, grounder: Grounder[Any] | None = None) -> None:
        self._clip = Clip(options.clip)
        self._dino = Dino(options.dino)
        self._grounder = grounder
        self._texts: dict[str, Embedding] = {}
        self._together = max(options.clip.batch_size, options.dino.batch_size)

    @property
    def _parts(self) -> list[ImageModel[Any] | Grounder[Any]]:
        return [self._clip, self._dino, *([self._grounder] if self._grounder else [])]

    def check(self) -> None:
        """Raise a `ReasonpixError` for what is missing and cheap to see."""
        for part in self._parts:
            part.check()

    def load(self) -> None:
        """Read the weights. Raises `WeightsError`."""
        for part in self._parts:
            part.load()

    def close(self) -> None:
        """Give back what `load` took, and forget the embeddings."""
        self._texts.clear()
        for part in self._parts:
            part.close()

    def fingerprint_facts(self) -> dict[str, Any]:
        """What the values follow from, beside images and captions (JSON values)."""
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

        What a case lacks the words or images for is left out. An image that cannot be read, or a
        value that is no number, gives a problem in the place of the case. `edited` read RGB images
        of any size; they are called once each, from threads.
        """
        results: list[dict[str, float] | Problem] = []
        edits = prefetch(lambda pair: self._read(*pair), zip(cases, edited, strict=True), THREADS)
        while some := list(islice(edits, self._together)):
            self._compare(some)
            self._look_for_targets([edit for edit in some if edit.grounded])
            results += [edit.problem or _checked(edit) for edit in some]
            report(len(results), len(cases))
        return results

    # -- one by one, in threads ------------------------------------------------------------------

    def _read(self, case: Case, read_edited: Callable[[], Image.Image]) -> _Edit:
        """Read the images of a case, and measure what takes no model."""
        try:
            return self._look(case, rgb(read_edited()))
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            if is_out_of_memory(error):
                raise
            told = isinstance(error, ReasonpixError)
            what = str(error) if told else f"{case.row}: {type(error).__name__}: {error}"
            return _Edit(case, problem=Problem(status="failed", reason=what))

    def _look(self, case: Case, edited: Image.Image) -> _Edit:
        edit, images = _Edit(case), {"edited": edited}
        if case.read_truth:
            truth = images["truth"] = rgb(case.read_truth())
            edit.values["l1"], edit.values["l2"] = distances(edited, truth)
        if case.box or case.read_mask or _has_direction(case):
            before = images["input"] = rgb(case.read_input())
            after = resized(edited, before.size)
            if (outside := _outside(case, before.size)) is not None and outside.any():
                edit.values["psnr_outside"] = psnr(after, before, outside)
                edit.values["ssim_outside"] = ssim(after, before, outside)
            if self._grounder and case.box and case.target:
                edit.grounded = after
        digests = {role: pixel_digest(image) for role, image in images.items()}
        for model, pictures, roles in (
            (self._clip, edit.clip, _seen_by_clip(case)),
            (self._dino, edit.dino, ["edited", "truth"] if case.read_truth else []),
        ):
            pictures |= {role: model.picture(images[role], digests[role]) for role in roles}
        return edit

    # -- by models, together ---------------------------------------------------------------------

    def _compare(self, edits: Sequence[_Edit]) -> None:
        """Measure the similarities of embeddings."""
        clip = _embedded(self._clip, [edit.clip for edit in edits])
        dino = _embedded(self._dino, [edit.dino for edit in edits])
        self._read_captions([edit.case for edit in edits])
        for edit, by_clip, by_dino in zip(edits, clip, dino, strict=True):
            case, values = edit.case, edit.values
            if edit.problem:
                continue
            if case.read_truth:
                values["clip_i"] = cosine(by_clip["edited"], by_clip["truth"])
                values["dino"] = cosine(by_dino["edited"], by_dino["truth"])
            if case.edited_caption:
                wanted = self._texts[case.edited_caption]
                values["clip_t"] = cosine(by_clip["edited"], wanted)
            if _has_direction(case):
                values["clip_direction"] = cosine(
                    by_clip["edited"] - by_clip["input"], wanted - self._texts[case.caption]
                )

    def _read_captions(self, cases: Sequence[Case]) -> None:
        captions = {text for case in cases for text in (case.caption, case.edited_caption) if text}
        if new := sorted(captions - self._texts.keys()):
            self._texts |= zip(new, self._clip.embed_texts(new), strict=True)

    def _look_for_targets(self, edits: Sequence[_Edit]) -> None:
        if not edits:
            return
        assert self._grounder is not None
        found = overlaps(
            self._grounder,
            [edit.grounded for edit in edits if edit.grounded],
            [[edit.case.target] for edit in edits if edit.case.target],
            [edit.case.box for edit in edits if edit.case.box],
        )
        for edit, answer in zip(edits, found, strict=True):
            if isinstance(answer, Problem):
                edit.problem = answer
            else:
                found_it = answer[0] >= RegroundedOptions().overlap
                edit.values["target_found"] = float(found_it)


def cosine(one: Embedding, other: Embedding) -> float:
    """In [-1, 1]; 0 where one of them is zero: what does not change has no direction."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.clip(one @ other / lengths, -1, 1)) if lengths else 0.0


def _has_direction(case: Case) -> bool:
    return bool(case.caption and case.edited_caption) and case.caption != case.edited_caption


def _seen_by_clip(case: Case) -> list[str]:
    """The roles of the images that are compared with each other or with captions."""
    roles = {
        "edited": case.read_truth or case.edited_caption,
        "truth": case.read_truth,
        "input": _has_direction(case),
    }
    return [role for role, is_seen in roles.items() if is_seen]


def _outside(case: Case, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """(height, width) of the input image: what the edit should preserve, where that is known."""
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
    """By role, of each edit. Those of the benchmark's own images are kept."""
    keep = {it.digest for edit in edits for role, it in edit.items() if role != "edited"}
    found = model.embed([it for edit in edits for it in edit.values()], keep)
    return [{role: found[it.digest] for role, it in edit.items()} for edit in edits]


def _checked(edit: _Edit) -> dict[str, float] | Problem:
    wrong = [key for key, value in edit.values.items() if not np.isfinite(value)]
    if not wrong:
        return edit.values
    what = f"{edit.case.row}: {', '.join(wrong)}: no finite number; compute in float32"
    return Problem(status="failed", reason=what)
