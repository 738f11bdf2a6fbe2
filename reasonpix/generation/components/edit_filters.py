"""Scorers of edits that also filter: Eq. 1 by value or by rank, and the checks the paper lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from reasonpix.plugin.components import Component, Edit, Grounder, Options, Scorer
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Box, Problem

Scores = list[dict[str, float] | Problem]
T = TypeVar("T")


def _pixels(image: Image.Image) -> NDArray[np.float32]:
    """(height, width, 3), float32 in [0, 1]: differences of uint8 would wrap around."""
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _squared_difference(edit: Edit) -> NDArray[np.float32]:
    """(height, width): squared difference, mean over the channels."""
    difference = _pixels(edit.input_image) - _pixels(edit.edited_image)
    result: NDArray[np.float32] = np.square(difference).mean(axis=2)
    return result


def _known(value: T | None) -> T:
    assert value is not None  # a recipe that cannot give what a scorer `requires` is refused
    return value


def inside(box: Box) -> NDArray[np.bool_]:
    """(height, width): which pixels the box touches."""
    x0, y0, x1, y1 = box.pixels()
    mask = np.zeros((box.height, box.width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


class Eq1Options(Options):
    """Options of `eq1`: exactly one of `value` and `rank`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"value", "rank"})

    value: float | None = Field(None, gt=0, description="τ: smallest distance that is kept")
    rank: float | None = Field(
        None, gt=0, lt=1, description="Share of the run, nearest to their input, to reject"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.value is None) == (self.rank is None):
            raise ValueError("give either value (τ) or rank (a share), not both and not neither")
        return self


class Eq1(Scorer[Eq1Options]):
    """Rejects pairs whose images hardly differ: ‖x_in − x_edit‖² < τ (Eq. 1 of the paper).

    The distance is the mean over pixels and channels, of floats in [0, 1], so that τ means the
    same at any image size; `rank` is not touched by the scale.
    """

    name: ClassVar[str] = "eq1"
    Options: ClassVar[type[Options]] = Eq1Options
    requires: ClassVar[frozenset[str]] = frozenset()

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`distance`: mean squared difference in [0, 1]."""
        return [{"distance": float(_squared_difference(edit).mean())} for edit in edits]

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """By value, or the `rank` share with the smallest distances (ties by order)."""
        distances = np.fromiter((score["distance"] for score in scores), float, len(scores))
        if self.options.value is not None:
            lowest, why = distances < self.options.value, f"< τ {self.options.value}"
        else:
            assert self.options.rank is not None
            # 0.29 * 100 is a little less than 29 in floats.
            worst = int(round(self.options.rank * len(distances), 6))
            lowest, why = (
                np.zeros(len(distances), bool),
                f"is among the lowest {self.options.rank:.0%}",
            )
            lowest[np.argsort(distances, kind="stable")[:worst]] = True
        rejected = zip(lowest, distances, strict=True)
        return [f"distance {distance:.5f} {why}" if low else None for low, distance in rejected]


class RegionDistanceOptions(Options):
    """Options of `region-distance`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"min_inside", "max_outside"})

    min_inside: float = Field(0.0, ge=0, description="Smallest mean squared change inside the box")
    max_outside: float = Field(1.0, ge=0, description="Largest mean squared change outside the box")


