"""`reasonpix train` as a user has it: what it says, and how it is stopped."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner, Result

from reasonpix.cli.main import cli
from tests.conftest import WriteRecipe
from tests.support.pair_files import parquet, picture, rows
from tests.support.tiny_training import LONG, files, losses, run, start, write_training

# Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """One thread, and an accelerator that has chosen nothing yet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(it) for it in arguments])


def command(folder: Path, output: str, arguments: list[str]) -> None:
    """The command in `folder`; both its streams go to `output`, a file or a terminal."""
    os.environ |= {"TERM": "xterm", "COLUMNS": "120"}
    os.chdir(folder)
    stream = os.open(output, os.O_CREAT | os.O_WRONLY)
    for number in (1, 2):
        os.dup2(stream, number)
    cli(arguments)


def test_it_tells_where_the_model_is_and_the_model_is_of_use(here: Path) -> None:
    content = rows(8)
    content[3]["edit_prompt"] = ""
    content[5]["edited_image"] = {"bytes": b"no image", "path": None}
    content[6]["edited_image"] = content[6]["input_image"]
    parquet(here / "pairs.parquet", content)
    write_training(here, data__broken="skip")
    result = call("train", "recipe.yaml", "--out", "my run", "--set", "steps=1")
    assert result.exit_code == 0, result.output
    left_out, which, where, how = result.stdout.splitlines()
    assert left_out.startswith("left out 3 rows, such as ") and "pairs.parquet" in left_out
    assert which == "full list: 'my run/left-out.jsonl'"
    assert where == "the model is in 'my run/model'; edit with it:"
    picture(1).save("one.png")
    words = how.replace("IMAGE", "one.png").replace("TEXT", "'make it rain'")
    done = call(*re.findall(r"'[^']*'|\S+", words)[1:], "--device", "cpu")
    assert done.exit_code == 1  # quotes are the shell's
    done = call(*[word.strip("'") for word in re.findall(r"'[^']*'|\S+", words)[1:]])
    assert done.exit_code == 0, done.output
    assert Path(done.stdout.strip()).is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(number: int, here: Path) -> None:
    run(here, "whole", **LONG)
    AcceleratorState._reset_state(True)
    out, arguments = here / "out", ["train", "recipe.yaml", "--out", "out"]
    process = start(command, here, "said", arguments)
    wait_for(process, lambda: (out / "log.jsonl").exists() and len(losses(out)) >= 2)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    assert last_line(here) == "stopped; run the same command again to continue"
    done = len(losses(out))
    assert 2 <= done < 10
    assert sorted((out / "state").iterdir())[-1].name == f"{done:08}"
    again = call(*arguments)
    assert again.exit_code == 0, again.output
    assert files(out / "model") == files(here / "whole" / "model")
    assert losses(out) == losses(here / "whole")


def last_line(folder: Path) -> str:
    """Before it stand columns that are not read."""
    return (folder / "said").read_text().splitlines()[-1]


def wait_for(process: Any, happened: Any) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.002)


def test_a_signal_before_any_step_stops_at_once(here: Path) -> None:
    write_training(here, data__crops=400)
    process = start(command, here, "said", ["train", "recipe.yaml", "--out", "out"])
    wait_for(process, lambda: (here / "out" / "features").is_dir())
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert last_line(here) == "stopped; run the same command again to continue"
    assert not (here / "out" / "state").exists()


def test_progress_is_drawn_on_a_terminal(here: Path) -> None:
    write_training(here, **LONG)
    terminal, child = pty.openpty()
    arguments = ["train", "recipe.yaml", "--out", "out"]
    process = start(command, here, os.ttyname(child), arguments)
    seen = b""
    while process.is_alive() or select.select([terminal], [], [], 0.1)[0]:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096)
    os.close(terminal)
    os.close(child)
    text = seen.decode()
    for stage in ("rows", "features", "align", "train"):
        assert re.search(rf"{stage} .*\d+/\d+", text), stage
    assert re.search(r"train .*6/6 .*loss \d\.\d{4}  [\d.]+ images/s", text)


def test_what_is_published_is_trained_on(here: Path, write_recipe: WriteRecipe) -> None:
    assert call("generate", write_recipe("generate.yaml"), "--out", "run").exit_code == 0
    assert call("publish", "run", "--out", "pairs").exit_code == 0
    write_training(here, data__path="pairs", steps=2)
    result = call("train", "recipe.yaml", "--out", "out")
    assert result.exit_code == 0, result.output
    assert len(losses(here / "out")) == 2


def told(result: Result, code: int = 1) -> str:
    """What was said without a traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr


def test_mistakes_are_told_without_a_traceback(here: Path) -> None:
    content = rows(4)
    content[2]["edit_prompt"] = ""
    parquet(here / "pairs.parquet", content)
    write_training(here)
    arguments = ["train", "recipe.yaml", "--out"]
    assert "no text in 'edit_prompt'" in told(call(*arguments, "out"))
    assert "no such option" in told(call(*arguments, "out", "--set", "stpes=1"), 2)
    assert "did you mean 'mini/train'" in told(call("train", "mini/trian", "--out", "out"), 2)
    assert "a recipe for `reasonpix generate`" in told(
        call("train", "mini/part3", "--out", "out"), 2
    )
    (here / "thesis").mkdir()
    (here / "thesis" / "text").write_text("all of it")
    assert "thesis is not empty" in told(call(*arguments, "thesis"))
    assert "--out" in call("train", "recipe.yaml").stderr
    gone = call(*arguments, "out", "--set", "model.model=./gone")
    assert "no folder './gone'" in told(gone)


def test_the_others_of_many_processes_are_silent(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_training(here)
    monkeypatch.setenv("RANK", "1")
    result = call("train", "recipe.yaml", "--out", "out", "--set", "model.model=./gone")
    assert (result.exit_code, result.output) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ("train recipe.yaml --out out", "train"),
        ("edit one.png --instruction x --model y", "edit"),
    ],
)
def test_a_missing_extra_is_named(arguments: str, extra: str, here: Path) -> None:
    write_training(here)
    picture(1).save("one.png")
    code = f"""if True:
        import sys
        sys.modules["diffusers"] = None
        from reasonpix.cli.main import cli
        cli({arguments.split()})
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = f"this needs the package diffusers: pip install 'reasonpix[{extra}]'\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_help_imports_nothing_heavy() -> None:
    code = """if True:
        import sys
        from reasonpix.cli.main import cli
        try:
            cli(["train", "--help"])
        except SystemExit:
            heavy = {"torch", "transformers", "diffusers", "numpy", "pydantic", "PIL", "rich"}
            print("HEAVY", *sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"


def test_it_is_a_module_too(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reasonpix", "train", "--help"], capture_output=True, text=True
    )
    assert done.stdout.startswith("Usage: reasonpix train [OPTIONS] RECIPE")
