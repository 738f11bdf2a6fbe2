"""Concurrent requests to a language model, as callers see them.

A `Dispatcher` combines the queue (pending requests, budget, ledger) with a transport that sends
them (calls in threads or batch jobs, see `live_calls` and `batch_jobs`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from reasonpix.errors import ReasonpixError
from reasonpix.llm.batch_jobs import BatchTransport
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.live_calls import LiveTransport
from reasonpix.llm.queue import PendingRequest, RequestQueue
from reasonpix.llm.types import Completion, Conversation, LanguageModel
from reasonpix.plugin.types import Problem

STOPPED = "the run was stopped; run the same command again to continue"


class Transport(Protocol):
    """Sends pending requests. `add` and `next_step` are called with the queue's lock held."""

    @property
    def max_threads(self) -> int:
        """Steps that may run concurrently."""

    def add(self, pending: PendingRequest) -> None:
        """Accept a new request."""

    def next_step(self, in_flight: int) -> Callable[[], None] | float | None:
        """What to do next, while `in_flight` steps are running.

        A step, which runs without the lock; or the seconds until there may be one; or None when
        nothing happens before the queue changes or a step ends.
        """


class Dispatcher:
    """Answers conversations through a transport, whose steps run in separate threads."""

    def __init__(self, queue: RequestQueue, transport: Transport) -> None:
        self._queue = queue
        self._transport = transport
        self._threads: list[threading.Thread] = []
        self._in_flight = 0  # guarded by the queue's lock, as `_threads` is

    def answers(
        self, task: str, conversations: Sequence[Conversation]
    ) -> list[Completion | Problem]:
        """The answer to each conversation, in order. May be called from several threads.

        A `Problem` is the reason why one conversation has no answer. An error that stops the run
        (`CostLimit`, another `ReasonpixError` of the model, KeyboardInterrupt) is raised in all
        threads, after the answers in flight are stored, and by all later calls.
        """
        try:
            waiter = self._queue.add(task, conversations)
            with self._queue.changed:
                for pending in waiter.new:  # together, so that they fill batches
                    self._transport.add(pending)
                waiter.count_down()
                self._start_threads()
                self._queue.changed.notify()
            waiter.over.wait()
        except BaseException as error:
            self._queue.stop(error)
            self._wait_idle()
            raise
        if waiter.missing:
            self._wait_idle()
        if waiter.missing:
            assert self._queue.error is not None
            raise self._queue.error
        return waiter.results()

    @property
    def stopped(self) -> bool:
        """Whether the run is ending; `complete` may then return without finishing."""
        return self._queue.stopped

    def close(self) -> None:
        """Wait for steps in flight, drop other requests, end the threads. Batch jobs stay open."""
        self._queue.stop(ReasonpixError(STOPPED))
        self._wait_idle()
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        while len(self._threads) < min(self._transport.max_threads, len(self._queue)):
            thread = threading.Thread(target=self._work, name="language model", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                try:
                    step()
                except BaseException as error:
                    self._queue.stop(error)
                finally:
                    self._end_step()
        except BaseException as error:
            self._queue.stop(error)  # otherwise callers would wait for ever

    def _next_step(self) -> Callable[[], None] | None:
        """The next step, None when the queue has stopped."""
        with self._queue.changed:
            while not self._queue.stopped:
                step = self._transport.next_step(self._in_flight)
                if callable(step):
                    self._in_flight += 1
                    self._queue.changed.notify()  # there may be work for another thread
                    return step
                if not self._queue.stopped:
                    self._queue.changed.wait(step)
            return None

    def _end_step(self) -> None:
        with self._queue.changed:
            self._in_flight -= 1
            if self._queue.stopped:
                self._queue.changed.notify_all()
            else:
                self._queue.changed.notify()

    def _wait_idle(self) -> None:
        with self._queue.changed:
            self._queue.changed.wait_for(lambda: self._in_flight == 0)


def make_dispatcher(
    llm: LanguageModel, ledger: Ledger, poll_interval_s: float = 30.0
) -> Dispatcher:
    """A dispatcher for `llm` that stores answers in `ledger`, which several may share.

    Batch jobs are polled every `poll_interval_s`. Raises `RecipeError` if the ledger has a cost
    limit but the cost of a request is unknown.
    """
    queue = RequestQueue(llm, ledger)
    transport: Transport = (
        BatchTransport(llm, ledger, queue, poll_interval_s)
        if llm.jobs
        else LiveTransport(llm, queue)
    )
    return Dispatcher(queue, transport)
