"""Run a recipe: plan its records, and have an executor run the stages on them until all are done.

The unit of work is one shard through one stage (`unit`). Stages run in groups: all stages of a
group run at once, on different shards. A group ends where a filter needs the scores of the whole
run, and where models do not fit in memory together.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.engine.local_executor import LocalExecutor
from reasonpix.generation.engine.reopening import (
    reopen_behind_filters,
    reopen_downstream,
    reopen_failed,
)
from reasonpix.generation.engine.unit import UnitResult, asks_llm
from reasonpix.generation.model_domains import run_warnings
from reasonpix.generation.outcomes import outcome_counts, write_stages
from reasonpix.generation.pipeline import Stage, stages_of
from reasonpix.generation.plan import Listing, plan_of, rows_for, rows_wanted
from reasonpix.generation.recipe import Recipe, load_recipe
from reasonpix.generation.run_folder import RunFolder, Shard
from reasonpix.llm.budget import check_price
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.ledger_sync import ledger_file
from reasonpix.llm.planner import LLMPlanner
from reasonpix.plugin.components import ModelOptions, Source
from reasonpix.plugin.weights import check_weights

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a stage is, in shards, and how the records ended that this call computed."""

    stage: str
    shards: int
    shards_done: int
    reused: int
    """Shards that an earlier call finished."""
    ok: int
    rejected: int
    failed: int


ProgressCallback = Callable[[Progress], None]
ExecutorName = Literal["local", "ray"]


def generate(
    recipe: Recipe | str | Path,
    out: str | Path,
    limit: float | None = None,
    report: ProgressCallback = lambda _: None,
    max_cost: float | None = None,
    *,
    target_accepted: int | None = None,
    retry_failed: bool = False,
    executor: ExecutorName = "local",
    address: str | None = None,
) -> RunFolder:
    """Run a recipe into the folder `out` (a path or a URL), or continue an interrupted run.

    `recipe` is a loaded recipe, a file, or the name of a shipped recipe.
    `limit` is the number of images of the source to use, `math.inf` for all. By default a new run
    uses all, and an existing one keeps its number. `target_accepted` plans images in rounds, until
    about that many samples are accepted. `retry_failed` recomputes the records that failed.
    `max_cost` bounds what this and all earlier calls pay for LLM answers, in the currency of the
    recipe's prices: `CostLimit` is raised before it is exceeded. `executor` is this process, or
    Ray: the cluster at `address`, or one started on this machine.
    Raises `RunError` if `out` holds a run of other images or of more than `limit`, or files that
    do not belong to a run.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if max_cost is not None and not math.isfinite(max_cost):
        raise RecipeError([f"--max-cost: {max_cost} is not an amount; give a finite number"])
    run = RunFolder(out)
    _check_folder(run)
    stages = stages_of(recipe)
    with ExitStack() as stack:
        source = stack.enter_context(closing(open_source(recipe)))
        wanted = rows_wanted(plan_of(recipe, run), limit, target_accepted)
        recheck_all = retry_failed or target_accepted is not None
        _check_components(recipe, run, stages, wanted, recheck_all, max_cost)
        stack.enter_context(run.storage.lock())
        run.storage.remove_drafts()
        listing = Listing(recipe, run, source)
        _extend_plan(run, stages, listing, wanted)
        run.storage.write("recipe.yaml", recipe.as_yaml().encode())
        write_stages(run, [stage.entry for stage in stages])
        run.note(began=True)
        if retry_failed:
            reopen_failed(run, stages)
        reopen_downstream(run, stages)
        execute = stack.enter_context(
            _open_executor(executor, recipe, run, stages, source, address, max_cost)
        )
        while True:
            for group in _groups(stages, execute.fit):
                _run_group(run, group, execute, report)
            if target_accepted is None:
                return run
            counts = outcome_counts(run)
            if counts.accepted >= target_accepted:
                return run
            wanted = rows_for(target_accepted, counts.accepted, counts.total)
            if not _extend_plan(run, stages, listing, min(wanted, limit or math.inf)):
                return run


_OWN_FILES = frozenset({"holder", "stages", "journal.jsonl", "recipe.yaml", "stages.json"})
"""What a run may have left behind that was stopped before it was planned."""


def _check_folder(run: RunFolder) -> None:
    """Raise `RunError` if the folder holds anything but a run."""
    names = {*run.storage.names(""), *run.storage.folders("")}
    if not run.is_planned and (other := sorted(names - _OWN_FILES)):
        raise RunError(
            f"{run} holds {other[0]!r} and is not a run folder; name a new or an empty folder"
        )


class Executor(Protocol):
    """Runs stages on shards: in this process, or on a cluster."""

    def fit(self, stages: Sequence[Stage]) -> bool:
        """Whether these stages can run at the same time."""

    def run_stages(
        self,
        stages: Sequence[Stage],
        todo: Sequence[set[str]],
        shards: Sequence[Shard],
        report: Callable[[UnitResult], None],
    ) -> None:
        """Run each stage on the shards named in its `todo`, and commit them.

        A shard passes the stages in order. Raises whatever stops the run.
        """


@contextmanager
def _open_executor(
    name: ExecutorName,
    recipe: Recipe,
    run: RunFolder,
    stages: Sequence[Stage],
    source: Source[Any],
    address: str | None,
    max_cost: float | None,
) -> Iterator[Executor]:
    if name == "ray":
        from reasonpix.generation.engine.ray_executor import open_ray_executor

        with open_ray_executor(recipe, run, stages, address, max_cost) as ray_executor:
            yield ray_executor
        return
    with ExitStack() as stack:
        ledger: Ledger | None = None
        if any(asks_llm(stage) for stage in stages):
            path = stack.enter_context(ledger_file(run.storage))
            ledger = stack.enter_context(closing(Ledger(path, max_cost)))
        yield stack.enter_context(LocalExecutor(run, source, ledger))


def open_source(recipe: Recipe) -> Source[Any]:
    """The recipe's source, loaded."""
    source = recipe.source.build()
    assert isinstance(source, Source)
    source.load()
    return source


