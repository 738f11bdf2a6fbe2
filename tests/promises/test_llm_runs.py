"""Runs that ask an LLM: what they cost, what is asked again, and what is not."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml

from reasonpix.errors import CostLimit, RecipeError, RunError
from reasonpix.generation.engine.engine import Progress, generate
from reasonpix.generation.outcomes import funnel, read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.generation.statistics import spending
from reasonpix.inspection.cost_estimate import Estimate, estimate_cost
from reasonpix.llm.prompts import Prompt
from reasonpix.llm.tasks import REPLACE
from tests.conftest import Distribution, Shell, WriteRecipe

PARROT = """
import json
import threading
from typing import ClassVar

from pydantic import Field

from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.llm.types import Completion
from reasonpix.llm.planner import LLMPlanner, LLMPlannerOptions


class ParrotOptions(LLMPlannerOptions):
    fingerprint_exclude: ClassVar = LLMPlannerOptions.fingerprint_exclude | {"log", "at_once"}
    target: str = Field("pear", description="What it always plans")
    log: str = Field("asked.txt", description="Where it notes what it was asked")
    at_once: int = Field(1, description="Calls under way at once")


class Parrot(LLMPlanner[ParrotOptions]):
    "Always answers the same."

    name = "parrot"
    Options = ParrotOptions
    max_answer_tokens = 30
    lock = threading.Lock()

    @property
    def concurrency(self):
        return self.options.at_once

    def complete(self, conversations):
        with self.lock, open(self.options.log, "a") as log:
            for conversation in conversations:
                log.write(conversation.messages[-1].content.splitlines()[0] + "\\n")
        return [self.say(conversation) for conversation in conversations]

    def say(self, conversation):
        fields = conversation.answer_schema["properties"]
        sweet = "Something sweet, please."
        if "target" in fields:
            answer = {"selected": "bee", "target": self.options.target, "instruction": sweet,
                      "selected_synonyms": [], "target_synonyms": []}
        elif "best" in fields:
            answer = {"best": 1}
        else:
            answer = {"revealing": [], "instruction": f"{sweet} {conversation.seed % 1000}"}
        return Completion(text=json.dumps(answer), prompt_tokens=1000, completion_tokens=20)


@hookimpl
def planners():
    return [Parrot]
