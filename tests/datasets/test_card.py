"""The card of a dataset: every claim of it, checked against the run."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from reasonpix.datasets.publishing import publish
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import outcome_counts
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.plugin.weights import digest
from tests.conftest import Distribution, WriteRecipe

FILTERS = ["no-op", {"use": "eq1", "reject_fraction": 0.3}]

MODEL = """
from pydantic import Field

from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Caption
from reasonpix.plugin.components import Captioner, ModelOptions


class WeighedOptions(ModelOptions):
    model: str = Field("ada/captioner", description="Never read")


class Weighed(Captioner[WeighedOptions]):
    "Gives every image the same caption."

    name = "weighed"
    Options = WeighedOptions

    def caption(self, images):
        return [Caption(text="a bee and a rabbit") for _ in images]


@hookimpl
def captioners():
    return [Weighed]
"""


@pytest.fixture
def weighed(distribution: Distribution) -> Path:
    site = distribution("weighed", {"weighed": "weighed"}, weighed=MODEL)
    metadata = site / "weighed-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "License-Expression: BSD-3-Clause\n")
    return site


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Seven records of which the two with the smallest change are rejected."""
    return generate(load_recipe(write_recipe(shard_size=3, filters=FILTERS)), tmp_path / "run")


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    """The head and the body of a dataset's card."""
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def table(body: str, section: str) -> list[list[str]]:
    """The lines of a section's tables, without heads."""
    text = body.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, line in enumerate(lines) if line[0] == "---"]
    return [line for i, line in enumerate(lines) if i not in rules and i + 1 not in rules]


def test_the_head_is_what_the_hub_reads(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "dataset")
    head, body = parts(tmp_path / "dataset")
    assert head["size_categories"] == ["n<1K"]
    assert head["task_categories"] == ["image-to-image"]
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "splits" not in head["dataset_info"]
    features = {one["name"]: one for one in head["dataset_info"]["features"]}
    assert features["edited_image"]["dtype"] == "image"
    assert "license" not in head  # nobody told that of the images
    assert "5 triples of input image" in body


def test_every_form_names_the_files_that_datasets_reads(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "dataset", "instruct-pix2pix")
    head, _ = parts(tmp_path / "dataset")
    [config] = head["configs"]
    [files] = config["data_files"]
    read = {path for pattern in files["path"] for path in (tmp_path / "dataset").glob(pattern)}
    assert len(read) == 1 + 2 * 5
    assert "viewer" not in head


def test_it_tells_what_came_through_and_why_the_others_did_not(
    run: RunFolder, tmp_path: Path
) -> None:
    publish(run, tmp_path / "dataset")
    _, body = parts(tmp_path / "dataset")
    told = table(body, "Records by stage")
    assert told == [
        [stage, *(str(counts[status]) for status in ("ok", "rejected", "failed"))]
        for stage, counts in outcome_counts(run).stages
    ]
    assert told[-1] == ["score-eq1", "5", "2", "0"]
    assert re.search(r"^- score-eq1: 2 rejected, such as: distance 0\.\d+", body, re.MULTILINE)


def test_it_tells_filters_their_thresholds_and_what_each_rejected(
    run: RunFolder, tmp_path: Path
) -> None:
    publish(run, tmp_path / "dataset")
    _, body = parts(tmp_path / "dataset")
    assert table(body, "Filters") == [
        ["no-op", "tolerance=12, min_changed=0.1", "7", "0"],
        ["eq1", "reject_fraction=0.3", "5", "2"],
    ]


def test_it_tells_the_components_and_their_packages(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "dataset")
    _, body = parts(tmp_path / "dataset")
    version = re.findall(r"^# reasonpix (\S+)$", body, re.MULTILINE)
    assert len(version) == 1
    made = table(body, "Components")
    assert ["planner", "fake-planner", f"reasonpix {version[0]}", "–"] in made
    assert [line[0] for line in made] == [
        "source", "captioner", "extractor", "grounder", "planner", "editor", "filter", "filter"
    ]  # fmt: skip
    assert table(body, "Licences")[-1] == ["package reasonpix", "Apache-2.0"]


