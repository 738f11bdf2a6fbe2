"""Write the report's files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reasonpix.core.atomic import write_atomically
from reasonpix.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Interval
from reasonpix.evaluation.comparison import Comparison, ScoreKey, compare
from reasonpix.evaluation.report.grid import render_grid
from reasonpix.evaluation.report.page import render_page
from reasonpix.evaluation.results import EvaluationFolder

_COLUMNS = ("kind", "method", "metric", "group", "value", "cases", "mean", "low", "high")


def write_report(folder: EvaluationFolder | str | Path, reference: str | None = None) -> Comparison:
    """Write `report.html`, `report.csv`, `report.json` and the grids of edits into the folder.

    `reference` is the method that the others are compared with, by default the recipe's last one.
    Raises `RunError` if there is no such method, or the folder does not hold an evaluation.
    """
    if not isinstance(folder, EvaluationFolder):
        folder = EvaluationFolder(Path(folder))
    comparison = compare(folder, reference)
    # All are rendered before one is written, so that they belong together.
    files = {
        "report.html": render_page(comparison),
        "report.csv": _csv(comparison),
        "report.json": _json(comparison),
    }
    grids = {
        f"grid-{kind}.png": render_grid(comparison, kind, cases)
        for kind in folder.kinds
        if (cases := comparison.spread(kind))
    }
    for name, content in files.items():
        write_atomically(folder.root / name, content.encode())
    for name, image in grids.items():
        write_atomically(folder.root / name, image)
    return comparison


def _csv(comparison: Comparison) -> str:
    """One row for each mean; `group` is empty for the means over all cases."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_mean_rows(comparison))
    return text.getvalue()


def _json(comparison: Comparison) -> str:
    folder = comparison.folder
    content = {
        "benchmark": folder.benchmark,
        "notes": folder.notes,
        "training_overlaps": {
            method: overlap and overlap.model_dump()
            for method, overlap in folder.training_overlaps.items()
        },
        "cases": len(folder.records),
        "kinds": folder.kinds,
        "methods": folder.methods,
        "reference": comparison.reference,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "metrics": [asdict(metric) for metric in comparison.metrics],
        "measured_with": folder.measured_with,
        "counts": list(_counts(comparison)),
        "means": list(_mean_rows(comparison)),
        "differences": [
            _row(key, difference) | {"verdict": comparison.verdict(key)}
            for key, difference in comparison.differences.items()
        ],
        "per_case": "scores/<folder>/<kind>.jsonl; evaluation.json names the methods' folders",
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _counts(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for (kind, method), result in comparison.results.items():
        yield {
            "kind": kind,
            "method": method,
            "requested": result.requested,
            "measured": len(result.scores),
            "pending": result.pending,
            "failed": dict(result.failures),
        }


def _mean_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Means over all cases come first."""
    for key, mean in sorted(comparison.means.items(), key=lambda pair: pair[0].group):
        yield _row(key, mean)


def _row(key: ScoreKey, interval: Interval) -> dict[str, Any]:
    """Numbers have 8 significant digits: processors differ in the last ones."""
    return vars(key) | {
        name: float(f"{value:.8g}") if isinstance(value, float) else value
        for name, value in vars(interval).items()
    }
