"""Stages over shards in this process: all stages of a group run at once, on different shards.

```
          ┌─ decode ahead ─┐                    ┌─ decode ahead ─┐
shards ──▶ stage 1 (thread) ──samples in memory──▶ stage 2 (thread) ──▶ …
               └───────────────── encode and commit, in order ──────┘
```
A stage whose component can have many items in flight gets many threads. The number of shards in
flight is bounded, and with it memory.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Self

from reasonpix.generation.engine.unit import (
    Components,
    StageRunner,
    UnitResult,
    decode_ahead,
    decoded_bytes,
    drop_images,
)
from reasonpix.generation.outcomes import Verdicts, verdicts
from reasonpix.generation.pipeline import Stage
from reasonpix.generation.resources import fit_here
from reasonpix.generation.run_folder import RunFolder, Shard
from reasonpix.llm.ledger import Ledger
from reasonpix.plugin.components import Source
from reasonpix.plugin.samples import Sample

_LOG = logging.getLogger(__name__)

SHARDS_IN_THREADS = 64
"""The most shards that one stage works on at once."""

DECODED_BYTES = 2**30
"""Above this many bytes of decoded images in flight, none are decoded ahead and none are kept."""


@dataclass
class _InFlightShard:
    """A shard between two stages."""

    shard: Shard
    samples: list[Sample]
    decoding: Future[None] | None = None


class LocalExecutor:
    """Runs stages in this process. A context manager that closes the components it loaded."""

    def __init__(self, run: RunFolder, source: Source[Any], ledger: Ledger | None) -> None:
        self._run = run
        self._source = source
        self._components = Components(source, ledger)

    def __enter__(self) -> Self:
        """Collect garbage less often, until exit."""
        # There are many records and no cycles; looking for these takes a third of a light run.
        self._gc_threshold = gc.get_threshold()
        gc.set_threshold(20_000, 20, 20)
        return self

    def __exit__(self, *_: object) -> None:
        """Close all components."""
        gc.set_threshold(*self._gc_threshold)
        self._components.retain(())

    def fit(self, stages: Sequence[Stage]) -> bool:
        """Whether the models of these stages fit together on this machine."""
        return fit_here([stage.resources for stage in stages])

    def run_stages(
        self,
        stages: Sequence[Stage],
        todo: Sequence[set[str]],
        shards: Sequence[Shard],
        report: Callable[[UnitResult], None],
    ) -> None:
        """Run each stage on the shards named in its `todo`, and commit them.

        `report` is called in this thread. On any exception, also KeyboardInterrupt, the units at
        work are finished and committed before it propagates.
        """
        self._components.retain(stages)
        busy = [(stage, names) for stage, names in zip(stages, todo, strict=True) if names]
        # Stages behind the same filters share verdicts, which take a walk over all scores.
        rejected: dict[int, Verdicts] = {}
        for stage, _ in busy:
            if len(stage.gates) not in rejected:
                rejected[len(stage.gates)] = verdicts(self._run, stage.gates)
        runners = [
            StageRunner(
                self._run,
                stage,
                self._source,
                self._components,
                rejected[len(stage.gates)],
            )
            for stage, _ in busy
        ]
        flow = _Flow(runners, [names for _, names in busy], shards)
        try:
            flow.start()
            for event in flow.events():
                if isinstance(event, BaseException):
                    raise event
                report(event)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                _LOG.info("stopping after the shards at work are finished")
            try:
                self._components.stop_llm_calls()
            finally:
                flow.stop()
            for event in flow.events():
                if isinstance(event, UnitResult):
                    with suppress(Exception):  # the first error is the one to raise
                        report(event)
            raise
        flow.stop()


class _Flow:
    """The threads of a group of stages, and the shards in flight between them."""

    def __init__(
        self, runners: Sequence[StageRunner], todo: Sequence[set[str]], shards: Sequence[Shard]
    ) -> None:
        self._events: SimpleQueue[UnitResult | BaseException | None] = SimpleQueue()
        self._runners = runners
        self._todo = todo
        self._shards = [shard for shard in shards if any(shard.name in names for names in todo)]
        self._remaining = len(self._shards)
        self._stopping = threading.Event()
        self._decoded: dict[str, int] = {}
        """Bytes of decoded images, by the name of the shard in flight."""
        self._commit_failed = False
        self._queues = [SimpleQueue[_InFlightShard | None]() for _ in runners]
        self._thread_counts = [shards_at_once(it.concurrency, self._shards) for it in runners]
        self._in_flight = threading.Semaphore(sum(self._thread_counts) + 2)
        self._image_pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="images")
        # Uncommitted results take memory, so a stage that is ahead of its commits has to wait.
        self._uncommitted = [threading.Semaphore(count + 1) for count in self._thread_counts]
        # One thread: the files of a shard appear in the order of its stages.
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        # Daemons: a second Ctrl-C does not wait for them.
        self._threads = [threading.Thread(target=self._catching(self._feed), daemon=True)]
        for number, count in enumerate(self._thread_counts):
            work = self._catching(partial(self._run_stage, number))
            self._threads += [threading.Thread(target=work, daemon=True) for _ in range(count)]

    def start(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def _catching(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._events.put(error)

        return run

    def events(self) -> Iterator[UnitResult | BaseException]:
        """Finished units and errors as they come, until all shards are through."""
        while (event := self._events.get()) is not None:
            yield event

    def stop(self) -> None:
        """Start nothing new, and wait for what is at work."""
        self._stopping.set()
        self._in_flight.release()
        for queue, count in zip(self._queues, self._thread_counts, strict=True):
            for _ in range(count):
                queue.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._committer.shutdown()
        self._image_pool.shutdown()
        self._events.put(None)

    def _feed(self) -> None:
        if not self._shards:
            self._events.put(None)
        for shard in self._shards:
            self._in_flight.acquire()
            if self._stopping.is_set():
                return
            first = next(i for i, names in enumerate(self._todo) if shard.name in names)
            self._pass_on(first, _InFlightShard(shard, self._runners[first].load(shard)))

    def _pass_on(self, number: int, item: _InFlightShard) -> None:
        """Hand a shard to stage `number` with images decoded ahead, or finish it after the last."""
        if number == len(self._runners):
            self._committer.submit(self._catching(partial(self._finish, item.shard)))
            return
        name = item.shard.name
        if name in self._decoded:
            self._decoded[name] = decoded_bytes(item.samples)
            # Stages with many threads ask language models, which read text: many shards wait there.
            if self._is_memory_full() or self._thread_counts[number] > 1:
                self._drop_images(item)
        if self._runners[number].stage.needs_images and name in self._todo[number]:
            item.decoding = self._image_pool.submit(self._decode, item)
        self._queues[number].put(item)

    def _decode(self, item: _InFlightShard) -> None:
        """Decode the images of a shard, unless memory is full: then the stage decodes them."""
        if not self._is_memory_full():
            decode_ahead(item.samples)
            self._decoded[item.shard.name] = decoded_bytes(item.samples)

    def _is_memory_full(self) -> bool:
        return sum(list(self._decoded.values())) > DECODED_BYTES

    def _drop_images(self, item: _InFlightShard) -> None:
        drop_images(item.samples)
        self._decoded[item.shard.name] = decoded_bytes(item.samples)

    def _commit(self, unit: Callable[[], UnitResult], number: int, item: _InFlightShard) -> None:
        """Commit a unit, unless an earlier commit failed: a later stage must not seem finished."""
        try:
            if not self._commit_failed:
                self._commit_failed = True
                self._events.put(unit())
                self._commit_failed = False
        finally:
            self._uncommitted[number].release()
        if self._is_memory_full():
            self._drop_images(item)

    def _finish(self, shard: Shard) -> None:
        """A shard has passed all stages and is committed."""
        self._decoded.pop(shard.name, None)
        self._in_flight.release()
        self._remaining -= 1
        if not self._remaining:
            self._events.put(None)

    def _run_stage(self, number: int) -> None:
        runner, todo = self._runners[number], self._todo[number]
        while (item := self._queues[number].get()) is not None and not self._stopping.is_set():
            shard, samples = item.shard, item.samples
            if item.decoding is not None:
                item.decoding.result()
            # A filter may be finished already; it changes nothing for the stages after it.
            if shard.name in todo:
                results, seconds = runner.compute(shard, samples)
                self._uncommitted[number].acquire()
                unit = partial(runner.commit, shard, samples, results, seconds, self._image_pool)
                self._committer.submit(self._catching(partial(self._commit, unit, number, item)))
                item.samples = runner.propagate(samples, results)
            self._pass_on(number + 1, item)


def shards_at_once(concurrency: int, shards: Sequence[Shard]) -> int:
    """How many shards a stage works on at once, to keep its component busy.

    Several times as many as the component can hold: while the last requests of one shard are
    answered, those of others are sent.
    """
    if concurrency == 1 or not shards:
        return 1
    wanted = math.ceil(8 * concurrency / max(shard.rows for shard in shards)) + 1
    return min(wanted, SHARDS_IN_THREADS)
