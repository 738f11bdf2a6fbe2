"""The page of an evaluation's report: tables, plots, and edits to look at. It needs no network."""

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
from reasonpix.evaluation.bootstrap import CONFIDENCE, FEWEST, RESAMPLES, Interval
from reasonpix.evaluation.comparison import Comparison, ScoreKey
from reasonpix.evaluation.metrics import MetricSpec
from reasonpix.evaluation.report.plots import bars
from reasonpix.evaluation.results import COPY, TRUTH

_ENDS = 3
"""Best cases of a method that are shown, and as many worst ones."""
_SIDE_BY_SIDE = 4
"""Cases of which the edits of all methods are shown."""
_GROUPS = 25
"""Groups of one sort that a page lists, and reasons why edits failed."""
_LOSSLESS, _SHOWN = 128, 256
"""Pixels a side up to which an image is shown as it is, and of the larger ones."""

_Images = Callable[[Path], Mapping[str, Any]]


def draw_page(comparison: Comparison) -> str:
    """The whole page. Images are in it, as small as suffices to judge an edit."""
    folder = comparison.folder
    environment = Environment(
        loader=PackageLoader("reasonpix", "pages"), autoescape=True, undefined=StrictUndefined
    )
    rows = [*comparison.methods, *comparison.references]
    images = cache(_image)  # inputs and ground truths are shown again and again
    return environment.get_template("report.html").render(
        name=folder.benchmark,
        comparison=comparison,
        cases=len(folder.entries),
        kinds=[_Kind(comparison, kind, images) for kind in folder.kinds],
        rows=rows,
        plots=[_plot(comparison, measure, rows) for measure in comparison.measures],
        breakdowns=list(_breakdowns(comparison)),
        chance=_by_chance(comparison),
        truth=TRUTH,
        has_oracle=any(measure.key == "clip_t" for measure in comparison.measures),
        confidence=f"{100 * CONFIDENCE:g}",
        resamples=RESAMPLES,
        fewest=FEWEST,
        recipe=_recipe(folder.root),
        identity=json.dumps(folder.identity, indent=1, ensure_ascii=False),
    )


def _recipe(root: Path) -> str:
    path = root / "recipe.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _number(value: float, measure: MetricSpec, sign: str = "") -> str:
    shown = round(value, measure.digits) + 0.0  # of −0 it makes 0
    return f"{shown:{sign}.{measure.digits}f}".replace("-", "−")


def _cell(found: Interval | None, measure: MetricSpec, sign: str = "") -> dict[str, Any]:
    """A mean and its interval in words."""
    if found is None:
        return {"mean": "–", "interval": "", "cases": 0, "mark": ""}
    interval = ""
    if found.low is not None and found.high is not None:
        ends = (_number(end, measure, sign) for end in (found.low, found.high))
        interval = f"[{', '.join(ends)}]"
    return {
        "mean": _number(found.mean, measure, sign),
        "interval": interval,
        "cases": found.cases,
        "mark": "",
    }


def _plot(comparison: Comparison, measure: MetricSpec, rows: Sequence[str]) -> dict[str, Any]:
    kinds = comparison.folder.kinds
    means = {
        method: {
            kind: found
            for kind in kinds
            if (found := comparison.means.get(ScoreKey(kind, method, measure.key)))
        }
        for method in rows
    }
    measured = {method: by_kind for method, by_kind in means.items() if by_kind}
    return {"measure": measure, "svg": bars(measure, measured, kinds)}


def _by_chance(comparison: Comparison) -> tuple[int, float]:
    """The differences that have an interval, and how many of these exclude 0 by chance."""
    intervals = sum(found.low is not None for found in comparison.differences.values())
    return intervals, intervals * (1 - CONFIDENCE)


