"""Estimate what the LLM answers of a run will cost, before any request is sent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from reasonpix.core.files.ignored import Ignored
from reasonpix.generation.engine.engine import open_source
from reasonpix.generation.outcomes import samples_reaching, verdicts
from reasonpix.generation.pipeline import Stage, stages_of
from reasonpix.generation.plan import plan_of, rows_wanted
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.generation.statistics import spending
from reasonpix.llm.budget import Spending
from reasonpix.llm.planner import LLMPlanner
from reasonpix.llm.tasks import TASKS
from reasonpix.plugin.components import Source

CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English, used until the run has answers to average."""

_ENOUGH = 5
"""The least number of answers to take an average of."""


@dataclass(frozen=True)
class Estimate:
    """The LLM requests that a stage still has to send."""

    stage: str
    records: int
    at_most: bool
    """Whether `records` is an upper bound, because earlier stages are not finished."""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """None if the recipe gives no price."""
    learnt: bool
    """Whether tokens are averages of this run's answers rather than the rule of thumb."""


def estimate_cost(
    recipe: Recipe, out: str | Path, limit: float | None = None, target_accepted: int | None = None
) -> list[Estimate]:
    """Estimate the requests of each stage that calls an LLM, if `recipe` runs into `out`.

    Writes nothing. Raises `RunError` as the run itself would.
    """
    run = RunFolder(out)
    plan = plan_of(recipe, run)
    wanted = rows_wanted(plan, limit, target_accepted)
    source = open_source(recipe)
    try:
        known = spending(run)
        new = max(0, _count(source, wanted) - plan.rows) if plan.may_grow(wanted) else 0
        return list(_estimates(recipe, run, source, new, known))
    finally:
        source.close()


def _estimates(
    recipe: Recipe, run: RunFolder, source: Source[Any], new: int, known: Spending
) -> Iterator[Estimate]:
    for stage in stages_of(recipe):
        use = next((use for use in stage.components if use.kind == "planner"), None)
        if stage.questions is None or use is None:
            continue
        planner = use.build()
        if not isinstance(planner, LLMPlanner):
            continue
        task, times = stage.questions
        records, at_most = _records(run, stage, source, new)
        calls = records * times
        before = known.by_task.get(task, Spending())
        learnt = before.answers >= _ENOUGH
        if learnt:
            prompt = before.prompt_tokens / before.answers
            completion = before.completion_tokens / before.answers
        else:
            question, answer = planner.prompt(TASKS[task]).typical_length
            prompt, completion = question / CHARACTERS_PER_TOKEN, answer / CHARACTERS_PER_TOKEN
        tokens = round(calls * prompt), round(calls * completion)
        price = planner.price
        yield Estimate(
            stage=stage.name,
            records=records,
            at_most=at_most,
            calls=calls,
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            cost=price.of(*tokens) if price else None,
            learnt=learnt,
        )


def _records(run: RunFolder, stage: Stage, source: Source[Any], new: int) -> tuple[int, bool]:
    """Records that the stage has yet to process, including `new` ones; is it an upper bound?"""
    if not run.is_planned:
        return new, True
    done = run.done(stage.entry.folder)
    todo = [shard for shard in run.shards() if shard.name not in done]
    names = {shard.name for shard in run.shards()}
    if new or any(names - run.done(entry.folder) for entry in stage.upstream):
        return new + sum(shard.rows for shard in todo), True
    rejected = verdicts(run, stage.upstream)
    reached = (samples_reaching(run, stage.upstream, rejected, shard, source) for shard in todo)
    return sum(1 for samples in reached for _ in samples), False


def _count(source: Source[Any], wanted: float) -> int:
    stop = None if math.isinf(wanted) else int(wanted)
    rows = (item for item in source.items() if not isinstance(item, Ignored))
    return sum(1 for _ in islice(rows, stop))
