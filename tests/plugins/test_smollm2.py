"""SmolLM2-135M for real: as the planner of a recipe, one line away from GPT-3.5, and by itself."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml
from reasonpix_local_llm import LocalLLM
from reasonpix_mini import world

from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.llm.tasks import REPLACE
from reasonpix.plugin import registry
from reasonpix.plugin.types import EditPlan, ReplaceRequest
from tests.plugins.test_local_llm import ask, assert_rows_are_independent, loaded, strict, texts
from tests.support.llm_server import served

PROMPT = {
    "system": "Answer with one JSON object.",
    "user": "Caption: $caption\nCategories: $categories",
    "repair": "$problem. Again.",
    "schema": strict(
        selected={"type": "string", "maxLength": 12},
        target={"type": "string", "maxLength": 12},
        selected_synonyms={"type": "array", "items": {"type": "string"}, "maxItems": 0},
        target_synonyms={"type": "array", "items": {"type": "string"}, "maxItems": 0},
        instruction={"type": "string", "maxLength": 40},
    ),
    "examples": [
        {
            "caption": "a horse in a meadow",
            "categories": ["horse", "meadow"],
            "answer": {
                "selected": "horse",
                "target": "cow",
                "selected_synonyms": [],
                "target_synonyms": [],
                "instruction": "The farm now earns its living with fresh milk.",
            },
        }
    ],
}


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """SmolLM2 unpacked for this module alone: half a gigabyte that pytest would keep."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", scratch)
        yield Path(scratch)


@pytest.fixture(scope="module")
def prompt(cache: Path) -> Path:
    path = cache / "replace.yaml"
    path.write_text(yaml.safe_dump(PROMPT, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def smollm2(prompt: Path) -> LocalLLM:
    weights = registry.checkpoint("mini/smollm2")
    assert weights is not None
    return loaded(weights, prompts={"replace": prompt}, max_tokens=50, temperature=0.7)


def test_smollm2_answers_what_it_knows(smollm2: LocalLLM) -> None:
    capital = strict(capital={"type": "string", "maxLength": 20})
    before = (
        "Answer with one JSON object.",
        "What is the capital of Italy?",
        '{"capital":"Rome"}',
    )
    asked = ask("What is the capital of France?", before=before, schema=capital)
    assert texts(smollm2.complete([asked])) == ['{"capital":"Paris"}']


def test_smollm2_answers_each_conversation_by_itself(smollm2: LocalLLM) -> None:
    requests = [
        ReplaceRequest(caption=scene.caption, categories=tuple(names), seed=index)
        for index in range(5)
        if (scene := world.scene("test", index))
        and (names := dict.fromkeys(placement.category for placement in scene.placements))
    ]
    asked = [smollm2.prompt(REPLACE).conversation(request) for request in requests]
    assert_rows_are_independent(smollm2, asked[:3])
    together = smollm2.complete(asked)
    for text in texts(together):
        jsonschema.validate(json.loads(text), PROMPT["schema"])
    assert len(set(texts(together))) == 5
    assert smollm2.complete(asked[:1]) == together[:1]
    assert smollm2.complete(asked[:1:-1])[::-1] == together[2:]
    # Through the planner: a repair turn for what is of no use, and a verdict for each.
    for request, plan in zip(requests[:2], smollm2.replace(requests[:2]), strict=True):
        if isinstance(plan, EditPlan):
            assert plan.selected in request.categories
        else:
            assert plan.status == "rejected"
            assert "even after a repair" in plan.reason


# The swap

RECIPE = """\
source: {{use: stickers, split: test, count: 3, captions: true}}
pipeline:
  extractor: spacy
  grounder: fake-grounder
  planner: {planner}
  editor: fake-editor
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as server:
        yield server.url


def computed(run: RunFolder) -> Counter[str]:
    """How many records each stage computed, by the run's own journal."""
    counts = Counter[str]()
    for line in run.journal():
        if "ok" in line:
            records = line["ok"] + line["rejected"] + line["failed"]
            counts[line["stage"].rpartition("-")[0]] += records
    return counts


def test_one_line_swaps_gpt_for_a_local_llm(url: str, prompt: Path, tmp_path: Path) -> None:
    gpt, local = tmp_path / "gpt.yaml", tmp_path / "local.yaml"
    gpt.write_text(
        RECIPE.format(planner=f"{{use: openai, model: gpt-3.5-turbo, base_url: '{url}'}}")
    )
    local.write_text(
        RECIPE.format(
            # A short prompt saves the test half a minute.
            planner=f"{{use: local-llm, model: mini/smollm2, prompts: {{replace: '{prompt}'}}}}"
        )
    )
    changes = [
        line
        for line in difflib.ndiff(gpt.read_text().splitlines(), local.read_text().splitlines())
        if line[:2] in ("- ", "+ ")
    ]
    assert [line[:11] for line in changes] == ["-   planner", "+   planner"]

    out = tmp_path / "run"
    run = generate(load_recipe(gpt), out)
    first = computed(run)
    assert [outcome.status for outcome in read_outcomes(run)] == ["ok"] * 3
    assert first == dict.fromkeys(["read", "caption", "extract", "ground", "plan", "edit"], 3)

    generate(load_recipe(local), out)
    # No image is read, no caption, entity or box computed again.
    again = computed(run) - first
    assert set(again) <= {"plan", "edit"} and again["plan"] == 3
    ended = list(read_outcomes(run))
    assert {(o.status, o.stage) for o in ended} <= {("ok", ""), ("rejected", "plan")}
    # A small model may write nothing usable; what it wrote is kept either way.
    assert all(o.reason for o in ended if o.status == "rejected")
