"""The unit of work: a shard through a stage. Whatever executor drives it, it gives the same bytes.

A finished unit is a file; what has a file is not computed again, so stopping at any moment costs
the shards in flight and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic_core import to_json

from reasonpix.core.images import encode_png
from reasonpix.core.memory import free_memory, is_out_of_memory
from reasonpix.errors import InvalidBox, ReasonpixError, RunError
from reasonpix.generation.outcomes import Verdicts, samples_reaching, verdicts
from reasonpix.generation.pipeline import Stage
from reasonpix.generation.run_folder import Row, RowTuple, RunFolder, Shard
from reasonpix.generation.samples import Sample
from reasonpix.generation.stages import Result
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.planner import LLMPlanner
from reasonpix.plugin.components import Component, Source
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.types import Problem

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnitResult:
    """A unit that was finished: how its records ended, and how long it took."""

    stage: str
    """The stage's folder."""
    shard: str
    ok: int
    rejected: int
    failed: int
    seconds: float


class Components:
    """The loaded components of a run: each once, whatever stages share it."""

    def __init__(self, source: Source[Any], ledger: Ledger | None) -> None:
        self._source = source
        self._ledger = ledger
        self._loaded: dict[tuple[str, ...], tuple[Component[Any], threading.Lock]] = {}

    def keep(self, stages: Sequence[Stage]) -> None:
        """Close what none of `stages` needs, to make room; all, when there are none."""
        needed = {_key(use) for stage in stages for use in uses_of(stage)}
        unneeded = [key for key in self._loaded if key not in needed]
        for key in unneeded:
            component, _ = self._loaded.pop(key)
            component.close()
        if unneeded and needed:
            free_memory()

    def stop(self) -> None:
        """Let no component ask a language model any more; what it was answered is kept."""
        for component, _ in self._loaded.values():
            if isinstance(component, LLMPlanner):
                component.close()

    def of(self, stage: Stage) -> tuple[dict[str, Component[Any]], list[threading.Lock]]:
        """The components of a stage, loaded, by slot; and the locks of those used one at a time."""
        by_slot: dict[str, Component[Any]] = {"source": self._source}
        locks: dict[tuple[str, ...], threading.Lock] = {}
        for use in uses_of(stage):
            if _key(use) not in self._loaded:
                component = use.build()
                if isinstance(component, LLMPlanner):
                    component.ledger = self._ledger
                _load(component)
                self._loaded[_key(use)] = component, threading.Lock()
            component, lock = self._loaded[_key(use)]
            if isinstance(component, LLMPlanner):
                _check_prompt(component, use, stage)
            if component.concurrency == 1:
                locks[_key(use)] = lock
            by_slot[use.slot] = component
        # Always in the same order, so that two stages never wait for one another.
        return by_slot, [locks[key] for key in sorted(locks)]


def _load(component: Component[Any]) -> None:
    try:
        component.load()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"{component.name}: out of memory while it was loaded; say under resources: what each "
            "stage takes (num_gpus, memory_gb), and models that do not fit together take turns"
        ) from error


def uses_of(stage: Stage) -> list[ComponentSpec]:
    """The components that a stage needs to have loaded; the source is there anyway."""
    return [use for use in (stage.use, *stage.needs) if use is not None and use.slot != "source"]


def _key(use: ComponentSpec) -> tuple[str, ...]:
    slot = "planner" if use.slot == "reader" else use.slot
    return slot, use.name, use.options.model_dump_json()


