from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from reasonpix.cli.main import cli
from reasonpix.generation.recipe_catalog import shipped
from tests.conftest import Shell, WriteRecipe


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group of the command line, as the words that call it."""
    found = [path]
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = (*path, name)
        found += commands(command, inner) if isinstance(command, click.Group) else [inner]
    return found


@pytest.mark.parametrize("words", commands(cli), ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(cli, [*words, flag])
        assert result.exit_code == 0
        assert result.output.startswith("Usage: ")
        explanation = result.output.split("\n\n")[1].strip()
        assert explanation and "Options:" not in explanation


def test_every_option_is_described() -> None:
    for words in commands(cli):
        command: click.Command = cli
        for word in words:
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), word)
            assert found is not None
            command = found
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, (words, parameter)


def test_help_and_listing_import_nothing_heavy() -> None:
    code = """if True:
        import sys
        from reasonpix.cli.main import cli
        try:
            cli(sys.argv[1:])
        except SystemExit as done:
            assert not done.code, done
        heavy = {"torch", "transformers", "diffusers", "spacy", "datasets", "openai"}
        heavy |= {"pyarrow", "numpy", "pydantic"} if "--help" in sys.argv else set()
        print("HEAVY", *sorted(heavy & set(sys.modules)))
    """
    for arguments in (["--help"], ["generate", "--help"], ["plugins", "ls"], ["recipes", "schema"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "HEAVY", arguments


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output.strip().endswith("version 0.1.0")


# -- errors --------------------------------------------------------------------------------------


def test_a_bad_recipe_is_told_on_stderr_with_code_2(
    shell: Shell, write_recipe: WriteRecipe
) -> None:
    recipe = write_recipe(captioner="fake-captoiner", editor={"use": "fake-editor", "color": 1})
    for command in (["recipes", "check", recipe], ["generate", recipe, "--out", "run"]):
        done = shell(*command)
        assert done.returncode == 2
        assert done.stdout == ""
        first, second = done.stderr.splitlines()
        assert first.startswith(f"{recipe}:5:3: pipeline.captioner.use: no captioner 'fake-captoin")
        assert second.startswith(f"{recipe}:11:5: pipeline.editor.color: no such option")


def test_debug_gives_the_traceback(shell: Shell, write_recipe: WriteRecipe) -> None:
    done = shell("--debug", "recipes", "check", write_recipe(captioner="fake-captoiner"))
    assert done.returncode != 0
    assert done.stderr.startswith("Traceback")
    assert "no captioner 'fake-captoiner'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["recipes", "show", "mini/prt3"], 2, "did you mean 'mini/part3'?"),
        (["recipes", "check", "nowhere.yaml"], 2, "nowhere.yaml: no such file, and no shipped"),
        (
            ["publish", "nowhere", "--out", "x"],
            1,
            "nowhere is not a run folder (it has no plan.json)",
        ),
        (["gallery", "nowhere"], 1, "nowhere is not a run folder (it has no plan.json)"),
        (["plugins", "show", "fake-captoner"], 1, "did you mean 'fake-captioner'?"),
        (["generate", "mini/part3"], 2, "Missing option '--out'"),
        (["generate", "mini/part3", "--out", __file__], 1, "a file is in the way; name another"),
        (["publish", __file__, "--out", "x"], 1, "is not a run folder"),
        (["generate", "mini/part3", "--out", "x", "--limit", "0"], 2, "'--limit'"),
    ],
)
def test_errors_are_one_line_without_traceback(
    arguments: list[str], code: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert what in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# -- recipes and plugins -------------------------------------------------------------------------


def test_recipes_are_listed_shown_and_copied(tmp_path: Path) -> None:
    listed = CliRunner().invoke(cli, ["recipes", "ls"]).output.splitlines()
    assert [line.split()[0] for line in listed] == list(shipped())
    assert all(len(line.split()) > 3 for line in listed)
    text = shipped()["mini/part3"].read_text(encoding="utf-8")
    assert CliRunner().invoke(cli, ["recipes", "show", "mini/part3"]).output == text

    to = tmp_path / "new" / "mine.yaml"
    assert CliRunner().invoke(cli, ["recipes", "copy", "mini/part3", str(to)]).exit_code == 0
    assert to.read_text(encoding="utf-8") == text
    again = CliRunner().invoke(cli, ["recipes", "copy", "mini/part2", str(to)])
    assert (again.exit_code, again.stderr) == (2, f"{to} exists; name a new file\n")
    assert to.read_text(encoding="utf-8") == text


def test_check_prints_every_option_that_will_be_used(write_recipe: WriteRecipe) -> None:
    recipe = str(write_recipe())
    result = CliRunner().invoke(
        cli,
        ["recipes", "check", recipe, "--set", "seed=3", "--set", "pipeline.planner.target=cat"],
    )
    assert result.exit_code == 0
    resolved = yaml.safe_load(result.output)
    assert resolved["seed"] == 3
    assert resolved["pipeline"]["planner"] == {"use": "fake-planner", "target": "cat"}
    assert resolved["pipeline"]["editor"]["colour"] == [200, 40, 40]


def test_the_schema_is_printed_as_json() -> None:
    printed = json.loads(CliRunner().invoke(cli, ["recipes", "schema"]).output)
    assert printed["title"] == "reasonpix recipe"


def test_plugins_are_listed_and_described() -> None:
    listed = CliRunner().invoke(cli, ["plugins", "ls"]).output.splitlines()
    kinds = {line.split()[0]: line.split()[1] for line in listed}
    assert kinds["eq1"] == "filter"
    assert kinds["image-folder"] == "source"
    assert kinds["fake-planner"] == "planner"
    shown = CliRunner().invoke(cli, ["plugins", "show", "image-folder"]).output
    assert shown.startswith(
        "image-folder: reasonpix.generation.components.image_folder of reasonpix 0.1.0\n"
    )
    assert "source: All images under a folder, by name" in shown
    assert "  path: Folder of images, searched with its subfolders (required)" in shown


# -- a run ---------------------------------------------------------------------------------------


def test_generate_publish_and_gallery(
    shell: Shell, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(filters=["no-op", {"use": "eq1", "reject_fraction": 0.3}])
    command = ["generate", recipe, "--out", "run", "--limit", "5", "--seed", "9"]
    done = shell(*command, "--set", "shard_size=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 of 5 records accepted; the run is run" in done.stdout
    funnel = [line.split() for line in done.stdout.splitlines()]
    assert ["score-eq1", "4", "1", "0"] in funnel
    assert ["source", "5", "0", "0"] in funnel
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["seed"] == 9

    other = shell(*command, "--set", "source.count=6")
    assert other.returncode == 1
    assert other.stderr.startswith("run was planned from another source (options.count was 7, is 6")

    done = shell("publish", "run", "--out", "dataset")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "4 triples of input image, reasoning instruction and edited image in"
    )
    done = shell("gallery", "run")
    assert done.stdout == f"{tmp_path / 'run' / 'gallery.html'}\n"
    assert Path(done.stdout.strip()).is_file()