"""


@pytest.fixture
def parrot(distribution: Distribution) -> Path:
    return distribution("parrot", {"parrot": "parrot_plugin"}, parrot_plugin=PARROT)


PRICE = {"prompt": 1.0, "completion": 10.0}
CALL = (1000 * 1.0 + 20 * 10.0) / 1e6


@pytest.fixture
def path(parrot: Path, write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    planner = {"use": "parrot", "log": str(tmp_path / "asked.txt"), "price": PRICE}
    return write_recipe(planner=planner, shard_size=3)


def asked(tmp_path: Path) -> int:
    log = tmp_path / "asked.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


def computed(run: RunFolder) -> list[str]:
    return [line["stage"].rpartition("-")[0] for line in run.journal() if "ok" in line]


def test_every_answer_is_kept_and_paid_for_once(path: Path, tmp_path: Path) -> None:
    run = generate(load_recipe(path), tmp_path / "run")
    assert asked(tmp_path) == 7
    spent = spending(run)
    assert (spent.answers, spent.prompt_tokens, spent.completion_tokens) == (7, 7000, 140)
    assert spent.cost == pytest.approx(7 * CALL)
    assert set(spent.by_task) == {"replace"}

    # A reader of answers that was mended computes the stage anew, and asks nothing.
    [plans] = (tmp_path / "run" / "stages").glob("plan-*")
    before = [shard.read_bytes() for shard in sorted(plans.iterdir())]
    for shard in plans.iterdir():
        shard.unlink()
    generate(load_recipe(path), tmp_path / "run")
    assert [shard.read_bytes() for shard in sorted(plans.iterdir())] == before
    assert asked(tmp_path) == 7


@pytest.mark.parametrize(
    "wrapped",
    [
        "<think>A {{pear}}, or {0}?</think>\nIt is {{selected}}:\n{0}",
        "```json\n{0}\n```\nThe {{target}} goes well with the {{selected}}.",
        '{{"thought": "a pear is sweet"}} {{"answer": {0}}}',
    ],
)
def test_paid_answers_that_were_rejected_become_records_without_a_request(
    path: Path, tmp_path: Path, wrapped: str
) -> None:
    run = generate(load_recipe(path), tmp_path / "run")
    [plans] = (tmp_path / "run" / "stages").glob("plan-*")
    before = [shard.read_bytes() for shard in sorted(plans.iterdir())]
    with sqlite3.connect(tmp_path / "run" / "llm.sqlite") as answers:
        for key, text in answers.execute("SELECT key, text FROM answers").fetchall():
            answers.execute(
                "UPDATE answers SET text = ? WHERE key = ?", (wrapped.format(text), key)
            )
    answers.close()
    for shard in plans.iterdir():  # an earlier version rejected them: its results are stale
        shard.unlink()
    generate(load_recipe(path), tmp_path / "run")
    assert [shard.read_bytes() for shard in sorted(plans.iterdir())] == before
    assert asked(tmp_path) == spending(run).answers == 7


def test_raw_answers_can_be_read(path: Path, tmp_path: Path) -> None:
    generate(load_recipe(path), tmp_path / "run")
    rows = sqlite3.connect(tmp_path / "run" / "llm.sqlite").execute("SELECT text FROM answers")
    assert {json.loads(text)["target"] for (text,) in rows} == {"pear"}


def test_another_planner_recomputes_no_caption_entity_or_box(path: Path, tmp_path: Path) -> None:
    run = generate(load_recipe(path), tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    generate(load_recipe(path, ["pipeline.planner=fake-planner"]), tmp_path / "run")
    assert sorted(computed(run)) == ["edit"] * 3 + ["plan"] * 3


def test_another_prompt_recomputes_the_stage_that_asks_by_it(path: Path, tmp_path: Path) -> None:
    run = generate(load_recipe(path), tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    built_in = Path(__file__).parents[2] / "reasonpix" / "llm" / "templates" / "replace.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(built_in.read_text().replace("system: |\n", "system: |\n  Be brief.\n", 1))
    generate(load_recipe(path, [f"pipeline.planner.prompts={{replace: {mine}}}"]), tmp_path / "run")
    assert sorted(computed(run)) == ["edit"] * 3 + ["plan"] * 3
    assert asked(tmp_path) == 14

    # The prompt of another task is not asked here.
    (tmp_path / "run" / "journal.jsonl").unlink()
    other = tmp_path / "other.yaml"
    other.write_text(built_in.with_name("select.yaml").read_text() + "\n")
    generate(load_recipe(path, [f"pipeline.planner.prompts={{select: {other}}}"]), tmp_path / "run")
    assert computed(run) == []


def test_a_prompt_that_is_edited_during_a_run_makes_no_results_of_the_old_one(
    path: Path, tmp_path: Path
) -> None:
    built_in = Path(__file__).parents[2] / "reasonpix" / "llm" / "templates" / "replace.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_bytes(built_in.read_bytes())

    def edit(progress: Progress) -> None:
        if progress.stage == "ground":
            mine.write_text(built_in.read_text() + "\n")

    recipe = load_recipe(path, [f"pipeline.planner.prompts={{replace: {mine}}}"])
    with pytest.raises(RunError, match="'replace' was edited while the run was in progress"):
        generate(recipe, tmp_path / "run", report=edit)
    assert asked(tmp_path) == 0
    run = generate(recipe, tmp_path / "run")
    assert dict(funnel(run))["plan"] == {"ok": 7}


def test_many_under_way_change_nothing(path: Path, tmp_path: Path) -> None:
    runs = [
        generate(
            load_recipe(path, [f"pipeline.planner.at_once={n}", "source.count=40"]),
            tmp_path / f"run{n}",
        )
        for n in (1, 3)
    ]
    files = [
        {p.relative_to(str(run)): p.read_bytes() for p in Path(str(run)).rglob("*.parquet")}
        for run in runs
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 14 * 7


def test_a_cost_limit_stops_and_a_higher_one_goes_on(path: Path, tmp_path: Path) -> None:
    # What is set aside for a call is more than it costs, so the run stops with room to spare.
    limit = 0.05
    with pytest.raises(CostLimit, match=r"--max-cost"):
        generate(load_recipe(path, ["source.count=60"]), tmp_path / "run", max_cost=limit)
    spent = spending(RunFolder(tmp_path / "run"))
    assert 0 < spent.cost + spent.lost_cost <= limit
    assert asked(tmp_path) == spent.answers < 60
    run = generate(load_recipe(path, ["source.count=60"]), tmp_path / "run", max_cost=1)
    assert asked(tmp_path) == 60
    assert dict(funnel(run))["edit"] == {"ok": 60}


def test_a_cost_limit_needs_a_price_before_anything_is_computed(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["pipeline.planner.price=null"])
    with pytest.raises(RecipeError, match="price"):
        generate(recipe, tmp_path / "run", max_cost=1)
    assert not (tmp_path / "run").exists()


# -- estimates ------------------------------------------------------------------------------------


def only(estimates: list[Estimate]) -> Estimate:
    [line] = estimates
    return line


def test_an_estimate_asks_and_writes_nothing(path: Path, tmp_path: Path) -> None:
    line = only(estimate_cost(load_recipe(path), tmp_path / "run"))
    assert (line.stage, line.records, line.at_most, line.calls) == ("plan", 7, True, 7)
    question, answer = Prompt(REPLACE).typical_length
    assert line.prompt_tokens == round(7 * question / 4)
    assert line.completion_tokens == round(7 * answer / 4)
    assert line.cost == (line.prompt_tokens * 1.0 + line.completion_tokens * 10.0) / 1e6
    assert not line.learnt
    assert not (tmp_path / "run").exists()
    assert asked(tmp_path) == 0
    assert only(estimate_cost(load_recipe(path), tmp_path / "run", limit=2)).calls == 2


def test_an_estimate_refuses_what_the_run_would_refuse(path: Path, tmp_path: Path) -> None:
    generate(load_recipe(path), tmp_path / "run")
    with pytest.raises(RunError, match="7 records are already planned"):
        estimate_cost(load_recipe(path), tmp_path / "run", limit=2)


def test_an_estimate_learns_from_the_runs_own_answers(path: Path, tmp_path: Path) -> None:
    changes = ["source.count=30"]
    generate(load_recipe(path, changes), tmp_path / "run")
    assert only(estimate_cost(load_recipe(path, changes), tmp_path / "run")).calls == 0
    other = load_recipe(path, [*changes, "pipeline.planner.target=fig"])
    line = only(estimate_cost(other, tmp_path / "run"))
    assert (line.records, line.at_most, line.learnt) == (30, False, True)
    assert (line.prompt_tokens, line.completion_tokens) == (30_000, 600)
    assert line.cost == pytest.approx(30 * CALL)


def test_an_estimate_of_rewriting_counts_candidates_and_orders(
    parrot: Path, distribution: Distribution, tmp_path: Path
) -> None:
    path = tmp_path / "part1.yaml"
    recipe: dict[str, Any] = {
        "part": "rewrite",
        "source": {"use": "stickers", "split": "test", "count": 5, "pairs": True},
        "candidates": 3,
        "selection_orders": 2,
        "pipeline": {"planner": "parrot"},
    }
    path.write_text(yaml.safe_dump(recipe))
    lines = estimate_cost(load_recipe(path), tmp_path / "run")
    assert [(line.stage, line.calls, line.cost) for line in lines] == [
        ("rewrite", 15, None),
        ("select", 10, None),
    ]
    single = load_recipe(path, ["candidates=1", "selection_orders=1"])
    assert [line.calls for line in estimate_cost(single, tmp_path / "run")] == [5, 0]


def test_the_command_line_estimates_limits_and_sums_up(
    path: Path, parrot: Path, tmp_path: Path, shell: Shell
) -> None:
    arguments = ("generate", path, "--out", tmp_path / "run")
    dry = shell(*arguments, "--dry-run", path=(parrot,))
    assert dry.returncode == 0, dry.stderr
    assert "plan" in dry.stdout and "≤ 7" in dry.stdout
    stopped = shell(*arguments, "--max-cost", "0.0001", path=(parrot,))
    assert stopped.returncode == 1
    assert "run the same command again" in stopped.stderr and "Traceback" not in stopped.stderr
    done = shell(*arguments, "--max-cost", "1", path=(parrot,))
    assert done.returncode == 0, done.stderr
    assert "replace: 7 answers, 7000 prompt and 140 answer tokens, 0.0084" in done.stdout
    assert "in this run folder: 0.0084: 0.001200 for each accepted sample" in done.stdout
    again = shell(*arguments, "--dry-run", path=(parrot,))
    assert "0.0084 has already been paid" in again.stdout
    nothing = shell("generate", "mini/part3", "--out", tmp_path / "other", "--dry-run")
    assert "calls no LLM" in nothing.stdout


def test_a_reader_is_asked_by_the_filter_that_needs_one(path: Path, tmp_path: Path) -> None:
    text = yaml.safe_load(path.read_text())
    text["pipeline"]["resolver"] = text["pipeline"]["planner"]
    text["filters"] = ["resolvable"]
    path.write_text(yaml.safe_dump(text))
    run = generate(load_recipe(path), tmp_path / "run")
    assert {verb: part.answers for verb, part in spending(run).by_task.items()} == {
        "replace": 7,
        "resolve": 7,
    }
    scores = [outcome.scores["resolvable.correct"] for outcome in read_outcomes(run)]
    assert set(scores) <= {0.0, 1.0}
    assert [line.stage for line in estimate_cost(load_recipe(path), tmp_path / "new")] == [
        "plan",
        "score-resolvable",
    ]
