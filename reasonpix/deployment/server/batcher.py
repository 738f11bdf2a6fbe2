"""A bounded queue of edits, made in batches by one model.

```python
batcher = Batcher(lambda: ReasonPix2Pix.from_pretrained(name), limit=64, wait=0.01)
model = batcher.model.result()
with batcher.admit() as reservation:
    edited = reservation.submit(EditTask(image, "make it rain"), model.settings).result()
batcher.close()
```

One thread owns the model: it loads the model and makes one batch after the other. The oldest edit
goes first, together with those in the queue that have the same settings and size. The model pads
its batches, so an edit does not depend on what shares its batch. When the queue is full, callers
are rejected immediately with a Retry-After estimate.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Condition, Thread
from time import monotonic
from typing import TYPE_CHECKING

from PIL.Image import Image

from reasonpix.core.memory import free_memory, is_out_of_memory
from reasonpix.errors import ReasonpixError
from reasonpix.plugin.types import Problem

if TYPE_CHECKING:
    from reasonpix.editing.config import SamplingSettings
    from reasonpix.editing.pipeline import EditTask, ReasonPix2Pix

RETRY_AFTER_S = 5
"""When to try again while the server starts, stops or is out of memory: nothing better is known."""

_log = logging.getLogger(__name__)


class ServerBusy(ReasonpixError):
    """The edit cannot be made now; try again in `retry_after` seconds."""

    label = "busy"
    """Short name of the reason, for the metrics."""

    def __init__(self, reason: str, retry_after: int = RETRY_AFTER_S) -> None:
        super().__init__(reason, retry_after)  # what it is unpickled from
        self.reason = reason
        self.retry_after = retry_after

    def __str__(self) -> str:
        """The reason, and when to try again."""
        return f"{self.reason}; try again in {self.retry_after} s"


class QueueFull(ServerBusy):
    """The queue is full."""

    label = "full"


class ModelLoading(ServerBusy):
    """The model is still loading."""

    label = "loading"


class ServerStopping(ServerBusy):
    """The server is shutting down."""

    label = "stopping"


class OutOfMemory(ServerBusy):
    """The device ran out of memory."""


class EditRejected(ReasonpixError):
    """The model cannot edit this image with this instruction."""


class EditError(ReasonpixError):
    """The model failed; the log has the traceback."""


class Observer:
    """Callbacks for what a `Batcher` does, called from any thread. This one ignores them."""

    def rejected(self, label: str) -> None:
        """An edit was not admitted; `label` is "full", "loading" or "stopping"."""

    def batch_started(self, waits: Sequence[float]) -> None:
        """A batch started; `waits` are the seconds each of its edits spent in the queue."""

    def batch_finished(self, size: int, seconds: float) -> None:
        """A batch of `size` edits finished, or was abandoned, after `seconds`."""

    def cancelled(self, running: bool) -> None:
        """A client gave up an edit, while it was `running` or still in the queue."""


@dataclass(eq=False)
class _Job:
    task: EditTask
    settings: SamplingSettings
    future: Future[Image] = field(default_factory=Future)
    submitted_at: float = field(default_factory=monotonic)
    running: bool = False

    @property
    def batch_key(self) -> tuple[SamplingSettings, tuple[int, int]]:
        """Jobs with equal keys can share a batch."""
        return self.settings, self.task.image.size


class _BatchAbandoned(Exception):
    """Every client waiting for the batch has gone."""


class Reservation:
    """A place for one edit, held from before its image is read until its result is sent."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._job: _Job | None = None

    def submit(self, task: EditTask, settings: SamplingSettings) -> Future[Image]:
        """Queue the edit. Its future may be cancelled at any time before it is done.

        The future raises `EditRejected`, `EditError` or `OutOfMemory`. The image stays in memory
        until then, so it should be no larger than the model's working size.
        """
        self._job = _Job(task, settings)
        self._batcher._enqueue(self._job)
        return self._job.future

    def cancel(self) -> None:
        """Cancel the edit, if it was submitted and is not done."""
        if self._job:
            self._job.future.cancel()


