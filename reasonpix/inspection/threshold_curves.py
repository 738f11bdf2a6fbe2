"""How many records a filter accepts as each threshold varies, computed from stored scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from reasonpix.core.atomic import write_atomically
from reasonpix.generation.outcomes import (
    OutcomeCounts,
    StageEntry,
    outcome_counts,
    read_stages,
    scorer_of,
    scores_of,
    verdicts,
)
from reasonpix.generation.run_folder import RunFolder
from reasonpix.plugin.components import ModelOptions

Measured = Sequence[Mapping[str, float]]

SAMPLED = 5000
"""The most records that a curve is computed from; of a larger run, evenly spaced ones."""

_POINTS = 48
_BINS = 32
_ZOOMS = 3


@dataclass(frozen=True)
class Curve:
    """The share of records that a filter accepts, by the value of one option."""

    option: str
    current: float
    ok: float
    """The share that is ok by this filter alone at the current value."""
    accepted: float
    """The share that all filters accept at the current value."""
    points: list[tuple[float, float]]
    """(value, share that is ok by this filter alone)"""
    together: list[tuple[float, float]]
    """(value, share that all filters accept); the other filters stay unchanged."""


@dataclass(frozen=True)
class Distribution:
    """How one score is distributed."""

    score: str
    low: float
    median: float
    high: float
    counts: list[int]
    """Records in equal-width bins from `low` to `high`."""


@dataclass(frozen=True)
class Survival:
    """What one filter measured, and how many records it accepts."""

    name: str
    measured: int
    ok: int
    sampled: int
    """Records that the curves are computed from."""
    curves: list[Curve]
    distributions: list[Distribution]


def filter_survivals(run: RunFolder) -> list[Survival]:
    """One for each filter, in order. Raises `RunError` if the run is not finished."""
    against = _against(run)
    return [filter_survival(run, entry, against) for entry in read_stages(run) if entry.is_score]


Against = Mapping[str, Sequence[str]]
"""By record, the folders of the stages that it did not pass or reach."""


def _against(run: RunFolder) -> Against:
    entries = read_stages(run)
    rejected = verdicts(run, entries)
    against: dict[str, list[str]] = {}
    for shard in run.shards():
        for entry in entries:
            for record_id, status, _ in run.ends(entry.folder, shard):
                stopped = against.setdefault(record_id, [entry.folder for entry in entries])
                if status == "ok" and record_id not in rejected.get(entry.folder, ()):
                    stopped.remove(entry.folder)
    return against


def filter_survival(run: RunFolder, entry: StageEntry, against: Against | None = None) -> Survival:
    """What a filter accepts of the records it measured, for each numeric threshold in use."""
    against = _against(run) if against is None else against
    table = scores_of(run, entry)
    measured = (row for shard in run.shards() for row in run.ends(entry.folder, shard))
    free = [set(against[row[0]]) <= {entry.folder} for row in measured if row[1] == "ok"]
    rejected = sum(reason is not None for reason in scorer_of(entry).reject(table))
    step = max(1, -(-len(table) // SAMPLED))
    sample = _Sample(entry, [table[i] for i in range(0, len(table), step)], free[::step])
    options = scorer_of(entry).options
    curves = [
        _curve(sample, name, value)
        for name, value in options
        if name in options.fingerprint_exclude - ModelOptions.fingerprint_exclude
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and sample.scores
    ]
    names = dict.fromkeys(name for scores in sample.scores for name in scores)
    return Survival(
        name=entry.component["use"],
        measured=len(table),
        ok=len(table) - rejected,
        sampled=len(sample.scores),
        curves=curves,
        distributions=[_distribution(name, sample.scores) for name in names],
    )


@dataclass(frozen=True)
class _Sample:
    """What a curve is computed from."""

    entry: StageEntry
    scores: Measured
    free: Sequence[bool]
    """For each record, whether everything else accepts it."""

    def shares(self, option: str, value: float) -> tuple[float, float] | None:
        """The shares that this filter and that all filters accept; None if the value is invalid."""
        try:
            reasons = scorer_of(self.entry, **{option: value}).reject(self.scores)
        except ValidationError:
            return None
        accepted = sum(
            reason is None and free for reason, free in zip(reasons, self.free, strict=True)
        )
        return reasons.count(None) / len(reasons), accepted / len(reasons)


def _distribution(name: str, sample: Measured) -> Distribution:
    values = np.array([scores[name] for scores in sample if name in scores])
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, _BINS, (low, high) if low < high else (low - 0.5, low + 0.5))
    return Distribution(name, low, float(np.median(values)), high, counts.tolist())


def _curve(sample: _Sample, option: str, current: float) -> Curve:
    """Over the option's range; if it has none, over the range of scores where shares change."""
    whole = isinstance(current, int)
    low, high, is_bounded = _range(sample, option, current)
    points: list[tuple[float, tuple[float, float]]] = []
    for _ in range(1 if is_bounded else _ZOOMS):
        points = [
            (x, shares)
            for x in _grid(low, high, whole)
            if (shares := sample.shares(option, x)) is not None
        ]
        changes = [i for i in range(1, len(points)) if points[i][1] != points[i - 1][1]]
        if not changes:
            break
        first, last = max(0, changes[0] - 2), min(len(points) - 1, changes[-1] + 1)
        if last - first > len(points) // 2:
            break
        low, high = points[first][0], points[last][0]
    shares = sample.shares(option, current)
    assert shares is not None  # the recipe's own value is valid
    alone, together = ([(x, pair[i]) for x, pair in points] for i in (0, 1))
    return Curve(option, current, *shares, points=alone, together=together)


