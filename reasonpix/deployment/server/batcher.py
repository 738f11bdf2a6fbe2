"""Edits of many askers by one model: a bounded queue, and batches of those that go together.

```python
with Batcher(lambda: ReasonPix2Pix.from_pretrained(name), limit=64, wait=0.01) as batcher:
    model = batcher.model.result()
    with batcher.admit() as slot:
        edited = slot.submit(EditTask(image, "make it rain"), model.settings).result()
```

One thread owns the model: it loads it, and edits one batch after the other. The oldest edit goes
first, with those that wait for the same settings and size; as the model pads its batches, an edit
does not depend on its company. Who has no room is told at once when to come again.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
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

AWAY = 5
"""Seconds after which to look again whether a server has started, or another taken its place."""

_log = logging.getLogger(__name__)


class ServerBusy(ReasonpixError):
    """An edit that cannot be made now; in `retry_after` seconds it may be."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(f"{reason}; try again in {retry_after} s")
        self.retry_after = retry_after


class Full(ServerBusy):
    """As many edits are under way as there may be."""


class Unready(ServerBusy):
    """The model is being loaded."""


class Stopping(ServerBusy):
    """No more edits are taken."""


class OutOfMemory(ServerBusy):
    """Memory ran out."""


class EditRejected(ReasonpixError):
    """The model cannot edit this image by this instruction."""


class EditError(ReasonpixError):
    """The model failed; the log has the traceback."""


class Observer:
    """Is told what a `Batcher` does, from any thread. This one ignores it."""

    def refused(self, reason: str) -> None:
        """An edit was not taken: "full", "unready" or "stopping"."""

    def began(self, waited: Sequence[float]) -> None:
        """A batch began; its edits `waited` so many seconds each."""

    def ended(self, size: int, seconds: float) -> None:
        """A batch of `size` edits ended, or was stopped, after so many seconds."""

    def cancelled(self, running: bool) -> None:
        """An edit was given up by who asked for it, while it was `running` or before."""


@dataclass(eq=False)
class _Job:
    task: EditTask
    settings: SamplingSettings
    future: Future[Image] = field(default_factory=Future)
    since: float = field(default_factory=monotonic)
    running: bool = False

    @property
    def company(self) -> tuple[SamplingSettings, tuple[int, int]]:
        """What those have in common that the model can edit together."""
        return self.settings, self.task.image.size


class _NobodyLeft(Exception):
    """All who waited for a batch have gone."""


class Reservation:
    """Room for one edit, from before its image is read until its result is sent."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._job: _Job | None = None

    def submit(self, task: EditTask, settings: SamplingSettings) -> Future[Image]:
        """Let the edit wait for its turn. Its future may be cancelled at any time before its end.

        It raises `EditRejected`, `EditError` or `OutOfMemory`. The image should be no larger than
        the model's working size: it is kept until then.
        """
        self._job = _Job(task, settings)
        self._batcher._put(self._job)
        return self._job.future

    def __enter__(self) -> Reservation:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the room back; an edit that has not ended is cancelled."""
        self._batcher._leave(self._job)
        self._job = None


