from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import WriteRecipe
from PIL import Image

from reasonpix.engine import generate
from reasonpix.errors import RunError
from reasonpix.images import encode_png
from reasonpix.outcomes import funnel, outcomes
from reasonpix.publish import publish
from reasonpix.recipe import load_recipe
from reasonpix.run import RunFolder

FILTERS = ["no-op", {"use": "eq1", "rank": 0.3}]


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Seven records of which the two with the smallest change are rejected."""
    return generate(load_recipe(write_recipe(shard_size=3, filters=FILTERS)), tmp_path / "run")


def rows(folder: Path) -> list[dict[str, object]]:
    return pq.read_table(folder / "data" / "train-00000.parquet").to_pylist()


def test_rows_hold_the_accepted_records(run: RunFolder, tmp_path: Path) -> None:
    assert publish(run, tmp_path / "dataset") == 5
    accepted = [outcome for outcome in outcomes(run) if outcome.status == "ok"]
    published = rows(tmp_path / "dataset")
    assert [row["record_id"] for row in published] == [o.sample.record_id for o in accepted]
    row, sample = published[0], accepted[0].sample
    assert row["input_image"] == {"bytes": encode_png(sample.image()), "path": None}
    assert row["edited_image"] == {"bytes": encode_png(sample.edited_image()), "path": None}
    assert row["edit_prompt"] == "Something else would look better there."
    assert (row["selected"], row["target"], row["caption"]) == ("bee", "pear", "a bee and a rabbit")
    assert row["box"] == [8.0, 8.0, 24.0, 24.0]
    assert row["source_id"] == sample.item.native_id
    scores = json.loads(str(row["scores"]))
    assert set(scores) == {"eq1.distance", "no-op.changed"}
    assert scores["no-op.changed"] == 1.0


def test_an_edit_is_the_input_outside_and_the_colour_inside(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "dataset")
    for row in rows(tmp_path / "dataset"):
        before, after = (
            np.asarray(Image.open(io.BytesIO(row[column]["bytes"])))  # type: ignore[index]
            for column in ("input_image", "edited_image")
        )
        assert (after[8:24, 8:24] == (200, 40, 40)).all()
        outside = np.ones(after.shape[:2], bool)
        outside[8:24, 8:24] = False
        assert (after[outside] == before[outside]).all()


def test_datasets_loads_it_with_images(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    publish(run, tmp_path / "dataset")
    code = """if True:
        import datasets, json
        data = datasets.load_dataset("dataset")
        train = data["train"]
        print(json.dumps([
            list(data), train.column_names, str(train.features["box"]),
            [[row["input_image"].getpixel((0, 0)), row["edited_image"].getpixel((9, 9))]
             for row in train],
        ]))
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    splits, columns, box, pixels = json.loads(done.stdout)
    assert splits == ["train"]
    assert columns[:3] == ["input_image", "edit_prompt", "edited_image"]
    assert columns[3:] == [
        "direct_instruction",
        "record_id",
        "source_id",
        "caption",
        "edited_caption",
        "candidates",
        "chosen",
        "selected",
        "target",
        "box",
        "scores",
    ]
    assert "float32" in box
    accepted = [o.sample.item.native_id for o in outcomes(run) if o.status == "ok"]
    assert pixels == [[[60 + int(i), 120, 200], [200, 40, 40]] for i in accepted]


def test_the_card_tells_what_came_through(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "dataset")
    card = (tmp_path / "dataset" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "5 triples of input image" in body
    told = re.findall(r"^\| (\S+) \| (\d+) \| (\d+) \| (\d+) \|$", body, re.MULTILINE)
    assert told == [
        (stage, *(str(counts[status]) for status in ("ok", "rejected", "failed")))
        for stage, counts in funnel(run)
    ]
    assert told[-1] == ("score-eq1", "5", "2", "0")
    assert "- score-eq1: 2 rejected" in body
    assert "| plan | fake-planner | target=pear |" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["pipeline"]["captioner"]["use"] == "fake-captioner"


def test_the_same_run_is_published_the_same(run: RunFolder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        publish(run, tmp_path / name)
    for file in ("README.md", "data/train-00000.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not re.search(r"\b20[2-9]\d-\d\d", (tmp_path / "one" / "README.md").read_text())


def test_an_existing_folder_is_left_alone(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    with pytest.raises(RunError, match="dataset exists; publish to a new folder"):
        publish(run, tmp_path / "dataset")
    assert list((tmp_path / "dataset").iterdir()) == []


def test_an_unfinished_run_is_refused(run: RunFolder, tmp_path: Path) -> None:
    next((run.root / "stages").glob("edit-*/000001.parquet")).unlink()
    with pytest.raises(RunError, match="not finished: stage edit lacks 1 of 3 shards; run "):
        publish(run, tmp_path / "dataset")
    (run.root / "stages.json").unlink()
    with pytest.raises(RunError, match=r"stages\.json cannot be read.*generate.* again"):
        publish(run, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_a_run_that_accepted_nothing_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    filters = [{"use": "eq1", "value": 100}]
    run = generate(load_recipe(write_recipe(filters=filters)), tmp_path / "run")
    with pytest.raises(RunError, match="accepted no sample; see `reasonpix gallery"):
        publish(run, tmp_path / "dataset")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run"]


def test_an_image_that_changed_is_not_published(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20), "navy").save(folder / "a.png")
    path = write_recipe(source={"use": "image-folder", "path": str(folder)})
    run = generate(load_recipe(path), tmp_path / "run")
    Image.new("RGB", (20, 20), "pink").save(folder / "a.png")
    with pytest.raises(RunError, match=r"a\.png: the file changed since the run was planned"):
        publish(run, tmp_path / "dataset")
    (folder / "a.png").unlink()
    with pytest.raises(RunError, match=r"a\.png: .*No such file"):
        publish(run, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()