def test_the_recipe_makes_the_run_again(
    run: RunFolder, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    publish(run, tmp_path / "dataset")
    _, body = parts(tmp_path / "dataset")
    text = body.split("```yaml\n")[1].split("```")[0]
    assert "shard_size" not in text
    (tmp_path / "again.yaml").write_text(text)
    again = generate(load_recipe(tmp_path / "again.yaml"), tmp_path / "again")
    publish(again, tmp_path / "other")
    for name in ("README.md", "data/train-00000.parquet"):
        assert (tmp_path / "other" / name).read_bytes() == (
            tmp_path / "dataset" / name
        ).read_bytes()


def test_a_part_of_the_source_is_made_again_by_its_limit(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(shard_size=3, filters=FILTERS)
    for name, limit, planned in (
        ("some", 5, "5 records were planned, and the source may hold more."),
        ("one", 1, "1 record was planned, and the source may hold more."),
        ("every", math.inf, "7 records were planned, all that the source holds."),
    ):
        run = generate(load_recipe(path), tmp_path / name, limit)
        publish(run, tmp_path / f"of-{name}")
        _, body = parts(tmp_path / f"of-{name}")
        recipe = body.split("## Recipe\n")[1]
        assert planned in recipe
        commands = re.findall(r"`reasonpix generate recipe.yaml --out DIR --limit (\d+)`", recipe)
        assert commands == ([] if limit == math.inf else [str(limit)])
    assert "1 triple of input image" in parts(tmp_path / "of-one")[1]
    (tmp_path / "again.yaml").write_text(
        (tmp_path / "of-some/README.md").read_text().split("```yaml\n")[1].split("```")[0]
    )
    again = generate(load_recipe(tmp_path / "again.yaml"), tmp_path / "again", 5)
    publish(again, tmp_path / "of-again")
    for name in ("README.md", "data/train-00000.parquet"):
        same = (tmp_path / "of-again" / name).read_bytes()
        assert same == (tmp_path / "of-some" / name).read_bytes()


def make(
    write_recipe: WriteRecipe, tmp_path: Path, **captioner: object
) -> tuple[dict[str, Any], str]:
    images = tmp_path / "images"
    if not images.exists():
        images.mkdir()
        for number in range(2):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(images / f"{number}.png")
    (images / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nMine.\n")
    source = {"use": "image-folder", "path": str(images)}
    recipe = write_recipe(source=source, captioner={"use": "weighed", **captioner})
    count = len(list(tmp_path.iterdir()))
    run = generate(load_recipe(recipe), tmp_path / f"run{count}")
    publish(run, tmp_path / f"dataset{count}")
    return parts(tmp_path / f"dataset{count}")


def test_weights_in_a_folder_are_told_by_their_digest_and_licence(
    weighed: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "README.md").write_text("---\nlicense: cc-by-4.0\ntags: [x]\n---\n# It\n")
    head, body = make(write_recipe, tmp_path, model=str(model))
    assert ["captioner", "weighed", "weighed 1.0", str(model)] in table(body, "Components")
    assert [str(model), "–", digest(model)] in table(body, "Components")
    assert table(body, "Licences")[:2] == [["images", "cc-by-4.0"], [str(model), "cc-by-4.0"]]
    assert ["package weighed", "BSD-3-Clause"] in table(body, "Licences")
    assert head["license"] == "cc-by-4.0"  # of all that it is made of
    (model / "README.md").write_text("---\nlicense: OpenRAIL\n---\n")
    head, body = make(write_recipe, tmp_path, model=str(model))
    assert head["license"] == ["cc-by-4.0", "openrail"]
    (model / "README.md").write_text("# It\n\nNothing of licences.\n")
    head, body = make(write_recipe, tmp_path, model=str(model))
    assert [str(model), f"see {model}"] in table(body, "Licences")
    assert "license" not in head


def test_weights_of_the_hub_are_told_by_their_revision_and_their_cached_card(
    weighed: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    revision = hashlib.sha1(b"revision").hexdigest()
    head, body = make(write_recipe, tmp_path, revision=revision, cache_dir=str(tmp_path / "hub"))
    assert ["ada/captioner", revision, "–"] in table(body, "Components")
    assert ["ada/captioner", "see ada/captioner"] in table(body, "Licences")
    assert "license" not in head
    snapshot = tmp_path / "hub" / "models--ada--captioner" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    _, body = make(write_recipe, tmp_path, revision=revision, cache_dir=str(tmp_path / "hub"))
    assert ["ada/captioner", "mit"] in table(body, "Licences")
    _, body = make(write_recipe, tmp_path)
    assert ["ada/captioner", "not named", "–"] in table(body, "Components")


def test_where_and_how_fast_it_ran_is_not_told(
    weighed: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    cards = [
        make(write_recipe, tmp_path, batch_size=size, device=device, cache_dir=cache)
        for size, device, cache in ((1, "cpu", None), (4, "auto", str(tmp_path / "cache")))
    ]
    assert cards[0] == cards[1]
    assert "batch_size" not in cards[0][1]


def test_a_prompt_is_told_by_its_digest(
    distribution: Distribution, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = """
import json
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.llm.types import Completion
from reasonpix.llm.planner import LLMPlanner, LLMPlannerOptions


class Parrot(LLMPlanner[LLMPlannerOptions]):
    "Plans the same for every image."

    name = "parrot"

    def complete(self, conversations):
        plan = {"selected": "bee", "target": "pear", "selected_synonyms": [],
                "target_synonyms": [], "instruction": "Something sweet would be nice."}
        return [Completion(text=json.dumps(plan)) for _ in conversations]


@hookimpl
def planners():
    return [Parrot]
"""
    distribution("parrot", {"parrot": "parrot"}, parrot=source)
    run = generate(load_recipe(write_recipe(planner="parrot")), tmp_path / "run")
    publish(run, tmp_path / "dataset")
    _, body = parts(tmp_path / "dataset")
    from importlib.resources import files

    built_in = files("reasonpix.llm").joinpath("templates/replace.yaml").read_bytes()
    assert ["plan", hashlib.sha256(built_in).hexdigest()] in table(body, "Components")


def test_a_plugin_that_is_gone_is_no_hindrance(
    weighed: Path, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(write_recipe, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # a path of its own: no cached list of plugins
    import sys

    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(weighed)])
    run = next(path for path in tmp_path.iterdir() if path.name.startswith("run"))
    publish(RunFolder(run), tmp_path / "dataset")
    _, body = parts(tmp_path / "dataset")
    assert ["captioner", "weighed", "?", "ada/captioner"] in table(body, "Components")
