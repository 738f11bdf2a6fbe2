"""Run a recipe: plan its records, have an executor do the stages on them, and go on until done.

The unit of work is a shard through a stage (`work`). Stages are done in groups: within a group all
are at work at the same time, on different shards; a group ends where a filter decides by the scores
of the whole run, and where models do not fit together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.engine import local_executor
from reasonpix.generation.engine.unit import UnitResult
from reasonpix.generation.outcomes import outcome_counts, write_stages
from reasonpix.generation.pipeline import Stage, stages_of
from reasonpix.generation.plan import Listing, plan_of, rows_for, rows_wanted
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.run_folder import RunFolder, Shard
from reasonpix.llm.budget import check_price
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.ledger_sync import ledger_file
from reasonpix.llm.planner import LLMPlanner
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions, Source
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.weights import check_weights


@dataclass(frozen=True)
class Progress:
    """How far a stage is, in shards of the plan; and how records ended that were computed now."""

    stage: str
    shards: int
    shards_done: int
    reused: int
    """Shards that an earlier call had done."""
    ok: int
    rejected: int
    failed: int


Report = Callable[[Progress], None]
ExecutorName = Literal["local", "ray"]


def generate(
    recipe: Recipe,
    out: str | Path,
    limit: float | None = None,
    report: Report = lambda _: None,
    max_cost: float | None = None,
    *,
    target_accepted: int | None = None,
    retry_failed: bool = False,
    executor: ExecutorName = "local",
    address: str | None = None,
) -> RunFolder:
    """Run a recipe into the folder `out`, or go on where an earlier call stopped.

    `limit` is how many images of the source to use, `math.inf` all of them. Without it an earlier
    plan is kept as it is, and a first one takes all. `target_accepted` plans, in rounds, about as
    many images as it takes for so many accepted samples. `retry_failed` computes the records anew
    that failed.
    `max_cost` bounds what this and all earlier calls together pay for LLM answers, in the currency
    of the recipe's prices; before it could be passed, `CostLimit` is raised.
    The `executor` is this process, or Ray: a cluster at `address`, or one of this machine alone.
    Raises `RunError` when `out` holds a run of other images, or of more than `limit`, or files
    that are of no run.
    """
    if max_cost is not None and not math.isfinite(max_cost):
        raise RecipeError([f"--max-cost: {max_cost} is no amount; give a number"])
    run = RunFolder(out)
    if not run.is_planned and (other := sorted(_files(run) - _OWN)):
        raise RunError(
            f"{run} holds {other[0]!r} and is no run folder; name a new folder, or an empty one"
        )
    stages = stages_of(recipe)
    with ExitStack() as opened:
        source = open_source(recipe)
        opened.callback(source.close)
        wanted = rows_wanted(plan_of(recipe, run), limit, target_accepted)
        anew = retry_failed or target_accepted is not None
        _check_components(run, stages, wanted, anew, max_cost)
        opened.enter_context(run.storage.held())
        run.storage.tidy()
        listing = Listing(recipe, run, source)
        _plan_more(run, stages, listing, wanted)
        run.storage.write("recipe.yaml", recipe.as_yaml().encode())
        write_stages(run, [stage.entry for stage in stages])
        run.note(began=True)
        if retry_failed:
            _reopen_failed(run, stages)
        _reopen_followers(run, stages)
        if executor == "ray":
            from reasonpix.generation.engine import ray_executor

            execute: Executor = opened.enter_context(
                ray_executor.opened(recipe, run, address, max_cost)
            )
        else:
            ledger: Ledger | None = None
            if any(_asks_llm(use) for use in recipe.uses):
                ledger = Ledger(opened.enter_context(ledger_file(run.storage)), max_cost)
                opened.callback(ledger.close)
            execute = opened.enter_context(local_executor.LocalExecutor(run, source, ledger))
        while True:
            for group in _groups(stages, execute.fit):
                _do(run, group, execute, report)
            if target_accepted is None:
                return run
            ended = outcome_counts(run)
            if ended.accepted >= target_accepted:
                return run
            wanted = rows_for(target_accepted, ended.accepted, ended.total)
            if not _plan_more(run, stages, listing, min(wanted, limit or math.inf)):
                return run


_OWN = frozenset({"holder", "stages", "journal.jsonl", "recipe.yaml", "stages.json"})
"""What a run may have left that ended before it was planned."""


def _files(run: RunFolder) -> set[str]:
    return {*run.storage.names(""), *run.storage.folders("")}


class Executor(Protocol):
    """What does stages on shards: this process, or a cluster."""

    def fit(self, stages: Sequence[Stage]) -> bool:
        """Whether these stages can be at work at the same time."""

    def run_stages(
        self,
        stages: Sequence[Stage],
        todo: Sequence[set[str]],
        shards: Sequence[Shard],
        report: Callable[[UnitResult], None],
    ) -> None:
        """Do each stage on the shards that its `todo` names, and commit them.

        A shard goes through the stages in their order. Raises what stops the run.
        """


def open_source(recipe: Recipe) -> Source[Any]:
    """The recipe's source, loaded."""
    source = recipe.source.build()
    assert isinstance(source, Source)
    source.load()
    return source


def _asks_llm(use: ComponentSpec) -> bool:
    return issubclass(registry.find(use.slot, use.name), LLMPlanner)


