from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from reasonpix.evaluation.bootstrap import MIN_CASES, Interval, intervals, paired

# Rounded, as what is a millionth of the other scores is lost in the sum.
SCORES = st.lists(
    st.floats(-10, 10).map(lambda score: round(score, 4)), min_size=MIN_CASES, max_size=40
)


def interval(scores: ArrayLike) -> Interval | None:
    return intervals([scores])[0]


def ends(scores: object) -> np.ndarray:
    found = interval(scores)  # type: ignore[arg-type]
    assert found is not None and found.low is not None and found.high is not None
    return np.array([found.low, found.mean, found.high])


@given(SCORES)
def test_an_interval_holds_the_mean_and_stays_in_the_scores_range(scores: list[float]) -> None:
    low, mean, high = ends(scores)
    assert low <= mean <= high
    assert mean == pytest.approx(np.mean(scores))
    assert min(scores) - 1e-9 <= low and high <= max(scores) + 1e-9


@given(SCORES, st.floats(-100, 100), st.floats(0.1, 100))
def test_it_moves_and_grows_with_the_scores(
    scores: list[float], offset: float, factor: float
) -> None:
    moved = ends(factor * np.array(scores) + offset)
    assert moved == pytest.approx(factor * ends(scores) + offset, abs=1e-9, rel=1e-9)


@given(SCORES)
def test_it_is_mirrored_with_the_scores(scores: list[float]) -> None:
    assert ends([-score for score in scores]) == pytest.approx(-ends(scores)[::-1], abs=1e-9)


@given(SCORES)
def test_a_method_does_not_differ_from_itself(scores: list[float]) -> None:
    by_case = {str(index): score for index, score in enumerate(scores)}
    found = interval(paired(by_case, by_case))
    assert found == Interval(len(scores), 0.0, 0.0, 0.0) and not found.excludes_zero


def test_pairs_are_the_cases_that_both_have() -> None:
    assert paired({"a": 3.0, "b": 5.0, "c": 1.0}, {"c": 4.0, "a": 1.0, "d": 9.0}) == [2.0, -3.0]


def test_few_scores_have_a_mean_but_no_interval() -> None:
    assert interval([]) is None
    assert interval([0.25]) == Interval(1, 0.25, None, None)
    few = interval([1.0] * (MIN_CASES - 1))
    assert few is not None and few.low is None and few.half_width is None
    assert not few.excludes_zero
    enough = interval([1.0] * MIN_CASES)
    assert enough is not None and (enough.low, enough.high) == (1.0, 1.0) and enough.excludes_zero


def test_columns_of_any_lengths_are_taken_together_and_keep_their_order() -> None:
    random = np.random.default_rng(0)
    columns = [random.normal(size=length) for length in (7, 0, 30, 7, 1, 30)]
    together = intervals(columns)
    for column, one in zip(columns, together, strict=True):
        alone = interval(column)
        assert (alone is None) == (one is None)
        if alone and one and alone.low is not None:
            assert (one.cases, one.low) == (alone.cases, pytest.approx(alone.low))
    assert intervals(columns) == together


def test_it_is_as_wide_as_the_normal_one_for_many_cases() -> None:
    scores = np.random.default_rng(1).normal(3.0, 2.0, 1000)
    found = interval(scores)
    assert found is not None and found.half_width is not None
    assert found.half_width == pytest.approx(1.96 * scores.std() / 1000**0.5, rel=0.06)


@pytest.mark.parametrize("shape", ["normal", "skewed", "share"])
def test_19_of_20_intervals_hold_the_true_mean(shape: str) -> None:
    random = np.random.default_rng(2)
    size = (1000, 80)
    scores, true = {
        "normal": (random.normal(0.7, 0.1, size), 0.7),
        "skewed": (random.gamma(2.0, 0.05, size), 0.1),
        "share": (random.binomial(1, 0.3, size), 0.3),
    }[shape]
    found = intervals(list(scores))
    held = [
        one is not None
        and one.low is not None
        and one.high is not None
        and one.low <= true <= one.high
        for one in found
    ]
    assert 0.92 <= np.mean(held) <= 0.98
