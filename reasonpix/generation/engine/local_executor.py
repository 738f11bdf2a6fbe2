"""Stages over shards in this process: all stages at work at the same time, on different shards.

```
          ┌─ decode ahead ─┐                    ┌─ decode ahead ─┐
shards ──▶ stage 1 (thread) ──samples in memory──▶ stage 2 (thread) ──▶ …
               └───────────────── encode and commit, in order ──────┘
```
A stage whose component has many items under way gets many threads. How many shards are on their way
is bounded, and with it memory.
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
    bytes_decoded,
    decode_ahead,
    forget_images,
)
from reasonpix.generation.outcomes import Verdicts, verdicts
from reasonpix.generation.pipeline import Stage
from reasonpix.generation.resources import fit_here
from reasonpix.generation.run_folder import RunFolder, Shard
from reasonpix.generation.samples import Sample
from reasonpix.llm.ledger import Ledger
from reasonpix.plugin.components import Source

_LOG = logging.getLogger(__name__)

SHARDS_IN_THREADS = 64
"""Most shards that a stage has under way at once."""

DECODED_BYTES = 2**30
"""Decoded images on their way, beyond which none are decoded ahead, and none are kept."""


@dataclass
class _InFlightShard:
    """A shard between two stages."""

    shard: Shard
    samples: list[Sample]
    decoded: Future[None] | None = None


class LocalExecutor:
    """This process, to do stages in: a context manager that closes what they loaded."""

    def __init__(self, run: RunFolder, source: Source[Any], ledger: Ledger | None) -> None:
        self._run = run
        self._source = source
        self._components = Components(source, ledger)

    def __enter__(self) -> Self:
        """Itself."""
        # Records are many, and no cycles: looking for these takes a third of a light run.
        self._collected = gc.get_threshold()
        gc.set_threshold(20_000, 20, 20)
        return self

    def __exit__(self, *_: object) -> None:
        """Close all components."""
        gc.set_threshold(*self._collected)
        self._components.keep(())

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
        """Do each stage on the shards that its `todo` names, and commit them.

        `report` is called in this thread. When it or anything else raises, also KeyboardInterrupt,
        the units at work are finished and committed before that is raised again.
        """
        self._components.keep(stages)
        busy = [(stage, names) for stage, names in zip(stages, todo, strict=True) if names]
        # Once for all that follow the same filters: it takes a walk over all scores of these.
        rejected: dict[int, Verdicts] = {}
        for stage, _ in busy:
            if len(stage.gates) not in rejected:
                rejected[len(stage.gates)] = verdicts(self._run, stage.gates)
        works = [
            StageRunner(
                self._run, stage, self._source, self._components, rejected[len(stage.gates)]
            )
            for stage, _ in busy
        ]
        flow = _Flow(works, [names for _, names in busy], shards)
        try:
            flow.begin()
            for event in flow.events():
                if isinstance(event, BaseException):
                    raise event
                report(event)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                _LOG.info("stopping: what is at work is finished first")
            try:
                self._components.stop()
            finally:
                flow.end()
            for event in flow.events():
                if isinstance(event, UnitResult):
                    with suppress(Exception):  # what stopped the run counts
                        report(event)
            raise
        flow.end()


class _Flow:
    """The threads of a group of stages, and the shards on their way between them."""

    def __init__(
        self, works: Sequence[StageRunner], todo: Sequence[set[str]], shards: Sequence[Shard]
    ) -> None:
        self._events: SimpleQueue[UnitResult | BaseException | None] = SimpleQueue()
        self._works = works
        self._todo = todo
        self._shards = [shard for shard in shards if any(shard.name in names for names in todo)]
        self._left = len(self._shards)
        self._stopping = threading.Event()
        self._decoded: dict[str, int] = {}
        """Bytes of the decoded images of shards on their way."""
        self._is_broken = False
        """Whether a commit failed."""
        self._queues = [SimpleQueue[_InFlightShard | None]() for _ in works]
        self._threads_of = [shards_at_once(work.concurrency, self._shards) for work in works]
        self._room = threading.Semaphore(sum(self._threads_of) + 2)
        self._images = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="images")
        # What is not stored takes memory: a stage that makes more has to wait.
        self._waiting = [threading.Semaphore(count + 1) for count in self._threads_of]
        # One thread: the files of a shard appear in the order of its stages.
        self._committing = ThreadPoolExecutor(1, thread_name_prefix="commit")
        # Daemons: a second Ctrl-C does not wait for them.
        self._threads = [threading.Thread(target=self._guarded(self._feed), daemon=True)]
        for number, count in enumerate(self._threads_of):
            work = self._guarded(partial(self._work, number))
            self._threads += [threading.Thread(target=work, daemon=True) for _ in range(count)]

    def begin(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._events.put(error)

        return guarded

    def events(self) -> Iterator[UnitResult | BaseException]:
        """What was finished and what broke, as it comes, until all is through."""
        while (event := self._events.get()) is not None:
            yield event

    def end(self) -> None:
        """Begin nothing new, and wait for what is at work."""
        self._stopping.set()
        self._room.release()
        for queue, count in zip(self._queues, self._threads_of, strict=True):
            for _ in range(count):
                queue.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._committing.shutdown()
        self._images.shutdown()
        self._events.put(None)

    def _feed(self) -> None:
        if not self._shards:
            self._events.put(None)
        for shard in self._shards:
            self._room.acquire()
            if self._stopping.is_set():
                return
            first = next(i for i, names in enumerate(self._todo) if shard.name in names)
            self._hand_on(first, _InFlightShard(shard, self._works[first].load(shard)))

    def _hand_on(self, number: int, moving: _InFlightShard) -> None:
        """To the stage of that number, with its images decoded ahead; or out of the flow."""
        if number == len(self._works):
            self._committing.submit(self._guarded(partial(self._leave, moving.shard)))
            return
        name = moving.shard.name
        if name in self._decoded:
            self._decoded[name] = bytes_decoded(moving.samples)
            # Many shards wait where questions are answered, and these are asked in words.
            if self._is_full() or self._threads_of[number] > 1:
                self._forget(moving)
        if self._works[number].stage.sees_images and name in self._todo[number]:
            moving.decoded = self._images.submit(self._decode, moving)
        self._queues[number].put(moving)

    def _decode(self, moving: _InFlightShard) -> None:
        """Decode the images of a shard, unless so many are that the stage has to do it."""
        if not self._is_full():
            decode_ahead(moving.samples)
            self._decoded[moving.shard.name] = bytes_decoded(moving.samples)

    def _is_full(self) -> bool:
        return sum(list(self._decoded.values())) > DECODED_BYTES

    def _forget(self, moving: _InFlightShard) -> None:
        forget_images(moving.samples)
        self._decoded[moving.shard.name] = bytes_decoded(moving.samples)

    def _commit(self, unit: Callable[[], UnitResult], number: int, moving: _InFlightShard) -> None:
        """Store a unit. After one that failed none is: a later stage would count as finished."""
        try:
            if not self._is_broken:
                self._is_broken = True
                self._events.put(unit())
                self._is_broken = False
        finally:
            self._waiting[number].release()
        if self._is_full():
            self._forget(moving)

    def _leave(self, shard: Shard) -> None:
        """A shard is through, and all of it is committed."""
        self._decoded.pop(shard.name, None)
        self._room.release()
        self._left -= 1
        if not self._left:
            self._events.put(None)

    def _work(self, number: int) -> None:
        work, todo = self._works[number], self._todo[number]
        while (moving := self._queues[number].get()) is not None and not self._stopping.is_set():
            shard, samples = moving.shard, moving.samples
            if moving.decoded is not None:
                moving.decoded.result()
            # A filter may have been done before; it changes nothing for those after it.
            if shard.name in todo:
                results, seconds = work.compute(shard, samples)
                self._waiting[number].acquire()
                unit = partial(work.commit, shard, samples, results, seconds, self._images)
                self._committing.submit(self._guarded(partial(self._commit, unit, number, moving)))
                moving.samples = work.advance(samples, results)
            self._hand_on(number + 1, moving)


def shards_at_once(concurrency: int, shards: Sequence[Shard]) -> int:
    """How many shards a stage works on at once, to keep its component's hands full.

    Several times what these can hold: while the last questions of one shard are answered, those of
    others go on.
    """
    if concurrency == 1 or not shards:
        return 1
    wanted = math.ceil(8 * concurrency / max(shard.rows for shard in shards)) + 1
    return min(wanted, SHARDS_IN_THREADS)
