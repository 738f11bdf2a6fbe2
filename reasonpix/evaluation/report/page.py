"""The HTML page of the report: tables, plots, and a choice of edits. It loads nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from reasonpix.core.images import UndecodableImage, data_url, decode
from reasonpix.evaluation.bootstrap import CONFIDENCE, MIN_CASES, RESAMPLES, Interval
from reasonpix.evaluation.comparison import Comparison, ScoreKey
from reasonpix.evaluation.metrics import METRICS, MetricSpec
from reasonpix.evaluation.report.plots import bar_chart
from reasonpix.evaluation.results import COPY, TRUTH

_EXTREMES = 3
"""How many of a method's best cases are shown, and of its worst ones."""
_MAX_ROWS = 25
"""Most values of a group in a table, and most reasons of failures."""
_LOSSLESS_SIDE, _MAX_SIDE = 128, 256
"""Images up to the first size, in pixels, are embedded losslessly; others scaled to the second."""

_ImageLoader = Callable[[Path], Mapping[str, Any]]


def render_page(comparison: Comparison) -> str:
    """The whole page, with its images, as small as it takes to judge an edit."""
    folder = comparison.folder
    environment = Environment(
        loader=PackageLoader("reasonpix", "pages"), autoescape=True, undefined=StrictUndefined
    )
    rows = [*comparison.methods, *comparison.controls]
    images = cache(_image)  # inputs and ground truths appear several times
    return environment.get_template("report.html").render(
        name=folder.benchmark,
        comparison=comparison,
        cases=len(folder.records),
        kinds=[_Kind(comparison, kind, images) for kind in folder.kinds],
        rows=rows,
        plots=[_plot(comparison, metric, rows) for metric in comparison.metrics],
        breakdowns=list(_breakdowns(comparison)),
        chance=_chance_findings(comparison),
        notes=[
            (metric.title, folder.notes[metric.key])
            for metric in METRICS
            if metric.key in folder.notes
        ],
        training=comparison.training_sentences,
        has_overlap=not all(is_clean for _, is_clean in comparison.training_sentences),
        truth=TRUTH,
        has_oracle=any(metric.key == "clip_t" for metric in comparison.metrics),
        confidence=f"{100 * CONFIDENCE:g}",
        resamples=RESAMPLES,
        min_cases=MIN_CASES,
        recipe=_recipe(folder.root),
        measured_with=json.dumps(folder.measured_with, indent=1, ensure_ascii=False),
    )


def _recipe(root: Path) -> str:
    path = root / "recipe.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _number(value: float, metric: MetricSpec, sign: str = "") -> str:
    shown = round(value, metric.digits) + 0.0  # turns −0 into 0
    return f"{shown:{sign}.{metric.digits}f}".replace("-", "−")


def _cell(
    mean: Interval | None, metric: MetricSpec, mark: str = "", sign: str = ""
) -> dict[str, Any]:
    """A mean and its interval as text. `mark` is best, better, worse or empty."""
    if mean is None:
        return {"mean": "–", "interval": "", "cases": 0, "mark": mark}
    interval = ""
    if mean.low is not None and mean.high is not None:
        interval = f"[{', '.join(_number(end, metric, sign) for end in (mean.low, mean.high))}]"
    number = _number(mean.mean, metric, sign)
    return {"mean": number, "interval": interval, "cases": mean.cases, "mark": mark}


def _plot(comparison: Comparison, metric: MetricSpec, rows: Sequence[str]) -> dict[str, Any]:
    kinds = comparison.folder.kinds
    means = {
        method: {
            kind: interval
            for kind in kinds
            if (interval := comparison.means.get(ScoreKey(kind, method, metric.key)))
        }
        for method in rows
    }
    measured = {method: by_kind for method, by_kind in means.items() if by_kind}
    notes = comparison.folder.notes.get(metric.key, [])
    return {"metric": metric, "notes": notes, "svg": bar_chart(metric, measured, kinds)}


def _chance_findings(comparison: Comparison) -> tuple[int, float]:
    """The number of differences with an interval, and how many of them exclude 0 by chance."""
    intervals = sum(interval.low is not None for interval in comparison.differences.values())
    return intervals, intervals * (1 - CONFIDENCE)


