"""Preference pairs: the rows, their conversations, and what they say of how sure a choice is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from reasonpix.datasets.publishing import publish
from reasonpix.errors import RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.llm.prompts import Prompt
from reasonpix.llm.tasks import REWRITE
from reasonpix.plugin.samples import Sample
from reasonpix.plugin.types import RewriteRequest
from tests.conftest import Distribution, WriteRecipe

CHATTER = """
import json
from typing import ClassVar

from pydantic import Field

from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.llm.types import Completion
from reasonpix.llm.planner import LLMPlanner, LLMPlannerOptions


class ChatterOptions(LLMPlannerOptions):
    distinct: int = Field(3, description="How many candidates differ")
    first: bool = Field(False, description="Choose what stands first, in whatever order")


class Chatter(LLMPlanner[ChatterOptions]):
    "Writes candidates that differ by their number; chooses the highest, or the first shown."

    name = "chatter"
    Options: ClassVar = ChatterOptions

    def __init__(self, options):
        super().__init__(options)
        self.asked = {}

    def complete(self, conversations):
        return [Completion(text=json.dumps(self.say(one))) for one in conversations]

    def say(self, conversation):
        question = conversation.messages[-1].content
        if "revealing" in conversation.answer_schema["properties"]:
            number = conversation.seed % self.options.distinct
            return {"revealing": ["hole"], "instruction": f"Let it breathe at {number} o'clock."}
        shown = [line for line in question.splitlines() if "o'clock" in line]
        hours = [line.split(" o'clock")[0].split()[-1] for line in shown]
        return {"best": 1 if self.options.first else hours.index(max(hours)) + 1}


@hookimpl
def planners():
    return [Chatter]
