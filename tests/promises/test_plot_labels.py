"""Labels of plots do not lie on each other, and the report calls no method a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reasonpix.evaluation.report import write_report
from reasonpix.inspection.threshold_curves import write_survival_page
from tests.evaluation.report.test_report import make
from tests.inspection.test_threshold_curves import synthetic
from tests.support.browsing import needs_chromium, opened, started

TEXTS = """() => [...document.querySelectorAll('svg')].map(svg => {
  const box = e => { const r = e.getBoundingClientRect();
                     return [r.left, r.top, r.right, r.bottom] };
  const texts = [...svg.querySelectorAll('text')].filter(it => it.textContent.trim());
  return [...texts, svg.closest('figure').querySelector('figcaption')]
    .map(it => [it.textContent.trim(), box(it)]) })"""


def scores(method: str, kind: str, case: int) -> dict[str, float]:
    direction = -0.2 if case % 2 else 0.3
    return {"l1": 0.01 * case, "dino": 0.5, "psnr_outside": 100.0, "clip_direction": direction}


def pages(folder: Path) -> list[Path]:
    found = []
    options = [{"max_outside": 100.0}, {"max_outside": 1e-9}]
    for number, option in enumerate(options):  # far beyond the scores, and near their ends
        run, _ = synthetic(folder / f"run-{number}", 1234, option)
        write_survival_page(run, folder / f"survival-{number}.html")
        found.append(folder / f"survival-{number}.html")
    for count in (2, 9):
        names = tuple(f"A method with a really very long name, number {n}" for n in range(count))
        write_report(make(folder / f"report-{count}", scores, methods=names))
        found.append(folder / f"report-{count}" / "report.html")
    return found


@needs_chromium
def test_no_label_lies_on_another(tmp_path: Path) -> None:
    with started() as browser:
        for file in pages(tmp_path):
            for width in (1280, 400):
                with opened(browser, width) as page:
                    page.goto(file.as_uri())
                    plots = page.evaluate(TEXTS)
                assert plots and not [pair for plot in plots for pair in overlapping(plot)], file


def overlapping(texts: list[tuple[str, list[float]]]) -> list[tuple[str, str]]:
    """Pairs of texts that share more than half a pixel each way."""

    def share(one: Any, other: Any) -> bool:
        return all(min(one[k + 2], other[k + 2]) - max(one[k], other[k]) > 0.5 for k in (0, 1))

    return [(a, b) for i, (a, p) in enumerate(texts) for b, q in texts[i + 1 :] if share(p, q)]


def test_texts_that_overlap_are_found() -> None:
    assert overlapping([("a", [0, 0, 9, 9]), ("b", [8, 8, 12, 12]), ("c", [9, 0, 12, 8])]) == [
        ("a", "b")
    ]


@pytest.mark.parametrize("name", ["report.html", "report.csv", "report.json"])
def test_no_method_is_called_a_baseline(tmp_path: Path, name: str) -> None:
    write_report(make(tmp_path / "out"))
    text = (tmp_path / "out" / name).read_text(encoding="utf-8").lower()
    assert "baseline" not in text.replace("center_baseline", "")
