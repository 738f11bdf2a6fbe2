"""How many cases of a benchmark are in the training data of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from reasonpix.core.parallel import THREADS, prefetch
from reasonpix.datasets.training_data import TrainingData, image_hash
from reasonpix.evaluation.cases import Case
from reasonpix.plugin.components import Method, ModelOptions


@dataclass(frozen=True)
class CaseContent:
    """What a case may share with training data."""

    images: frozenset[str]
    """Hashes of its input and edited image, see `image_hash`."""
    instructions: Mapping[str, str]
    """By kind."""


class TrainingOverlap(BaseModel):
    """What a benchmark shares with the training data of a model."""

    model_config = ConfigDict(frozen=True)

    datasets: tuple[str, ...]
    """What the model was trained on."""
    unrecorded: tuple[str, ...]
    """Models from which training started, and whose training data are unknown."""
    cases: int
    images: int
    """Cases of which an image is in the training data."""
    instructions: dict[str, tuple[int, int]]
    """By kind: cases whose instruction is in the training data, and cases that have one."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is shared."""
        return not self.images and not any(shared for shared, _ in self.instructions.values())

    def sentence(self, model: str) -> str:
        """The counts in words."""
        shared = [
            f"{count} of {total} {kind} instructions"
            for kind, (count, total) in self.instructions.items()
        ]
        parts = [*shared, f"images of {self.images} of {self.cases} cases"]
        data = f"The training data of {model} ({', '.join(self.datasets) or 'none'})"
        verb = "share nothing with the benchmark" if self.is_clean else "contain"
        counted = "" if self.is_clean else f" {', '.join(parts[:-1])} and the {parts[-1]}"
        more = (
            f" What {' and '.join(self.unrecorded)} was trained on before is unknown."
            if self.unrecorded
            else ""
        )
        return f"{data} {verb}{counted}.{more}"


def content_of(case: Case) -> CaseContent:
    """Read a case's images. Raises `SourceError`."""
    images = [case.read_input(), *([case.read_truth()] if case.read_truth else [])]
    return CaseContent(frozenset(map(image_hash, images)), case.instructions)


def measure_overlap(training: TrainingData, cases: Iterable[CaseContent]) -> TrainingOverlap:
    """Compare the cases with what a model was trained on."""
    cases = list(cases)
    kinds = dict.fromkeys(kind for case in cases for kind in case.instructions)
    texts = {
        kind: [it.instructions[kind] for it in cases if kind in it.instructions] for kind in kinds
    }
    return TrainingOverlap(
        datasets=tuple(dict.fromkeys(dataset.name for dataset in training.datasets)),
        unrecorded=training.unrecorded,
        cases=len(cases),
        images=sum(training.has_image(case.images) for case in cases),
        instructions={
            kind: (sum(map(training.has_instruction, them)), len(them))
            for kind, them in texts.items()
        },
    )


def method_overlaps(
    methods: Mapping[str, Method[Any]], cases: Iterable[Case]
) -> dict[str, TrainingOverlap | None]:
    """By method; None for one whose training data are unknown. Raises `WeightsError`."""
    known = {name: _training_data(method) for name, method in methods.items()}
    # Images are decoded only if there is something to compare them with.
    read = any(known.values()) and prefetch(content_of, iter(cases), THREADS)
    contents = list(read or ())
    return {
        name: None if training is None else measure_overlap(training, contents)
        for name, training in known.items()
    }


def _training_data(method: Method[Any]) -> TrainingData | None:
    """That of all weights that a method loads; None if any of them has no record."""
    from reasonpix.editing import read_model_training_data

    options = method.options
    if not isinstance(options, ModelOptions):
        return None
    named = [name for field in options.weights if (name := getattr(options, field))]
    found = [read_model_training_data(options.model_copy(update={"model": name})) for name in named]
    total = TrainingData()
    for one in found:
        if one is None:
            return None
        total |= one
    return total if found else None
