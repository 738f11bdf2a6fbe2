"""An evaluation end to end: real parquet files, real metrics, methods that are quick."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from reasonpix.cli.main import cli
from reasonpix.evaluation.results import COPY, TRUTH, EvaluationFolder
from tests.conftest import Distribution
from tests.support.benchmark_rows import benchmark, row, scene

METRICS = {"clip": "mini/clip", "dino": "mini/dino"}

Recipe = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Write a recipe of two fake methods over four cases; `methods=` replaces them."""
    data = benchmark(tmp_path / "benchmark", [row(number) for number in range(4)])

    def write(**changes: Any) -> Path:
        body = {
            "benchmark": {"path": str(data)},
            "metrics": METRICS,
            "methods": {"Red": "fake-method", "Black": {"use": "fake-method", "tint": 0}},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(body | changes, sort_keys=False))
        return path

    return write


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(it) for it in arguments])


def evaluated(recipe: Path, out: Path, *more: object) -> EvaluationFolder:
    result = call("evaluate", recipe, "--out", out, *more)
    assert result.exit_code == 0, result.output
    return EvaluationFolder(out)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The edits that there are, with the time of each."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_method_edits_every_case_by_each_kind(recipe: Recipe, tmp_path: Path) -> None:
    folder = evaluated(recipe(), tmp_path / "out")
    assert folder.methods == [TRUTH, COPY, "Red", "Black"]
    assert folder.kinds == ["direct", "reasoning"]
    assert list(folder.records) == [f"record-{number}" for number in range(4)]
    for method in folder.methods:
        for kind in folder.kinds:
            assert list(folder.scores(method, kind)) == list(folder.records), (method, kind)
    edit = folder.edit("Red", "direct", "record-1")
    assert isinstance(edit, Path)
    with Image.open(edit) as image:
        assert image.size == scene(1).size and image.getpixel((0, 0))[0] == 100
        assert image.getpixel((60, 60)) == scene(1).getpixel((60, 60))


def test_the_truth_is_perfect_and_the_copy_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    folder = evaluated(recipe(), tmp_path / "out")
    for score in folder.scores(TRUTH, "reasoning").values():
        assert (score["l1"], score["l2"]) == (0, 0)
        assert score["clip_i"] == pytest.approx(1, abs=1e-6)
        assert score["dino"] == pytest.approx(1, abs=1e-6)
    for score in folder.scores(COPY, "direct").values():
        assert score["l1"] > 0 and score["psnr_outside"] == 100
        assert score["ssim_outside"] == pytest.approx(1)
    assert folder.scores(COPY, "direct") == folder.scores(COPY, "reasoning")


def test_an_edit_depends_on_the_instruction_and_not_on_the_method_next_to_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    both = evaluated(recipe(), tmp_path / "both")
    alone = evaluated(recipe(methods={"Red": "fake-method"}), tmp_path / "alone")
    for kind in both.kinds:
        for case in both.records:
            one, other = (it.edit("Red", kind, case) for it in (both, alone))
            assert isinstance(one, Path) and isinstance(other, Path)
            assert one.read_bytes() == other.read_bytes()
    assert both.scores("Red", "direct") == alone.scores("Red", "direct")
    assert both.scores("Red", "direct") != both.scores("Red", "reasoning")


def test_the_same_command_again_does_nothing_anew(recipe: Recipe, tmp_path: Path) -> None:
    path, out = recipe(), tmp_path / "out"
    evaluated(path, out)
    before = files(out / "edits") | files(out / "scores")
    report = (out / "report.json").read_bytes()
    evaluated(path, out)
    assert files(out / "edits") | files(out / "scores") == before
    assert (out / "report.json").read_bytes() == report