def _check_prompt(planner: LLMPlanner[Any], use: ComponentSpec, stage: Stage) -> None:
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
        self._parts, self._locks = components.of(stage)
        self._rejected = verdicts(run, stage.gates) if rejected is None else rejected
        self._reopened = run.reopened(stage.entry.folder)
        self._largest: int | None = None
        """The most samples that memory was found to hold at once."""

    @property
    def concurrency(self) -> int:
        """How many items its components can have under way at once."""
        parts = [part for slot, part in self._parts.items() if slot != "source"]
        return min((part.concurrency for part in parts), default=1)

    def do(self, shard: Shard) -> UnitResult:
        """Compute a shard from what is in the run folder, and commit it."""
        samples = self.load(shard)
        results, seconds = self.compute(shard, samples)
        return self.commit(shard, samples, results, seconds)

    def load(self, shard: Shard) -> list[Sample]:
        """The samples of a shard that reach this stage, from the run folder."""
        reached = samples_reaching(
            self._run, self.stage.follows, self._rejected, shard, self._source
        )
        return list(reached)

    def compute(self, shard: Shard, samples: Sequence[Sample]) -> tuple[list[Result | Row], float]:
        """One result for each sample, or the row that is kept of it; and the seconds it took.

        When a batch breaks, each record is tried alone: a bad one costs one. When memory does not
        hold a batch, it is halved, and later ones are as small.
        """
        known: dict[str, Row] = {}
        if shard.name in self._reopened:
            known = self._run.known(self.stage.entry.folder, shard)
        todo = [sample for sample in samples if sample.record_id not in known]
        computed: list[Result] = []
        with ExitStack() as held:
            for lock in self._locks if todo else ():
                held.enter_context(lock)
            started = time.perf_counter()
            while len(computed) < len(todo):
                end = len(computed) + (self._largest or len(todo))
                computed += self._batch(todo[len(computed) : end])
            seconds = time.perf_counter() - started
        if not known:
            return [*computed], seconds
        new = iter(computed)
        results: list[Result | Row] = [known.get(s.record_id) or next(new) for s in samples]
        return results, seconds

    def _batch(self, samples: Sequence[Sample]) -> list[Result]:
        """One result for each sample; or none, when memory did not hold them: try again."""
        try:
            results = self.stage.compute(samples, self._parts)
        except Exception as error:
            # A wrong box is of one image; our other errors are of the component: they stop the run.
            if isinstance(error, ReasonpixError) and not isinstance(error, InvalidBox):
                raise
            _LOG.debug("%s, %d records", self.stage.name, len(samples), exc_info=error)
            if len(samples) == 1:
                # Where the file was is of no use in a dataset's card.
                what = error.strerror if isinstance(error, OSError) else None
                reason = f"{type(error).__name__}: {what or error}"
                return [Problem(status="failed", reason=reason)]
            if not is_out_of_memory(error):
                return [result for sample in samples for result in self._batch([sample])]
        else:
            if len(results) != len(samples):
                raise RunError(f"{self.stage.name} gave {len(results)} results for {len(samples)}")
            return results
        # Not before the error is gone: its frames hold the batch.
        self._largest = -(-self._together(len(samples)) // 2)
        _LOG.info("%s: out of memory; %d records at once now", self.stage.name, self._largest)
        free_memory()
        return []

    def _together(self, samples: int) -> int:
        """How many of so many samples the stage's components compute at once."""
        sizes = (getattr(part.options, "batch_size", samples) for part in self._parts.values())
        return min(samples, *sizes)

    def advance(self, samples: Sequence[Sample], results: Sequence[Result | Row]) -> list[Sample]:
        """The samples that go on to the stages after this one, with what was found out."""
        if self.stage.entry.is_score:
            return list(samples)
        going = []
        for sample, result in zip(samples, results, strict=True):
            if type(result) is Problem:
                continue
            if isinstance(result, Row):
                if result.status != "ok":
                    continue
                sample.take_row(self.stage.name, result)
            elif isinstance(result, tuple):
                sample.edited = result[1]
            else:
                sample.take(result)
            going.append(sample)
        return going

    def commit(
        self,
        shard: Shard,
        samples: Sequence[Sample],
        results: Sequence[Result | Row],
        seconds: float,
        encoders: Executor | None = None,
    ) -> UnitResult:
        """Store the results of a shard: its file appears complete or not at all.

        Images that were made are encoded by `encoders`, where there are any.
        """
        folder, started = self.stage.entry.folder, time.perf_counter()
        each = encoders.map if encoders and any(type(it) is tuple for it in results) else map
        rows = list(each(row_of, [sample.record_id for sample in samples], results))
        self._run.write(folder, shard, rows)
        for sample, row in zip(samples, rows, strict=True):
            if row[4] is not None:
                # From now on it need not be kept decoded.
                sample.load_edited = partial(bytes, row[4])
        if shard.name in self._reopened:
            self._run.completed(folder, shard)
        ends = Counter([row[1] for row in rows])
        seconds = round(seconds + time.perf_counter() - started, 3)
        return UnitResult(folder, shard.name, ends["ok"], ends["rejected"], ends["failed"], seconds)


def decode_ahead(samples: Sequence[Sample]) -> None:
    """Decode the images of samples; what is wrong with one is told by the stage that needs it."""
    for sample in samples:
        with suppress(Exception):
            sample.decode()


def forget_images(samples: Sequence[Sample]) -> None:
    """Keep no image decoded that can be decoded again."""
    for sample in samples:
        sample.decoded = None
        if sample.load_edited is not None:
            sample.edited = None


def bytes_decoded(samples: Sequence[Sample]) -> int:
    """Memory that decoded images take."""
    images = (image for sample in samples for image in (sample.decoded, sample.edited) if image)
    return sum(3 * image.width * image.height for image in images)


def row_of(record_id: str, result: Any) -> RowTuple:
    """The values of the row that holds a result."""
    # By the class itself, and not by `isinstance` and `model_dump_json`: pydantic takes long there,
    # and with light components this is most of what a stage costs.
    kind = type(result)
    if kind is Row:
        return result  # type: ignore[no-any-return]
    if kind is Problem:
        # What a component raised may hold halves of characters, which no file can.
        reason = result.reason.encode("utf-8", "backslashreplace").decode()
        return record_id, result.status, reason, "", None
    if kind is tuple:
        output, image = result
        return record_id, "ok", "", to_json(output).decode(), encode_png(image)
    return record_id, "ok", "", to_json(result).decode(), None