def _breakdowns(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The chief metric by group, for each sort of groups that puts any cases together."""
    measure = comparison.chief
    for group, values in comparison.groups.items():
        if measure is None or len(values) == len(comparison.folder.entries):
            continue
        yield {
            "group": group,
            "groups": len(values),
            "tables": [
                {
                    "kind": kind,
                    "rows": list(_breakdown(comparison, kind, measure, group, values[:_GROUPS])),
                }
                for kind in comparison.folder.kinds
            ],
        }


def _breakdown(
    comparison: Comparison, kind: str, measure: MetricSpec, group: str, values: Sequence[str]
) -> Iterator[dict[str, Any]]:
    entries = comparison.folder.entries.values()
    counts = Counter(it.groups.get(group) for it in entries if kind in it.instructions)
    methods = [*comparison.methods, *(name for name in comparison.references if name == COPY)]
    for value in values:
        best = comparison.best(kind, measure, group, value)
        cells = []
        for method in methods:
            found = comparison.means.get(ScoreKey(kind, method, measure.key, group, value))
            cells.append(_cell(found, measure) | {"mark": "best" if method in best else ""})
        yield {"value": value, "cases": counts[value], "cells": cells, "methods": methods}


class _Kind:
    """What the page shows of one kind of instruction."""

    def __init__(self, comparison: Comparison, kind: str, images: _Images) -> None:
        self.name = kind
        self._comparison = comparison
        self._folder = comparison.folder
        self._images = images

    def results(self, method: str) -> dict[str, int]:
        """How many cases were measured, failed, and are to do."""
        found = self._comparison.results[self.name, method]
        return {
            "measured": len(found.scores),
            "failed": len(found.failures),
            "pending": found.pending if method != TRUTH else 0,
        }

    def means(self, method: str) -> Iterator[dict[str, Any]]:
        """A cell for each metric; the best method's are marked."""
        for measure in self._comparison.measures:
            found = self._comparison.means.get(ScoreKey(self.name, method, measure.key))
            best = method in self._comparison.best(self.name, measure)
            yield _cell(found, measure) | {"mark": "best" if best else ""}

    def differences(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """By method, a cell for each metric; marked better or worse."""
        for method in (*self._comparison.methods, COPY):
            if method == self._comparison.baseline:
                continue
            cells = []
            for measure in self._comparison.measures:
                place = ScoreKey(self.name, method, measure.key)
                found = self._comparison.differences.get(place)
                mark = self._comparison.verdict(place) if found else ""
                cells.append(_cell(found, measure, "+") | {"mark": mark})
            yield method, cells

    def side_by_side(self) -> Iterator[dict[str, Any]]:
        """Cases from the baseline's best to its worst, evenly spread, with every method's edit."""
        ranked = self._ranked(self._comparison.baseline)
        count = min(_SIDE_BY_SIDE, len(ranked))
        steps = max(1, count - 1)
        for index in range(count):
            case = ranked[index * (len(ranked) - 1) // steps]
            yield self._card(case, self._comparison.methods)

    def ends(self, method: str) -> list[tuple[str, list[dict[str, Any]]]]:
        """The best and the worst cases of a method; no case is both."""
        ranked = self._ranked(method)
        best, worst = ranked[:_ENDS], ranked[_ENDS:][-_ENDS:][::-1]
        return [
            (title, [self._card(case, [method]) for case in cases])
            for title, cases in (("Best", best), ("Worst", worst))
            if cases
        ]

    def failures(self, method: str) -> tuple[list[tuple[str, int, str]], int]:
        """Reasons with how many cases and the first of them; and how many reasons are left out."""
        failures = self._comparison.results[self.name, method].failures
        first: dict[str, str] = {}
        for case, reason in failures.items():
            first.setdefault(reason, case)
        counts = Counter(failures.values()).most_common()
        shown = [(reason, count, first[reason]) for reason, count in counts[:_GROUPS]]
        return shown, len(counts) - len(shown)

    def _ranked(self, method: str) -> list[str]:
        """Cases from a method's best to its worst; equal ones in their order."""
        measure = self._comparison.chief
        if measure is None:
            return []
        sign = 1 if measure.better == "lower" else -1
        scores = self._comparison.results[self.name, method].scores
        ranked = [
            (sign * row[measure.key], case) for case, row in scores.items() if measure.key in row
        ]
        return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]

    def _card(self, case: str, methods: Sequence[str]) -> dict[str, Any]:
        """A case with the edits of some methods; of one alone with all of its scores."""
        entry = self._folder.entries[case]
        measure = self._comparison.chief
        pictures = [("input", self._folder.input(case), "")]
        if truth := self._folder.truth(case):
            pictures.append((TRUTH, truth, ""))
        for method in methods:
            edit = self._folder.edit(method, self.name, case)
            if isinstance(edit, Path):
                note = self._scores(method, case, [measure] if measure else [])
                pictures.append((method, edit, note if len(methods) > 1 else ""))
        alone = methods[0] if len(methods) == 1 else None
        return {
            "entry": entry,
            "instruction": entry.instructions[self.name],
            "pictures": [(label, self._images(path), note) for label, path, note in pictures],
            "scores": self._scores(alone, case, self._comparison.measures) if alone else "",
        }

    def _scores(self, method: str, case: str, measures: Sequence[MetricSpec]) -> str:
        row = self._comparison.results[self.name, method].scores.get(case, {})
        return " · ".join(
            f"{measure.title} {_number(row[measure.key], measure)}"
            for measure in measures
            if measure.key in row
        )


def _image(path: Path) -> dict[str, Any]:
    """For an `img`; without `url` where the file cannot be read."""
    with suppress(OSError, UndecodableImage):
        image = decode(path.read_bytes())
        return {"url": data_url(image, _LOSSLESS, _SHOWN), "small": max(image.size) <= _LOSSLESS}
    return {"url": "", "small": False}
