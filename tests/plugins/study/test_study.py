from __future__ import annotations

import csv
import json
import re
import sqlite3
import threading
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from reasonpix_study.create import create_study
from reasonpix_study.design import Design
from reasonpix_study.report import Agreement, agreement, wilson, write_report
from reasonpix_study.store import Study, StudyError

from reasonpix.cli.main import cli
from reasonpix.core.images import decode
from reasonpix.errors import ReasonpixError
from reasonpix.evaluation.results import COPY, TRUTH, EvaluationFolder
from tests.support.pair_files import picture
from tests.support.study_files import KINDS, METHODS, evaluation, small_study


@st.composite
def designs(draw: st.DrawFn) -> Design:
    cases = draw(st.integers(1, 30))
    return Design(
        benchmark="stars",
        kinds=KINDS[: draw(st.integers(1, 2))],
        methods=METHODS[: draw(st.integers(2, 4))],
        cases=cases,
        per_worker=draw(st.integers(1, cases)),
        seed=draw(st.integers(0, 99)),
    )


@given(designs(), st.integers(1, 12))
def test_laws_of_sheets(design: Design, sheets: int) -> None:
    judged: Counter[tuple[int, str]] = Counter()
    for number in range(sheets):
        sheet = design.sheet(number)
        assert design.sheet(number) == sheet
        assert len(sheet) == design.per_worker
        assert len({it.case for it in sheet}) == design.per_worker  # not even by another kind
        judged.update((it.case, it.kind) for it in sheet)
        for kind in design.kinds:
            orders = [it.order for it in sheet if it.kind == kind]
            assert all(sorted(order) == sorted(design.methods) for order in orders)
            for position in range(len(design.methods)):
                times = Counter(order[position] for order in orders)
                counts = [times[method] for method in design.methods]
                assert max(counts) - min(counts) <= 1
    every = [judged[case, kind] for case in range(design.cases) for kind in design.kinds]
    assert max(every) - min(every) <= 1
    assert (min(every) > 0) == (sheets >= design.sheets)


def test_the_papers_design() -> None:
    design = Design(
        benchmark="v3det", kinds=KINDS, methods=METHODS, cases=100, per_worker=20, seed=0
    )
    assert design.sheets == 10
    assert design.model_copy(update={"kinds": ("reasoning",)}).sheets == 5
    sheets = [design.sheet(number) for number in range(10)]
    for sheet in sheets:
        assert Counter(it.kind for it in sheet) == {"direct": 10, "reasoning": 10}
    orders = [it.order for sheet in sheets for it in sheet]
    assert len(set(orders)) == 24  # every one there is
    other = design.model_copy(update={"seed": 1})
    assert other.sheet(0) != sheets[0]


def content(study: Study) -> tuple[object, ...]:
    """All that a study holds but the codes."""
    with sqlite3.connect(study.folder / "study.sqlite") as db:
        samples = db.execute("SELECT * FROM samples ORDER BY place, kind").fetchall()
        workers = db.execute("SELECT id, sheet FROM workers").fetchall()
    db.close()
    images = {path.name: path.read_bytes() for path in (study.folder / "images").iterdir()}
    return study.design, samples, workers, images


def test_same_evaluation_and_seed_same_study(tmp_path: Path) -> None:
    edits = evaluation(tmp_path / "evaluation", 9)
    made = [
        create_study(edits, tmp_path / str(n), samples=5, per_worker=3, seed=seed)
        for n, seed in enumerate((7, 7, 8))
    ]
    contents = [content(study) for study in made]
    assert contents[0] == contents[1] != contents[2]
    codes = [{it.code for it in study.invitations()} for study in made]
    assert [len(it) for it in codes] == [4, 4, 4]  # 5 samples by 2 kinds, 3 for each
    assert not codes[0] & codes[1]
    assert all(re.fullmatch(r"[\w-]{16}", code) for code in codes[0])
    for study in made:
        study.close()