def _range(sample: _Sample, option: str, current: float) -> tuple[float, float, bool]:
    """The option's bounds, or the range of its scores; and whether it is the option's own range.

    An option's scores are those whose name it contains: `max_outside` ranges over `outside`.
    """
    field = type(scorer_of(sample.entry).options).model_fields[option]
    bounds = {
        side: next((v for m in field.metadata if (v := _bound(m, side)) is not None), None)
        for side in ("ge", "gt", "le", "lt")
    }
    low = bounds["ge"] if bounds["gt"] is None else bounds["gt"]
    high = bounds["le"] if bounds["lt"] is None else bounds["lt"]
    if low is not None and high is not None:
        return low, high, True
    own = [
        value
        for scores in sample.scores
        for name, value in scores.items()
        if f"_{name}_" in f"_{option}_"
    ]
    values = own or [current, *(value for scores in sample.scores for value in scores.values())]
    smallest, largest = min(values), max(values)
    if own:
        margin = 0.05 * (largest - smallest) or 0.05 * abs(largest) or 1.0
        smallest, largest = smallest - margin, largest + margin
    return (
        smallest if low is None else max(low, smallest),
        largest if high is None else min(high, largest),
        bool(own),
    )


def _bound(constraint: Any, side: str) -> float | None:
    value = getattr(constraint, side, None)
    return float(value) if isinstance(value, int | float) else None


def _grid(low: float, high: float, whole: bool) -> list[float]:
    if whole:
        step = max(1, round((high - low) / _POINTS))
        return list(range(round(low), round(high) + 2, step))
    # Round values are easier to read off and to type.
    return [float(f"{x:.6g}") for x in np.linspace(low, high, _POINTS + 1)]


# -- The page -------------------------------------------------------------------------------------


def write_survival_page(
    run: RunFolder, out: Path | None = None, before: OutcomeCounts | None = None
) -> str:
    """Write a page with the curves of all filters to `out`, and return its path or URL.

    By default it is `survival.html` in the run folder. `before` is how records ended before the
    filters changed, to be shown next to the current counts.
    """
    environment = Environment(
        loader=PackageLoader("reasonpix", "pages"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("survival.html").render(
        name=run.name,
        filters=[_filter_plots(survival) for survival in filter_survivals(run)],
        after=outcome_counts(run),
        before=before,
    )
    if out is not None:
        write_atomically(out, page.encode())
        return str(out)
    run.storage.write("survival.html", page.encode())
    return f"{run}/survival.html"


WIDTH, HEIGHT = 300, 110
"""Size of a panel in its own units, without labels."""


def _filter_plots(survival: Survival) -> dict[str, Any]:
    """The coordinates that the page needs of a filter."""
    return {
        "filter": survival,
        "curves": [_line_of(curve) for curve in survival.curves],
        "distributions": [_bars_of(each) for each in survival.distributions],
    }


def _line_of(curve: Curve) -> dict[str, Any]:
    lines = (
        curve.points or [(curve.current, curve.ok)],
        curve.together or [(curve.current, curve.accepted)],
    )
    low, high = lines[0][0][0], lines[0][-1][0]
    width = (high - low) or 1.0

    def place(x: float) -> float:
        return min(WIDTH, max(0.0, WIDTH * (x - low) / width))

    return {
        "curve": curve,
        "lines": [
            " ".join(f"{place(x):.1f},{HEIGHT * (1 - share):.1f}" for x, share in points)
            for points in lines
        ],
        "at": place(curve.current),
        "height": HEIGHT * (1 - curve.ok),
        "low": low,
        "high": high,
        "outside": not low <= curve.current <= high,
    }


def _bars_of(distribution: Distribution) -> dict[str, Any]:
    most, width = max(distribution.counts), WIDTH / len(distribution.counts)
    return {
        "of": distribution,
        "most": most,
        "bars": [
            (i * width, HEIGHT * (1 - count / most), width, HEIGHT * count / most)
            for i, count in enumerate(distribution.counts)
            if count
        ],
    }
