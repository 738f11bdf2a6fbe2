"""The commands for a run that is there, as a user calls them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from reasonpix.cli import runs
from reasonpix.cli.main import cli
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import outcome_counts
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import WriteRecipe


def call(command: click.Command, *arguments: str | Path, answer: str | None = None) -> Result:
    # A command keeps the names of its option for help as it is first called with them.
    words = list(map(str, arguments))
    return CliRunner().invoke(command, words, input=answer, **cli.context_settings)


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    recipe = load_recipe(
        write_recipe(shard_size=3, filters=[{"use": "eq1", "reject_fraction": 0.3}])
    )
    return generate(recipe, tmp_path / "run")


def test_status_by_the_runs_own_recipe_and_by_another(
    run: RunFolder, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    def row(stage: str, *arguments: str | Path) -> list[str]:
        result = call(runs.status_command, str(run), *arguments)
        assert result.exit_code == 0, result.output
        [line] = [it.split() for it in result.output.splitlines() if it.split()[:1] == [stage]]
        return line[1:4]

    assert row("caption") == ["0", "3", "0"]
    change = "pipeline.editor.colour=[1, 2, 3]"
    assert row("caption", "--set", change) == ["3", "0", "0"]
    assert row("edit", "--set", change) == ["0", "0", "3"]
    other = write_recipe("other.yaml", extractor={"use": "fake-extractor"}, filters=["no-op"])
    assert row("edit", "--recipe", other) == ["3", "0", "0"]
    assert row("score-no-op", "--recipe", other) == ["0", "0", "3"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_status_needs_no_permission_to_write(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "holder").unlink()
    folder.chmod(0o555)
    try:
        result = call(runs.status_command, folder)
    finally:
        folder.chmod(0o755)
    assert "no process is running it" in result.output


def test_clean_asks_first(run: RunFolder, tmp_path: Path) -> None:
    folders = set((tmp_path / "run" / "stages").iterdir())
    no_run = call(runs.clean_command, str(tmp_path))
    assert no_run.exit_code == 1 and "is not a run folder" in str(no_run.exception)
    assert call(runs.clean_command, str(run)).output == "0 stage folders removed\n"
    call(runs.refilter_command, str(run), "--set", "filters=[]")
    refused = call(runs.clean_command, str(run), answer="n\n")
    assert refused.exit_code == 1 and "Remove them?" in refused.output
    assert "score-eq1-" in refused.output
    assert set((tmp_path / "run" / "stages").iterdir()) == folders
    assert call(runs.clean_command, str(run), answer="y\n").output.endswith(
        "1 stage folder removed\n"
    )
    left = set((tmp_path / "run" / "stages").iterdir())
    assert [folder.name.rpartition("-")[0] for folder in folders - left] == ["score-eq1"]


def test_clean_with_yes_does_not_ask(run: RunFolder) -> None:
    call(runs.refilter_command, str(run), "--set", "filters=[]")
    result = call(runs.clean_command, str(run), "--yes")
    assert result.exit_code == 0 and "?" not in result.output


def test_refilter_tells_how_many_there_were_and_are(run: RunFolder, tmp_path: Path) -> None:
    drawn = call(runs.refilter_command, str(run))
    assert drawn.output.splitlines()[-2:] == [
        "5 of 7 records accepted",
        str(tmp_path / "run" / "survival.html"),
    ]
    page = tmp_path / "page.html"
    changed = call(
        runs.refilter_command, str(run), "--set", "filters.0.reject_fraction=0.6", "--out", page
    )
    accepted, files, where = changed.output.splitlines()[-3:]
    assert (accepted, where) == ("3 of 7 records accepted (5 before)", str(page))
    again = f"`reasonpix generate {run}/recipe.yaml --out {run}` keeps these thresholds"
    assert f"{run}/recipe.yaml and {run}/stages.json were rewritten: {again}" in files
    # It does so, and the recipe that the run began with does not.
    generate(load_recipe(tmp_path / "run" / "recipe.yaml"), tmp_path / "run")
    assert outcome_counts(run).accepted == 3
    generate(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    assert outcome_counts(run).accepted == 5
    [line] = [it.split() for it in changed.output.splitlines() if "score-eq1" in it]
    assert line == ["score-eq1", "3", "4", "0", "5"]
    assert page.exists()


def test_inspect_as_text_and_as_json(run: RunFolder) -> None:
    text = call(runs.inspect_command, str(run), "2")
    assert text.exit_code == 0 and "plan: ok by fake-planner 1" in text.output
    told = json.loads(call(runs.inspect_command, str(run), "2", "--json").output)
    assert told["item"]["native_id"] == "2" and "replayed" not in told


def test_replay_fails_when_something_differs(run: RunFolder, tmp_path: Path) -> None:
    same = call(runs.inspect_command, str(run), "2", "--replay")
    assert same.exit_code == 0
    assert same.output.endswith("7 of 7 stages are identical, byte for byte\n")
    [caption] = (tmp_path / "run" / "stages").glob("caption-*")
    shard = run.shards()[0]
    rows = [row._replace(output='{"text": "a fly"}') for row in run.read(caption.name, shard)]
    run.write(caption.name, shard, rows)
    differs = call(runs.inspect_command, str(run), "2", "--replay", "--json")
    assert differs.exit_code == 1
    replayed = json.loads(differs.output)["replayed"]
    assert [it["stage"] for it in replayed if it["differences"]] == ["caption", "extract"]
