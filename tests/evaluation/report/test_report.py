from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from reasonpix.core.images import encode_png
from reasonpix.errors import RunError
from reasonpix.evaluation.bootstrap import intervals
from reasonpix.evaluation.comparison import ScoreKey, compare
from reasonpix.evaluation.report import print_tables, write_report
from reasonpix.evaluation.results import COPY, TRUTH, EvaluationFolder, json_lines
from reasonpix.plugin.types import Problem
from tests.inspection.test_gallery import HOSTILE, Page

FILES = ("report.html", "report.csv", "report.json")
KINDS = ("direct", "reasoning")
CASES = 8
Scores = Callable[[str, str, int], Mapping[str, float] | None]


def scored(method: str, kind: str, case: int) -> dict[str, float] | None:
    """By hand: `ours` is better by 0.1 than `theirs`, and `theirs` fails on case 2."""
    if method == TRUTH:
        return {"l1": 0.0, "dino": 1.0}
    base = 0.5 if kind == "direct" else 0.3
    gain = {COPY: -0.2, "theirs": 0.0, "ours": 0.1}[method]
    if (method, case) == ("theirs", 2):
        return None
    dino = base + gain + case / 100
    return {"l1": 1 - dino, "dino": dino}


NOTE = "CLIP-T compares with <local> descriptions."


OVERLAPS: dict[str, Any] = {
    "theirs": {
        "datasets": ["part1"],
        "unrecorded": [],
        "cases": 8,
        "images": 0,
        "instructions": {"direct": [2, 8], "reasoning": [8, 8]},
    },
    "ours": None,
}


def make(
    root: Path,
    scores: Scores = scored,
    methods: Sequence[str] = ("theirs", "ours"),
    cases: int = CASES,
    instruction: str = "Turn A to B",
    truth: bool = True,
) -> EvaluationFolder:
    folders = {TRUTH: TRUTH, COPY: COPY} | {name: f"m{i}" for i, name in enumerate(methods)}
    root.mkdir()
    (root / "evaluation.json").write_text(
        json.dumps(
            {
                "benchmark": "bench",
                "notes": {"clip_t": [NOTE]},
                "training_overlaps": OVERLAPS,
                "kinds": KINDS,
                "folders": folders,
            }
        )
    )
    (root / "recipe.yaml").write_text("methods: {ours: copy}\n")
    ids = [f"case-{index}" for index in range(cases)]
    rows = [
        {
            "id": case,
            "row": f"bench:{index}",
            "instructions": dict.fromkeys(KINDS, instruction),
            "caption": "",
            "edited_caption": "",
            "groups": {"category": "bee" if index < 6 else "ant", "unique": case},
        }
        for index, case in enumerate(ids)
    ]
    (root / "cases.jsonl").write_bytes(json_lines(rows))
    folder = EvaluationFolder(root)
    for index, case in enumerate(ids):
        picture = Image.new("RGB", (12, 8), (index, 0, 0))
        for name in ("input", *(("truth",) if truth else ())):
            (root / name).mkdir(exist_ok=True)
            (root / name / f"{case}.png").write_bytes(encode_png(picture))
    for method in folder.methods:
        for kind in KINDS:
            rows = []
            for index, case in enumerate(ids):
                found = scores(method, kind, index)
                if method in methods:
                    edited = Image.new("RGB", (12, 8), (index, 9, KINDS.index(kind)))
                    failed = Problem(status="failed", reason="it diverged <here>")
                    folder.write_edit(method, kind, case, failed if found is None else edited)
                if found is not None:
                    rows.append({"id": case, **found})
            path = root / "scores" / folders[method] / f"{kind}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(json_lines([{"dino": "tiny@1"}, *rows]))
    return folder


def rows_of(folder: EvaluationFolder) -> dict[tuple[str, ...], dict[str, str]]:
    text = (folder.root / "report.csv").read_text(encoding="utf-8")
    keys = ("kind", "method", "metric", "group", "value")
    return {tuple(row[key] for key in keys): row for row in csv.DictReader(io.StringIO(text))}