def _check_components(
    recipe: Recipe,
    run: RunFolder,
    stages: Sequence[Stage],
    wanted: float,
    recheck_all: bool,
    max_cost: float | None,
) -> None:
    """Let every component that has work to do check its requirements, before any work starts.

    `recheck_all`: also check components whose shards are all finished, because a retry or another
    round may give them work.
    """
    planned: set[str] = set()
    if run.is_planned and not recheck_all:
        plan = run.plan()
        if not plan.may_grow(wanted):
            planned = {shard.name for shard in plan.shards}
    for stage in stages:
        if planned and planned <= run.done(stage.entry.folder):
            continue
        for spec in stage.components:
            component = spec.build()
            component.check()
            if isinstance(component.options, ModelOptions):
                check_weights(component.options)
            if max_cost is not None and isinstance(component, LLMPlanner):
                check_price(component)
    for warning in run_warnings(plan_of(recipe, run), [stage.entry for stage in stages]):
        _LOG.warning(warning)


def _extend_plan(run: RunFolder, stages: Sequence[Stage], listing: Listing, wanted: float) -> bool:
    """Plan up to `wanted` records; returns whether any were added."""
    if listing.plan.shards and listing.plan.may_grow(wanted):
        reopen_behind_filters(run, stages, {shard.name for shard in listing.plan.shards})
    return listing.extend(wanted)


def _groups(
    stages: Sequence[Stage], fit: Callable[[Sequence[Stage]], bool]
) -> Iterator[list[Stage]]:
    """The stages in groups that run at the same time."""
    group: list[Stage] = []
    for stage in stages:
        gates = {gate.folder for gate in stage.gates}
        needs_scores = any(other.entry.folder in gates for other in group)
        if group and (needs_scores or not fit([*group, stage])):
            yield group
            group = []
        group.append(stage)
    yield group


def _run_group(
    run: RunFolder, stages: Sequence[Stage], execute: Executor, report: ProgressCallback
) -> None:
    """Run a group of stages and report their progress."""
    shards = run.shards()
    done = {stage.entry.folder: run.done(stage.entry.folder) for stage in stages}
    todo = [{shard.name for shard in shards} - done[stage.entry.folder] for stage in stages]
    names = {stage.entry.folder: stage.name for stage in stages}
    reused = {folder: len(finished) for folder, finished in done.items()}
    shards_done = Counter(reused)
    records = {folder: Counter(ok=0, rejected=0, failed=0) for folder in done}

    def report_stage(folder: str) -> None:
        report(
            Progress(
                names[folder], len(shards), shards_done[folder], reused[folder], **records[folder]
            )
        )

    def on_unit(unit: UnitResult) -> None:
        run.note(**vars(unit))
        shards_done[unit.stage] += 1
        records[unit.stage].update(ok=unit.ok, rejected=unit.rejected, failed=unit.failed)
        report_stage(unit.stage)

    for folder in done:
        report_stage(folder)
    if any(todo):
        execute.run_stages(stages, todo, shards, on_unit)
