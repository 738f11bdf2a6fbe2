"""What `status` tells of a run, and what `clean` takes away."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reasonpix.datasets.publishing import publish
from reasonpix.errors import RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import funnel, read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.inspection.gallery import write_gallery
from reasonpix.inspection.status import RunStatus, clean, read_status, superseded
from reasonpix.inspection.threshold_curves import write_survival_page
from tests.conftest import WriteRecipe

STAGES = ["read", "caption", "extract", "ground", "plan", "edit", "score-no-op"]


def shards(told: RunStatus) -> dict[str, tuple[int, int, int]]:
    return {it.stage: (it.reused, it.done, it.todo) for it in told.stages}


def records(told: RunStatus) -> dict[str, tuple[int, int, int, int]]:
    return {it.stage: (it.ok, it.rejected, it.failed, it.todo_records) for it in told.stages}


def unfinish(run: RunFolder, stage: str, *names: str) -> None:
    """As if the run had been killed before it came to these shards of a stage."""
    assert run.storage.local is not None
    [folder] = (run.storage.local / "stages").glob(f"{stage}-*")
    for name in names:
        (folder / f"{name}.parquet").unlink()


def test_what_a_call_did_is_done_and_what_it_found_is_reused(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(shard_size=3, filters=["no-op"]))
    run = generate(recipe, tmp_path / "run")
    assert shards(read_status(run)) == dict.fromkeys(STAGES, (0, 3, 0))
    assert records(read_status(run)) == dict.fromkeys(STAGES, (7, 0, 0, 0))

    generate(recipe, tmp_path / "run")
    assert shards(read_status(run)) == dict.fromkeys(STAGES, (3, 0, 0))

    unfinish(run, "edit", "000001")
    generate(recipe, tmp_path / "run")
    assert shards(read_status(run))["edit"] == (2, 1, 0)
    assert shards(read_status(run))["plan"] == (3, 0, 0)


def test_a_run_that_was_stopped_tells_what_is_to_do(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = generate(load_recipe(write_recipe(shard_size=3, filters=["no-op"])), tmp_path / "run")
    unfinish(run, "edit", "000001", "000002")
    unfinish(run, "score-no-op", "000000", "000001", "000002")
    told = read_status(run)
    assert shards(told)["plan"] == (0, 3, 0)
    assert shards(told)["edit"] == (0, 1, 2)
    assert shards(told)["score-no-op"] == (0, 0, 3)
    assert records(told)["edit"] == (3, 0, 0, 4)
    assert records(told)["score-no-op"] == (0, 0, 0, 7)
    text = "\n".join(told.lines())
    assert "7 records in 3 shards, the whole source" in text
    assert "no process is running it" in text
    [edit] = [line.split() for line in told.lines() if line.split()[:1] == ["edit"]]
    assert edit == ["edit", "0", "1", "2", "3", "0", "0", "≤", "4"]


@pytest.mark.usefixtures("trial")
def test_records_that_ended_are_counted_where_they_did(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    captions = ["a bee", "a ghost", "unlisted", "torn", "a raises-in-planner", "nobody here"]
    path = write_recipe(
        shard_size=4,
        source={"use": "trial-source", "captions": captions},
        captioner=None,
        extractor="trial-extractor",
        grounder="trial-grounder",
        planner="trial-planner",
    )
    run = generate(load_recipe(path), tmp_path / "run")
    told = records(read_status(run))
    assert told["read"] == (4, 0, 1, 0)
    assert told["extract"] == (3, 1, 0, 0)
    assert told["ground"] == (2, 1, 0, 0)
    assert told["plan"] == (1, 0, 1, 0)
    # What reaches a stage that is to do is known from the one before.
    unfinish(run, "edit", "000000", "000001")
    assert records(read_status(run))["edit"] == (0, 0, 0, 1)
    # The journal may be lost; the files tell the same.
    (tmp_path / "run" / "journal.jsonl").unlink()
    unfinish(run, "plan", "000001")
    assert records(read_status(run)) | {"plan": None, "edit": None} == told | {
        "plan": None,
        "edit": None,
    }
    assert records(read_status(run))["plan"] == (1, 0, 0, 1)
    assert dict(told_source := read_status(run).source) == {"ok": 5, "failed": 1}, told_source
    assert ["source", "5", "0", "1"] in [line.split() for line in read_status(run).lines()]


def test_what_is_accepted_so_far_is_told(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    filters = [{"use": "eq1", "reject_fraction": 0.3}, "no-op"]
    path = write_recipe(shard_size=3, filters=filters)
    run = generate(load_recipe(path), tmp_path / "run")
    told = read_status(run)
    assert (told.finished, told.accepted) == (7, 5)
    text = list(told.lines())
    assert "5 of 7 records accepted" in text
    assert text[-1] == f"to try other thresholds: reasonpix refilter {run} --set …"
    distances = [outcome.scores["eq1.distance"] for outcome in read_outcomes(run)]
    unfinish(run, "score-no-op", "000002")
    unfinish(run, "score-eq1", "000001")
    told = read_status(run)
    # Of four measured records the lowest is rejected; three are in a shard that is finished.
    assert (told.finished, told.accepted) == (
        3,
        3 - (min(distances[:3]) < distances[6]),
    )
    assert "accepted so far, of 3 records that passed all stages" in "\n".join(told.lines())
    told = read_status(run, load_recipe(path))
    assert told.finished is None and not re.search("^.*[0-9] accepted", "\n".join(told.lines()))


PAIRS = {"use": "fake-source", "count": 7, "caption": "a bee", "instruction": "add a hole",
         "edited_caption": "a bee with a hole"}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"filters": [{"use": "eq1", "reject_fraction": 0.3}, "no-op"]},
        # Both reject the same records, which count at the first.
        {"filters": [{"use": "no-op", "min_changed": 1.0}, {"use": "eq1", "value": 100}]},
        {"filters": [{"use": "eq1", "reject_fraction": 0.5}, {"use": "eq1", "value": 100}][1:]},
        # Before the planner, which sees what the filter leaves.
        {"filters": [{"use": "eq1", "reject_fraction": 0.3}, "leak"], "source": PAIRS,
         "part": "rewrite"},
    ],
)  # fmt: skip
def test_all_commands_count_the_same(
    write_recipe: WriteRecipe, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = generate(load_recipe(write_recipe(shard_size=3, **changes)), tmp_path / "run")
    counts = {
        stage: (count["ok"], count["rejected"], count["failed"]) for stage, count in funnel(run)
    }
    assert any(rejected for _, rejected, _ in counts.values())
    told = read_status(run)
    assert {name: row[:3] for name, row in records(told).items()} == {
        stage: row for stage, row in counts.items() if stage != "source"
    }
    assert told.accepted == list(counts.values())[-1][0]
    text = re.sub(r"<[^>]*>", "|", Path(write_gallery(run)).read_text())
    page = re.sub(r"<[^>]*>", "|", Path(write_survival_page(run)).read_text())
    for stage, row in counts.items():
        for shown in (text, page):
            assert re.search(rf"\|{stage}\|+" + r"\|+".join(map(str, row)), shown), stage
    if told.accepted:
        publish(run, tmp_path / "dataset")
        card = (tmp_path / "dataset" / "README.md").read_text()
        for stage, row in counts.items():
            assert f"| {stage} | {' | '.join(map(str, row))} |" in card
    # Another recipe's thresholds are shown as it would decide.
    other = read_status(run, load_recipe(tmp_path / "recipe.yaml", ["filters=[]"]))
    assert other.finished is None


def test_a_preview_of_other_thresholds_counts_as_they_decide(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(filters=[{"use": "eq1", "reject_fraction": 0.3}])
    run = generate(load_recipe(path), tmp_path / "run")
    for fraction, row in ((0.3, (5, 2)), (0.5, (4, 3)), (0.9, (1, 6))):
        other = load_recipe(path, [f"filters.0.reject_fraction={fraction}"])
        assert records(read_status(run, other))["score-eq1"][:2] == row


def test_one_is_no_plural(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(source={"use": "fake-source", "count": 1}))
    text = "\n".join(read_status(generate(recipe, tmp_path / "run")).lines())
    assert "1 record in 1 shard, the whole source" in text and "1 of 1 record accepted" in text


def test_a_recipe_tells_what_it_would_reuse(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = write_recipe(shard_size=3, filters=["no-op"])
    run = generate(load_recipe(path), tmp_path / "run")
    before = sorted(path for path in (tmp_path / "run").rglob("*") if path.name != "holder")
    told = read_status(run, load_recipe(path, ["pipeline.planner.target=cat"]))
    reused, todo = (3, 0, 0), (0, 0, 3)
    assert list(shards(told).values()) == [reused] * 4 + [todo] * 3
    assert records(told)["plan"] == (0, 0, 0, 7)
    # A threshold is no reason to compute anything.
    told = read_status(run, load_recipe(path, ["filters.0.min_changed=0.9"]))
    assert set(shards(told).values()) == {reused}
    after = sorted(path for path in (tmp_path / "run").rglob("*") if path.name != "holder")
    assert after == before

    other = load_recipe(path, ["source.count=8"])
    with pytest.raises(RunError, match="another source"):
        read_status(run, other)


def test_no_run_is_told_so(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe())
    for asked in (None, recipe):
        with pytest.raises(RunError, match="is not a run folder"):
            read_status(RunFolder(tmp_path / "nothing"), asked)
    with pytest.raises(RunError, match="is not a run folder"):
        superseded(RunFolder(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_the_process_at_work_is_named(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = generate(load_recipe(write_recipe()), tmp_path / "run")
    code = """if True:
        import sys
        from reasonpix.core.remote_storage import open_storage
        with open_storage(sys.argv[1]).lock():
            print("held", flush=True)
            sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert f"process {other.pid} on" in (read_status(run).holder or "")
        with pytest.raises(RunError, match=f"process {other.pid}"):
            clean(run, [])
        other.communicate()
    assert read_status(run).holder is None


