"""The report of an evaluation: a page, a CSV and a JSON file in its folder, tables on the console.

Made from the folder alone: the same folder gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonpix.core.storage import write_atomically
from reasonpix.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Interval
from reasonpix.evaluation.comparison import Comparison, ScoreKey, compare
from reasonpix.evaluation.metrics import MEASURES, MetricSpec
from reasonpix.evaluation.report.page import draw_page
from reasonpix.evaluation.results import EvaluationFolder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    comparison: Comparison

    @property
    def page(self) -> Path:
        """Where it is to be looked at."""
        return self.comparison.folder.root / "report.html"

    def print(self, console: Console | None = None) -> None:
        """Show Table 3, one for each kind of instruction."""
        from rich.console import Console

        console = console or Console()
        measures = self.comparison.measures
        at_once = len(MEASURES) if console.width >= _WIDE else _AT_ONCE
        for kind in self.comparison.folder.kinds:
            for first in range(0, len(measures), at_once):
                console.print(_table(self.comparison, kind, measures[first : first + at_once]))
            for line in _left_out(self.comparison, kind):
                console.print(line, markup=False, highlight=False)


def write_report(folder: EvaluationFolder, baseline: str | None = None) -> Report:
    """Write `report.html`, `report.csv` and `report.json` into the folder.

    `baseline` is the method that the others are compared with, by default the recipe's last one.
    Raises `RunError` when there is no such method.
    """
    comparison = compare(folder, baseline)
    # All three are made before one is written: they belong together.
    files = {
        "report.html": draw_page(comparison),
        "report.csv": _as_csv(comparison),
        "report.json": _as_json(comparison),
    }
    for name, content in files.items():
        write_atomically(folder.root / name, content.encode())
    return Report(comparison)


# -- For programs ---------------------------------------------------------------------------------

_COLUMNS = ("kind", "method", "metric", "group", "value", "cases", "mean", "low", "high")


def _as_csv(comparison: Comparison) -> str:
    """One row for each mean; `group` is empty where it is over all cases."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(place, found) for place, found in _sorted(comparison))
    return text.getvalue()


def _as_json(comparison: Comparison) -> str:
    folder = comparison.folder
    content = {
        "benchmark": folder.benchmark,
        "cases": len(folder.entries),
        "kinds": folder.kinds,
        "methods": folder.methods,
        "baseline": comparison.baseline,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "metrics": [asdict(measure) for measure in comparison.measures],
        "measured_with": folder.identity,
        "counts": list(_counts(comparison)),
        "means": [_row(place, found) for place, found in _sorted(comparison)],
        "differences": [
            _row(place, found) | {"verdict": comparison.verdict(place)}
            for place, found in comparison.differences.items()
        ],
        "per_case": "scores/<folder>/<kind>.jsonl; evaluation.json names the methods' folders",
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _sorted(comparison: Comparison) -> list[tuple[ScoreKey, Interval]]:
    """Means over all cases come first."""
    return sorted(comparison.means.items(), key=lambda pair: pair[0].group)


def _counts(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for (kind, method), found in comparison.results.items():
        yield {
            "kind": kind,
            "method": method,
            "asked": found.asked,
            "measured": len(found.scores),
            "pending": found.pending,
            "failed": dict(found.failures),
        }


def _row(place: ScoreKey, found: Interval) -> dict[str, Any]:
    return vars(place) | {
        name: _rounded(value) if isinstance(value, float) else value
        for name, value in vars(found).items()
    }


def _rounded(value: float) -> float:
    """Without the last digits, in which processors differ."""
    return float(f"{value:.8g}")


# -- For people -----------------------------------------------------------------------------------

_WIDE, _AT_ONCE = 125, 5
"""Letters in a line of a console that has room for all metrics, and metrics that a narrow one has.
"""


def _table(comparison: Comparison, kind: str, measures: Sequence[MetricSpec]) -> Table:
    """Methods by metrics. Names are no markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{kind} instructions")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold", min_width=14)
    table.add_column("cases", justify="right", min_width=5)
    for measure in measures:
        arrow = "↓" if measure.better == "lower" else "↑"
        table.add_column(f"{measure.title} {arrow}", justify="right", min_width=7, max_width=9)
    best = {measure.key: comparison.best(kind, measure) for measure in measures}
    for method in (*comparison.methods, *comparison.references):
        cells = []
        for measure in measures:
            found = comparison.means.get(ScoreKey(kind, method, measure.key))
            style = "bold" if method in best[measure.key] else ""
            cells.append(Text(_words(found, measure), style))
        cases = len(comparison.results[kind, method].scores)
        last = method == comparison.methods[-1]
        table.add_row(Text(method), str(cases), *cells, end_section=last)
    return table


def _words(found: Interval | None, measure: MetricSpec) -> str:
    if found is None:
        return "–"
    mean = f"{found.mean:.{measure.digits}f}"
    if found.half_width is None:
        return mean
    return f"{mean}\n±{found.half_width:.{measure.digits}f}"


def _left_out(comparison: Comparison, kind: str) -> Iterator[str]:
    """The cases that are in no mean."""
    for method in comparison.methods:
        found = comparison.results[kind, method]
        if found.failures:
            yield f"{method}: {len(found.failures)} failed, not in its means"
        if found.pending:
            yield f"{method}: {found.pending} still to do"
