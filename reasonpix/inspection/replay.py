"""Recompute one record, stage by stage, and compare with the results that the run stored."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from reasonpix.core.figures import counted
from reasonpix.core.images import decode
from reasonpix.generation.engine.unit import Components, StageRunner, component_specs, row_of
from reasonpix.generation.outcomes import StageEntry, source_of
from reasonpix.generation.pipeline import Stage
from reasonpix.generation.run_folder import Row, RunFolder, Shard
from reasonpix.inspection.lineage import Lineage, trace_record
from reasonpix.inspection.stored_answers import ReplayLedger, build_replayed
from reasonpix.llm.planner import LLMPlanner
from reasonpix.plugin.components import Component, Source
from reasonpix.plugin.samples import Sample


@dataclass(frozen=True)
class Replayed:
    """A stage that was recomputed; it is identical if nothing differs."""

    stage: str
    differences: list[str]

    @property
    def is_identical(self) -> bool:
        """Whether the result equals the stored one, byte for byte."""
        return not self.differences


def replay_record(run: RunFolder, reference: str) -> tuple[Lineage, list[Replayed]]:
    """The lineage of a record, and each of its stages recomputed from that stage's stored input.

    Loads the run's components, one stage after another. Language models are not called; their
    stored answers are read. Raises `RunError` like `trace_record`.
    """
    replayed: list[Replayed] = []
    source = source_of(run)

    def visit(
        stage: Stage | None, entry: StageEntry, sample: Sample, row: Row, ledger: ReplayLedger
    ) -> None:
        differences = list(_stage_differences(run, stage, entry, sample, row, source, ledger))
        replayed.append(Replayed(entry.stage, differences))

    try:
        return trace_record(run, reference, visit), replayed
    finally:
        source.close()


class _Components(Components):
    """The components of one stage. Language models answer from the ledger, and are not loaded."""

    def __init__(self, source: Source[Any], ledger: ReplayLedger) -> None:
        super().__init__(source, ledger)
        self._answers = ledger
        self._opened: list[Component[Any]] = []

    def load_for(self, stage: Stage) -> tuple[dict[str, Component[Any]], list[threading.Lock]]:
        """The components of the stage, by slot."""
        by_slot: dict[str, Component[Any]] = {"source": self._source}
        for use in component_specs(stage):
            component = by_slot[use.slot] = build_replayed(use, self._answers)
            if not isinstance(component, LLMPlanner):
                component.load()
                self._opened.append(component)
        return by_slot, []

    def close(self) -> None:
        """Close the components that were loaded."""
        for component in self._opened:
            component.close()


def _stage_differences(
    run: RunFolder,
    stage: Stage | None,
    entry: StageEntry,
    sample: Sample,
    row: Row,
    source: Source[Any],
    ledger: ReplayLedger,
) -> Iterator[str]:
    """How a stage's result differs now."""
    if stage is None:
        yield "the run's recipe has no such stage here; check that its plugins are installed"
        return
    if stage.entry.component != entry.component:
        yield from changes(entry.component, stage.entry.component, "component")
        return
    ledger.clear_lookups()
    components = _Components(source, ledger)
    try:
        runner = StageRunner(run, stage, source, components)
        # No run has this shard, so no stored row of the record is reused.
        [result], _ = runner.compute(Shard("", 1), [sample])
    finally:
        components.close()
    if missing := ledger.lookups.count(None):
        yield f"{counted(missing, 'question')} without a stored answer"
    else:
        yield from _differences(row, Row(*row_of(sample.record_id, result)))


def _differences(old: Row, new: Row) -> Iterator[str]:
    for name in ("status", "reason"):
        if getattr(old, name) != getattr(new, name):
            yield f"{name} was {getattr(old, name)!r}, is {getattr(new, name)!r}"
    if old.output != new.output:
        yield from changes(_value(old.output), _value(new.output), "output")
    if old.image != new.image:
        yield _image_difference(old.image, new.image)


def _value(output: str) -> Any:
    return json.loads(output) if output else None


def changes(before: Any, now: Any, where: str) -> Iterator[str]:
    """The paths at which two JSON values differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                yield from changes(before.get(key), now.get(key), f"{where}.{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            if old != new:
                yield from changes(old, new, f"{where}.{number}")
    else:
        yield f"{where} was {json.dumps(before)}, is {json.dumps(now)}"


def _image_difference(before: bytes | None, now: bytes | None) -> str:
    if before is None or now is None:
        return f"image {'is new' if before is None else 'is gone'}"
    old, new = (np.asarray(decode(image), dtype=np.int16) for image in (before, now))
    if old.shape != new.shape:
        return f"image was {old.shape[1]}x{old.shape[0]}, is {new.shape[1]}x{new.shape[0]} pixels"
    apart = np.abs(old - new)
    pixels = int((apart.max(axis=2) > 0).sum())
    if not pixels:
        return "image has the same pixels, but is encoded differently"
    return (
        f"image differs in {pixels} of {old[..., 0].size} pixels, by {apart.max()} of 255 at most"
    )


def replay_lines(replayed: list[Replayed]) -> Iterator[str]:
    """A line for each stage and each difference."""
    if not replayed:
        yield "nothing to recompute: no stage has a result of this record"
        return
    for stage in replayed:
        yield f"{stage.stage:>22}: {'identical' if stage.is_identical else 'differs'}"
        yield from (f"{'':>24}{difference}" for difference in stage.differences)
    identical = sum(stage.is_identical for stage in replayed)
    yield f"{identical} of {len(replayed)} stages are identical, byte for byte"