def _breakdowns(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The primary metric by group, unless every case is a group of its own."""
    metric = comparison.primary_metric
    for group, values in comparison.groups.items():
        if metric is None or len(values) == len(comparison.folder.records):
            continue
        yield {
            "group": group,
            "groups": len(values),
            "tables": [
                {
                    "kind": kind,
                    "rows": list(_breakdown(comparison, kind, metric, group, values[:_MAX_ROWS])),
                }
                for kind in comparison.folder.kinds
            ],
        }


def _breakdown(
    comparison: Comparison, kind: str, metric: MetricSpec, group: str, values: Sequence[str]
) -> Iterator[dict[str, Any]]:
    records = comparison.folder.records.values()
    counts = Counter(it.groups.get(group) for it in records if kind in it.instructions)
    methods = [*comparison.methods, *(name for name in comparison.controls if name == COPY)]
    for value in values:
        best = comparison.best(kind, metric, group, value)
        cells = []
        for method in methods:
            mean = comparison.means.get(ScoreKey(kind, method, metric.key, group, value))
            cells.append(_cell(mean, metric, "best" if method in best else ""))
        yield {"value": value, "cases": counts[value], "cells": cells, "methods": methods}


class _Kind:
    """The page's content for one kind of instruction."""

    def __init__(self, comparison: Comparison, kind: str, images: _ImageLoader) -> None:
        self.name = kind
        self._comparison = comparison
        self._folder = comparison.folder
        self._images = images

    def results(self, method: str) -> dict[str, int]:
        """How many cases were measured, how many failed, and how many are pending."""
        result = self._comparison.results[self.name, method]
        return {
            "measured": len(result.scores),
            "failed": len(result.failures),
            "pending": result.pending if method != TRUTH else 0,
        }

    def means(self, method: str) -> Iterator[dict[str, Any]]:
        """A cell for each metric; the best method's is marked."""
        for metric in self._comparison.metrics:
            mean = self._comparison.means.get(ScoreKey(self.name, method, metric.key))
            is_best = method in self._comparison.best(self.name, metric)
            yield _cell(mean, metric, "best" if is_best else "")

    def differences(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """By method, a cell for each metric, marked if it is better or worse than the reference."""
        for method in (*self._comparison.methods, COPY):
            if method == self._comparison.reference:
                continue
            cells = []
            for metric in self._comparison.metrics:
                key = ScoreKey(self.name, method, metric.key)
                difference = self._comparison.differences.get(key)
                mark = self._comparison.verdict(key) if difference else ""
                cells.append(_cell(difference, metric, mark, sign="+"))
            yield method, cells

    def side_by_side(self) -> Iterator[dict[str, Any]]:
        """The cases that `Comparison.spread` chooses, with every method's edit."""
        for case in self._comparison.spread(self.name):
            yield self._card(case, self._comparison.methods)

    def extremes(self, method: str) -> list[tuple[str, list[dict[str, Any]]]]:
        """A method's best and worst cases, if there is a metric; no case is in both."""
        if self._comparison.primary_metric is None:
            return []
        ranked = self._comparison.ranked(self.name, method)
        best, worst = ranked[:_EXTREMES], ranked[_EXTREMES:][-_EXTREMES:][::-1]
        return [
            (title, [self._card(case, [method]) for case in cases])
            for title, cases in (("Best", best), ("Worst", worst))
            if cases
        ]

    def failures(self, method: str) -> tuple[list[tuple[str, int, str]], int]:
        """Reasons, each with its number of cases and the first one; and how many are not listed."""
        failures = self._comparison.results[self.name, method].failures
        first: dict[str, str] = {}
        for case, reason in failures.items():
            first.setdefault(reason, case)
        counts = Counter(failures.values()).most_common()
        shown = [(reason, count, first[reason]) for reason, count in counts[:_MAX_ROWS]]
        return shown, len(counts) - len(shown)

    def _card(self, case: str, methods: Sequence[str]) -> dict[str, Any]:
        """A case with the edits of `methods`; a single method's with all of its scores."""
        record = self._folder.records[case]
        metric = self._comparison.primary_metric
        images = [("input", self._folder.input(case), "")]
        if truth := self._folder.truth(case):
            images.append((TRUTH, truth, ""))
        for method in methods:
            edit = self._folder.edit(method, self.name, case)
            if isinstance(edit, Path):
                note = self._scores(method, case, [metric] if metric else [])
                images.append((method, edit, note if len(methods) > 1 else ""))
        alone = methods[0] if len(methods) == 1 else None
        return {
            "record": record,
            "instruction": record.instructions[self.name],
            "images": [(label, self._images(path), note) for label, path, note in images],
            "scores": self._scores(alone, case, self._comparison.metrics) if alone else "",
        }

    def _scores(self, method: str, case: str, metrics: Sequence[MetricSpec]) -> str:
        row = self._comparison.results[self.name, method].scores.get(case, {})
        return " · ".join(
            f"{metric.title} {_number(row[metric.key], metric)}"
            for metric in metrics
            if metric.key in row
        )


def _image(path: Path) -> dict[str, Any]:
    """The source of an `img`; `url` is empty if the file cannot be read."""
    with suppress(OSError, UndecodableImage):
        image = decode(path.read_bytes())
        return {
            "url": data_url(image, _LOSSLESS_SIDE, _MAX_SIDE),
            "small": max(image.size) <= _LOSSLESS_SIDE,
        }
    return {"url": "", "small": False}
