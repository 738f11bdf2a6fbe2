"""Filters made of a score function and thresholds."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pytest
from pydantic import Field

from reasonpix.plugin.components import Options
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.filters import RejectIf, ThresholdFilter, ThresholdOptions


class SizeOptions(ThresholdOptions):
    """Thresholds and an option that changes scores."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"threads"})

    threads: int = Field(1, description="Threads")
    scale: float = Field(1.0, description="Factor")
    low: Annotated[float, RejectIf("size", "<", "{:.1f} is below {limit}")] = Field(
        1.0, description="Smallest size"
    )
    high: Annotated[
        float | None,
        RejectIf("size", ">", "{:.1f} is above {limit}"),
        RejectIf("weight", ">=", "too heavy"),
    ] = Field(None, description="Largest size and weight")


class Size(ThresholdFilter[SizeOptions]):
    """A filter of two scores."""

    name: ClassVar[str] = "size"
    Options: ClassVar[type[Options]] = SizeOptions

    def score_edit(self, edit: Edit) -> dict[str, float]:
        """The instruction's length."""
        return {"size": self.options.scale * len(edit.instruction), "weight": 0.0}


def test_thresholds_stay_out_of_fingerprints_and_other_options_do_not() -> None:
    assert SizeOptions.fingerprint_exclude == {"threads", "low", "high"}
    assert ThresholdOptions.fingerprint_exclude == Options.fingerprint_exclude


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({"size": 1.0, "weight": 0.0}, None),
        ({"size": 0.9, "weight": 9.0}, "0.9 is below 1.0"),
        ({"size": 3.0, "weight": 2.9}, None),
        ({"size": 3.1, "weight": 0.0}, "3.1 is above 3.0"),
        ({"size": 2.0, "weight": 3.0}, "too heavy"),
    ],
)
def test_the_first_threshold_that_rejects_gives_the_reason(
    scores: dict[str, float], reason: str | None
) -> None:
    assert Size(SizeOptions(high=3.0)).reject([scores, scores]) == [reason, reason]


def test_a_threshold_that_is_not_set_rejects_nothing() -> None:
    assert Size(SizeOptions()).reject([{"size": 1e9, "weight": 1e9}]) == [None]
