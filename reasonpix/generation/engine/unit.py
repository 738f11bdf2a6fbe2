"""The unit of work: one shard through one stage. The bytes do not depend on the executor.

A finished unit is a file, and a shard that has its file is not recomputed. So an interrupted run
loses only the shards that were in flight.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from reasonpix.core.images import encode_png
from reasonpix.core.memory import free_memory, is_out_of_memory
from reasonpix.errors import InvalidBox, ReasonpixError, RunError
from reasonpix.generation.outcomes import Verdicts, samples_reaching, verdicts
from reasonpix.generation.pipeline import Stage
from reasonpix.generation.run_folder import Row, RowTuple, RunFolder, Shard
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.planner import LLMPlanner
from reasonpix.plugin import registry
from reasonpix.plugin.components import Component, Source
from reasonpix.plugin.samples import Sample
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.stages import Result
from reasonpix.plugin.types import Problem

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnitResult:
    """A finished unit: how its records ended, and how long it took."""

    stage: str
    """The stage's folder."""
    shard: str
    ok: int
    rejected: int
    failed: int
    seconds: float

    @classmethod
    def count(
        cls, folder: str, shard: Shard, statuses: Iterable[str], seconds: float = 0.0
    ) -> UnitResult:
        """Count how the records of a shard ended."""
        counts = Counter(statuses)
        return cls(folder, shard.name, counts["ok"], counts["rejected"], counts["failed"], seconds)


def component_specs(stage: Stage) -> list[ComponentSpec]:
    """The components that a stage needs loaded, without the source, which always is."""
    return [spec for spec in stage.components if spec.slot != "source"]


def asks_llm(stage: Stage) -> bool:
    """Whether one of a stage's components calls a language model."""
    return any(
        issubclass(registry.find(spec.slot, spec.name), LLMPlanner)
        for spec in component_specs(stage)
    )


class Components:
    """The loaded components of a run. Stages that name the same component share it."""

    def __init__(self, source: Source[Any], ledger: Ledger | None) -> None:
        self._source = source
        self._ledger = ledger
        self._loaded: dict[tuple[str, ...], tuple[Component[Any], threading.Lock]] = {}

    def retain(self, stages: Sequence[Stage]) -> None:
        """Close the components that none of `stages` needs; without stages, close all."""
        needed = {_key(spec) for stage in stages for spec in component_specs(stage)}
        unneeded = [key for key in self._loaded if key not in needed]
        for key in unneeded:
            component, _ = self._loaded.pop(key)
            component.close()
        if unneeded and needed:
            free_memory()

    def stop_llm_calls(self) -> None:
        """Send no more requests to language models. Answers received so far are kept."""
        for component, _ in self._loaded.values():
            if isinstance(component, LLMPlanner):
                component.close()

    def load_for(self, stage: Stage) -> tuple[dict[str, Component[Any]], list[threading.Lock]]:
        """A stage's components by slot, loaded, and the locks of those that are not concurrent."""
        by_slot: dict[str, Component[Any]] = {"source": self._source}
        locks: dict[tuple[str, ...], threading.Lock] = {}
        for spec in component_specs(stage):
            if _key(spec) not in self._loaded:
                component = spec.build()
                if isinstance(component, LLMPlanner):
                    component.ledger = self._ledger
                _load(component)
                self._loaded[_key(spec)] = component, threading.Lock()
            component, lock = self._loaded[_key(spec)]
            if isinstance(component, LLMPlanner):
                _check_prompt(component, spec, stage)
            if component.concurrency == 1:
                locks[_key(spec)] = lock
            by_slot[spec.slot] = component
        # A fixed order, so that two stages never wait for each other.
        return by_slot, [locks[key] for key in sorted(locks)]


def _load(component: Component[Any]) -> None:
    try:
        component.load()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"{component.name}: out of memory while loading; set num_gpus and memory_gb of each "
            "stage under `resources:`, so that models that do not fit together take turns"
        ) from error


def _key(spec: ComponentSpec) -> tuple[str, ...]:
    return spec.kind, spec.name, spec.options.model_dump_json()


def _check_prompt(planner: LLMPlanner[Any], spec: ComponentSpec, stage: Stage) -> None:
    """Raise `RunError` if a prompt was edited after it went into the stage's fingerprint."""
    if stage.questions is None:
        return
    task, _ = stage.questions
    components = (stage.entry.component, *stage.entry.component.get("uses", ()))
    planned = next(facts for facts in components if facts.get("slot") == spec.slot)
    prompt = planner.prompt_identity(task)
    if any(planned.get(name, fact) != fact for name, fact in prompt.items()):
        raise RunError(
            f"the prompt {task!r} was edited while the run was in progress; "
            "run the same command again to continue with the new prompt"
        )


