"""What the scores of an evaluation say: means, differences to a baseline, means by group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from reasonpix.errors import RunError
from reasonpix.evaluation.bootstrap import Interval, intervals, paired
from reasonpix.evaluation.metrics import MEASURES, MetricSpec
from reasonpix.evaluation.results import COPY, TRUTH, CaseRecord, EvaluationFolder

Scores = Mapping[str, Mapping[str, float]]
"""By case, then by metric."""


@dataclass(frozen=True)
class ScoreKey:
    """Which scores a mean is of; all cases where there is no group."""

    kind: str
    method: str
    metric: str
    group: str = ""
    value: str = ""


@dataclass(frozen=True)
class Results:
    """Of one method by one kind of instruction."""

    asked: int
    scores: Scores
    failures: Mapping[str, str]
    """By case, why it has no scores."""

    @property
    def pending(self) -> int:
        """Cases that were not tried yet, or not measured."""
        return self.asked - len(self.scores) - len(self.failures)


@dataclass(frozen=True)
class Comparison:
    """Methods, compared on one benchmark."""

    folder: EvaluationFolder
    baseline: str
    measures: Sequence[MetricSpec]
    """Those that anything was measured by."""
    results: Mapping[tuple[str, str], Results]
    """By kind and method."""
    means: Mapping[ScoreKey, Interval] = field(default_factory=dict)
    differences: Mapping[ScoreKey, Interval] = field(default_factory=dict)
    """Of a method's score less the baseline's, on the cases that both have."""

    @property
    def methods(self) -> list[str]:
        """Without the ground truth and the copy."""
        return [name for name in self.folder.methods if name not in (TRUTH, COPY)]

    @property
    def references(self) -> list[str]:
        """Of the copy and the ground truth, those that were measured."""
        measured = {method for (_, method), results in self.results.items() if results.scores}
        return [name for name in (COPY, TRUTH) if name in measured]

    @property
    def chief(self) -> MetricSpec | None:
        """The metric that cases are ranked by: DINO, or the first there is."""
        by_key = {measure.key: measure for measure in self.measures}
        return by_key.get("dino", next(iter(self.measures), None))

    @property
    def groups(self) -> dict[str, list[str]]:
        """What cases are grouped by, and the groups, the largest first."""
        counts: dict[str, dict[str, int]] = {}
        for entry in self.folder.entries.values():
            for group, value in entry.groups.items():
                values = counts.setdefault(group, {})
                values[value] = values.get(value, 0) + 1
        return {
            group: sorted(values, key=lambda value: (-values[value], value))
            for group, values in counts.items()
        }

    def verdict(self, at: ScoreKey) -> Literal["better", "worse", ""]:
        """Whether a method is better than the baseline by more than chance."""
        difference = self.differences[at]
        if not difference.excludes_zero:
            return ""
        measure = next(measure for measure in self.measures if measure.key == at.metric)
        return "better" if (difference.mean > 0) == (measure.better == "higher") else "worse"

    def best(self, kind: str, metric: MetricSpec, group: str = "", value: str = "") -> set[str]:
        """The methods with the best mean; several where they do not differ as it is printed."""
        means = {
            method: round(found.mean, metric.digits)
            for method in self.methods
            if (found := self.means.get(ScoreKey(kind, method, metric.key, group, value)))
        }
        if len(means) < 2:
            return set()
        first = (min if metric.better == "lower" else max)(means.values())
        return {method for method, mean in means.items() if mean == first}


def compare(folder: EvaluationFolder, baseline: str | None = None) -> Comparison:
    """Compare what was measured. `baseline` is a method; by default the recipe's last one.

    Raises `RunError` when there is no such method.
    """
    names = [name for name in folder.methods if name != TRUTH]
    baseline = names[-1] if baseline is None else baseline
    if baseline not in names:
        raise RunError(f"{folder.root} has no method {baseline!r}; there are {', '.join(names)}")
    entries = folder.entries
    results = {
        (kind, method): Results(
            asked=sum(kind in entry.instructions for entry in entries.values()),
            scores=folder.scores(method, kind),
            failures=folder.failures(method, kind),
        )
        for kind in folder.kinds
        for method in folder.methods
    }
    present = {
        metric
        for found in results.values()
        for scores in found.scores.values()
        for metric in scores
    }
    measures = [measure for measure in MEASURES if measure.key in present]
    keys = [measure.key for measure in measures]
    columns = _columns(results, keys, entries)
    return Comparison(
        folder,
        baseline,
        measures,
        results,
        means=_intervals(columns),
        differences=_intervals(_differences(results, keys, baseline)),
    )


def _intervals(columns: Mapping[ScoreKey, Sequence[float]]) -> dict[ScoreKey, Interval]:
    """One for each column that is not empty. All at once, as the draws are shared."""
    found = zip(columns, intervals(list(columns.values())), strict=True)
    return {place: one for place, one in found if one is not None}


def _columns(
    results: Mapping[tuple[str, str], Results],
    metrics: Sequence[str],
    entries: Mapping[str, CaseRecord],
) -> dict[ScoreKey, list[float]]:
    """The scores of all cases, and of those of each group."""
    columns: dict[ScoreKey, list[float]] = {}
    for (kind, method), found in results.items():
        for metric in metrics:
            for case, score in _by_case(found, metric):
                for group, value in (("", ""), *entries[case].groups.items()):
                    place = ScoreKey(kind, method, metric, group, value)
                    columns.setdefault(place, []).append(score)
    return columns


def _differences(
    results: Mapping[tuple[str, str], Results], metrics: Sequence[str], baseline: str
) -> dict[ScoreKey, list[float]]:
    return {
        ScoreKey(kind, method, metric): paired(
            dict(_by_case(found, metric)), dict(_by_case(results[kind, baseline], metric))
        )
        for (kind, method), found in results.items()
        if method not in (TRUTH, baseline)
        for metric in metrics
    }


def _by_case(results: Results, metric: str) -> Iterator[tuple[str, float]]:
    return ((case, row[metric]) for case, row in results.scores.items() if metric in row)
