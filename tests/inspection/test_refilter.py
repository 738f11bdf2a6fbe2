"""Filters applied anew, and survival by their thresholds: from stored scores, with no model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import (
    current_stages,
    read_outcomes,
)
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.generation.run_recipe import recipe_of
from reasonpix.inspection.refilter import reapply_filters
from tests.conftest import WriteRecipe

EQ1 = {"use": "eq1", "reject_fraction": 0.3}
PAIRS = {"use": "fake-source", "count": 6, "caption": "a bee", "instruction": "add a hole",
         "edited_caption": "a bee with a hole"}  # fmt: skip


def ends(run: RunFolder) -> list[tuple[str, str, str]]:
    return [(o.status, o.stage, o.reason) for o in read_outcomes(run)]


def files(out: Path) -> dict[str, bytes]:
    """All but what says which filters there are."""
    changing = {"recipe.yaml", "stages.json", "holder"}
    paths = [path for path in out.rglob("*") if path.is_file() and path.name not in changing]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def test_another_threshold_gives_what_a_run_with_it_gives(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(shard_size=3, filters=[EQ1, "no-op"])
    out = tmp_path / "run"
    run = generate(load_recipe(path), out)
    kept = files(out)
    changes = ["filters.0.reject_fraction=0.6", "filters.1.min_changed=0.5"]
    before, after = reapply_filters(run, changes)
    assert (before.accepted, after.accepted) == (5, 3)
    assert files(out) == kept

    fresh = generate(load_recipe(path, changes), tmp_path / "fresh")
    assert ends(run) == ends(fresh)
    for name in ("recipe.yaml", "stages.json"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    # The recipe is the run's own now: going on with it computes nothing.
    generate(recipe_of(run), out)
    assert [line for line in run.journal() if "stage" in line] == [
        json.loads(line) for line in kept["journal.jsonl"].splitlines() if b"stage" in line
    ]


def test_filters_that_were_measured_go_come_back_and_change_places(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(filters=[EQ1, "no-op", "region-distance"])
    run = generate(load_recipe(path), tmp_path / "run")
    kept = files(tmp_path / "run")

    def stages() -> list[str]:
        return [entry.stage for entry in current_stages(run) if entry.is_score]

    _, after = reapply_filters(run, ["filters=[region-distance]"])
    assert stages() == ["score-region-distance"] and after.accepted == 7
    _, after = reapply_filters(run, ["filters=[no-op, {use: eq1, reject_fraction: 0.5}]"])
    assert stages() == ["score-no-op", "score-eq1"] and after.accepted == 4
    _, after = reapply_filters(run, ["filters=[]"])
    assert stages() == [] and after.accepted == 7
    assert files(tmp_path / "run") == kept


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("filters.1.tolerance=3", "score-no-op"),
        ("filters.1=regrounded", "score-regrounded"),
        ("pipeline.captioner.caption=a cat", "caption, extract"),
        ("seed=1", "plan, edit, score-eq1, score-no-op"),
    ],
)
def test_what_would_have_to_be_computed_is_refused(
    change: str, stages: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = generate(load_recipe(write_recipe(filters=[EQ1, "no-op"])), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=f"no results of {stages}.*reasonpix generate .*--set"):
        reapply_filters(run, [change])
    (out / "holder").write_bytes(before[out / "holder"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_filter_before_the_planner_decides_what_that_is_asked(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(source=PAIRS, filters=[EQ1, "leak"], part="rewrite")
    run = generate(load_recipe(path), tmp_path / "run")
    with pytest.raises(RunError, match=r"rewrite, select, score-leak.*before rewrite.*: eq1"):
        reapply_filters(run, ["filters.0.reject_fraction=0.5"])
    # One after it is free to change, and the fakes leak nothing at -1.
    before, after = reapply_filters(run, ["filters=[{use: eq1, reject_fraction: 0.3}]"])
    assert before.accepted == after.accepted == 5


def test_mistakes_and_unfinished_runs_are_told(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = generate(load_recipe(write_recipe(filters=[EQ1])), out)
    with pytest.raises(RecipeError, match=r"filters\.0\.reject_fraction.*less than 1"):
        reapply_filters(run, ["filters.0.reject_fraction=2"])
    with run.storage.lock(), pytest.raises(RunError, match="is in use by process"):
        reapply_filters(RunFolder(out), ["filters.0.reject_fraction=0.5"])
    [folder] = (out / "stages").glob("score-eq1-*")
    (folder / "000000.parquet").unlink()
    with pytest.raises(RunError, match="is not finished: stage score-eq1"):
        reapply_filters(run, ["filters.0.reject_fraction=0.5"])
    with pytest.raises(RunError, match="is not a run folder"):
        reapply_filters(RunFolder(tmp_path / "nothing"), [])


def test_the_packages_that_made_the_results_stay_named(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = generate(load_recipe(write_recipe(filters=[EQ1])), tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(re.sub(r"# reasonpix \S+", "# reasonpix 0.0.7", path.read_text()))
    reapply_filters(run, ["filters.0.reject_fraction=0.5"])
    assert path.read_text().startswith("# reasonpix 0.0.7\npart: replace\n")
    assert "reject_fraction: 0.5" in path.read_text()