class StageRunner:
    """A stage of a run with its components loaded, ready for shards."""

    def __init__(
        self,
        run: RunFolder,
        stage: Stage,
        source: Source[Any],
        components: Components,
        rejected: Verdicts | None = None,
    ) -> None:
        self.stage = stage
        self._run = run
        self._source = source
        self._components, self._locks = components.load_for(stage)
        self._rejected = verdicts(run, stage.gates) if rejected is None else rejected
        self._reopened = run.reopened(stage.entry.folder)
        self._max_batch: int | None = None
        """The most samples that fit in memory at once, once that is known."""

    @property
    def concurrency(self) -> int:
        """How many items its components can have in flight at once."""
        components = [part for slot, part in self._components.items() if slot != "source"]
        return min((component.concurrency for component in components), default=1)

    def run(self, shard: Shard) -> UnitResult:
        """Load a shard from the run folder, compute it, and commit it."""
        samples = self.load(shard)
        results, seconds = self.compute(shard, samples)
        return self.commit(shard, samples, results, seconds)

    def load(self, shard: Shard) -> list[Sample]:
        """The samples of a shard that reach this stage, from the run folder."""
        return list(
            samples_reaching(self._run, self.stage.upstream, self._rejected, shard, self._source)
        )

    def compute(self, shard: Shard, samples: Sequence[Sample]) -> tuple[list[Result | Row], float]:
        """One result for each sample, or the row that is already stored; and the seconds it took.

        If a batch raises, each record is retried alone, so that a bad one fails alone. If a batch
        does not fit in memory, it is halved, and so are later ones.
        """
        stored: dict[str, Row] = {}
        if shard.name in self._reopened:
            stored = self._run.known(self.stage.entry.folder, shard)
        todo = [sample for sample in samples if sample.record_id not in stored]
        computed: list[Result] = []
        with ExitStack() as locked:
            for lock in self._locks if todo else ():
                locked.enter_context(lock)
            started = time.perf_counter()
            while len(computed) < len(todo):
                end = len(computed) + (self._max_batch or len(todo))
                computed += self._compute_batch(todo[len(computed) : end])
            seconds = time.perf_counter() - started
        if not stored:
            return [*computed], seconds
        new = iter(computed)
        results: list[Result | Row] = [stored.get(s.record_id) or next(new) for s in samples]
        return results, seconds

    def _compute_batch(self, samples: Sequence[Sample]) -> list[Result]:
        """One result for each sample, or none if they did not fit in memory: then try again."""
        try:
            return self.stage.compute(samples, self._components)
        except Exception as error:
            # A wrong box belongs to one image. Our other errors are the component's: they stop it.
            if isinstance(error, ReasonpixError) and not isinstance(error, InvalidBox):
                raise
            _LOG.debug("%s, %d records", self.stage.name, len(samples), exc_info=error)
            if len(samples) == 1:
                # A local path would be of no use in a dataset's card.
                message = error.strerror if isinstance(error, OSError) else None
                reason = f"{type(error).__name__}: {message or error}"
                return [Problem(status="failed", reason=reason)]
            if not is_out_of_memory(error):
                return [result for sample in samples for result in self._compute_batch([sample])]
        # Outside the handler: the error's frames hold the batch.
        components = self._components.values()
        sizes = (getattr(part.options, "batch_size", len(samples)) for part in components)
        self._max_batch = -(-min(len(samples), *sizes) // 2)
        _LOG.info("%s: out of memory; now %d records at a time", self.stage.name, self._max_batch)
        free_memory()
        return []

    def propagate(self, samples: Sequence[Sample], results: Sequence[Result | Row]) -> list[Sample]:
        """The samples that go on to the next stages, with this stage's results added."""
        if self.stage.entry.is_score:
            return list(samples)
        passed = []
        for sample, result in zip(samples, results, strict=True):
            if type(result) is Problem:
                continue
            if isinstance(result, Row):
                if result.status != "ok":
                    continue
                sample.add_stored(self.stage.spec, result.output, result.image)
            elif isinstance(result, tuple):
                sample.add(self.stage.spec, *result)
            else:
                sample.add(self.stage.spec, result)
            passed.append(sample)
        return passed

    def commit(
        self,
        shard: Shard,
        samples: Sequence[Sample],
        results: Sequence[Result | Row],
        seconds: float,
        encoders: Executor | None = None,
    ) -> UnitResult:
        """Store the results of a shard; its file appears complete or not at all.

        Images that the stage made are encoded in `encoders`, if given.
        """
        folder, started = self.stage.entry.folder, time.perf_counter()
        has_images = any(type(result) is tuple for result in results)
        encode = encoders.map if encoders and has_images else map
        rows = list(encode(row_of, [sample.record_id for sample in samples], results))
        self._run.write(folder, shard, rows)
        for sample, row in zip(samples, rows, strict=True):
            if row[4] is not None:
                # From now on the decoded image can be dropped.
                sample.add_encoded(self.stage.spec, row[4])
        if shard.name in self._reopened:
            self._run.completed(folder, shard)
        seconds = round(seconds + time.perf_counter() - started, 6)
        return UnitResult.count(folder, shard, (row[1] for row in rows), seconds)


def decode_ahead(samples: Sequence[Sample]) -> None:
    """Decode the images of samples. The stage that needs a broken one reports it."""
    for sample in samples:
        with suppress(Exception):
            for image in list(sample.images.values()):
                image.keep()


def drop_images(samples: Sequence[Sample]) -> None:
    """Drop the decoded images that can be decoded again."""
    for sample in samples:
        for image in list(sample.images.values()):
            image.release()


def decoded_bytes(samples: Sequence[Sample]) -> int:
    """Memory that decoded images take."""
    images = (image.decoded for sample in samples for image in list(sample.images.values()))
    return sum(3 * image.width * image.height for image in images if image is not None)


def row_of(record_id: str, result: Any) -> RowTuple:
    """The values of the row that holds a result."""
    # `type` and `to_json` rather than `isinstance` and `model_dump_json`: pydantic is slow there,
    # and with light components this is most of a stage's time.
    kind = type(result)
    if kind is Row:
        return result  # type: ignore[no-any-return]
    if kind is Problem:
        # An exception's text may hold lone surrogates, which no file can store.
        reason = result.reason.encode("utf-8", "backslashreplace").decode()
        return record_id, result.status, reason, "", None
    if kind is tuple:
        output, image = result
        return record_id, "ok", "", to_json(output).decode(), encode_png(image)
    return record_id, "ok", "", to_json(result).decode(), None