def test_clean_removes_what_is_superseded_and_nothing_else(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path, out = write_recipe(filters=["no-op"]), tmp_path / "run"
    run = generate(load_recipe(path), out)
    first = {folder.name for folder in (out / "stages").iterdir()}
    assert read_status(run).superseded == {}
    generate(load_recipe(path, ["pipeline.planner.target=cat"]), out)
    sizes = dict(read_status(run).superseded)
    assert [name.rpartition("-")[0] for name in sizes] == ["edit", "plan", "score-no-op"]
    assert sizes.keys() <= first
    for folder, size in sizes.items():
        assert size == sum(it.stat().st_size for it in (out / "stages" / folder).iterdir())
    ended = [(o.status, o.sample.instruction) for o in read_outcomes(run)]

    # Only what was agreed to, and no folder that is current, whoever asks for it.
    [edit, *_] = sizes
    current = {folder.name for folder in (out / "stages").iterdir()} - sizes.keys()
    clean(run, [edit, *current])
    assert list(read_status(run).superseded) == list(sizes)[1:]
    draft = out / "stages" / "source" / ".000000.parquet.4.tmp"
    draft.write_bytes(b"torn")
    clean(run, sizes)
    assert {folder.name for folder in (out / "stages").iterdir()} == current
    assert not draft.exists()
    assert [(o.status, o.sample.instruction) for o in read_outcomes(run)] == ended


def test_without_a_list_of_current_stages_nothing_is_superseded(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = generate(load_recipe(write_recipe()), out)
    before = sorted((out / "stages").rglob("*"))
    (out / "stages.json").unlink()
    with pytest.raises(RunError, match=r"stages\.json cannot be read"):
        clean(run, [folder.name for folder in (out / "stages").iterdir()])
    assert sorted((out / "stages").rglob("*")) == before
