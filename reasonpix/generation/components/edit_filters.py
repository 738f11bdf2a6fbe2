"""Filters of edits: Eq. 1 of the paper, and checks that the paper lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from reasonpix.plugin.components import Component, Grounder, Options, Scorer
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.filters import RejectIf, ThresholdFilter, ThresholdOptions
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Box, Problem

T = TypeVar("T")


def _pixels(image: Image.Image) -> NDArray[np.float32]:
    """(height, width, 3), float32 in [0, 1]: differences of uint8 would wrap around."""
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _squared_difference(edit: Edit) -> NDArray[np.float32]:
    """(height, width): squared difference, mean over the channels."""
    difference = _pixels(edit.input_image) - _pixels(edit.edited_image)
    result: NDArray[np.float32] = np.square(difference).mean(axis=2)
    return result


def _required(value: T | None) -> T:
    assert value is not None  # a recipe that cannot provide the fields in `requires` is refused
    return value


def box_mask(box: Box) -> NDArray[np.bool_]:
    """(height, width): which pixels the box touches."""
    x0, y0, x1, y1 = box.pixels()
    mask = np.zeros((box.height, box.width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


class Eq1Options(ThresholdOptions):
    """Options of `eq1`: exactly one of `value` and `reject_fraction`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"reject_fraction"})

    value: Annotated[float | None, RejectIf("distance", "<", "distance {:.5f} < τ {limit}")] = (
        Field(None, gt=0, description="τ: smallest distance that is kept")
    )
    reject_fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of the run to reject: the edits nearest to their input"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.value is None) == (self.reject_fraction is None):
            raise ValueError("set exactly one of value (τ) and reject_fraction (a share)")
        return self


class Eq1(ThresholdFilter[Eq1Options]):
    """Rejects pairs whose images hardly differ: ‖x_in − x_edit‖² < τ (Eq. 1 of the paper).

    The distance is the mean over pixels and channels, of floats in [0, 1], so that τ means the
    same at any image size. `reject_fraction` does not depend on the scale of the distance.
    """

    name: ClassVar[str] = "eq1"
    Options: ClassVar[type[Options]] = Eq1Options
    requires: ClassVar[frozenset[str]] = frozenset()

    def score_edit(self, edit: Edit) -> dict[str, float]:
        """`distance`: mean squared difference in [0, 1]."""
        return {"distance": float(_squared_difference(edit).mean())}

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """By `value`, or the `reject_fraction` with the smallest distances (ties by order)."""
        fraction = self.options.reject_fraction
        if fraction is None:
            return super().reject(scores)
        distances = [score["distance"] for score in scores]
        # Rounded first, because 0.29 * 100 is slightly less than 29 in floats.
        count = int(round(fraction * len(distances), 6))
        reasons: list[str | None] = [None] * len(distances)
        for i in sorted(range(len(distances)), key=distances.__getitem__)[:count]:
            reasons[i] = f"distance {distances[i]:.5f} is among the lowest {fraction:.0%}"
        return reasons


class RegionDistanceOptions(ThresholdOptions):
    """Options of `region-distance`."""

    min_inside: Annotated[float, RejectIf("inside", "<", "inside changed by {:.5f} only")] = Field(
        0.0, ge=0, description="Smallest mean squared change inside the box"
    )
    max_outside: Annotated[float, RejectIf("outside", ">", "outside changed by {:.5f}")] = Field(
        1.0, ge=0, description="Largest mean squared change outside the box"
    )


class RegionDistance(ThresholdFilter[RegionDistanceOptions]):
    """Measures changes inside and outside the box: Eq. 1 alone rewards changing everything."""

    name: ClassVar[str] = "region-distance"
    Options: ClassVar[type[Options]] = RegionDistanceOptions
    requires: ClassVar[frozenset[str]] = frozenset({"box"})

    def score_edit(self, edit: Edit) -> dict[str, float]:
        """`inside` and `outside`: mean squared differences in [0, 1]."""
        difference, mask = _squared_difference(edit), box_mask(_required(edit.box))
        outside = 0.0 if mask.all() else float(difference[~mask].mean())
        return {"inside": float(difference[mask].mean()), "outside": outside}


class NoOpOptions(ThresholdOptions):
    """Options of `no-op`."""

    tolerance: int = Field(
        12, ge=0, le=255, description="Largest difference of a channel that does not count"
    )
    min_changed: Annotated[float, RejectIf("changed", "<", "{:.1%} of the box changed")] = Field(
        0.1, ge=0, le=1, description="Smallest share of the box's pixels that must change"
    )


class NoOp(ThresholdFilter[NoOpOptions]):
    """Detects edits that did nothing: hardly a pixel of the box differs visibly."""

    name: ClassVar[str] = "no-op"
    Options: ClassVar[type[Options]] = NoOpOptions
    requires: ClassVar[frozenset[str]] = frozenset({"box"})

    def score_edit(self, edit: Edit) -> dict[str, float]:
        """`changed`: share of the box's pixels that differ by more than the tolerance."""
        before = np.asarray(edit.input_image, dtype=np.int16)
        after = np.asarray(edit.edited_image, dtype=np.int16)
        changed = np.abs(before - after).max(axis=2) > self.options.tolerance
        return {"changed": float(changed[box_mask(_required(edit.box))].mean())}


def overlaps(
    grounder: Grounder[Any],
    images: Sequence[Image.Image],
    categories: Sequence[Sequence[str]],
    boxes: Sequence[Box],
) -> list[tuple[float, ...] | Problem]:
    """For each image, how far the best box of each category overlaps the image's given box.

    The overlap is the intersection as a share of the smaller box, 0 when nothing is detected.
    """
    groundings = grounder.ground(images, categories)
    return [
        grounding
        if isinstance(grounding, Problem)
        else tuple(match.box.overlap(box) if match.box else 0.0 for match in grounding)
        for grounding, box in zip(groundings, boxes, strict=True)
    ]


class RegroundedOptions(ThresholdOptions):
    """Options of `regrounded`."""

    overlap: Annotated[
        float,
        RejectIf("target", "<", "the target category is not found in the box"),
        RejectIf("source", ">=", "the selected category is still found in the box"),
    ] = Field(
        0.5, gt=0, le=1, description="Share of the smaller box that two boxes of one object share"
    )


class Regrounded(ThresholdFilter[RegroundedOptions]):
    """Requires the grounder to detect the target in the edited box, and no longer the source."""

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
        results = overlaps(
            grounder,
            [edit.edited_image for edit in edits],
            [(_required(edit.target), _required(edit.selected)) for edit in edits],
            [_required(edit.box) for edit in edits],
        )
        return [
            result
            if isinstance(result, Problem)
            else dict(zip(("target", "source"), result, strict=True))
            for result in results
        ]


@hookimpl
def scorers() -> list[type[Scorer[Any]]]:
    """The filters of this module."""
    return [Eq1, RegionDistance, NoOp, Regrounded]