def test_only_cases_that_all_edited_are_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edits = evaluation(tmp_path / "evaluation", 6, failed={"Deneb": (0, 3), "Alphard": (4,)})
    with create_study(edits, tmp_path / "all", samples=3, per_worker=2) as study:
        rows = content(study)[1]
        assert isinstance(rows, list)
        assert {row[2] for row in rows} == {"case1", "case2", "case5"}
    told = "3 of 6 cases cannot be drawn, because a method has no edit of them"
    assert told in caplog.messages
    with create_study(
        edits, tmp_path / "direct", samples=6, per_worker=2, kinds=["direct"]
    ) as study:
        assert study.design.kinds == ("direct",) and len(study.invitations()) == 3
    with pytest.raises(
        ReasonpixError, match=r"4 samples cannot be drawn: .* edited only 3 of 6 cases"
    ):
        create_study(edits, tmp_path / "more", samples=4, per_worker=2)
    assert not (tmp_path / "more").exists()


def test_images_are_the_evaluations_and_their_names_tell_nothing(tmp_path: Path) -> None:
    edits = evaluation(tmp_path / "evaluation", 2)
    methods = ["Deneb", TRUTH, COPY]
    with create_study(edits, tmp_path / "s", samples=2, per_worker=2, methods=methods) as study:
        rows = content(study)[1]
        assert isinstance(rows, list)
        for _, kind, case, _, width, height, before, candidates in rows:
            number = int(case.removeprefix("case"))
            names = json.loads(candidates)
            original = decode(study.image(before).read_bytes())
            assert original.tobytes() == picture(number, (24, 16)).tobytes()
            edit = decode(study.image(names["Deneb"]).read_bytes())
            seed = 4000 + 2 * number + KINDS.index(kind)
            assert edit.tobytes() == picture(seed, (24, 16)).tobytes()
            assert names[COPY] == before
            # The truth is larger; that would give it away.
            assert decode(study.image(names[TRUTH]).read_bytes()).size == (width, height)
        # 2 inputs, 2 truths, 2 edits by 2 kinds
        names = [path.name for path in (study.folder / "images").iterdir()]
        assert len(names) == 8
        assert all(re.fullmatch(r"[0-9a-f]{64}\.png", name) for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ["Deneb", "Vega"]},
            "the evaluation has no method 'Vega'; there are ground truth, copy",
        ),
        ({"methods": ["Deneb", "Deneb"]}, "a method is named twice: Deneb, Deneb"),
        ({"methods": ["Deneb"]}, "name 2 to 9 methods to compare, not 1"),
        ({"kinds": ["polite"]}, "the evaluation has no kind 'polite'; there are direct, reasoning"),
        ({"per_worker": 7}, "7 samples for each worker: choose 1 to 6"),
    ],
)
def test_what_cannot_be_had(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ReasonpixError, match=message):
        small_study(tmp_path, **options)
    assert not (tmp_path / "study").exists()


def test_methods_must_be_named_unless_there_are_four(tmp_path: Path) -> None:
    edits = evaluation(tmp_path / "evaluation", 2, ("Alphard", "Deneb"))
    with pytest.raises(ReasonpixError, match="name the methods to compare"):
        create_study(edits, tmp_path / "study", samples=2, per_worker=2)