class Batcher:
    """Holds at most `limit` edits, and makes them in batches. See the module.

    An edit waits `wait` seconds for company while the model has nothing else to do. Entering does
    nothing; leaving is `close()`.
    """

    model: Future[ReasonPix2Pix]
    """What `load` gave or raised."""

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
        self._slots = 0
        self._waiting: list[_Job] = []
        self._running: Sequence[_Job] = ()
        self._rows = 1
        self._seconds = 1.0  # of a batch; a guess until one has been made
        self._measured = False
        self._stopping = self._closed = False
        self._thread = Thread(target=self._work, name="edits", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """Slots that are taken."""
        return self._slots

    @property
    def waiting(self) -> int:
        """Edits that wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Edits that are being made."""
        return len(self._running)

    def check_ready(self) -> None:
        """Raise `Unready` or `Stopping` where no edit could be taken, however few there are."""
        if self._stopping:
            raise Stopping("the server is stopping", AWAY)
        if not self.model.done() or self.model.exception():
            raise Unready("the model is being loaded", AWAY)

    def admit(self) -> Reservation:
        """Room for one edit. Raises `Full`, `Unready` or `Stopping`."""
        try:
            with self._changed:
                self.check_ready()
                if self._slots >= self._limit:
                    raise Full(f"{self._slots} edits are under way or wait", self._retry_after())
                self._slots += 1
        except ServerBusy as refused:
            self._observer.refused(type(refused).__name__.lower())
            raise
        return Reservation(self)

    def stop(self) -> None:
        """Take no more edits; those that have a slot are made."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def close(self, grace: float = 0) -> bool:
        """Stop, wait `grace` seconds for what is held, and cancel the rest.

        Gives whether the thread has ended; one that loads, or is amid a step, may take longer.
        """
        self.stop()
        if self.model.done():
            self._thread.join(grace)
        for job in (*self._waiting, *self._running):
            job.future.cancel()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self.model.done():
            self._thread.join(1)
        return not self._thread.is_alive()

    def __enter__(self) -> Batcher:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close at once."""
        self.close()

    def _retry_after(self) -> int:
        """Seconds that all who are held now will take."""
        return max(1, math.ceil(math.ceil(self._slots / self._rows) * self._seconds))

    def _put(self, job: _Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()
        job.future.add_done_callback(lambda _: self._drop(job))

    def _drop(self, job: _Job) -> None:
        """See to it that a job that is cancelled waits no longer."""
        if not job.future.cancelled():
            return
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._changed.notify_all()
        self._observer.cancelled(job.running)

    def _leave(self, job: _Job | None) -> None:
        if job:
            job.future.cancel()
        with self._changed:
            self._slots -= 1
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            model = self._load()
            self._rows = model.rows
        except BaseException as error:
            self.model.set_exception(error)
            return
        self.model.set_result(model)
        while jobs := self._next():
            self._observer.began([monotonic() - job.since for job in jobs])
            started = monotonic()
            self._edit(model, jobs)
            self._note(jobs, monotonic() - started)
            jobs = ()  # their images need not lie here until others come

    def _next(self) -> Sequence[_Job]:
        """The jobs of the next batch, as soon as there is one; none when all is done."""
        with self._changed:
            while True:
                now = monotonic()
                groups: dict[object, list[_Job]] = defaultdict(list)
                for job in self._waiting:
                    groups[job.company].append(job)
                for jobs in groups.values():  # that of the oldest comes first
                    if len(jobs) >= self._rows or now >= jobs[0].since + self._wait:
                        self._running = jobs[: self._rows]
                        for job in self._running:
                            job.running = True
                            self._waiting.remove(job)
                        return self._running
                if self._closed or (self._stopping and not self._slots):
                    return ()
                oldest = self._waiting[0].since if self._waiting else None
                self._changed.wait(None if oldest is None else oldest + self._wait - now)

    def _note(self, jobs: Sequence[_Job], seconds: float) -> None:
        stopped = all(job.future.cancelled() for job in jobs)
        with self._changed:
            self._running = ()
            if not stopped:
                weight = 0.2 if self._measured else 1
                self._seconds += weight * (seconds - self._seconds)
                self._measured = True
        self._observer.ended(len(jobs), seconds)

    def _edit(self, model: ReasonPix2Pix, jobs: Sequence[_Job]) -> None:
        """Give each job its end, but for those that were cancelled."""
        failure = _attempt(model, jobs)
        # Only here the error is gone, and with it frames that may hold much of a device's memory.
        if failure is None:
            return
        free_memory()
        if len(jobs) == 1:
            _end(jobs[0], failure)
            return
        for job in jobs:  # what one of them breaks shall break it alone
            if not job.future.done():
                self._edit(model, [job])


def _attempt(model: ReasonPix2Pix, jobs: Sequence[_Job]) -> ReasonpixError | None:
    """Edit them together; what is given back is why they could not be."""

    def advance(share: float) -> None:
        if all(job.future.done() for job in jobs):
            raise _NobodyLeft

    try:
        tasks = [job.task for job in jobs]
        for number, edited in model.edit(tasks, jobs[0].settings, advance):
            _end(
                jobs[number], EditRejected(edited.reason) if isinstance(edited, Problem) else edited
            )
    except _NobodyLeft:
        pass
    except BaseException as error:  # whatever it is, others want edits too
        exhausted = any(
            isinstance(it, Exception) and is_out_of_memory(it) for it in (error, error.__cause__)
        )
        if len(jobs) == 1:
            _log.error("an edit failed: %s", error, exc_info=None if exhausted else error)
        if exhausted:
            return OutOfMemory("memory ran out", AWAY)
        return EditError("the model failed at this edit; the server's log says why")
    return None


def _end(job: _Job, end: Image | ReasonpixError) -> None:
    with suppress(InvalidStateError):  # nobody waits for it any more
        if isinstance(end, ReasonpixError):
            job.future.set_exception(end)
        else:
            job.future.set_result(end)
