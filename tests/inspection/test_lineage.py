"""The way of one record, told from the run folder, and computed anew."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest

from reasonpix.core.hashing import seed_of
from reasonpix.errors import RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.inspection.lineage import Lineage, trace_record
from reasonpix.inspection.lineage_text import lineage_lines
from reasonpix.inspection.replay import replay_lines, replay_record
from tests.conftest import WriteRecipe
from tests.inspection.conftest import asked

STAGES = ["read", "caption", "extract", "ground", "plan", "edit", "score-no-op"]

PAIRS = {"use": "fake-source", "count": 5, "caption": "a bee", "instruction": "add a hole",
         "edited_caption": "a bee with a hole"}  # fmt: skip


def ids(run: RunFolder) -> list[str]:
    return [record_id for shard in run.shards() for record_id, _, _ in run.ends("source", shard)]


def status(told: Lineage) -> dict[str, str]:
    return {step.stage: step.status for step in told.steps}


# -- which record ---------------------------------------------------------------------------------


def test_a_record_is_found_by_id_by_how_that_begins_and_by_its_own_name(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = {"use": "fake-source", "count": 40}
    run = generate(load_recipe(write_recipe(source=source, shard_size=16)), tmp_path / "run")
    every = ids(run)
    chosen = every[33]
    for wanted in (chosen, chosen[:8], "33"):
        assert trace_record(run, wanted).record_id == chosen
    assert trace_record(run, chosen).shard == "000002"
    # A whole name wins over the beginning of an id.
    assert trace_record(run, "3").record_id == every[3]
    letter = next(a for a in "abcdef" if sum(it.startswith(a) for it in every) > 1)
    with pytest.raises(RunError, match=f"'{letter}' matches . records of .*: {letter}"):
        trace_record(run, letter)
    with pytest.raises(RunError, match="has no record 'no such'"):
        trace_record(run, "no such")
    with pytest.raises(RunError, match="is not a run folder"):
        trace_record(RunFolder(tmp_path / "nothing"), "3")


# -- what is told ---------------------------------------------------------------------------------


def test_the_whole_way_of_an_accepted_record(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = write_recipe(
        seed=5, shard_size=3, filters=["no-op", {"use": "eq1", "reject_fraction": 0.2}]
    )
    run = generate(load_recipe(path), tmp_path / "run")
    outcome = [o for o in read_outcomes(run) if o.status == "ok"][2]
    record_id = outcome.sample.record_id
    told = trace_record(run, record_id)
    assert (told.status, told.reason) == ("accepted", "")
    assert told.item == outcome.sample.item.model_dump()
    assert told.source["use"] == "fake-source" and told.source["options"]["count"] == 7
    assert status(told) == dict.fromkeys([*STAGES, "score-eq1"], "ok")
    steps = {step.stage: step for step in told.steps}
    assert steps["caption"].output == {"text": "a bee and a rabbit"}
    assert steps["plan"].output["target"] == "pear"
    assert steps["plan"].seeds == [seed_of(5, "plan", record_id)]
    assert steps["edit"].seeds == [seed_of(5, "edit", record_id)]
    assert steps["score-no-op"].seeds == [seed_of(5, "score", record_id)]
    assert steps["caption"].seeds == steps["plan"].questions == []
    assert steps["score-eq1"].verdict == "accepted"
    assert steps["score-eq1"].options == {"value": None, "reject_fraction": 0.2}
    assert steps["caption"].package.startswith("reasonpix ")
    image = outcome.sample.edited_png()
    assert steps["edit"].image == {
        "bytes": len(image),
        "width": 32,
        "height": 32,
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    shares = [step.seconds for step in told.steps]
    assert all(share is not None and share >= 0 for share in shares)
    assert told.published is not None
    assert told.published["edit_prompt"] == outcome.sample.instruction
    assert told.published["score_eq1_distance"] == outcome.scores["eq1.distance"]

    assert json.loads(json.dumps(told.as_dict()))["steps"][4]["stage"] == "plan"
    text = "\n".join(lineage_lines(told))
    for words in (
        f"record {record_id} of {run}, shard 00000",
        "plan: ok by fake-planner 1 (reasonpix ",
        f"seeds: {seed_of(5, 'plan', record_id)}",
        f"results: stages/{steps['edit'].folder}",
        f"image: 32x32 pixels, {len(image)} bytes",
        "verdict: accepted",
        "edit_prompt: Something else would look better there.",
    ):
        assert words in text


@pytest.mark.usefixtures("trial")
def test_a_record_that_ended_early(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    captions = ["a bee", "unlisted", "torn", "a ghost", "a raises-in-planner", "a reject-me"]
    path = write_recipe(
        source={"use": "trial-source", "captions": captions},
        captioner=None,
        extractor="trial-extractor",
        grounder="trial-grounder",
        planner="trial-planner",
        editor="trial-editor",
        filters=["trial-filter", "no-op"],
    )
    run = generate(load_recipe(path), tmp_path / "run")
    for outcome in read_outcomes(run):
        told = trace_record(run, outcome.sample.item.native_id)
        assert told.status == {"ok": "accepted"}.get(outcome.status, outcome.status)
        if outcome.status != "ok":
            assert (told.stage, told.reason) == (outcome.stage, outcome.reason)
        assert (told.published is None) == (outcome.status != "ok")
    ghost = trace_record(run, "3")
    assert list(status(ghost).values()) == ["ok"] * 3 + ["rejected"] + ["not reached"] * 4
    torn = "\n".join(lineage_lines(trace_record(run, "2")))
    assert "failed at read: 2: not an image" in torn
    later = ", ".join([*STAGES[1:6], "score-trial-filter", "score-no-op"])
    assert torn.count("not reached") == 1 and f"\nnot reached: {later}" in torn
    # A record that a filter rejects has been measured by all.
    rejected = trace_record(run, "5")
    assert set(status(rejected).values()) == {"ok"}
    assert [step.verdict for step in rejected.steps[-2:]] == ["it was asked for", "accepted"]
    text = "\n".join(lineage_lines(rejected))
    assert "verdict: rejected: it was asked for" in text and "verdict: accepted" in text
    # Nothing follows from a record that the source could not give.
    _, replayed = replay_record(run, "1")
    assert replayed == []
    [line] = replay_lines(replayed)
    assert "nothing to recompute" in line


def test_a_run_that_goes_on(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = write_recipe(shard_size=4, filters=["no-op"])
    run = generate(load_recipe(path), tmp_path / "run")
    for stage in ("edit", "score-no-op"):
        [folder] = (tmp_path / "run" / "stages").glob(f"{stage}-*")
        (folder / "000001.parquet").unlink()
    first, last = trace_record(run, "0"), trace_record(run, "6")
    assert status(last) == status(first) | {"edit": "to do", "score-no-op": "to do"}
    assert (last.status, last.stage, last.published) == ("to do", "edit", None)
    # It is measured, and what the filter makes of it depends on those that are not.
    assert (first.status, first.stage) == ("to do", "score-no-op")
    assert first.steps[-1].output is not None and first.steps[-1].verdict is None


# -- what a language model was asked --------------------------------------------------------------


def test_the_questions_and_raw_answers_are_told_in_order(
    parrot: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = generate(load_recipe(write_recipe(planner=parrot, shard_size=3)), tmp_path / "run")
    before = asked(tmp_path)
    assert before == 14  # 7 records, each with a repair
    told = trace_record(run, "4")
    [plan] = [step for step in told.steps if step.stage == "plan"]
    first, repair = plan.questions
    assert json.loads(first.answer)["target"] == "bee"
    assert json.loads(repair.answer)["target"] == "pear"
    assert repair.messages[: len(first.messages)] == first.messages
    assert repair.messages[len(first.messages)] == ("assistant", first.answer)
    assert [first.seed, repair.seed][0] == plan.seeds[0]
    assert (first.prompt_tokens, first.completion_tokens) == (1000, 20)
    assert first.cost == pytest.approx((1000 + 200) / 1e6) and first.attempts == 1
    assert plan.output["target"] == "pear"
    assert plan.unanswered == 0 and not plan.note
    text = "\n".join(lineage_lines(told))
    assert "question 2 (replace, seed" in text and "1000 + 20 tokens, cost 0.001200" in text
    assert f"the first {len(first.messages)} turns are the same as in question 1" in text
    assert text.count(first.messages[0][1].splitlines()[0]) == 1
    assert asked(tmp_path) == before


def test_candidates_and_orders_are_questions_of_their_own(
    parrot: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    filters = [{"use": "eq1", "reject_fraction": 0.2}, "leak"]
    path = write_recipe(source=PAIRS, planner=parrot, filters=filters, part="rewrite")
    run = generate(load_recipe(path, ["candidates=3", "selection_orders=2"]), tmp_path / "run")
    before = asked(tmp_path)
    accepted = [o for o in read_outcomes(run) if o.status == "ok"]
    steps = {it.stage: it for it in trace_record(run, accepted[0].sample.record_id).steps}
    assert [question.task for question in steps["rewrite"].questions] == ["rewrite"] * 3
    assert [question.task for question in steps["select"].questions] == ["select"] * 2
    record_id = accepted[0].sample.record_id
    assert steps["rewrite"].seeds == [seed_of(0, "rewrite", record_id, i) for i in range(3)]
    assert steps["select"].seeds == [seed_of(0, "select", record_id, i) for i in range(2)]

    # The filter before the planner: what it rejects is asked nothing.
    [rejected] = [o for o in read_outcomes(run) if o.status != "ok"]
    told = trace_record(run, rejected.sample.record_id)
    assert (told.status, told.stage, told.reason) == ("rejected", "score-eq1", rejected.reason)
    assert status(told)["rewrite"] == status(told)["score-leak"] == "not reached"
    assert asked(tmp_path) == before


@pytest.mark.parametrize("batch", [False, True])
def test_an_answer_that_is_not_stored_is_not_asked_for(
    batch: bool, parrot: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = generate(load_recipe(write_recipe(planner=parrot)), tmp_path / "run")
    before = asked(tmp_path)
    with sqlite3.connect(tmp_path / "run" / "llm.sqlite") as db:
        db.execute("DELETE FROM answers")
    db.close()
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("batch: false", f"batch: {str(batch).lower()}"))
    told, replayed = replay_record(run, "0")
    [plan] = [step for step in told.steps if step.stage == "plan"]
    assert (plan.questions, plan.unanswered) == ([], 1)
    assert "1 question without a stored answer" in "\n".join(lineage_lines(told))
    assert [it.stage for it in replayed if not it.is_identical] == ["plan"]
    assert "without a stored answer" in "\n".join(replay_lines(replayed))
    (tmp_path / "run" / "llm.sqlite").unlink()
    assert trace_record(run, "0").as_dict() == told.as_dict()
    assert not (tmp_path / "run" / "llm.sqlite").exists()
    assert asked(tmp_path) == before


def test_a_prompt_that_changed_since_is_not_taken_for_the_one_of_then(
    parrot: dict[str, object], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    built_in = Path(__file__).parents[2] / "reasonpix" / "llm" / "templates" / "replace.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(built_in.read_text())
    planner = parrot | {"prompts": {"replace": str(mine)}}
    run = generate(load_recipe(write_recipe(planner=planner)), tmp_path / "run")
    mine.write_text(built_in.read_text().replace("system: |\n", "system: |\n  Be brief.\n", 1))
    told, replayed = replay_record(run, "0")
    [plan] = [step for step in told.steps if step.stage == "plan"]
    assert plan.questions == [] and "changed since" in plan.note
    [differs] = [it for it in replayed if not it.is_identical]
    assert differs.stage == "plan"
    assert differs.differences[0].startswith('component.prompt was "')
