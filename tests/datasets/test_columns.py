"""The columns of published datasets, as the `datasets` library gives them, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reasonpix.datasets.columns import FEATURES, columns_of, part_of, score_columns
from reasonpix.datasets.formats import open_reader
from reasonpix.datasets.publishing import publish
from reasonpix.errors import RunError, SourceError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import StageEntry, read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import Distribution, WriteRecipe

PAIRS = {
    "use": "fake-source",
    "count": 4,
    "caption": "a square",
    "edited_caption": "a square with a hole",
    "instruction": "make a hole",
}


@pytest.fixture
def rewritten(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    recipe = write_recipe("one.yaml", source=PAIRS, filters=["leak", "eq1"], part="rewrite")
    recipe.write_text(recipe.read_text().replace("- eq1", "- {use: eq1, value: 0.0001}"))
    return generate(load_recipe(recipe), tmp_path / "rewritten")


@pytest.fixture
def replaced(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    filters = ["no-op", {"use": "eq1", "reject_fraction": 0.3}]
    return generate(load_recipe(write_recipe(filters=filters)), tmp_path / "replaced")


LOADED = """if True:
    import datasets, json, sys
    datasets.disable_progress_bars()

    def colour(cell, at):
        return cell.convert("RGB").getpixel(at)

    def rows(folder):
        for row in datasets.load_dataset(folder, split="train"):
            facts = row.get("json") or row
            before = row.get("input_image") or row["input.png"]
            after = row.get("edited_image") or row["edited.png"]
            scores = {name: facts[name] for name in facts if name.startswith("score_")}
            yield [colour(before, (16, 16)), colour(after, (16, 16)), facts["edit_prompt"],
                   facts["record_id"], facts["part"], facts["candidates"], facts["box"], scores]

    print(json.dumps({folder: list(rows(folder)) for folder in sys.argv[1:]}))
"""


def elsewhere(code: str, folder: Path, *arguments: str) -> Any:
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_form_gives_input_image_edited_image_and_instruction(
    rewritten: RunFolder, replaced: RunFolder, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    forms = ("hf", "webdataset", "instruct-pix2pix")
    for run in (rewritten, replaced):
        for form in forms:
            publish(run, tmp_path / f"{run.name}-{form}", form)
    names = [f"{run.name}-{form}" for run in (rewritten, replaced) for form in forms]
    loaded = elsewhere(LOADED, tmp_path, *names)
    for run in (rewritten, replaced):
        known = [outcome for outcome in read_outcomes(run) if outcome.status == "ok"]
        assert len(known) >= 4
        columns = columns_of(run)
        for form in forms:
            for row, outcome in zip(loaded[f"{run.name}-{form}"], known, strict=True):
                before, after, prompt, record_id, part, candidates, box, scores = row
                sample = outcome.sample
                for pixel, image in ((before, sample.image()), (after, sample.edited_image())):
                    expected = image.getpixel((16, 16))
                    assert isinstance(expected, tuple)
                    slack = 6 if form == "instruct-pix2pix" else 0  # JPEG
                    assert all(abs(a - b) <= slack for a, b in zip(pixel, expected, strict=True))
                assert before != after
                assert (prompt, record_id) == (sample.instruction, sample.record_id)
                assert part == columns.part == ("I" if run is rewritten else "III")
                assert (candidates is None) == (box is not None) == (run is replaced)
                assert scores == {columns.scores[name]: it for name, it in outcome.scores.items()}


CONCATENATED = """if True:
    import datasets, json
    parts = [datasets.load_dataset(folder, split="train") for folder in ("one", "two")]
    both = datasets.concatenate_datasets(parts)
    scores = {name: str(kind.dtype) for name, kind in both.features.items() if "score" in name}
    print(json.dumps([scores, both["part"][:], both["score_leak_leaks"][:],
                      both.filter(lambda row: (row["score_no_op_changed"] or 0) > 0.5).num_rows]))
"""


def test_parts_with_other_filters_can_be_concatenated(
    rewritten: RunFolder, replaced: RunFolder, tmp_path: Path
) -> None:
    """Scores are numbers, each in its column; what a part did not measure is null."""
    pytest.importorskip("datasets")
    publish(rewritten, tmp_path / "one")
    publish(replaced, tmp_path / "two")
    kinds, parts, leaks, changed = elsewhere(CONCATENATED, tmp_path)
    assert set(kinds.values()) == {"float64"}
    assert {"score_leak_leaks", "score_eq1_distance", "score_no_op_changed"} <= set(kinds)
    assert parts == ["I"] * 4 + ["III"] * 5
    assert leaks == [0.0] * 4 + [None] * 5
    assert changed == 5


@pytest.mark.parametrize("form", ["hf", "webdataset", "instruct-pix2pix"])
def test_our_readers_know_the_columns(replaced: RunFolder, tmp_path: Path, form: str) -> None:
    publish(replaced, tmp_path / "dataset", form)
    reader = open_reader("dataset", tmp_path, "train", None)
    assert set(FEATURES) <= set(reader.columns)
    reader.require(["part", "edit_prompt", "caption"])
    texts = [row for row in reader.texts(["part", "edit_prompt"]) if not isinstance(row, OSError)]
    assert texts == [{"part": "III", "edit_prompt": "Something else would look better there."}] * 5


def test_a_damaged_row_of_metadata_is_named(replaced: RunFolder, tmp_path: Path) -> None:
    publish(replaced, tmp_path / "dataset", "instruct-pix2pix")
    path = tmp_path / "dataset" / "metadata.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:]]))
    with pytest.raises(SourceError, match=r"dataset/metadata\.jsonl: cannot be read: line 3"):
        open_reader("dataset", tmp_path, "train", None)


@pytest.mark.parametrize(
    ("score", "column"),
    [
        ("no-op.changed", "score_no_op_changed"),
        ("eq1.distance", "score_eq1_distance"),
        ("my filter.a/b", "score_my_filter_a_b"),
    ],
)
def test_names_of_score_columns(score: str, column: str) -> None:
    assert score_columns([score]) == {score: column}


TWINS = """
from reasonpix.plugin import Options, Scorer, hookimpl


class First(Scorer):
    name = "a-b"
    Options = Options

    def score(self, edits, pipeline):
        return [{"c": 1.0} for _ in edits]

    def reject(self, scores):
        return [None] * len(scores)


class Second(First):
    name = "a"

    def score(self, edits, pipeline):
        return [{"b_c": 1.0} for _ in edits]


@hookimpl
def scorers():
    return [First, Second]
"""


def test_two_scores_do_not_share_a_column(
    distribution: Distribution, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    distribution("twins", {"a": "twins", "a-b": "twins"}, twins=TWINS)
    run = generate(load_recipe(write_recipe(filters=["a", "a-b"])), tmp_path / "run")
    with pytest.raises(RunError, match=r"a\.b_c and a-b\.c would share the column 'score_a_b_c'"):
        publish(run, tmp_path / "dataset")


@pytest.mark.parametrize(
    ("stages", "part"),
    [
        ({"caption": None, "rewrite": "gpt"}, "I"),
        ({"caption": None, "plan": "gpt", "edit": "gligen"}, "II"),
        ({"caption": "blip2", "plan": "gpt", "edit": "gligen"}, "III"),
    ],
)
def test_parts_of_the_paper(stages: dict[str, str | None], part: str) -> None:
    assert part_of([StageEntry(name, "", {"use": use}, {}) for name, use in stages.items()]) == part