class Batcher:
    """Admits at most `limit` edits and makes them in batches; see the module's docstring.

    While the model is idle, an edit waits up to `wait` seconds for others to share its batch.
    """

    model: Future[ReasonPix2Pix]
    """The result of `load`, or the error it raised."""

    def __init__(
        self,
        load: Callable[[], ReasonPix2Pix],
        *,
        limit: int,
        wait: float,
        observer: Observer | None = None,
    ) -> None:
        self.model = Future()
        self._load = load
        self._limit = limit
        self._wait = wait
        self._observer = observer or Observer()
        self._changed = Condition()
        self._admitted = 0
        self._queue: list[_Job] = []
        self._running: Sequence[_Job] = ()
        self._batch_size = 1
        self._batch_seconds = 1.0  # a guess until a batch has been measured
        self._measured = False
        self._stopping = self._closed = False
        self._thread = Thread(target=self._work, name="edits", daemon=True)
        self._thread.start()

    @property
    def admitted(self) -> int:
        """Edits that hold a reservation."""
        return self._admitted

    @property
    def waiting(self) -> int:
        """Edits in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Edits in the current batch."""
        return len(self._running)

    def check_ready(self) -> None:
        """Raise `ModelLoading` or `ServerStopping` unless edits can be admitted."""
        if self._stopping:
            raise ServerStopping("the server is shutting down")
        self.check_loaded()

    def check_loaded(self) -> None:
        """Raise `ModelLoading` unless the model is loaded."""
        if not self.model.done() or self.model.exception():
            raise ModelLoading("the model is still loading")

    @contextmanager
    def admit(self) -> Iterator[Reservation]:
        """Reserve a place for one edit; an unfinished edit is cancelled on leaving.

        Raises `QueueFull`, `ModelLoading` or `ServerStopping`.
        """
        try:
            with self._changed:
                self.check_ready()
                if self._admitted >= self._limit:
                    raise QueueFull(
                        f"the queue is full: {self._admitted} edits are running or waiting",
                        self._retry_after(),
                    )
                self._admitted += 1
        except ServerBusy as error:
            self._observer.rejected(error.label)
            raise
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.cancel()
            with self._changed:
                self._admitted -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        """Admit no more edits; finish those already admitted."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def close(self, grace: float = 0) -> bool:
        """Stop, give admitted edits `grace` seconds to finish, and cancel the rest.

        Returns whether the thread has ended: it may still be loading the model or inside a step.
        """
        self.stop()
        if self.model.done():
            self._thread.join(grace)
        for job in (*self._queue, *self._running):
            job.future.cancel()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self.model.done():
            self._thread.join(1)
        return not self._thread.is_alive()

    def _retry_after(self) -> int:
        """Seconds until all admitted edits should be done."""
        batches = math.ceil(self._admitted / self._batch_size)
        return max(1, math.ceil(batches * self._batch_seconds))

    def _enqueue(self, job: _Job) -> None:
        with self._changed:
            self._queue.append(job)
            self._changed.notify_all()
        job.future.add_done_callback(lambda _: self._dequeue_if_cancelled(job))

    def _dequeue_if_cancelled(self, job: _Job) -> None:
        if not job.future.cancelled():
            return
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
                self._changed.notify_all()
        self._observer.cancelled(job.running)

    def _work(self) -> None:
        try:
            model = self._load()
            self._batch_size = model.rows
        except BaseException as error:
            self.model.set_exception(error)
            return
        self.model.set_result(model)
        while jobs := self._next_batch():
            self._observer.batch_started([monotonic() - job.submitted_at for job in jobs])
            started = monotonic()
            self._edit(model, jobs)
            self._record_batch(jobs, monotonic() - started)
            jobs = ()  # or their images would stay in memory until the next batch

    def _next_batch(self) -> Sequence[_Job]:
        """Wait for the next batch; empty when the batcher has stopped and all edits are done."""
        with self._changed:
            while True:
                now = monotonic()
                groups: dict[object, list[_Job]] = defaultdict(list)
                for job in self._queue:
                    groups[job.batch_key].append(job)
                for jobs in groups.values():  # the group of the oldest job comes first
                    if len(jobs) >= self._batch_size or now >= jobs[0].submitted_at + self._wait:
                        self._running = jobs[: self._batch_size]
                        for job in self._running:
                            job.running = True
                            self._queue.remove(job)
                        return self._running
                if self._closed or (self._stopping and not self._admitted):
                    return ()
                oldest = self._queue[0].submitted_at if self._queue else None
                self._changed.wait(None if oldest is None else oldest + self._wait - now)

    def _record_batch(self, jobs: Sequence[_Job], seconds: float) -> None:
        abandoned = all(job.future.cancelled() for job in jobs)
        with self._changed:
            self._running = ()
            if not abandoned:
                weight = 0.2 if self._measured else 1
                self._batch_seconds += weight * (seconds - self._batch_seconds)
                self._measured = True
        self._observer.batch_finished(len(jobs), seconds)

    def _edit(self, model: ReasonPix2Pix, jobs: Sequence[_Job]) -> None:
        """Settle every job that is not cancelled."""
        error = _edit_together(model, jobs)
        # The exception, whose frames may hold device memory, is gone only after that call returned.
        if error is None:
            return
        free_memory()
        if len(jobs) == 1:
            _settle(jobs[0], error)
            return
        for job in jobs:  # one bad edit must not fail the others
            if not job.future.done():
                self._edit(model, [job])


def _edit_together(model: ReasonPix2Pix, jobs: Sequence[_Job]) -> ReasonpixError | None:
    """Edit the jobs as one batch. Returns why that failed, if it did."""

    def advance(share: float) -> None:
        if all(job.future.done() for job in jobs):
            raise _BatchAbandoned

    try:
        tasks = [job.task for job in jobs]
        for number, edited in model.edit(tasks, jobs[0].settings, advance):
            outcome = EditRejected(edited.reason) if isinstance(edited, Problem) else edited
            _settle(jobs[number], outcome)
    except _BatchAbandoned:
        pass
    except BaseException as error:  # whatever it is, the server goes on
        out_of_memory = any(
            isinstance(cause, Exception) and is_out_of_memory(cause)
            for cause in (error, error.__cause__)
        )
        if len(jobs) == 1:
            _log.error("an edit failed: %s", error, exc_info=None if out_of_memory else error)
        if out_of_memory:
            return OutOfMemory("the device ran out of memory")
        return EditError("the model failed on this edit; see the server's log")
    return None


def _settle(job: _Job, outcome: Image | ReasonpixError) -> None:
    with suppress(InvalidStateError):  # it was cancelled
        if isinstance(outcome, ReasonpixError):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
