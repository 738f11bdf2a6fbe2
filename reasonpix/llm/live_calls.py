"""Send requests by calling the model directly, in as many threads as its `concurrency`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from reasonpix.core.memory import free_memory, is_out_of_memory
from reasonpix.errors import ReasonpixError
from reasonpix.llm.queue import PendingRequest, RequestQueue
from reasonpix.llm.rate import RateController, retry_delay_s
from reasonpix.llm.types import Attempt, Conversation, LanguageModel, Unavailable
from reasonpix.plugin.types import Problem

_LOG = logging.getLogger(__name__)

_OTHER_DISPATCHER_S = 0.1
# How soon to look again when another dispatcher has reserved what is left of the budget.


@dataclass(frozen=True)
class _Reply:
    """The outcomes of one call, and what went wrong with the call as a whole."""

    outcomes: Sequence[Attempt]
    fatal: ReasonpixError | None = None
    """An error that affects all calls."""
    failure: str = ""
    """An unexpected error, which may be due to a single conversation."""
    out_of_memory: bool = False


class LiveTransport:
    """Sends by `complete`, in batches of the model's `batch_size` or as many as fit in memory."""

    def __init__(self, llm: LanguageModel, queue: RequestQueue) -> None:
        self.max_threads = llm.concurrency
        self._llm = llm
        self._queue = queue
        self._rate = RateController(llm.concurrency)
        self._batch_size = llm.batch_size

    def add(self, pending: PendingRequest) -> None:
        """Queue a request."""
        self._queue.push(pending)

    def next_step(self, in_flight: int) -> Callable[[], None] | float | None:
        """The next call, or the seconds until there may be one."""
        now = time.monotonic()
        delay_s = self._queue.release_delayed(now)
        if not self._queue.ready:
            return delay_s
        pause_s = self._rate.wait_s(in_flight, now)
        if pause_s == 0:
            if batch := self._queue.take(self._batch_size):
                return partial(self._call, batch, self._rate.decreases)
            pause_s = None if in_flight else _OTHER_DISPATCHER_S
        return min((wait_s for wait_s in (delay_s, pause_s) if wait_s is not None), default=None)

    def _call(self, batch: Sequence[PendingRequest], decreases: int) -> None:
        """Call the model once and settle the outcomes."""
        in_flight = self._queue.send(batch)
        started = time.perf_counter()
        reply = self._complete([pending.request.conversation for pending in batch])
        seconds = time.perf_counter() - started
        if reply.out_of_memory:
            free_memory()
        outcomes = self._queue.settle(in_flight, reply.outcomes, seconds)
        if reply.fatal is not None:
            self._queue.stop(reply.fatal)
            return
        with self._queue.changed:
            self._rate.observe(outcomes, decreases, time.monotonic())
            if reply.out_of_memory and len(batch) > 1:
                self._batch_size = min(self._batch_size, -(-len(batch) // 2))
                _LOG.info("out of memory; the batch size is now %d", self._batch_size)
                self._push_again(batch)
            elif reply.failure and len(batch) > 1:
                for pending in batch:
                    pending.alone = True  # so that only the bad one fails
                self._push_again(batch)
            else:
                for pending, outcome in zip(batch, outcomes, strict=True):
                    if reply.failure:
                        outcome = Problem(status="failed", reason=reply.failure)
                    if self._queue.finish(pending, outcome):
                        self._retry(pending, outcome)

    def _complete(self, conversations: Sequence[Conversation]) -> _Reply:
        """Call `complete`, and check what it returns."""
        try:
            outcomes = self._llm.complete(conversations)
            if len(outcomes) != len(conversations):
                raise ValueError(f"{len(outcomes)} answers to {len(conversations)} conversations")
            for outcome in outcomes:
                if not isinstance(outcome, Attempt):
                    raise ReasonpixError(
                        f"{type(self._llm).__name__}.complete returned {outcome!r:.80}; it must "
                        "return a Completion, a Problem or an Unavailable for each conversation"
                    )
            return _Reply(outcomes)
        except ReasonpixError as error:
            return _Reply([Unavailable(reason=str(error))] * len(conversations), fatal=error)
        except Exception as error:
            # Leave out the path in an OSError: it belongs to this machine, reasons are published.
            text = error.strerror if isinstance(error, OSError) and error.strerror else error
            failure = f"{type(error).__name__}: {text}"
            memory = is_out_of_memory(error)  # of this machine, where nobody charges for it
            unavailable = Unavailable(reason=failure, may_be_charged=not memory)
            return _Reply([unavailable] * len(conversations), failure=failure, out_of_memory=memory)

    def _push_again(self, batch: Sequence[PendingRequest]) -> None:
        if not self._queue.stopped:
            for pending in batch:
                self._queue.push(pending)

    def _retry(self, pending: PendingRequest, outcome: Attempt) -> None:
        assert isinstance(outcome, Unavailable)
        if outcome.overloaded:
            self._queue.push(pending)  # the rate controller pauses all calls
        else:
            self._queue.delay(pending, retry_delay_s(pending.failures, outcome.retry_after_s))