class RegionDistance(Scorer[RegionDistanceOptions]):
    """Change inside the box and outside: Eq. 1 alone also rewards edits that changed everything."""

    name: ClassVar[str] = "region-distance"
    Options: ClassVar[type[Options]] = RegionDistanceOptions
    requires: ClassVar[frozenset[str]] = frozenset({"box"})

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`inside` and `outside`: mean squared differences in [0, 1]."""
        scores: Scores = []
        for edit in edits:
            difference, within = _squared_difference(edit), inside(_known(edit.box))
            outside = 0.0 if within.all() else float(difference[~within].mean())
            scores.append({"inside": float(difference[within].mean()), "outside": outside})
        return scores

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """Too little change inside, or too much outside."""
        reasons: list[str | None] = []
        for score in scores:
            if score["inside"] < self.options.min_inside:
                reasons.append(f"inside changed by {score['inside']:.5f} only")
            elif score["outside"] > self.options.max_outside:
                reasons.append(f"outside changed by {score['outside']:.5f}")
            else:
                reasons.append(None)
        return reasons


class NoOpOptions(Options):
    """Options of `no-op`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"min_changed"})

    tolerance: int = Field(
        12, ge=0, le=255, description="Difference of a channel that is no change"
    )
    min_changed: float = Field(
        0.1, ge=0, le=1, description="Smallest share of the box's pixels that must change"
    )


class NoOp(Scorer[NoOpOptions]):
    """Detects edits that did nothing: hardly a pixel of the box differs visibly."""

    name: ClassVar[str] = "no-op"
    Options: ClassVar[type[Options]] = NoOpOptions
    requires: ClassVar[frozenset[str]] = frozenset({"box"})

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`changed`: share of the box's pixels that differ by more than the tolerance."""
        scores: Scores = []
        for edit in edits:
            before = np.asarray(edit.input_image, dtype=np.int16)
            after = np.asarray(edit.edited_image, dtype=np.int16)
            changed = np.abs(before - after).max(axis=2) > self.options.tolerance
            scores.append({"changed": float(changed[inside(_known(edit.box))].mean())})
        return scores

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """Fewer changed pixels than `min_changed`."""
        limit = self.options.min_changed
        return [
            f"{score['changed']:.1%} of the box changed" if score["changed"] < limit else None
            for score in scores
        ]


def overlaps(
    grounder: Grounder[Any],
    images: Sequence[Image.Image],
    categories: Sequence[Sequence[str]],
    boxes: Sequence[Box],
) -> list[tuple[float, ...] | Problem]:
    """How far the best box of each of an image's categories overlaps the box given for the image.

    The overlap is the intersection as a share of the smaller box, 0 when nothing is found.
    """
    found = grounder.ground(images, categories)
    return [
        answer
        if isinstance(answer, Problem)
        else tuple(it.box.overlap(box) if it.box else 0.0 for it in answer)
        for answer, box in zip(found, boxes, strict=True)
    ]


class RegroundedOptions(Options):
    """Options of `regrounded`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"overlap"})

    overlap: float = Field(
        0.5, gt=0, le=1, description="Share of the smaller box that two boxes of one object share"
    )


class Regrounded(Scorer[RegroundedOptions]):
    """The grounder must find the target in the box of the edited image, and the source no more."""

    name: ClassVar[str] = "regrounded"
    Options: ClassVar[type[Options]] = RegroundedOptions
    needs_slots: ClassVar[frozenset[str]] = frozenset({"grounder"})
    requires: ClassVar[frozenset[str]] = frozenset({"box", "selected", "target"})

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`target` and `source`: how far the category's best box overlaps the edited box.

        See `overlaps`.
        """
        grounder = pipeline["grounder"]
        assert isinstance(grounder, Grounder)
        found = overlaps(
            grounder,
            [edit.edited_image for edit in edits],
            [(_known(edit.target), _known(edit.selected)) for edit in edits],
            [_known(edit.box) for edit in edits],
        )
        return [
            it if isinstance(it, Problem) else {"target": it[0], "source": it[1]} for it in found
        ]

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """Target not found where it should be, or the source category still there."""
        reasons: list[str | None] = []
        for score in scores:
            if score["target"] < self.options.overlap:
                reasons.append("the target category is not found in the box")
            elif score["source"] >= self.options.overlap:
                reasons.append("the selected category is still found in the box")
            else:
                reasons.append(None)
        return reasons


@hookimpl
def scorers() -> list[type[Scorer[Any]]]:
    """The scorers of this module."""
    return [Eq1, RegionDistance, NoOp, Regrounded]