def test_means_intervals_and_groups_are_those_of_the_scores(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    write_report(folder)
    rows = rows_of(folder)
    ours = rows["direct", "ours", "dino", "", ""]
    assert ours["cases"] == "8"
    assert float(ours["mean"]) == pytest.approx(0.6 + 0.035)
    expected = intervals([[0.6 + case / 100 for case in range(8)]])[0]
    assert expected is not None
    assert float(ours["low"]) == pytest.approx(expected.low)
    assert float(ours["high"]) == pytest.approx(expected.high)

    theirs = rows["reasoning", "theirs", "l1", "", ""]
    assert theirs["cases"] == "7"  # the failed one is in no mean
    assert float(theirs["mean"]) == pytest.approx(1 - 0.3 - (28 - 2) / 700)
    ant = rows["direct", "ours", "dino", "category", "ant"]
    assert (ant["cases"], ant["low"], ant["high"]) == ("2", "", "")  # too few for an interval
    assert float(ant["mean"]) == pytest.approx(0.665)
    assert rows["direct", "ours", "dino", "category", "bee"]["cases"] == "6"

    report = json.loads((folder.root / "report.json").read_text())
    means = {
        tuple(row[k] for k in ("kind", "method", "metric", "group", "value"))
        for row in report["means"]
    }
    assert means == set(rows)
    assert report["measured_with"] == {"dino": "tiny@1"}
    counts = {(it["kind"], it["method"]): it for it in report["counts"]}
    assert counts["direct", "theirs"]["failed"] == {"case-2": "it diverged <here>"}
    assert counts["direct", "theirs"]["pending"] == 0


def test_notes_about_the_benchmark_are_on_the_page_in_json_and_on_the_console(
    tmp_path: Path,
) -> None:
    comparison = write_report(make(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "CLIP-T compares with &lt;local&gt; descriptions." in page
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["notes"] == {
        "clip_t": [NOTE]
    }
    console = Console(width=130, file=io.StringIO())
    print_tables(comparison, console)
    assert NOTE in console.file.getvalue()  # type: ignore[attr-defined]


def test_differences_are_of_the_cases_that_both_methods_have(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    write_report(folder)
    report = json.loads((folder.root / "report.json").read_text())
    assert report["reference"] == "ours"
    differences = {(it["kind"], it["method"], it["metric"]): it for it in report["differences"]}
    assert {method for _, method, _ in differences} == {"theirs", COPY}
    one = differences["direct", "theirs", "dino"]
    # Constant on every case, though the means themselves are over different cases.
    assert (one["cases"], one["verdict"]) == (7, "worse")
    assert (one["mean"], one["low"], one["high"]) == pytest.approx((-0.1, -0.1, -0.1))
    assert differences["direct", "theirs", "l1"]["mean"] == pytest.approx(0.1)
    assert differences["direct", "theirs", "l1"]["verdict"] == "worse"

    comparison = compare(folder, "theirs")
    assert comparison.verdict(ScoreKey("direct", "ours", "l1")) == "better"
    assert comparison.best("direct", comparison.metrics[0]) == {"ours"}
    with pytest.raises(RunError, match=r"no method 'thiers'; choose one of .*theirs, ours"):
        write_report(folder, "thiers")


def test_a_difference_by_chance_is_none(tmp_path: Path) -> None:
    def alike(method: str, kind: str, case: int) -> dict[str, float]:
        return {"l1": 0.5 + (0.1 if method == "theirs" else 0.0) * (-1) ** case}

    folder = make(tmp_path / "out", alike)
    comparison = compare(folder)
    assert comparison.verdict(ScoreKey("direct", "theirs", "l1")) == ""
    assert comparison.best("direct", comparison.metrics[0]) == {"theirs", "ours"}


def test_the_page_shows_table_cases_and_failures(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    write_report(folder)
    page = Page(folder.root / "report.html")
    text = " ".join("".join(page.text).split())
    for words in ("0.6350", "reference", "1 failed", "1×: it diverged <here>"):
        assert words in text
    assert "worse −0.1000" in text and "methods: {ours: copy}" in text and '"tiny@1"' in text
    assert "category (2)" in text
    assert "unique (8)" not in text  # a group for each case says nothing
    assert len(page.all("svg")) == 2
    labels = [image["alt"] for image in page.all("img")]
    # By kind: 4 side by side, but for the edit that failed; 3 best and 3 worst of each method.
    strips = labels.count("ours") - 2 * 6
    assert strips == 2 * 4
    assert labels.count("input") == labels.count(TRUTH) == 2 * (4 + 6 + 6)
    for element, attributes in page.elements:
        assert element not in ("script", "link", "iframe"), element
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#"))


def test_best_and_worst_are_by_dino(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", methods=("ours",))
    write_report(folder)
    html = (folder.root / "report.html").read_text(encoding="utf-8")
    best, worst = html.split("<h4>Best</h4>")[1].split("<h4>Worst</h4>")
    order = ["case-7", "case-6", "case-5"]
    assert [best.index(f"{case} ·") for case in order] == sorted(
        best.index(f"{c} ·") for c in order
    )
    assert "case-4 ·" not in best
    order = ["case-0", "case-1", "case-2"]
    assert [worst.index(f"{case} ·") for case in order] == sorted(
        worst.index(f"{case} ·") for case in order
    )


def test_hostile_names_and_instructions_stay_words(tmp_path: Path) -> None:
    odd = '<b>$x_1$ [red]\u4f60\u597d, "quoted" & \'ours\' id="axes_1"'

    def odd_scores(method: str, kind: str, case: int) -> Mapping[str, float] | None:
        return scored("ours" if method == odd else method, kind, case)

    folder = make(tmp_path / "out", odd_scores, ("theirs", odd), instruction=HOSTILE)
    comparison = write_report(folder)
    page = Page(folder.root / "report.html")
    assert not page.all("script") and HOSTILE in page.text and odd in page.text
    assert any(odd[:12] in words and words.endswith("…") for words in page.text)  # in the plots
    assert rows_of(folder)["direct", odd, "dino", "", ""]["cases"] == "8"
    console = Console(width=200, record=True, file=io.StringIO())
    print_tables(comparison, console)
    assert "<b>$x_1$ [red]" in console.export_text()


def test_metrics_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    def without_truth(method: str, kind: str, case: int) -> Mapping[str, float] | None:
        return None if method == TRUTH else {"clip_t": 0.2 + case / 100}

    folder = make(tmp_path / "out", without_truth, truth=False)
    comparison = write_report(folder)
    assert [metric.key for metric in comparison.metrics] == ["clip_t"]
    text = "".join(Page(folder.root / "report.html").text)
    assert "CLIP-T" in text and "DINO" not in text and TRUTH not in text.split("Plots")[0]


@pytest.mark.parametrize("failing", [False, True])
def test_one_case_is_enough_and_none_is_no_error(tmp_path: Path, failing: bool) -> None:
    def one(method: str, kind: str, case: int) -> Mapping[str, float] | None:
        return None if failing else scored(method, kind, case)

    folder = make(tmp_path / "out", one, cases=1)
    comparison = write_report(folder)
    console = Console(width=200, record=True, file=io.StringIO())
    print_tables(comparison, console)
    text = "".join(Page(folder.root / "report.html").text)
    if failing:
        assert rows_of(folder) == {}
        assert "ours: 1 failed" in console.export_text() and "1×: it diverged" in text
    else:
        assert "0.6000" in text and "±" not in console.export_text()
        assert rows_of(folder)["direct", "ours", "dino", "", ""]["low"] == ""


def test_the_console_shows_means_and_widths(tmp_path: Path) -> None:
    comparison = write_report(make(tmp_path / "out"))
    console = Console(width=80, record=True, file=io.StringIO())
    print_tables(comparison, console)
    text = console.export_text()
    assert "direct instructions" in text and "reasoning instructions" in text
    found = comparison.means[ScoreKey("direct", "ours", "dino")]
    assert f"{found.mean:.4f}" in text and f"±{found.half_width:.4f}" in text
    assert "theirs: 1 failed, not in its means" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    write_report(first)
    # Neither another process nor its hash seed changes them.
    code = (
        "import sys; from pathlib import Path\n"
        "from reasonpix.evaluation.report import write_report\n"
        "from reasonpix.evaluation.results import EvaluationFolder\n"
        "write_report(EvaluationFolder(Path(sys.argv[1])))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, second.root], check=True)
    for name in FILES:
        assert (first.root / name).read_bytes() == (second.root / name).read_bytes(), name


def test_photographs_are_made_small(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", cases=2)
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    Image.fromarray(noise).save(folder.input("case-0"))
    folder.input("case-1").write_bytes(b"damaged")
    write_report(folder)
    page = Page(folder.root / "report.html")
    inputs: list[Any] = [image for image in page.all("img") if image["alt"] == "input"]
    assert inputs and all(str(it["src"]).startswith("data:image/jpeg") for it in inputs)
    assert all(len(str(it["src"])) < 150_000 for it in inputs)


def test_a_report_of_a_folder_named_by_its_path(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    assert write_report(str(folder.root)).folder.methods == folder.methods
    assert (folder.root / "report.html").is_file()
    with pytest.raises(RunError, match=r"nope is not an evaluation; create one with"):
        write_report(tmp_path / "nope")
