"""Put questions in jobs, to be answered within hours at a lower price.

What is asked meanwhile, from all threads, is collected until nothing new has come for a while. The
ledger knows the jobs: a restart waits for them in the place of handing them in again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from heapq import heapify

from reasonpix.llm.ledger import Job, Ledger
from reasonpix.llm.queue import LanguageModel, PendingRequest, RequestQueue, storable
from reasonpix.llm.types import Unavailable

_LOG = logging.getLogger(__name__)

LARGEST_JOB = 50_000
"""Conversations in a job (the limit of the OpenAI batch endpoint)."""


class BatchDispatcher(RequestQueue):
    """Puts questions by `submit` and `collect`, from one thread.

    A job is looked at every `poll_interval_s`; one is handed in when nothing new was asked for a
    sixth of that time.
    """

    threads = 1

    def __init__(self, llm: LanguageModel, ledger: Ledger, poll_interval_s: float) -> None:
        super().__init__(llm, ledger)
        self._poll_interval_s = poll_interval_s
        self._jobs: dict[str, tuple[Job, float]] = {}  # by name, with the time of the next look
        earlier = ledger.open_jobs()
        self._earlier = {sent.key: job for job in earlier if job.id for sent in job.calls}
        self._unsure = [job for job in earlier if not job.id and job.calls]

    def _work(self) -> None:
        while (step := self._next_step()) is not None:
            try:
                if isinstance(step, Job):
                    self._collect(step)
                else:
                    self._submit(step)
            except BaseException as error:
                self._stop(error)
            finally:
                self._step_ended()

    def _retry(self, asked: PendingRequest, outcome: Unavailable) -> None:
        self._enqueue(asked)  # into the next job

    def _waits_already(self, key: str) -> bool:
        if (job := self._earlier.get(key)) is None:
            return False
        if job.name not in self._jobs:
            self._ledger.budget.adopted(len(job.calls))
            self._jobs[job.name] = (job, 0.0)
        return True

    def _next_step(self) -> Job | list[PendingRequest] | None:
        """A job to look at, or questions to hand in; None when the work is over."""
        with self._changed:
            while self._stopped is None:
                now = time.monotonic()
                times = []
                for name, (job, due) in self._jobs.items():
                    if due <= now:
                        self._jobs[name] = (job, now + self._poll_interval_s)
                        self._under_way += 1
                        return job
                    times.append(due)
                if self._ready:
                    quiet = self._last_asked + self._poll_interval_s / 6
                    if quiet > now and len(self._ready) < LARGEST_JOB:
                        times.append(quiet)
                    elif batch := self._job():
                        self._under_way += 1
                        return batch
                    else:
                        times.append(now + 0.1 * self._poll_interval_s)
                self._changed.wait(min(times) - now if times else None)
            return None

    def _job(self) -> list[PendingRequest]:
        """What to hand in next: a job that may have got lost on its way, just as it was, or all."""
        wanted = sorted(self._ready)[:LARGEST_JOB]
        by_key = {asked.call.key: asked for asked in self._ready}
        for job in self._unsure:
            if all(sent.key in by_key for sent in job.calls):
                wanted = [by_key[sent.key] for sent in job.calls]
                self._unsure.remove(job)
                self._ledger.forget(job)
                break
        batch = self._reserved(wanted)
        taken = set(batch)
        self._ready = [asked for asked in self._ready if asked not in taken]
        heapify(self._ready)
        return batch

    def _submit(self, batch: Sequence[PendingRequest]) -> None:
        calls = [asked.call for asked in batch]
        keys = sorted(call.key for call in calls)
        name = hashlib.sha256("".join(keys).encode()).hexdigest()
        sent = self._ledger.send(calls, self._parameters, job=name)
        id = self._llm.submit({call.key: call.conversation for call in calls})
        self._ledger.submitted(name, id)
        _LOG.info(
            "%d questions are handed in as job %s; it is looked at every %g s. Stopping is safe: "
            "the same command goes on waiting.",
            len(calls),
            id,
            self._poll_interval_s,
        )
        with self._changed:
            due = time.monotonic() + self._poll_interval_s
            self._jobs[name] = (Job(name, id, tuple(sent)), due)

    def _collect(self, job: Job) -> None:
        assert job.id is not None
        results = self._llm.collect(job.id)
        if results is None:
            return
        none = Unavailable(reason="the job ended without an answer to it")
        outcomes = [storable(results.get(sent.key, none)) for sent in job.calls]
        with self._changed:
            asked = [self._asked.get(sent.key) for sent in job.calls]
        attempts = [it.attempts if it else 1 for it in asked]
        self._ledger.settle(
            [self._ended(*it) for it in zip(job.calls, outcomes, attempts, strict=True)], job.name
        )
        with self._changed:
            del self._jobs[job.name]
            for sent, outcome in zip(job.calls, outcomes, strict=True):
                self._earlier.pop(sent.key, None)
                if (question := self._asked.get(sent.key)) is not None:
                    self._finish(question, outcome)