def _check_components(
    run: RunFolder, stages: Sequence[Stage], wanted: float, anew: bool, max_cost: float | None
) -> None:
    """Let every component that has work to do say what it misses, before any of it begins.

    `anew` says that even those may have some whose shards are all finished.
    """
    names: set[str] = set()
    if run.is_planned and not anew:
        plan = run.plan()
        if not plan.may_grow(wanted):
            names = {shard.name for shard in plan.shards}
    for stage in stages:
        if names and names <= run.done(stage.entry.folder):
            continue
        for use in filter(None, (stage.use, *stage.needs)):
            component = use.build()
            if isinstance(component.options, ModelOptions):
                check_weights(component.options)
            component.check()
            if max_cost is not None and isinstance(component, LLMPlanner):
                check_price(component)


def _plan_more(run: RunFolder, stages: Sequence[Stage], listing: Listing, wanted: float) -> bool:
    """Plan up to so many records. What follows a filter of the whole run is decided anew."""
    if listing.plan.shards and listing.plan.may_grow(wanted):
        _reopen_after_gates(run, stages, {shard.name for shard in listing.plan.shards})
    return listing.extend(wanted)


def _reopen_failed(run: RunFolder, stages: Sequence[Stage]) -> None:
    """Take the shards for unfinished in which records failed.

    Other recipes may have stages in this folder that follow from the same results: these are
    completed when their recipe is run again.
    """
    shards = run.shards()
    failed: dict[str, set[str]] = {}
    for stage in stages:
        folder = stage.entry.folder
        done = run.done(folder)
        failed[folder] = {
            shard.name
            for shard in shards
            if shard.name in done
            and any(status == "failed" for _, status, _ in run.ends(folder, shard))
        }
    names = set().union(*failed.values())
    if names:
        _reopen_after_gates(run, stages, {shard.name for shard in shards})
        _reopen_others(run, stages, names)
    for folder in reversed(failed):
        _reopen(run, folder, failed[folder])


def _reopen_after_gates(run: RunFolder, stages: Sequence[Stage], names: set[str]) -> None:
    """Take shards for unfinished in all stages that follow a filter of the whole run.

    What it rejects depends on the records that it measured; rows that are there are kept. Only
    where instructions are rewritten (Part I) does anything follow a filter.
    """
    if any(stage.name == "rewrite" for stage in stages):
        _reopen_others(run, [stage for stage in stages if not stage.gates], names)


def _reopen_others(run: RunFolder, stages: Sequence[Stage], names: set[str]) -> None:
    """Take shards for unfinished in all stage folders but those of `stages` and the source."""
    kept = {"source", *(stage.entry.folder for stage in stages)}
    for folder in reversed(run.storage.folders("stages")):
        if folder not in kept:
            _reopen(run, folder, names)


def _reopen_followers(run: RunFolder, stages: Sequence[Stage]) -> None:
    """Take those shards for unfinished that follow from one that is to be computed.

    So it is when a file was deleted, or a commit failed: what is computed now may let other
    records through than before.
    """
    names = {shard.name for shard in run.shards()}
    todo: dict[str, set[str]] = {}
    for stage in stages:
        done = run.done(stage.entry.folder)
        due = set().union(*(todo[entry.folder] for entry in stage.follows)) & done
        _reopen(run, stage.entry.folder, due)
        todo[stage.entry.folder] = names - done | due


def _reopen(run: RunFolder, folder: str, names: set[str]) -> None:
    done = run.done(folder)
    for shard in run.shards():
        if shard.name in names & done:
            run.reopen(folder, shard)


def _groups(
    stages: Sequence[Stage], fit: Callable[[Sequence[Stage]], bool]
) -> Iterator[list[Stage]]:
    """The stages in groups of which all are at work at the same time."""
    group: list[Stage] = []
    for stage in stages:
        gates = {gate.folder for gate in stage.gates}
        decided = any(other.entry.folder in gates for other in group)
        if group and (decided or not fit([*group, stage])):
            yield group
            group = []
        group.append(stage)
    yield group


def _do(run: RunFolder, stages: Sequence[Stage], execute: Executor, report: Report) -> None:
    """Do a group of stages, and tell how far they are."""
    shards = run.shards()
    done = {stage.entry.folder: run.done(stage.entry.folder) for stage in stages}
    todo = [{shard.name for shard in shards} - done[stage.entry.folder] for stage in stages]
    names = {stage.entry.folder: stage.name for stage in stages}
    reused = {folder: len(found) for folder, found in done.items()}
    finished = Counter(reused)
    ends = {folder: Counter[str]() for folder in done}

    def tell(folder: str) -> None:
        counts = ends[folder]
        report(
            Progress(
                names[folder],
                len(shards),
                finished[folder],
                reused[folder],
                ok=counts["ok"],
                rejected=counts["rejected"],
                failed=counts["failed"],
            )
        )

    def note(unit: UnitResult) -> None:
        run.note(**vars(unit))
        finished[unit.stage] += 1
        ends[unit.stage].update(ok=unit.ok, rejected=unit.rejected, failed=unit.failed)
        tell(unit.stage)

    for folder in done:
        tell(folder)
    if any(todo):
        execute.run_stages(stages, todo, shards, note)
