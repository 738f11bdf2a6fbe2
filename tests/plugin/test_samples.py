"""The edited caption of a sample is one and the same wherever it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from reasonpix.datasets.publishing import publish
from reasonpix.evaluation.benchmark_writer import build_benchmark
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.replace_stages import edit
from reasonpix.plugin import (
    Caption,
    Editor,
    EditPlan,
    EditRequest,
    Entity,
    Options,
    Sample,
    SourceItem,
    SourcePair,
)
from reasonpix.plugin.samples import Entities
from tests.conftest import WriteRecipe


class Recorder(Editor[Options]):
    """Keeps what it is asked, and edits nothing."""

    name = "recorder"

    def __init__(self) -> None:
        super().__init__(Options())
        self.asked: list[EditRequest] = []

    def edit(self, requests: Sequence[EditRequest]) -> list[Image.Image]:
        self.asked += requests
        return [request.image for request in requests]


@pytest.mark.parametrize(
    ("caption", "target", "expected"),
    [
        ("a bee near two bees", "The Unicorn", "a unicorn near two bees"),
        ("two knives and a knife", "scissors", "two knives and a pair of scissors"),
        ("A bee is on its flower.", "horses", "Horses are on their flower."),
        ("a tabby-cat in a street", "bench", "a bench in a street"),
    ],
)
def test_editor_dataset_and_benchmark_have_one_caption(
    caption: str, target: str, expected: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(
        source={"use": "fake-source", "count": 1},
        captioner={"use": "fake-captioner", "caption": caption},
        planner={"use": "fake-planner", "target": target},
    )
    run = generate(load_recipe(recipe), tmp_path / "run")
    [outcome] = read_outcomes(run)
    recorder = Recorder()
    edit([outcome.sample], recorder, 0)
    captions = [recorder.asked[0].edited_caption]
    for form in ("hf", "instruct-pix2pix"):
        publish(run, tmp_path / form, to=form)
    build_benchmark(run, tmp_path / "benchmark")
    for table in ("hf/data/train-00000.parquet", "benchmark/data/test-00000.parquet"):
        captions += pq.read_table(tmp_path / table)["edited_caption"].to_pylist()
    [prompt] = tmp_path.glob("instruct-pix2pix/*/prompt.json")
    captions.append(json.loads(prompt.read_text())["output"])
    assert captions == [expected] * 4


def sample(
    caption: str, selected: str, target: str, text: str = "", synonyms: Sequence[str] = ()
) -> Sample:
    item = SourceItem(native_id="", content="")
    entities = (Entity(category=selected, text=text),) if text else ()
    outputs = {
        "caption": Caption(text=caption),
        "extract": Entities(entities=entities),
        "plan": EditPlan(
            selected=selected, target=target, instruction="", synonyms=tuple(synonyms)
        ),
    }
    return Sample("", item, {}, outputs)


@pytest.mark.parametrize(
    ("caption", "text", "selected", "target", "edited"),
    [
        ("a bee and a rabbit", "a bee", "bee", "owl", "an owl and a rabbit"),
        ("An owl on a bee", "An owl", "owl", "bee", "A bee on a bee"),
        ("a beekeeper and a bee", "bee", "bee", "owl", "a beekeeper and an owl"),
        ("the big red bus", "the big red bus", "bus", "tram", "the big red tram"),
        ("a red cup and a blue cup", "a blue cup", "cup", "egg", "a red cup and a blue egg"),
        ("honey", "", "bee", "owl", "honey, with an owl"),
        ("butterflies fly", "butterflies", "butterfly", "owl", "butterflies and an owl fly"),
        ("two mice", "two mice", "mouse", "elf", "a mouse and an elf"),
    ],
)
def test_the_extracted_phrase_is_replaced(
    caption: str, text: str, selected: str, target: str, edited: str
) -> None:
    assert sample(caption, selected, target, text).edited_caption == edited


def test_synonyms_of_the_plan_are_looked_for() -> None:
    found = sample("a bike by a wall", "bicycle", "horse", synonyms=["bike", "stallion"])
    assert found.edited_caption == "a horse by a wall"


def test_a_pair_has_its_own_caption() -> None:
    pair = SourcePair(content="", caption="an owl", instruction="make it an owl")
    item = SourceItem(native_id="", content="", pair=pair)
    assert Sample("", item, {}, {"caption": Caption(text="a bee")}).edited_caption == "an owl"
    assert Sample("", SourceItem(native_id="", content=""), {}).edited_caption is None
