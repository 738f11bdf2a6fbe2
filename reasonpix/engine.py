"""Drive the stages over the shards, in this process, one stage after the other.

The unit of work is a shard through a stage. A finished unit is a file; what has a file is not
computed again, so stopping at any moment costs the shards in flight and nothing else.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from reasonpix import plugins
from reasonpix.asking import check_price
from reasonpix.errors import InvalidBox, ReasonpixError, RecipeError, RunError
from reasonpix.ledger import Ledger
from reasonpix.outcomes import Verdicts, samples_reaching, verdicts, write_stages
from reasonpix.pipeline import Stage, stages_of
from reasonpix.planning import LLMPlanner
from reasonpix.recipe import Recipe, Use
from reasonpix.records import Problem
from reasonpix.run import Row, RunFolder, Shard, Status, fingerprint, write_atomically
from reasonpix.samples import Sample
from reasonpix.slots import Component, ModelOptions, Source, SourceItem
from reasonpix.stages import Result
from reasonpix.weights import check_weights


@dataclass(frozen=True)
class Progress:
    """How far a stage is: shards of the plan, and records that ended in each way so far."""

    stage: str
    shards: int
    shards_done: int
    ok: int
    rejected: int
    failed: int


def generate(
    recipe: Recipe,
    out: Path,
    limit: int | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    max_cost: float | None = None,
) -> RunFolder:
    """Run a recipe into the folder `out`, or go on where an earlier call stopped.

    `max_cost` bounds what this and all earlier calls together pay for LLM answers, in the currency
    of the recipe's prices; before it could be passed, `CostLimit` is raised.
    Raises `RunError` when `out` holds a run of other images, another seed, limit or shard size.
    """
    if max_cost is not None and not math.isfinite(max_cost):
        raise RecipeError([f"--max-cost: {max_cost} is no amount; give a number"])
    run = RunFolder(out)
    all_stages = stages_of(recipe)
    with ExitStack() as opened:
        source = open_source(recipe)
        opened.callback(source.close)
        _check_components(run, all_stages, max_cost)
        opened.enter_context(run.held())
        _freeze_plan(recipe, run, source, limit)
        write_atomically(out / "recipe.yaml", recipe.as_yaml().encode())
        write_stages(run, [stage.entry for stage in all_stages])
        ledger: Ledger | None = None
        if any(_asks_llm(use) for use in recipe.uses):
            ledger = Ledger(run.llm_path, max_cost)
            opened.callback(ledger.close)
        for stage in all_stages:
            _run_stage(run, stage, source, ledger, report)
    return run


def open_source(recipe: Recipe) -> Source[Any]:
    """The recipe's source, loaded."""
    source = plugins.build("source", recipe.source.name, recipe.source.options)
    assert isinstance(source, Source)
    source.load()
    return source


def _asks_llm(use: Use) -> bool:
    return issubclass(plugins.find(use.slot, use.name), LLMPlanner)


def _check_components(run: RunFolder, all_stages: Sequence[Stage], max_cost: float | None) -> None:
    """Let every component that has work to do say what it misses, before any of it begins."""
    shards = {shard.name for shard in run.shards()} if run.plan_path.exists() else None
    for stage in all_stages:
        if shards is None or shards - run.done(stage.entry.folder):
            for use in filter(None, (stage.use, *stage.needs)):
                component = plugins.build(use.slot, use.name, use.options)
                if isinstance(component.options, ModelOptions):
                    check_weights(component.options)
                component.check()
                if max_cost is not None and isinstance(component, LLMPlanner):
                    check_price(component)


def _freeze_plan(recipe: Recipe, run: RunFolder, source: Source[Any], limit: int | None) -> None:
    """List the source once into shards, or check that the existing plan is of this very source."""
    asked = check_plan(recipe, run, limit)
    if run.plan_path.exists():
        return
    shards: list[dict[str, Any]] = []
    rows = (_planned(recipe.source.name, item) for item in islice(source.items(), limit))
    while chunk := list(islice(rows, recipe.shard_size)):
        shard = Shard(f"{len(shards):06d}", len(chunk))
        run.write("source", shard, chunk)
        shards.append(vars(shard))
    if not shards:
        raise RunError(f"the source {recipe.source.name!r} holds no image")
    options = recipe.source.options.model_dump(mode="json")
    run.freeze({"asked": asked, "source_options": options, "shards": shards})


def check_plan(recipe: Recipe, run: RunFolder, limit: int | None) -> dict[str, Any]:
    """What a plan follows from. Raises `RunError` when the run has a plan that does not."""
    asked = {
        "seed": recipe.seed,
        "shard_size": recipe.shard_size,
        "limit": limit,
        "source": plugins.identity("source", recipe.source.name, recipe.source.options),
    }
    if run.plan_path.exists():
        planned = run.plan()["asked"]
        differing = [key for key in asked if planned.get(key) != asked[key]]
        if differing:
            changes = "; ".join(f"{key} was {planned.get(key)!r}" for key in differing)
            raise RunError(
                f"{run.root} was planned differently ({changes}); "
                "use the same values to go on, or another --out"
            )
    return asked


def _planned(source: str, item: SourceItem | tuple[str, Problem]) -> Row:
    if isinstance(item, SourceItem):
        pair = [item.pair.content, item.pair.instruction] if item.pair else []
        record_id = fingerprint([source, item.native_id, item.content, *pair])
        return Row(record_id, "ok", output=item.model_dump_json())
    native_id, problem = item
    unread = SourceItem(native_id=native_id, content="")
    return Row(
        fingerprint([source, native_id]), problem.status, problem.reason, unread.model_dump_json()
    )


