"""Ask a language model many things at once: every answer is stored, none is paid for twice.

Failures come again after a pause, overload makes the calls fewer, and a cost limit is never passed.
Nothing here changes an answer; what is random (jitter) only moves calls in time.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from heapq import heappop, heappush

from reasonpix.core.memory import free_memory, is_out_of_memory
from reasonpix.errors import ReasonpixError
from reasonpix.llm.batch_jobs import BatchDispatcher
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.queue import Attempt, LanguageModel, PendingRequest, RequestQueue, storable
from reasonpix.llm.types import Unavailable
from reasonpix.plugin.types import Problem

_LOG = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
"""The back-off's first and last upper bounds; it doubles in between."""


class AimdWindow:
    """How many calls may be under way: additive increase, multiplicative decrease, as TCP does.

    It starts at `largest` and grows to it again by 1/size for each answer. An overload halves it,
    at most once a round trip: calls that were sent before the last decrease saw the old window.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.size = float(largest)
        self.decreases = 0
        """How often it was halved; a call notes the number when it is sent."""
        self.streak = 0
        """Decreases since the last answer."""

    def answered(self) -> None:
        """A call was answered."""
        self.size = min(float(self.largest), self.size + 1 / self.size)
        self.streak = 0

    def overloaded(self, decreases: int) -> bool:
        """A call sent after so many decreases was refused. Whether that is news."""
        if decreases != self.decreases:
            return False
        self.size = max(1.0, self.size / 2)
        self.decreases += 1
        self.streak += 1
        return True


def backoff_s(number: int) -> float:
    """A pause before retry `number`, counted from 1: exponential, with full jitter."""
    return random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(number - 1, 30)))


class LiveDispatcher(RequestQueue):
    """Puts questions by `complete`, from as many threads as the model has `concurrency`."""

    def __init__(self, llm: LanguageModel, ledger: Ledger) -> None:
        super().__init__(llm, ledger)
        self.threads = llm.concurrency
        self._window = AimdWindow(llm.concurrency)
        self._delayed: list[tuple[float, PendingRequest]] = []  # heap, the first due first
        self._paused_until = 0.0
        self._largest = llm.batch_size
        """Conversations in a call: the model's `batch_size`, or what memory was found to hold."""

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            try:
                self._call(*taken)
            except BaseException as error:
                self._stop(error)
            finally:
                self._step_ended()

    def _retry(self, asked: PendingRequest, outcome: Unavailable) -> None:
        if outcome.overloaded:
            self._enqueue(asked)  # for the end of the pause that all make
            return
        pause_s = backoff_s(asked.failures)
        if outcome.retry_after_s is not None:
            pause_s = outcome.retry_after_s * random.uniform(1, 1.1)
        heappush(self._delayed, (time.monotonic() + pause_s, asked))

    def _take(self) -> tuple[list[PendingRequest], int] | None:
        """The next batch, with the window's number of decreases; None when the work is over."""
        with self._changed:
            while self._stopped is None:
                now = time.monotonic()
                while self._delayed and self._delayed[0][0] <= now:
                    heappush(self._ready, heappop(self._delayed)[1])
                waits = [self._delayed[0][0] - now] if self._delayed else []
                if self._ready and self._under_way < int(self._window.size):
                    if self._paused_until > now:
                        waits.append(self._paused_until - now)
                    elif batch := self._batch():
                        self._under_way += 1
                        self._changed.notify()  # there may be work for one more
                        return batch, self._window.decreases
                    elif not self._under_way:
                        waits.append(0.1)  # for a call of another caller to end
                self._changed.wait(min(waits, default=None))
            return None

    def _batch(self) -> list[PendingRequest]:
        wanted = [heappop(self._ready)]
        while self._ready and len(wanted) < self._largest:
            if wanted[0].alone or self._ready[0].alone:
                break
            wanted.append(heappop(self._ready))
        batch = self._reserved(wanted)
        for asked in wanted[len(batch) :]:
            heappush(self._ready, asked)
        return batch

    def _call(self, batch: Sequence[PendingRequest], decreases: int) -> None:
        """One call of `complete`, and what follows from how it ends."""
        sent = self._ledger.send([asked.call for asked in batch], self._parameters)
        outcomes: Sequence[Attempt]
        stop: ReasonpixError | None = None
        broken = ""
        memory_is_out = False
        started = time.perf_counter()
        try:
            outcomes = self._llm.complete([asked.call.conversation for asked in batch])
            if len(outcomes) != len(batch):
                raise ValueError(f"{len(outcomes)} answers to {len(batch)} conversations")
            for outcome in outcomes:
                if not isinstance(outcome, Attempt):
                    raise ReasonpixError(
                        f"{type(self._llm).__name__}.complete gave {outcome!r:.80}; it gives a "
                        "Completion, a Problem or an Unavailable for each conversation"
                    )
        except ReasonpixError as error:
            stop = error
            outcomes = [Unavailable(reason=str(error))] * len(batch)
        except Exception as error:
            # The file that an error of the system names is of this machine, a reason is for all.
            told = error.strerror if isinstance(error, OSError) and error.strerror else error
            broken = f"{type(error).__name__}: {told}"
            memory_is_out = is_out_of_memory(error)  # here, where nobody charges for it
            outcomes = [Unavailable(reason=broken, may_be_charged=not memory_is_out)] * len(batch)
        seconds = time.perf_counter() - started
        if memory_is_out:
            free_memory()
        outcomes = [storable(outcome) for outcome in outcomes]
        attempts = [asked.attempts for asked in batch]
        self._ledger.settle(
            [self._ended(*it, seconds) for it in zip(sent, outcomes, attempts, strict=True)]
        )
        if stop is not None:
            self._stop(stop)
            return
        with self._changed:
            self._mind(outcomes, decreases)
            if memory_is_out and len(batch) > 1:
                self._halve(batch)
                return
            for asked, outcome in zip(batch, outcomes, strict=True):
                if not broken:
                    self._finish(asked, outcome)
                elif len(batch) == 1:
                    self._finish(asked, Problem(status="failed", reason=broken))
                elif self._stopped is None:
                    asked.alone = True  # so that a bad one costs one
                    heappush(self._ready, asked)

    def _halve(self, batch: Sequence[PendingRequest]) -> None:
        """Ask in calls of half as many from now on, these questions too."""
        self._largest = min(self._largest, -(-len(batch) // 2))
        _LOG.info("out of memory; %d conversations at once now", self._largest)
        if self._stopped is None:
            for asked in batch:
                heappush(self._ready, asked)

    def _mind(self, outcomes: Sequence[Attempt], decreases: int) -> None:
        """Fit the window and the pause to what a call met."""
        refused = [it for it in outcomes if isinstance(it, Unavailable) and it.overloaded]
        if any(not isinstance(it, Unavailable) for it in outcomes):
            self._window.answered()
        if not refused:
            return
        news = self._window.overloaded(decreases)
        asked_for = [it.retry_after_s for it in refused if it.retry_after_s is not None]
        if asked_for:
            pause_s = max(asked_for) * random.uniform(1, 1.1)
        elif news:
            pause_s = backoff_s(self._window.streak)
        else:
            return
        if pause_s > LONGEST_PAUSE_S:
            _LOG.info("all calls pause for %.0f s: %s", pause_s, refused[0].reason)
        self._paused_until = max(self._paused_until, time.monotonic() + pause_s)


def caller_for(llm: LanguageModel, ledger: Ledger, poll_interval_s: float = 30.0) -> RequestQueue:
    """What asks `llm`, and stores what it answers in `ledger`, which several may share.

    `poll_interval_s` is how often a job is looked at. Raises `RecipeError` when the ledger has a
    cost limit and nobody says what a call can cost.
    """
    return (
        BatchDispatcher(llm, ledger, poll_interval_s) if llm.jobs else LiveDispatcher(llm, ledger)
    )
