"""Send requests in batch jobs, which are answered within hours at a lower price.

Requests from all threads are collected until no new one comes for a while. The ledger records the
jobs, so that a restarted run waits for them instead of submitting them again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from reasonpix.llm.ledger import Ledger
from reasonpix.llm.queue import PendingRequest, RequestQueue
from reasonpix.llm.requests import Job
from reasonpix.llm.types import Attempt, LanguageModel, Unavailable

_LOG = logging.getLogger(__name__)

LARGEST_JOB = 50_000
"""Maximum number of conversations in a job (the limit of OpenAI's batch endpoint)."""


class BatchTransport:
    """Sends by `submit` and `collect`, in one thread.

    Jobs are polled every `poll_interval_s`; a new one is submitted when no request was added for a
    sixth of that time.
    """

    max_threads = 1

    def __init__(
        self, llm: LanguageModel, ledger: Ledger, queue: RequestQueue, poll_interval_s: float
    ) -> None:
        self._llm = llm
        self._ledger = ledger
        self._queue = queue
        self._poll_interval_s = poll_interval_s
        self._jobs: dict[str, tuple[Job, float]] = {}  # by name, with the time of the next poll
        earlier = ledger.open_jobs()
        self._earlier = {sent.key: job for job in earlier if job.id for sent in job.requests}
        self._unconfirmed = [job for job in earlier if not job.id and job.requests]

    def add(self, pending: PendingRequest) -> None:
        """Queue a request, unless a job of an earlier process contains it."""
        if (job := self._earlier.get(pending.request.key)) is None:
            self._queue.push(pending)
        elif job.name not in self._jobs:
            self._ledger.budget.adopted(len(job.requests))
            self._jobs[job.name] = (job, 0.0)

    def next_step(self, in_flight: int) -> Callable[[], None] | float | None:
        """Poll a job or submit one, or the seconds until either is due."""
        now = time.monotonic()
        for name, (job, due) in self._jobs.items():
            if due <= now:
                self._jobs[name] = (job, now + self._poll_interval_s)
                return partial(self._collect, job)
        due_times = [due for _, due in self._jobs.values()]
        if ready := self._queue.ready:
            submit_at = self._queue.last_push + self._poll_interval_s / 6
            if submit_at > now and len(ready) < LARGEST_JOB:
                due_times.append(submit_at)
            elif batch := self._take():
                return partial(self._submit, batch)
            else:
                due_times.append(now + 0.1 * self._poll_interval_s)
        return min(due_times) - now if due_times else None

    def _take(self) -> list[PendingRequest]:
        """The requests of the next job.

        A job that was being submitted when its process died is submitted again unchanged, so that
        the server can recognise it.
        """
        ready = {pending.request.key for pending in self._queue.ready}
        for job in self._unconfirmed:
            keys = {sent.key for sent in job.requests}
            if keys <= ready:
                self._unconfirmed.remove(job)
                self._ledger.forget(job)
                return self._queue.take_keys(keys)
        return self._queue.take(LARGEST_JOB)

    def _submit(self, batch: Sequence[PendingRequest]) -> None:
        conversations = {p.request.key: p.request.conversation for p in batch}
        name = hashlib.sha256("".join(sorted(conversations)).encode()).hexdigest()
        in_flight = self._queue.send(batch, name)
        job_id = self._llm.submit(conversations)
        self._ledger.submitted(name, job_id)
        _LOG.info(
            "submitted %d requests as job %s, which is polled every %g s. You can stop the run: "
            "the same command continues to wait for the job.",
            len(batch),
            job_id,
            self._poll_interval_s,
        )
        with self._queue.changed:
            due = time.monotonic() + self._poll_interval_s
            self._jobs[name] = (Job(name, job_id, tuple(in_flight)), due)

    def _collect(self, job: Job) -> None:
        assert job.id is not None
        results = self._llm.collect(job.id)
        if results is None:
            return
        outcomes = self._queue.settle(
            job.requests, [_outcome(results.get(sent.key)) for sent in job.requests], job=job.name
        )
        with self._queue.changed:
            del self._jobs[job.name]
            for sent, outcome in zip(job.requests, outcomes, strict=True):
                self._earlier.pop(sent.key, None)
                pending = self._queue.pending(sent.key)
                if pending is not None and self._queue.finish(pending, outcome):
                    self._queue.push(pending)


def _outcome(result: Attempt | None) -> Attempt:
    """The outcome of a request in a job that ended. Overload is a failure like any other here."""
    if result is None:
        return Unavailable(reason="the job ended without an answer to this request")
    if isinstance(result, Unavailable):
        return result.model_copy(update={"overloaded": False})
    return result
