"""Compare an evaluation's scores: means, paired differences to a reference method, groups."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from reasonpix.errors import RunError
from reasonpix.evaluation.bootstrap import Interval, intervals, paired
from reasonpix.evaluation.metrics import METRICS, MetricSpec
from reasonpix.evaluation.results import COPY, TRUTH, CaseRecord, EvaluationFolder

_SIDE_BY_SIDE, _UNRANKED = 4, 24
"""Most cases to show with all methods: if a metric ranks them, and without a metric."""

Scores = Mapping[str, Mapping[str, float]]
"""By case, then by metric."""


@dataclass(frozen=True)
class ScoreKey:
    """Which scores a mean is taken over; without a group, those of all cases."""

    kind: str
    method: str
    metric: str
    group: str = ""
    value: str = ""


@dataclass(frozen=True)
class Results:
    """The results of one method with one kind of instruction."""

    requested: int
    """Cases that have this kind of instruction."""
    scores: Scores
    failures: Mapping[str, str]
    """By case, why it has no scores."""

    @property
    def pending(self) -> int:
        """Cases that were not edited or not measured yet."""
        return self.requested - len(self.scores) - len(self.failures)


@dataclass(frozen=True)
class Comparison:
    """Methods compared on one benchmark."""

    folder: EvaluationFolder
    reference: str
    """The method that all others are compared with."""
    metrics: Sequence[MetricSpec]
    """The metrics that have scores."""
    results: Mapping[tuple[str, str], Results]
    """By kind and method."""
    means: Mapping[ScoreKey, Interval]
    differences: Mapping[ScoreKey, Interval]
    """A method's score minus the reference's, over the cases that both have."""

    @property
    def methods(self) -> list[str]:
        """The recipe's methods: without ground truth and copy."""
        return [name for name in self.folder.methods if name not in (TRUTH, COPY)]

    @property
    def controls(self) -> list[str]:
        """Of the copy and the ground truth, those that have scores."""
        measured = {method for (_, method), results in self.results.items() if results.scores}
        return [name for name in (COPY, TRUTH) if name in measured]

    @property
    def training_sentences(self) -> list[tuple[str, bool]]:
        """For each method, what its training data share with the benchmark; and whether nothing."""
        return [
            (f"The training data of {method} are unknown.", True)
            if overlap is None
            else (overlap.sentence(method), overlap.is_clean)
            for method, overlap in self.folder.training_overlaps.items()
        ]

    @property
    def primary_metric(self) -> MetricSpec | None:
        """The metric that cases are ranked by: DINO, or else the first one."""
        by_key = {metric.key: metric for metric in self.metrics}
        return by_key.get("dino", next(iter(self.metrics), None))

    def ranked(self, kind: str, method: str) -> list[str]:
        """Cases from a method's best to its worst; ties keep the benchmark's order.

        Without a metric, all cases in the benchmark's order.
        """
        metric = self.primary_metric
        if metric is None:
            records = self.folder.records
            return [case for case, record in records.items() if kind in record.instructions]
        sign = 1 if metric.better == "lower" else -1
        scores = self.results[kind, method].scores
        ranked = [
            (sign * row[metric.key], case) for case, row in scores.items() if metric.key in row
        ]
        return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]

    def spread(self, kind: str) -> list[str]:
        """The cases to show: evenly spread from the reference's best to its worst.

        Without a metric, the first ones.
        """
        ranked = self.ranked(kind, self.reference)
        if self.primary_metric is None:
            return ranked[:_UNRANKED]
        count = min(_SIDE_BY_SIDE, len(ranked))
        steps = max(1, count - 1)
        return [ranked[index * (len(ranked) - 1) // steps] for index in range(count)]

    @property
    def groups(self) -> dict[str, list[str]]:
        """By group name, such as "category", its values, the most frequent first."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for record in self.folder.records.values():
            for group, value in record.groups.items():
                counts[group][value] += 1
        return {
            group: sorted(values, key=lambda value: (-values[value], value))
            for group, values in counts.items()
        }

    def verdict(self, key: ScoreKey) -> Literal["better", "worse", ""]:
        """Whether a method differs from the reference by more than chance."""
        difference = self.differences[key]
        if not difference.excludes_zero:
            return ""
        metric = next(metric for metric in self.metrics if metric.key == key.metric)
        return "better" if (difference.mean > 0) == (metric.better == "higher") else "worse"

    def best(self, kind: str, metric: MetricSpec, group: str = "", value: str = "") -> set[str]:
        """The methods with the best mean; several if they are equal as printed."""
        means = {
            method: round(interval.mean, metric.digits)
            for method in self.methods
            if (interval := self.means.get(ScoreKey(kind, method, metric.key, group, value)))
        }
        if len(means) < 2:
            return set()
        best = (min if metric.better == "lower" else max)(means.values())
        return {method for method, mean in means.items() if mean == best}


def compare(folder: EvaluationFolder, reference: str | None = None) -> Comparison:
    """Compare the methods of an evaluation with `reference`, by default the recipe's last method.

    Raises `RunError` if there is no such method.
    """
    names = [name for name in folder.methods if name != TRUTH]
    reference = names[-1] if reference is None else reference
    if reference not in names:
        raise RunError(
            f"{folder.root} has no method {reference!r}; choose one of {', '.join(names)}"
        )
    records = folder.records
    results = {
        (kind, method): Results(
            requested=sum(kind in record.instructions for record in records.values()),
            scores=folder.scores(method, kind),
            failures=folder.failures(method, kind),
        )
        for kind in folder.kinds
        for method in folder.methods
    }
    measured = {
        key for result in results.values() for scores in result.scores.values() for key in scores
    }
    metrics = [metric for metric in METRICS if metric.key in measured]
    keys = [metric.key for metric in metrics]
    means = _intervals(_columns(results, keys, records))
    differences = _intervals(_differences(results, keys, reference))
    return Comparison(folder, reference, metrics, results, means, differences)


def _intervals(columns: Mapping[ScoreKey, Sequence[float]]) -> dict[ScoreKey, Interval]:
    """One for each column that is not empty; computed together, because they share resamples."""
    computed = zip(columns, intervals(list(columns.values())), strict=True)
    return {key: interval for key, interval in computed if interval is not None}


def _columns(
    results: Mapping[tuple[str, str], Results],
    metrics: Sequence[str],
    records: Mapping[str, CaseRecord],
) -> dict[ScoreKey, list[float]]:
    """The scores of all cases, and those of each group."""
    columns: dict[ScoreKey, list[float]] = defaultdict(list)
    for (kind, method), result in results.items():
        for metric in metrics:
            for case, score in _scores_of(result, metric):
                for group, value in (("", ""), *records[case].groups.items()):
                    columns[ScoreKey(kind, method, metric, group, value)].append(score)
    return columns


def _differences(
    results: Mapping[tuple[str, str], Results], metrics: Sequence[str], reference: str
) -> dict[ScoreKey, list[float]]:
    return {
        ScoreKey(kind, method, metric): paired(
            dict(_scores_of(result, metric)), dict(_scores_of(results[kind, reference], metric))
        )
        for (kind, method), result in results.items()
        if method not in (TRUTH, reference)
        for metric in metrics
    }


def _scores_of(results: Results, metric: str) -> Iterator[tuple[str, float]]:
    return ((case, row[metric]) for case, row in results.scores.items() if metric in row)