"""

SOURCE = {
    "use": "fake-source",
    "count": 6,
    "caption": "a square",
    "edited_caption": "a square with a hole",
    "instruction": "make a hole",
}


def made(write_recipe: WriteRecipe, folder: Path, planner: object, **top: int) -> RunFolder:
    path = write_recipe("part1.yaml", source=SOURCE, planner=planner, part="rewrite")
    path.write_text("".join(f"{key}: {value}\n" for key, value in top.items()) + path.read_text())
    return generate(load_recipe(path), folder / "run")


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "data" / "train-00000.parquet").to_pylist()


def samples(run: RunFolder) -> list[Sample]:
    return [outcome.sample for outcome in read_outcomes(run) if outcome.status == "ok"]


def texts(sample: Sample) -> list[str]:
    assert sample.candidates is not None
    return [candidate.instruction for candidate in sample.candidates.candidates]


def asked(prompt: Prompt[Any, Any, Any]) -> list[dict[str, str]]:
    """The conversation about the pairs of `SOURCE`."""
    request = RewriteRequest(
        caption="a square", edited_caption="a square with a hole", instruction="make a hole", seed=5
    )
    return [turn.model_dump() for turn in prompt.conversation(request).messages]


@pytest.fixture
def chatter(distribution: Distribution) -> Path:
    return distribution("chatter", {"chatter": "chatter"}, chatter=CHATTER)


def test_a_row_for_each_distinct_candidate_that_was_not_chosen(
    chatter: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = made(write_recipe, tmp_path, "chatter", candidates=5)
    expected = []
    for sample in samples(run):
        best = sample.instruction
        rejected = [text for text in dict.fromkeys(texts(sample)) if text != best]
        expected += [(sample.record_id, best, text) for text in rejected]
    assert publish(run, tmp_path / "dataset", "preference") == len(expected)
    assert len(expected) > len({record_id for record_id, _, _ in expected}) > 2
    published = rows(tmp_path / "dataset")
    told = [
        (
            row["record_id"],
            json.loads(row["chosen"][0]["content"])["instruction"],
            json.loads(row["rejected"][0]["content"])["instruction"],
        )
        for row in published
    ]
    assert told == expected
    for row in published:
        assert [turn["role"] for turn in row["chosen"] + row["rejected"]] == ["assistant"] * 2
        assert (row["agreement"], row["chosen_votes"], row["rejected_votes"]) == (1.0, 2, 0)


def test_the_prompt_is_what_was_asked_and_the_answers_are_in_its_form(
    chatter: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = made(write_recipe, tmp_path, "chatter")
    publish(run, tmp_path / "dataset", "preference")
    prompt = Prompt(REWRITE)
    row = rows(tmp_path / "dataset")[0]
    assert row["prompt"] == asked(prompt)
    assert [turn["role"] for turn in row["prompt"]][:2] == ["system", "user"]
    assert "Direct instruction: make a hole" in row["prompt"][-1]["content"]
    examples = [t["content"] for t in row["prompt"] if t["role"] == "assistant"]
    for answer in (row["chosen"][0]["content"], row["rejected"][0]["content"]):
        # As the worked examples are written, so that a trained model goes on in their way.
        assert list(json.loads(answer)) == list(json.loads(examples[0]))
        assert ": " not in answer.partition("instruction")[0]
        read = REWRITE.read(
            RewriteRequest(caption="a", edited_caption="b", instruction="c", seed=0),
            REWRITE.answer.model_validate_json(answer),
        )
        assert read.instruction.startswith("Let it breathe")


def own_prompt(folder: Path) -> Path:
    """A prompt file that asks for the keys in the other order."""
    built_in = (
        Path(str(sys.modules["reasonpix"].__path__[0])) / "llm" / "templates" / "rewrite.yaml"
    )
    content = yaml.safe_load(built_in.read_text(encoding="utf-8"))
    content["system"] = "Write something indirect."
    content["schema"]["properties"] = dict(reversed(content["schema"]["properties"].items()))
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_prompt_of_the_planner_s_own_is_the_one_that_is_told(
    chatter: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = own_prompt(tmp_path)
    planner = {"use": "chatter", "prompts": {"rewrite": str(path)}}
    run = made(write_recipe, tmp_path, planner)
    publish(run, tmp_path / "dataset", "preference")
    row = rows(tmp_path / "dataset")[0]
    assert row["prompt"] == asked(Prompt(REWRITE, path))
    assert row["prompt"][0]["content"] == "Write something indirect."
    assert row["chosen"][0]["content"].startswith('{"instruction":"Let it breathe')
    path.write_text(path.read_text() + "# edited\n")
    with pytest.raises(RunError, match=r"own\.yaml is not the prompt P_gen of .*run"):
        publish(run, tmp_path / "other", "preference")
    path.unlink()
    with pytest.raises(RunError, match=r"the prompt P_gen of .*own\.yaml: cannot be read"):
        publish(run, tmp_path / "other", "preference")
    assert not (tmp_path / "other").exists()


def test_a_planner_that_is_no_llm_gets_the_built_in_prompt(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = made(write_recipe, tmp_path, "fake-planner")
    publish(run, tmp_path / "dataset", "preference")
    row = rows(tmp_path / "dataset")[0]
    assert row["prompt"] == asked(Prompt(REWRITE))
    assert json.loads(row["chosen"][0]["content"])["revealing"] == []


def test_ties_are_told(chatter: Path, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = made(write_recipe, tmp_path, {"use": "chatter", "first": True})
    publish(run, tmp_path / "dataset", "preference")
    published = rows(tmp_path / "dataset")
    ties = [row for row in published if row["chosen_votes"] == row["rejected_votes"]]
    several = {sample.record_id for sample in samples(run) if len(set(texts(sample))) > 1}
    assert {row["record_id"] for row in ties} == several
    assert {(row["agreement"], row["chosen_votes"]) for row in published} == {(0.5, 1)}
    card = (tmp_path / "dataset" / "README.md").read_text()
    assert f"The pairs come from {len(several)} samples." in card
    assert f"Ties: {len(ties)}, where" in card


def test_what_was_asked_once_has_no_agreement(
    chatter: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = made(write_recipe, tmp_path, "chatter", selection_orders=1)
    publish(run, tmp_path / "dataset", "preference")
    published = rows(tmp_path / "dataset")
    assert {(row["agreement"], row["chosen_votes"]) for row in published} == {(None, 1)}
    card = (tmp_path / "dataset" / "README.md").read_text()
    several = len({row["record_id"] for row in published})
    assert f"P_select answered in one order only for {several} samples" in card
    assert "ties" not in card


def test_what_had_no_choice_gives_no_pair(
    chatter: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = made(write_recipe, tmp_path, {"use": "chatter", "distinct": 1})
    assert len(samples(run)) == 6
    with pytest.raises(
        RunError, match="6 accepted samples, but none gives a pair: 6 samples had only equal"
    ):
        publish(run, tmp_path / "dataset", "preference")
    assert not (tmp_path / "dataset").exists()


def test_a_single_candidate_is_not_blamed_on_the_planner(
    chatter: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = made(write_recipe, tmp_path, "chatter", candidates=1, selection_orders=1)
    with pytest.raises(
        RunError, match=r"none gives a pair: 6 samples had a single candidate .set `candidates: 4`"
    ):
        publish(run, tmp_path / "dataset", "preference")


def test_samples_without_a_pair_are_counted_on_the_card(
    chatter: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = made(write_recipe, tmp_path, {"use": "chatter", "distinct": 2}, candidates=2)
    equal = sum(len(set(texts(sample))) == 1 for sample in samples(run))
    assert 0 < equal < 6
    publish(run, tmp_path / "dataset", "preference")
    card = (tmp_path / "dataset" / "README.md").read_text()
    assert f"{equal} sample{'s' * (equal > 1)} had only equal candidates" in card


def test_a_run_that_replaces_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = generate(load_recipe(write_recipe()), tmp_path / "run")
    with pytest.raises(RunError, match=r"has no candidates: preference pairs need a run that"):
        publish(run, tmp_path / "dataset", "preference")
    assert not (tmp_path / "dataset").exists()


def test_datasets_loads_conversations(
    chatter: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    run = made(write_recipe, tmp_path, "chatter")
    publish(run, tmp_path / "dataset", "preference")
    code = """if True:
        import datasets, json
        data = datasets.load_dataset("dataset")["train"]
        # What TRL takes for conversational preference data with an explicit prompt.
        for row in data:
            for column in ("prompt", "chosen", "rejected"):
                assert isinstance(row[column], list)
                assert all(set(turn) == {"role", "content"} for turn in row[column])
        print(json.dumps([data.column_names, data[0]]))
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    columns, row = json.loads(done.stdout)
    assert columns[:3] == ["prompt", "chosen", "rejected"]
    assert row == rows(tmp_path / "dataset")[0]