def test_a_method_that_is_added_costs_its_own_edits_alone(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated(recipe(methods={"Red": "fake-method"}), out)
    before = files(out / "edits")
    folder = evaluated(recipe(), out)
    after = files(out / "edits")
    assert after.items() >= before.items() and len(after) == 2 * len(before)
    changed = {"Red": {"use": "fake-method", "tint": 3}}
    folder = evaluated(recipe(methods=changed), out)
    assert folder.methods == [TRUTH, COPY, "Red"]
    edit = folder.edit("Red", "direct", "record-0")
    assert isinstance(edit, Path)
    with Image.open(edit) as image:
        assert image.getpixel((0, 0))[0] == 3


def test_a_case_that_cannot_be_edited_is_told_and_tried_again_when_asked(
    tmp_path: Path, recipe: Recipe
) -> None:
    rows = [row(0), row(1, edit_prompt="fail")]
    data = benchmark(tmp_path / "failing", rows)
    path, out = recipe(benchmark={"path": str(data)}, methods={"Red": "fake-method"}), "out"
    folder = evaluated(path, tmp_path / out)
    assert folder.failures("Red", "reasoning") == {"record-1": "the instruction is 'fail'"}
    assert folder.failures("Red", "direct") == {}
    assert list(folder.scores("Red", "reasoning")) == ["record-0"]
    problem = next((tmp_path / out / "edits").rglob("record-1.json"))
    problem.write_text('{"status": "failed", "reason": "out of luck"}')
    assert evaluated(path, tmp_path / out).failures("Red", "reasoning")["record-1"] == "out of luck"
    again = evaluated(path, tmp_path / out, "--retry-failed")
    assert again.failures("Red", "reasoning")["record-1"] == "the instruction is 'fail'"


RECORDING = '''
import json, os
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.components import (Method, Options)

class Recording(Method):
    """Writes down what it is asked, slowly."""
    name = "recording"
    Options = Options
    requires = frozenset(SEES)

    def apply(self, requests):
        import time
        with open(os.environ["ASKED"], "a") as file:
            for it in requests:
                file.write(json.dumps([it.instruction, it.seed, it.caption, it.edited_caption]))
                file.write("\\n")
        time.sleep(float(os.environ.get("SLEEP", "0")))
        return [it.image for it in requests]

@hookimpl
def methods():
    return [Recording]
'''


def test_methods_are_told_what_comes_for_direct_instructions_only(
    recipe: Recipe, tmp_path: Path, distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(
        "rec", {"recording": "recording"}, recording=RECORDING.replace("SEES", '["caption"]')
    )
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    path = recipe(methods={"One": "recording", "Other": "recording"})
    evaluated(path, tmp_path / "out")
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    # Two names of one component with the same options: the same edits, made once.
    assert len(asked) == 8
    seeds = {}
    for instruction, seed, caption, edited_caption in asked:
        number = instruction.split()[-1]
        assert seeds.setdefault(number, seed) == seed
        assert caption == "a bee and an apple"
        assert edited_caption == ("a rabbit and an apple" if "Turn" in instruction else "")
    assert len(set(seeds.values())) == 4


def test_an_edit_of_another_size_is_not_kept(
    recipe: Recipe, tmp_path: Path, distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RECORDING.replace("SEES", "[]").replace(
        "[it.image for", "[it.image.resize((9, 9)) for"
    )
    distribution("rec", {"recording": "recording"}, recording=source)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    result = call("evaluate", recipe(methods={"One": "recording"}), "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "the edit is RGB, 9x9 pixels; it must be RGB and of the input's size, 64x64" in (
        result.stderr
    )
    assert not list((tmp_path / "out").glob("edits/*/*/*"))


def test_captions_that_are_missing_are_told_before_anything_is_done(
    recipe: Recipe, tmp_path: Path, distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(
        "rec", {"recording": "recording"}, recording=RECORDING.replace("SEES", '["caption"]')
    )
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    data = benchmark(tmp_path / "wordless", [row(0), row(1, caption=None)])
    path = recipe(benchmark={"path": str(data)}, methods={"One": "recording"})
    result = call("evaluate", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "methods.One: 'recording' needs the caption of every case" in result.stderr
    assert "has none" in result.stderr and not (tmp_path / "asked").exists()


def test_it_goes_on_where_it_was_killed(
    recipe: Recipe, tmp_path: Path, distribution: Distribution
) -> None:
    site = distribution(
        "rec", {"recording": "recording"}, recording=RECORDING.replace("SEES", "[]")
    )
    data = benchmark(tmp_path / "larger", [row(number) for number in range(24)])
    path = recipe(benchmark={"path": str(data)}, methods={"One": "recording"})
    asked, out = tmp_path / "asked", tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(site), "ASKED": str(asked)}
    command = [sys.executable, "-m", "reasonpix", "evaluate", str(path), "--out", str(out)]
    process = subprocess.Popen(command, env=environment | {"SLEEP": "1"}, stdout=subprocess.DEVNULL)
    while len(list(out.glob("edits/*/*/*.png"))) < 16:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list(out.glob("edits/*/*/*.png")))
    assert made < 48
    asked.unlink()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert len(asked.read_text().splitlines()) == 48 - made
    assert len(EvaluationFolder(out).scores("One", "direct")) == 24


def test_the_folder_of_another_benchmark_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated(recipe(), out)
    other = benchmark(tmp_path / "other", [row(9)])
    result = call("evaluate", recipe(benchmark={"path": str(other)}), "--out", out)
    assert result.exit_code == 1 and "holds the evaluation of another benchmark" in result.stderr
    redrawn = row(1, input_image=row(7)["input_image"])
    other = benchmark(tmp_path / "redrawn", [row(0), redrawn, row(2), row(3)])
    result = call("evaluate", recipe(benchmark={"path": str(other)}), "--out", out)
    assert result.exit_code == 1 and "its image differs from the one in" in result.stderr


def test_more_cases_of_the_same_benchmark_are_added(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated(recipe(), out, "--set", "benchmark.limit=2")
    before = files(out / "edits")
    folder = evaluated(recipe(), out)
    assert files(out / "edits").items() >= before.items()
    assert len(folder.scores("Red", "direct")) == 4


def test_two_processes_do_not_work_in_one_folder(recipe: Recipe, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    lock = os.open(out, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    result = call("evaluate", recipe(), "--out", out)
    os.close(lock)
    assert result.exit_code == 1 and "another process is evaluating" in result.stderr


def test_an_unknown_reference_method_is_reported_first(recipe: Recipe, tmp_path: Path) -> None:
    result = call("evaluate", recipe(), "--out", tmp_path / "out", "--reference", "Blue")
    assert result.exit_code == 1 and "no method 'Blue'; choose one of Red, Black" in result.stderr
    assert not (tmp_path / "out").exists()


def test_another_box_is_another_benchmark(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated(recipe(), out)
    moved = [row(0, box=[0.0, 0.0, 9.0, 9.0]), row(1), row(2), row(3)]
    other = benchmark(tmp_path / "moved", moved)
    result = call("evaluate", recipe(benchmark={"path": str(other)}), "--out", out)
    assert result.exit_code == 1 and "holds the evaluation of another benchmark" in result.stderr


def test_a_benchmark_that_was_moved_is_the_same(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated(recipe(), out)
    before = files(out / "edits")
    (tmp_path / "benchmark").rename(tmp_path / "elsewhere")
    evaluated(recipe(benchmark={"path": str(tmp_path / "elsewhere")}), out)
    assert files(out / "edits") == before


def test_an_exception_costs_the_case_that_causes_it(
    recipe: Recipe, tmp_path: Path, distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = (
        "        if any('number 2' in it.instruction for it in requests): raise ValueError('bad')\n"
    )
    head, rest = RECORDING.replace("SEES", "[]").split("        import time\n")
    distribution(
        "rec", {"recording": "recording"}, recording=f"{head}{fault}        import time\n{rest}"
    )
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    methods = {"One": "recording", "Red": "fake-method"}
    folder = evaluated(recipe(methods=methods), tmp_path / "out")
    assert folder.failures("One", "direct") == {"record-2": "ValueError: bad"}
    assert len(folder.scores("One", "reasoning")) == 3
    assert len(folder.scores("Red", "reasoning")) == 4


def test_a_folder_of_something_else_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "recipe.yaml").write_text("mine")
    result = call("evaluate", recipe(), "--out", out)
    assert result.exit_code == 1 and "mine holds something else; name a new folder" in result.stderr
    assert [path.read_text() for path in out.iterdir()] == ["mine"]


def test_models_that_are_missing_are_told_before_the_first_edit(
    recipe: Recipe, tmp_path: Path
) -> None:
    methods = {
        "Red": "fake-method",
        "Ours": {"use": "editing-model", "model": "./nowhere"},
        "Edict": {"use": "edict", "model": "mini/clip"},
    }
    grounder = {"use": "grounding-dino", "model": "./nowhere"}
    result = call("evaluate", recipe(methods=methods, grounder=grounder), "--out", tmp_path / "out")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith("methods.Ours: model: no folder './nowhere'")
    assert lines[1].startswith("methods.Edict: model: ") and "no model_index.json" in lines[1]
    assert lines[2].startswith("grounder: model: no folder './nowhere'")
    assert not (tmp_path / "out").exists()


def test_a_grounder_of_another_kind_is_told_before_the_first_edit(
    recipe: Recipe, tmp_path: Path
) -> None:
    grounder = {"use": "grounding-dino", "model": "mini/blip2"}
    result = call("evaluate", recipe(grounder=grounder), "--out", tmp_path / "out")
    assert result.exit_code == 1
    told = result.stderr.splitlines()[-1]
    assert "holds no usable GroundingDinoForObjectDetection" in told
    assert "config.json names Blip2ForConditionalGeneration" in told
    assert not list((tmp_path / "out").glob("edits/*"))


def test_what_was_damaged_is_made_again(recipe: Recipe, tmp_path: Path) -> None:
    path, out = recipe(methods={"Red": "fake-method"}), tmp_path / "out"
    evaluated(path, out)
    edits, scores = files(out / "edits"), files(out / "scores")
    edit = next((out / "edits").glob("*/direct/record-1.png"))
    edit.write_bytes(edit.read_bytes()[:-5])
    (out / "input" / "record-2.png").write_bytes(b"")
    table = next((out / "scores").glob("fake-method-*/direct.jsonl"))
    table.write_bytes(table.read_bytes()[:-40])
    evaluated(path, out)
    for before, now in ((edits, files(out / "edits")), (scores, files(out / "scores"))):
        assert {name: data for name, (_, data) in now.items()} == {
            name: data for name, (_, data) in before.items()
        }


def test_fewer_cases_of_which_none_was_edited(tmp_path: Path, recipe: Recipe) -> None:
    rows = [row(0, edit_prompt="fail"), row(1)]
    data = benchmark(tmp_path / "failing", rows)
    path = recipe(benchmark={"path": str(data)}, methods={"Red": "fake-method"})
    evaluated(path, tmp_path / "out")
    folder = evaluated(path, tmp_path / "out", "--set", "benchmark.limit=1")
    assert folder.scores("Red", "reasoning") == {}
    assert list(folder.failures("Red", "reasoning")) == ["record-0"]


def test_an_editing_model_is_known_by_its_encoder_too() -> None:
    from reasonpix.editing.method import EditingModelOptions
    from reasonpix.plugin import registry

    def component(model: str) -> Any:
        return registry.fingerprint_facts(
            "method", "editing-model", EditingModelOptions(model=model)
        )

    encoder = component("mini/reasonpix2pix")["component"]["encoder"]
    assert encoder["use"] == "llava" and set(encoder["weights"]) == {"model", "language_model"}


def test_without_a_terminal_progress_is_told_in_lines(recipe: Recipe, tmp_path: Path) -> None:
    result = call("evaluate", recipe(), "--out", tmp_path / "out")
    told = result.stderr.splitlines()
    assert "Red: 8 of 8" in told and told[-1].startswith("measure: ")


def test_models_for_other_images_than_the_benchmarks_are_told(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = recipe(methods={"Red": "fake-method"})
    evaluated(written, tmp_path / "out")
    [line] = [message for message in caplog.messages if "made for" in message]
    assert line.startswith("metrics.clip, metrics.dino: made for scenes of the sticker world")
    assert "if the benchmark's images show something else" in line
    caplog.clear()
    (tmp_path / "benchmark" / "README.md").write_text("---\nimage_domain: sticker-world\n---\n")
    evaluated(written, tmp_path / "out")
    assert not [message for message in caplog.messages if "made for" in message]
