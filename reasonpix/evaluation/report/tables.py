"""The tables of an evaluation on the console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from reasonpix.evaluation.bootstrap import Interval
from reasonpix.evaluation.comparison import Comparison, ScoreKey
from reasonpix.evaluation.metrics import METRICS, MetricSpec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE = 125
"""Characters in a line of a console that has room for all metrics."""
_NARROW_METRICS = 5
"""Metrics in each table of a narrower console."""


def print_tables(comparison: Comparison, console: Console | None = None) -> None:
    """Print Table 3, once for each kind of instruction."""
    from rich.console import Console

    console = console or Console()
    metrics = comparison.metrics
    step = len(METRICS) if console.width >= _WIDE else _NARROW_METRICS
    for kind in comparison.folder.kinds:
        for first in range(0, len(metrics), step):
            console.print(_table(comparison, kind, metrics[first : first + step]))
        for line in _missing_cases(comparison, kind):
            console.print(line, markup=False, highlight=False)
    notes = [note for several in comparison.folder.notes.values() for note in several]
    for line in (*notes, *(sentence for sentence, _ in comparison.training_sentences)):
        console.print(line, markup=False, highlight=False)


def _table(comparison: Comparison, kind: str, metrics: Sequence[MetricSpec]) -> Table:
    """Methods by metrics. Names are plain text, never markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{kind} instructions")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold", min_width=14)
    table.add_column("cases", justify="right", min_width=5)
    for metric in metrics:
        arrow = "↓" if metric.better == "lower" else "↑"
        table.add_column(f"{metric.title} {arrow}", justify="right", min_width=7, max_width=9)
    best = {metric.key: comparison.best(kind, metric) for metric in metrics}
    for method in (*comparison.methods, *comparison.controls):
        cells = [
            Text(
                _cell(comparison.means.get(ScoreKey(kind, method, metric.key)), metric),
                "bold" if method in best[metric.key] else "",
            )
            for metric in metrics
        ]
        cases = len(comparison.results[kind, method].scores)
        is_last = method == comparison.methods[-1]
        table.add_row(Text(method), str(cases), *cells, end_section=is_last)
    return table


def _cell(mean: Interval | None, metric: MetricSpec) -> str:
    if mean is None:
        return "–"
    text = f"{mean.mean:.{metric.digits}f}"
    return text if mean.half_width is None else f"{text}\n±{mean.half_width:.{metric.digits}f}"


def _missing_cases(comparison: Comparison, kind: str) -> Iterator[str]:
    for method in comparison.methods:
        result = comparison.results[kind, method]
        if result.failures:
            yield f"{method}: {len(result.failures)} failed, not in its means"
        if result.pending and comparison.metrics:
            yield f"{method}: {result.pending} still to do"