def test_folders_that_are_in_the_way_or_no_study(tmp_path: Path) -> None:
    with small_study(tmp_path), pytest.raises(StudyError, match="is not empty; name a new folder"):
        edits = EvaluationFolder(tmp_path / "evaluation")
        create_study(edits, tmp_path / "study", samples=6, per_worker=4)
    with pytest.raises(StudyError, match="is not a study; create one"):
        Study(tmp_path)
    (tmp_path / "study" / "study.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StudyError, match="is damaged"):
        Study(tmp_path / "study")


def test_the_folder_where_one_is_can_become_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = evaluation(tmp_path / "evaluation")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    create_study(edits, Path(), samples=6, per_worker=4).close()
    with Study(tmp_path / "here") as study:
        assert len(study.invitations()) == 3


def test_a_worker_goes_through_a_sheet_once(tmp_path: Path) -> None:
    with small_study(tmp_path) as study:
        code = study.invitations()[1].code
        worker = study.worker(code)
        assert worker == 2
        assert study.worker(code[:-1]) is None and study.worker("ü") is None
        assert study.session(2).started is False and study.session(2).task is None
        study.start(2)
        study.start(2)
        for number in (1, 2, 3, 4):
            session = study.session(2)
            assert session.task is not None and session.task.number == number
            following = session.following
            assert not study.answer(2, number + 1, 1, 1.0)  # not its turn
            assert study.answer(2, number, 3, 2.5)
            assert not study.answer(2, number, 1, 9.0)  # twice: the first one stays
            assert study.session(2).task == following
        session = study.session(2)
        assert session.started and session.task is None
        answers = study.answers()
        assert [it.position for it in answers] == [3] * 4
        assert [it.seconds for it in answers] == [2.5] * 4
        assert [it.shown for it in answers] == [it.order for it in study.design.sheet(0)]
        assert not study.answer(1, 1, 1, None)  # has not started
        with pytest.raises(ValueError, match="no candidate 5"):
            study.answer(2, 1, 5, None)
        for seconds in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="not a possible number of seconds"):
                study.answer(2, 1, 1, seconds)
        assert [it.answered for it in study.invitations()] == [0, 4, 0]


def test_what_is_shown_is_what_is_stored(tmp_path: Path) -> None:
    """The image on the chosen place is that of the method in the answer."""
    with small_study(tmp_path) as study:
        study.start(1)
        for number in range(1, 5):
            task = study.session(1).task
            assert task is not None
            study.answer(1, number, number, None)
            answer = study.answers()[-1]
            seed = 1000 * (METHODS.index(answer.chosen) + 1) + KINDS.index(answer.kind)
            edited = picture(seed + 2 * int(answer.case.removeprefix("case")), (24, 16))
            chosen = decode(study.image(task.candidates[number - 1]).read_bytes())
            assert chosen.tobytes() == edited.tobytes()
            assert answer.instruction == task.instruction


