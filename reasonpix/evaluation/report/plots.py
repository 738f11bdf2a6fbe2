"""Bar charts of a metric by method, with intervals, as SVG to embed in a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from reasonpix.evaluation.bootstrap import Interval
from reasonpix.evaluation.metrics import MetricSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4f83b5", "#dd6b36", "#6a9c58", "#9a76b0")
"""By kind of instruction, in order; legible on white and on black."""

_TEXT = "#010203"
"""Replaced by the page's text colour."""
_WIDTH, _ROW, _MARGIN = 3.7, 0.17, 0.55
"""Width of a chart, height of a bar, and margins above and below together; in inches."""
_MAX_NAME = 24
"""Longest label, in characters."""


def bar_chart(
    metric: MetricSpec, means: Mapping[str, Mapping[str, Interval]], kinds: Sequence[str]
) -> str:
    """One group of bars for each method, in the order of `means` (by method, then by kind).

    The same means give the same bytes. Text stays text, in the page's own colour.
    """
    import matplotlib as mpl

    settings: Any = {
        "svg.hashsalt": metric.key,
        "svg.fonttype": "none",
        "font.size": 8,
        "text.parse_math": False,
        "text.color": _TEXT,
        "axes.edgecolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
    }
    with mpl.rc_context(), warnings.catch_warnings():
        # Glyphs that matplotlib's own font lacks: the browser has other fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure = _figure(metric, means, kinds)
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _inline(buffer.getvalue(), f"{metric.title} by method")


def _figure(
    metric: MetricSpec, means: Mapping[str, Mapping[str, Interval]], kinds: Sequence[str]
) -> Figure:
    from matplotlib.figure import Figure

    step = len(kinds) + 0.7
    figure = Figure((_WIDTH, len(means) * step * _ROW + _MARGIN), layout="constrained")
    axes = figure.add_subplot()
    for index, kind in enumerate(kinds):
        colour = COLOURS[index % len(COLOURS)]
        for row, by_kind in enumerate(means.values()):
            if interval := by_kind.get(kind):
                _bar(axes, row * step + index, interval, metric, colour)
        axes.barh(0, 0, color=colour, label=_shortened(kind))  # for the legend
    axes.axvline(0, color=_TEXT, linewidth=0.6)
    middle = (len(kinds) - 1) / 2
    axes.set_yticks([row * step + middle for row in range(len(means))])
    axes.set_yticklabels([_shortened(name) for name in means])
    axes.set_ylim(len(means) * step - 0.9, -0.8)
    axes.margins(x=0.2)  # room for the numbers
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(kinds) > 1:
        figure.legend(loc="outside upper right", ncols=len(kinds), frameon=False, handlelength=0.8)
    return figure


def _bar(axes: Axes, y: float, interval: Interval, metric: MetricSpec, colour: str) -> None:
    axes.barh(y, interval.mean, height=0.9, color=colour)
    end = max(interval.mean, 0.0)
    if interval.low is not None and interval.high is not None:
        axes.plot([interval.low, interval.high], [y, y], color=_TEXT, linewidth=1)
        end = max(interval.high, 0.0)
    axes.annotate(
        f"{interval.mean:.{metric.digits}f}",
        (end, y),
        xytext=(3, 0),
        textcoords="offset points",
        va="center_baseline",
        fontsize=7,
    )


def _shortened(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _inline(svg: str, label: str) -> str:
    """Make an SVG file an element of a page: its styles and ids must not affect other elements."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    used = set(re.findall(r"(?:href=\"|url\()#(\w+)", svg))
    svg = re.sub(r'(<\w+) id="([^"]*)"', lambda it: it[0] if it[2] in used else it[1], svg)
    svg = svg.replace(_TEXT, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
