"""Drive the stages over the shards, in this process, one stage after the other.

The unit of work is a shard through a stage. A finished unit is a file; what has a file is not
computed again, so stopping at any moment costs the shard in flight and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from reasonpix import plugins, stages
from reasonpix.errors import InvalidBox, ReasonpixError, RunError
from reasonpix.outcomes import StageEntry, samples_reaching, write_stages
from reasonpix.recipe import Recipe, Use
from reasonpix.records import Problem
from reasonpix.run import Row, RunFolder, Shard, fingerprint, write_atomically
from reasonpix.slots import Component, ModelOptions, Scorer, Source, SourceItem
from reasonpix.stages import Result, Sample
from reasonpix.weights import check_weights


@dataclass(frozen=True)
class Stage:
    """A stage of one recipe: what it runs, and the fingerprint of all its results follow from."""

    name: str
    use: Use | None
    compute: Callable[[Sequence[Sample], dict[str, Component[Any]]], list[Result]]
    entry: StageEntry
    needs: tuple[Use, ...] = ()
    """Components beside its own that it calls."""


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
) -> RunFolder:
    """Run a recipe into the folder `out`, or go on where an earlier call stopped.

    Raises `RunError` when `out` holds a run of other images, another seed, limit or shard size.
    """
    run = RunFolder(out)
    source = plugins.build("source", recipe.source.name, recipe.source.options)
    assert isinstance(source, Source)
    source.load()
    try:
        all_stages = list(_stages(recipe))
        _check_components(run, all_stages)
        _freeze_plan(recipe, run, source, limit)
        write_atomically(out / "recipe.yaml", recipe.as_yaml().encode())
        write_stages(run, [stage.entry for stage in all_stages])
        for stage in all_stages:
            _run_stage(run, stage, all_stages, source, report)
    finally:
        source.close()
    return run


def _check_components(run: RunFolder, all_stages: Sequence[Stage]) -> None:
    """Let every component that has work to do say what it misses, before any of it begins."""
    shards = {shard.name for shard in run.shards()} if run.plan_path.exists() else None
    for stage in all_stages:
        if shards is None or shards - run.done(stage.entry.folder):
            for use in filter(None, (stage.use, *stage.needs)):
                component = plugins.build(use.slot, use.name, use.options)
                if isinstance(component.options, ModelOptions):
                    check_weights(component.options)
                component.check()


def _stages(recipe: Recipe) -> Iterator[Stage]:
    """The stages of a recipe. Each fingerprint covers the stage's own component and all before."""
    seed = recipe.seed

    def stage(name: str, use: Use | None, compute: Any, before: str, needs: Any = ()) -> Stage:
        facts = plugins.identity(use.slot, use.name, use.options) if use else {"use": None}
        digest = fingerprint([name, facts, before])
        options = use.options.model_dump(mode="json") if use else {}
        entry = StageEntry(stage=name, folder=f"{name}-{digest}", component=facts, options=options)
        return Stage(name, use, compute, entry, needs)

    def own(function: Any, slot: str, **more: Any) -> Any:
        return lambda samples, parts: function(samples, parts.get(slot), **more)

    chain = [
        ("read", recipe.source, own(stages.read, "source")),
        ("caption", recipe.captioner, own(stages.caption, "captioner")),
        ("extract", recipe.extractor, own(stages.extract, "extractor")),
        ("ground", recipe.grounder, own(stages.ground, "grounder")),
        ("plan", recipe.planner, own(stages.plan, "planner", run_seed=seed)),
        ("edit", recipe.editor, own(stages.edit, "editor", run_seed=seed)),
    ]
    before = str(seed)
    for name, use, compute in chain:
        made = stage(name, use, compute, before)
        before = made.entry.folder
        yield made
    for use in recipe.filters:
        scorer = plugins.find("filter", use.name)
        assert issubclass(scorer, Scorer)
        needs = tuple(sorted((getattr(recipe, slot) for slot in scorer.uses), key=lambda u: u.slot))
        compute = lambda samples, parts: stages.score(samples, parts["filter"], parts)  # noqa: E731
        yield stage(f"score-{use.name}", use, compute, before, needs)


def _freeze_plan(recipe: Recipe, run: RunFolder, source: Source[Any], limit: int | None) -> None:
    """List the source once into shards, or check that the existing plan is of this very source."""
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


def _planned(source: str, item: SourceItem | tuple[str, Problem]) -> Row:
    if isinstance(item, SourceItem):
        record_id = fingerprint([source, item.native_id, item.content])
        return Row(record_id, "ok", output=item.model_dump_json())
    native_id, problem = item
    unread = SourceItem(native_id=native_id, content="")
    return Row(
        fingerprint([source, native_id]), problem.status, problem.reason, unread.model_dump_json()
    )


def _run_stage(
    run: RunFolder,
    stage: Stage,
    all_stages: Sequence[Stage],
    source: Source[Any],
    report: Callable[[Progress], None],
) -> None:
    shards = run.shards()
    done = run.done(stage.entry.folder)
    counts: Counter[str] = Counter()
    before = [other.entry for other in all_stages[: all_stages.index(stage)]]
    earlier = [entry for entry in before if not (entry.is_score and stage.entry.is_score)]

    def tell(finished: int) -> None:
        report(
            Progress(
                stage.name,
                len(shards),
                finished,
                ok=counts["ok"],
                rejected=counts["rejected"],
                failed=counts["failed"],
            )
        )

    for shard in shards:
        if shard.name in done:
            counts.update(row.status for row in run.read(stage.entry.folder, shard))
    tell(len(done))
    todo = [shard for shard in shards if shard.name not in done]
    if not todo:
        return
    parts: dict[str, Component[Any]] = {"source": source}
    loaded: list[Component[Any]] = []
    try:
        for use in (stage.use, *stage.needs):
            if use is not None and use.slot != "source":
                component = plugins.build(use.slot, use.name, use.options)
                component.load()
                loaded.append(component)
                parts[use.slot] = component
        for number, shard in enumerate(todo, start=1):
            started = time.perf_counter()
            samples = list(samples_reaching(run, earlier, shard, source))
            rows = _rows(samples, lambda batch: stage.compute(batch, parts))
            run.write(stage.entry.folder, shard, rows)
            seconds = round(time.perf_counter() - started, 3)
            run.note(stage=stage.entry.folder, shard=shard.name, records=len(rows), seconds=seconds)
            counts.update(row.status for row in rows)
            tell(len(done) + number)
    finally:
        for component in loaded:
            component.close()


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