def test_workers_who_start_at_once_get_different_sheets(tmp_path: Path) -> None:
    with small_study(tmp_path, workers=12) as first, Study(first.folder) as second:
        ready = threading.Barrier(12)

        def start(worker: int) -> None:
            ready.wait()
            (first, second)[worker % 2].start(worker)

        threads = [threading.Thread(target=start, args=(n,)) for n in range(1, 13)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with sqlite3.connect(first.folder / "study.sqlite") as db:
            sheets = db.execute("SELECT sheet FROM workers ORDER BY sheet").fetchall()
            judged = db.execute("SELECT place, kind FROM judgements").fetchall()
        db.close()
        assert sheets == [(n,) for n in range(12)]
        assert set(Counter(judged).values()) == {4}  # 48 judgements of 12 samples


def test_wilson() -> None:
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
    published |= {(0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (chosen, of), (low, high) in published.items():
        found = wilson(chosen / of, of)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(None, 0).share is None


def test_agreement_as_published_and_by_hand() -> None:
    # Krippendorff (2011), example C: four observers, twelve units, nominal data, alpha .743.
    found = agreement(
        ["111", "2232", *["3333"] * 2, "2222", "1234", "4444", "1121", "2222", "555", "11", "3"]
    )
    assert found.samples == 11
    assert found.alpha == pytest.approx(0.743, abs=5e-4)
    # Example A: two observers, ten units, alpha .095.
    found = agreement(["00"] * 5 + ["01"] * 4 + ["11"])
    assert found.equal == pytest.approx(0.6)
    assert found.alpha == pytest.approx(0.095, abs=5e-4)
    # By hand: AB, AA: observed 2 / 4, expected 3·1·2 / (4·3), alpha 0.
    assert agreement(["AB", "AA"]) == Agreement(2, 0.5, 0.0)
    assert agreement(["AA", "BB", "C"]) == Agreement(2, 1.0, 1.0)
    assert agreement(["AA", "AA"]) == Agreement(2, 1.0, None)
    assert agreement(["A"]) == Agreement(0, None, None)


def test_report(tmp_path: Path) -> None:
    """Workers 1 to 3 judge everything once, 4 to 6 again; 4 stops after two answers."""
    with small_study(tmp_path, workers=7) as study:
        for worker in range(1, 7):
            study.start(worker)
            favourite = "Deneb" if worker < 4 else "Capella"
            for number, it in enumerate(study.design.sheet(worker - 1), 1):
                if worker == 4 and number > 2:
                    break
                liked = favourite if it.kind == "reasoning" else "Alphard"
                study.answer(worker, number, it.order.index(liked) + 1, float(number))
        codes = [it.code for it in study.invitations()]
    report = write_report(tmp_path / "study")
    direct, reasoning = report.kinds["direct"], report.kinds["reasoning"]
    assert (direct.samples, reasoning.samples, report.samples) == (6, 6, 6)
    assert direct.answers + reasoning.answers == 22
    assert direct.best["Alphard"] == wilson(1, 6)
    assert direct.best["Deneb"] == wilson(0, 6)
    assert (direct.agreement.equal, direct.agreement.alpha) == (1, None)
    twice = reasoning.agreement.samples
    assert twice == reasoning.answers - 6 and reasoning.agreement.equal == 0
    # A sample judged twice counts as one: half for each of the two.
    assert reasoning.best["Capella"].share == pytest.approx(twice / 2 / 6)
    assert reasoning.best["Deneb"].share == pytest.approx(1 - twice / 2 / 6)
    assert sum(it.share or 0 for it in report.positions) == pytest.approx(1)
    assert (report.workers, report.finished, report.median_seconds) == (6, 5, 2.0)

    stored = json.loads((tmp_path / "study" / "report.json").read_text())
    assert stored["kinds"]["direct"]["best"]["Alphard"]["share"] == 1
    with (tmp_path / "study" / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 22
    for row in rows:
        assert row["shown"].split("|")[int(row["position"]) - 1] == row["chosen"]
    assert {row["worker"] for row in rows} == {"1", "2", "3", "4", "5", "6"}
    exported = (tmp_path / "study" / "answers.csv").read_text() + json.dumps(stored)
    assert not any(code in exported for code in codes)


def test_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("Ours [v2]", "[/x]")
    edits = evaluation(tmp_path / "[red]", methods=names)
    create_study(edits, tmp_path / "study", samples=6, per_worker=4, methods=names).close()
    write_report(tmp_path / "study").print()
    told = capsys.readouterr().out
    assert all(name in told for name in names)


def test_commands(tmp_path: Path) -> None:
    edits = evaluation(tmp_path / "evaluation")
    runner = CliRunner()

    def run(*arguments: object) -> str:
        words = list(map(str, arguments))
        result = runner.invoke(cli, ["study", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    folder = tmp_path / "a study"
    options = ("--out", folder, "--samples", 6, "--per-worker", 4, "--url", "https://x.example/s/")
    made = run("create", edits.root, *options)
    links = re.findall(r"^worker \d: https://x\.example/s/[\w-]{16}  0 of 4$", made, re.MULTILINE)
    assert len(links) == 3
    assert made.endswith(f"reasonpix study serve '{folder}'\n")
    told = run("report", folder)  # nobody has answered
    assert "0 of 6" in told and "–" in told
    with Study(folder) as study:
        study.start(1)
        study.answer(1, 1, 1, 3.0)
    shown = run("codes", folder, "--add", 2).splitlines()
    assert [line.rpartition("  ")[2] for line in shown] == ["1 of 4", *["0 of 4"] * 4]
    assert shown[0].split()[2].rpartition("/")[2] in made  # older codes stay
    told = run("report", folder)
    assert "1 of 6" in told and "the median answer took 3.0 s" in told
    assert str(folder / "report.json") in told.replace("\n", "")
