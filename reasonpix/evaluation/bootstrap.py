"""Means of per-case scores with bootstrap confidence intervals (Efron, 1979).

Each resample draws as many cases again, with replacement; the interval holds the middle 95 % of the
resamples' means. Plain percentiles are used: bias-corrected ones (BCa; Efron, 1987) came no nearer
to 95 % in simulation. Both are somewhat narrow for few cases (of a normal distribution, 89 % hold
the true mean with 10 cases, 94 % with 30), and plain percentiles never leave the scores' range.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
MIN_CASES = 6
"""No interval below: five differences share a sign by chance 6 % of the time (2 × 0.5⁵)."""

_SEED = 20260
_MAX_NUMBERS = 8_000_000
"""Bounds the memory: so many numbers are held at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean over `cases` and its 95 % interval; `low` and `high` are None with too few cases."""

    cases: int
    mean: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """The number printed after ±; the interval need not be quite symmetric."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is larger than chance."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def intervals(columns: Sequence[ArrayLike]) -> list[Interval | None]:
    """The interval of each column of scores, of any length; None for an empty one.

    Columns of one length share their resamples, and the result of a column depends on its scores
    alone.
    """
    arrays = [np.asarray(column, float) for column in columns]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, array in enumerate(arrays):
        by_length[len(array)].append(index)
    results: list[Interval | None] = [None] * len(arrays)
    for length, indices in by_length.items():
        if length:
            computed = _intervals(np.stack([arrays[index] for index in indices], axis=1))
            for index, result in zip(indices, computed, strict=True):
                results[index] = result
    return results


def paired(scores: Mapping[str, float], reference: Mapping[str, float]) -> list[float]:
    """The differences to a reference method's scores, over the cases (by id) that both have.

    Scores of two methods are correlated, because some cases are harder than others: the interval of
    the mean difference is much narrower than those of the two means suggest.
    """
    return [score - reference[case] for case, score in scores.items() if case in reference]


def _intervals(values: NDArray[np.float64]) -> Iterator[Interval]:
    """One for each column of (cases, columns)."""
    cases, columns = values.shape
    means = values.mean(axis=0)
    if cases < MIN_CASES:
        yield from (Interval(cases, float(mean), None, None) for mean in means)
        return
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    step = _MAX_NUMBERS // RESAMPLES
    for start in range(0, columns, step):
        mean = means[start : start + step]
        block = values[:, start : start + step]
        deviations = block - mean
        resampled = np.concatenate([weights @ deviations for weights in _weights(cases)])
        low, high = np.quantile(resampled, tails, axis=0)
        # Rounding must not put the mean outside of its interval, nor the interval outside of the
        # scores' range.
        low = np.maximum(mean + np.minimum(low, 0), block.min(axis=0))
        high = np.minimum(mean + np.maximum(high, 0), block.max(axis=0))
        edges = (mean, np.minimum(mean, low), np.maximum(mean, high))
        for row in zip(*(edge.tolist() for edge in edges), strict=True):
            yield Interval(cases, *row)


def _weights(cases: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of (resamples, cases): the share of each case in each resample."""
    rng = np.random.default_rng((_SEED, cases))
    step = max(1, _MAX_NUMBERS // cases)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = rng.integers(cases, size=(rows, cases)) + np.arange(rows)[:, None] * cases
        counts = np.bincount(drawn.ravel(), minlength=rows * cases)
        yield counts.reshape(rows, cases) / cases
