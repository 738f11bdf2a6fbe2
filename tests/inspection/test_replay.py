"""A record that is recomputed stage by stage, and what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from reasonpix.core.images import encode_png
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import Row
from reasonpix.inspection.lineage import trace_record
from reasonpix.inspection.replay import replay_lines, replay_record
from tests.conftest import WriteRecipe
from tests.inspection.conftest import asked


def test_replay_gives_every_stage_again(
    parrot: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    filters = ["no-op", "regrounded", {"use": "eq1", "reject_fraction": 0.3}]
    path = write_recipe(planner=parrot, filters=filters, shard_size=3)
    run = generate(load_recipe(path), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.parquet")}
    count = asked(tmp_path)
    told, replayed = replay_record(run, "5")
    assert [it.stage for it in replayed] == [step.stage for step in told.steps]
    assert all(it.is_identical for it in replayed)
    assert "9 of 9 stages are identical, byte for byte" in "\n".join(replay_lines(replayed))
    assert asked(tmp_path) == count
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.parquet")} == before


@pytest.mark.usefixtures("trial")
@pytest.mark.parametrize("native_id", ["0", "1", "2", "3"])
def test_what_went_wrong_goes_wrong_again(
    native_id: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(
        source={"use": "trial-source", "captions": ["torn", "unlisted", "a giant", "a grey"]},
        captioner=None,
        extractor="trial-extractor",
        grounder="trial-grounder",
        editor="trial-editor",
    )
    run = generate(load_recipe(path), tmp_path / "run")
    told, replayed = replay_record(run, native_id)
    assert told.status == "failed"
    assert all(it.is_identical for it in replayed)
    assert len(replayed) == sum(step.status != "not reached" for step in told.steps)


def test_what_differs_is_told(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = generate(load_recipe(write_recipe(filters=["no-op"])), tmp_path / "run")
    [shard] = run.shards()
    folders = {path.name.rpartition("-")[0]: path.name for path in
               (tmp_path / "run" / "stages").iterdir() if "-" in path.name}  # fmt: skip

    def change(stage: str, changed: Callable[[Row], Row]) -> None:
        rows = run.read(folders[stage], shard)
        run.write(folders[stage], shard, [changed(rows[0]), *rows[1:]])

    def repaint(row: Row) -> Row:
        image = Image.new("RGB", (32, 32), (200, 40, 40))
        image.putpixel((0, 0), (0, 40, 40))
        return row._replace(image=encode_png(image))

    change("caption", lambda row: row._replace(output='{"text": "a fly"}'))
    change("edit", repaint)
    change("score-no-op", lambda row: row._replace(status="rejected", reason="no", output=""))
    told, replayed = replay_record(run, "0")
    differences = {it.stage: it.differences for it in replayed if not it.is_identical}
    # From each stage's stored input: the extractor was given the fly, and finds no rabbit in it.
    assert differences["caption"] == ['output.text was "a fly", is "a bee and a rabbit"']
    assert differences["extract"][0].startswith("output.entities was [")
    assert differences["edit"][0].startswith("image differs in ")
    assert differences["score-no-op"][:2] == [
        "status was 'rejected', is 'ok'",
        "reason was 'no', is ''",
    ]
    assert told.status == "rejected"
    assert trace_record(run, "1").status == "accepted"
    assert all(it.is_identical for it in replay_record(run, "1")[1])
    text = "\n".join(replay_lines(replayed))
    assert "caption: differs" in text and "read: identical" in text


def test_pixels_that_differ_are_counted(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = generate(load_recipe(write_recipe()), tmp_path / "run")
    [shard] = run.shards()
    [folder] = [path.name for path in (tmp_path / "run" / "stages").glob("edit-*")]
    rows = run.read(folder, shard)
    image = next(read_outcomes(run)).sample.edited_image()
    red, green, blue = image.getpixel((3, 4))
    image.putpixel((3, 4), (red, green, blue - 9))
    run.write(folder, shard, [rows[0]._replace(image=encode_png(image)), *rows[1:]])
    [edit] = [it for it in replay_record(run, "0")[1] if not it.is_identical]
    assert edit.differences == ["image differs in 1 of 1024 pixels, by 9 of 255 at most"]