def _run_stage(
    run: RunFolder,
    stage: Stage,
    source: Source[Any],
    ledger: Ledger | None,
    report: Callable[[Progress], None],
) -> None:
    shards = run.shards()
    done = run.done(stage.entry.folder)
    counts: Counter[str] = Counter()
    for shard in shards:
        if shard.name in done:
            counts.update(row.status for row in run.read(stage.entry.folder, shard))

    def tell() -> None:
        report(
            Progress(
                stage.name,
                len(shards),
                len(done),
                ok=counts["ok"],
                rejected=counts["rejected"],
                failed=counts["failed"],
            )
        )

    tell()
    todo = [shard for shard in shards if shard.name not in done]
    if not todo:
        return
    rejected = verdicts(run, stage.follows)
    with _Parts(stage, source, ledger) as parts:
        work = lambda group: _compute(run, stage, source, parts.by_slot, rejected, group)  # noqa: E731
        for shard, statuses in parts.map(work, todo):
            counts.update(statuses)
            done.add(shard.name)
            tell()


class _Parts:
    """The loaded components of a stage, and how many shards they are given at a time.

    A component with several items under way would idle at the end of each shard. It is given
    shards in groups, and two groups at once, so that one fills the gaps of the other.
    """

    def __init__(self, stage: Stage, source: Source[Any], ledger: Ledger | None) -> None:
        self._stage = stage
        self.by_slot: dict[str, Component[Any]] = {"source": source}
        self._uses = [u for u in (stage.use, *stage.needs) if u is not None and u.slot != "source"]
        self._ledger = ledger

    def __enter__(self) -> _Parts:
        with ExitStack() as opened:
            for use in self._uses:
                component = plugins.build(use.slot, use.name, use.options)
                if isinstance(component, LLMPlanner):
                    component.ledger = self._ledger
                    _check_prompt(component, use, self._stage)
                component.load()
                opened.callback(component.close)
                self.by_slot[use.slot] = component
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def map(
        self,
        work: Callable[[Sequence[Shard]], list[tuple[Shard, list[Status]]]],
        todo: Sequence[Shard],
    ) -> Iterator[tuple[Shard, list[Status]]]:
        """Do the work on all shards; gives each shard's result as it comes."""
        wanted = max(component.concurrency for component in self.by_slot.values())
        if wanted == 1:
            for shard in todo:
                yield from work([shard])
            return
        size = math.ceil(8 * wanted / max(shard.rows for shard in todo))
        groups = [todo[start : start + size] for start in range(0, len(todo), size)]
        with ThreadPoolExecutor(2, thread_name_prefix="shards") as workers:
            under_way = [workers.submit(work, group) for group in groups]
            try:
                for future in as_completed(under_way):
                    yield from future.result()
            except BaseException:
                for future in under_way:
                    future.cancel()
                # Components stop asking; what they have been answered is kept.
                self._opened.close()
                raise


def _check_prompt(planner: LLMPlanner[Any], use: Use, stage: Stage) -> None:
    """Raise `RunError` when a prompt was edited after the stage's results were named by it."""
    if stage.questions is None:
        return
    verb, _ = stage.questions
    facts = (stage.entry.component, *stage.entry.component.get("uses", ()))
    known = next(it for it in facts if it.get("slot") == use.slot)
    prompt = planner.prompt_identity(verb)
    if any(known.get(name, fact) != fact for name, fact in prompt.items()):
        raise RunError(
            f"the prompt {verb!r} was edited since the run began; "
            "run the same command again to go on with the new one"
        )


def _compute(
    run: RunFolder,
    stage: Stage,
    source: Source[Any],
    parts: dict[str, Component[Any]],
    rejected: Verdicts,
    shards: Sequence[Shard],
) -> list[tuple[Shard, list[Status]]]:
    """Compute and commit a group of shards; gives the status of each row."""
    started = time.perf_counter()
    reached = [
        list(samples_reaching(run, stage.follows, rejected, shard, source)) for shard in shards
    ]
    together = [sample for samples in reached for sample in samples]
    rows = iter(_rows(together, lambda batch: stage.compute(batch, parts)))
    seconds = round((time.perf_counter() - started) / len(shards), 3)
    results = []
    for shard, samples in zip(shards, reached, strict=True):
        own = [next(rows) for _ in samples]
        run.write(stage.entry.folder, shard, own)
        run.note(stage=stage.entry.folder, shard=shard.name, records=len(own), seconds=seconds)
        results.append((shard, [row.status for row in own]))
    return results


def _rows(
    samples: Sequence[Sample], compute: Callable[[Sequence[Sample]], list[Result]]
) -> list[Row]:
    """The shard's rows. When a batch breaks, each record is tried alone: a bad one costs one."""
    if not samples:
        return []
    try:
        results = compute(samples)
        return [_row(s.record_id, result) for s, result in zip(samples, results, strict=True)]
    except Exception as error:
        # A wrong box is of one image; our other errors are of the component, and stop the run.
        if isinstance(error, ReasonpixError) and not isinstance(error, InvalidBox):
            raise
        if len(samples) == 1:
            reason = f"{type(error).__name__}: {error}"
            return [Row(samples[0].record_id, "failed", reason)]
        return [row for sample in samples for row in _rows([sample], compute)]


def _row(record_id: str, result: Result) -> Row:
    if isinstance(result, Problem):
        return Row(record_id, result.status, result.reason)
    if isinstance(result, tuple):
        output, image = result
        return Row(record_id, "ok", output=output.model_dump_json(), image=image)
    return Row(record_id, "ok", output=result.model_dump_json())
