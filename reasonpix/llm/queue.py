"""Requests to one language model, between the callers that wait for answers and the transport.

The queue joins equal requests, answers known ones from the ledger, reserves the cost of a request
before it is sent, and stores every answer. It starts no threads and sends nothing itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from reasonpix.errors import CostLimit, ReasonpixError
from reasonpix.llm.budget import check_price, cost_bound
from reasonpix.llm.ledger import Ledger, Settlement
from reasonpix.llm.requests import InFlight, Request, request_key
from reasonpix.llm.types import Attempt, Completion, Conversation, LanguageModel, Unavailable
from reasonpix.plugin.types import Problem

OVERLOADS_PER_RETRY = 10
"""Overloads that a request survives for each permitted retry.

A strict rate limit refuses often, and the request is not at fault: it stays at the head of the
queue. With 6 retries and no Retry-After, a request that is always refused fails after about half
an hour.
"""

GIVEN_UP_IN_A_ROW = 5
"""Consecutive failed requests after which the server is considered gone."""


class Waiter:
    """A caller that waits for several answers."""

    def __init__(self) -> None:
        self.missing = 1  # the caller itself, which may add more
        self.over = threading.Event()
        """Set when all answers are there, or no more will come."""
        self.entries: list[PendingRequest | Completion] = []
        self.new: list[PendingRequest] = []
        """New requests, which the transport has to send."""

    def count_down(self) -> None:
        """Record one result, or that the caller has added everything."""
        self.missing -= 1
        if not self.missing:
            self.over.set()

    def results(self) -> list[Completion | Problem]:
        """All results, in the order of the conversations."""
        results = [
            entry.result if isinstance(entry, PendingRequest) else entry for entry in self.entries
        ]
        return [result for result in results if result is not None]


@dataclass(eq=False)
class PendingRequest:
    """A request without a result yet, queued or in flight."""

    number: int
    request: Request
    waiters: list[Waiter] = field(default_factory=list)
    result: Completion | Problem | None = None
    failures: int = 0
    overloads: int = 0
    alone: bool = False
    """Whether to send it in a separate call, because a batch with it failed."""

    def __lt__(self, other: PendingRequest) -> bool:
        """Whether it is older."""
        return self.number < other.number

    @property
    def attempts(self) -> int:
        """Attempts that ended, and the current one."""
        return self.failures + self.overloads + 1


class RequestQueue:
    """The pending requests to `llm`. Thread-safe.

    Callers `add` conversations and wait. A transport `push`es or `delay`s the new requests, takes
    them when it can send, and reports with `send`, `settle` and `finish`.
    Raises `RecipeError` if the ledger has a cost limit but the cost of a request is unknown.
    """

    def __init__(self, llm: LanguageModel, ledger: Ledger) -> None:
        if ledger.max_cost is not None:
            check_price(llm)
        self._llm = llm
        self._ledger = ledger
        self._parameters = llm.parameters
        self.changed = threading.Condition()
        """The queue's re-entrant lock, notified of changes. Hold it to make several calls atomic.
        """
        self.last_push = 0.0
        """When a request was last pushed, in `time.monotonic` seconds."""
        self.error: BaseException | None = None
        """Why the queue stopped, None while it is running."""
        self._added = 0
        self._pending: dict[str, PendingRequest] = {}
        self._ready: list[PendingRequest] = []  # heap, oldest first
        self._delayed: list[tuple[float, PendingRequest]] = []  # heap, earliest first
        self._given_up = 0

    @property
    def stopped(self) -> bool:
        """Whether nothing more is sent."""
        return self.error is not None

    def stop(self, error: BaseException) -> None:
        """Send nothing more and wake all waiters. The first error is the one they raise."""
        if isinstance(error, Exception) and not isinstance(error, ReasonpixError):
            # Raised unchanged, it would count as a failure of each single record.
            unexpected = ReasonpixError(
                f"the language model cannot be called: {type(error).__name__}: {error}; "
                "run the same command again to continue"
            )
            unexpected.__cause__ = error
            error = unexpected
        with self.changed:
            self.error = self.error or error
            for pending in self._pending.values():
                for waiter in pending.waiters:
                    waiter.over.set()
            self.changed.notify_all()

    # -- For callers

    def add(self, task: str, conversations: Sequence[Conversation]) -> Waiter:
        """Look up stored answers and pending requests, and create the requests that are missing."""
        waiter = Waiter()
        keys = [request_key(self._parameters, conversation) for conversation in conversations]
        for key, conversation in zip(keys, conversations, strict=True):
            waiter.entries.append(self._find(waiter, task, key, conversation))
        return waiter

    def _find(
        self, waiter: Waiter, task: str, key: str, conversation: Conversation
    ) -> PendingRequest | Completion:
        with self.changed:
            pending = self._pending.get(key)
            # Under the lock, because a request leaves `_pending` once its answer is stored.
            if pending is None and (stored := self._ledger.get(key)) is not None:
                return stored
            if self.error is not None:
                raise self.error
            if pending is None:
                self._added += 1
                request = Request(task, key, conversation, cost_bound(self._llm, conversation))
                pending = self._pending[key] = PendingRequest(self._added, request)
                waiter.new.append(pending)
            if waiter not in pending.waiters:
                pending.waiters.append(waiter)
                waiter.missing += 1
            return pending

    # -- For transports

    def __len__(self) -> int:
        """Requests without a result."""
        return len(self._pending)

    def pending(self, key: str) -> PendingRequest | None:
        """The pending request with this key."""
        return self._pending.get(key)

    @property
    def ready(self) -> Sequence[PendingRequest]:
        """Requests to send, in no particular order."""
        return self._ready

    def push(self, pending: PendingRequest) -> None:
        """Make a request ready to be sent."""
        with self.changed:
            heappush(self._ready, pending)
            self.last_push = time.monotonic()

    def delay(self, pending: PendingRequest, seconds: float) -> None:
        """Make a request ready after this many seconds."""
        with self.changed:
            heappush(self._delayed, (time.monotonic() + seconds, pending))

    def release_delayed(self, now: float) -> float | None:
        """Make due requests ready, and return the seconds until the next is due."""
        with self.changed:
            while self._delayed and self._delayed[0][0] <= now:
                heappush(self._ready, heappop(self._delayed)[1])
            return self._delayed[0][0] - now if self._delayed else None

    def take(self, limit: int) -> list[PendingRequest]:
        """Take the oldest ready requests, as many as the budget allows, and reserve their cost."""
        with self.changed:
            oldest = [heappop(self._ready)]
            while self._ready and len(oldest) < limit:
                if oldest[0].alone or self._ready[0].alone:
                    break
                oldest.append(heappop(self._ready))
            batch = self._reserve(oldest)
            for pending in oldest[len(batch) :]:
                heappush(self._ready, pending)
            return batch

    def take_keys(self, keys: set[str]) -> list[PendingRequest]:
        """`take` the ready requests with these keys."""
        with self.changed:
            batch = self._reserve(sorted(p for p in self._ready if p.request.key in keys))
            self._ready = sorted(set(self._ready) - set(batch))
            return batch

    def _reserve(self, requests: Sequence[PendingRequest]) -> list[PendingRequest]:
        """Reserve the cost of the first requests that fit the budget; stop if none ever will."""
        budget = self._ledger.budget
        batch = []
        for pending in requests:
            if not budget.reserve(pending.request.cost_bound):
                break
            batch.append(pending)
        if requests and not batch and not budget.in_flight:
            spent = budget.spent()
            used = spent.cost + spent.lost_cost + budget.reserved
            self.stop(
                CostLimit(
                    f"the next call can cost {requests[0].request.cost_bound:.6g}, and {used:.6g} "
                    f"of the limit of {self._ledger.max_cost:.6g} is spent; "
                    "raise --max-cost and run the same command again to continue"
                )
            )
        return batch

    def send(self, batch: Sequence[PendingRequest], job: str | None = None) -> list[InFlight]:
        """Record requests that are about to be sent, so that a kill cannot hide their cost."""
        return self._ledger.send([pending.request for pending in batch], self._parameters, job)

    def settle(
        self,
        in_flight: Sequence[InFlight],
        outcomes: Sequence[Attempt],
        seconds: float = 0.0,
        job: str | None = None,
    ) -> list[Attempt]:
        """Store answers and costs, and return the outcomes with text that UTF-8 can encode."""
        outcomes = [_encodable(outcome) for outcome in outcomes]
        with self.changed:
            pending = [self._pending.get(sent.key) for sent in in_flight]
        settlements = [
            self._settlement(sent, outcome, seconds, request.attempts if request else 1)
            for sent, outcome, request in zip(in_flight, outcomes, pending, strict=True)
        ]
        self._ledger.settle(settlements, job)
        return outcomes

    def _settlement(
        self, sent: InFlight, outcome: Attempt, seconds: float, attempts: int
    ) -> Settlement:
        if not isinstance(outcome, Completion):
            charged = isinstance(outcome, Unavailable) and outcome.may_be_charged
            return Settlement(sent, may_be_charged=charged)
        cost = None
        if (price := self._llm.price) is not None:
            cost = price.of(outcome.prompt_tokens, outcome.completion_tokens)
            if not outcome.prompt_tokens:
                cost = sent.cost_bound
        return Settlement(sent, outcome, cost, seconds, attempts)

    def finish(self, pending: PendingRequest, outcome: Attempt) -> bool:
        """Pass a settled outcome to the waiters; return whether to send the request again."""
        with self.changed:
            if isinstance(outcome, Unavailable):
                if self.error is not None:
                    return False  # the next run sends it again
                if outcome.overloaded:
                    pending.overloads += 1
                else:
                    pending.failures += 1
                retries = self._llm.max_retries
                if (
                    pending.failures <= retries
                    and pending.overloads <= OVERLOADS_PER_RETRY * retries
                ):
                    return True
                reason = f"no answer after {pending.attempts - 1} attempts: {outcome.reason}"
                outcome = Problem(status="failed", reason=reason)
                self._given_up += 1
                if self._given_up == GIVEN_UP_IN_A_ROW:
                    # An outage is not the fault of the records that happen to meet it.
                    self.stop(
                        ReasonpixError(
                            f"{GIVEN_UP_IN_A_ROW} requests in a row failed, the last with {reason}"
                            "; run the same command again to continue"
                        )
                    )
                    return False
            else:
                self._given_up = 0
            pending.result = outcome
            del self._pending[pending.request.key]
            for waiter in pending.waiters:
                waiter.count_down()
            return False


def _encodable(outcome: Attempt) -> Attempt:
    """The outcome without lone surrogates, which JSON can carry but UTF-8 cannot encode.

    A stream may split a pair, which is joined again. Without its other half, a surrogate becomes
    U+FFFD, which makes an answer invalid.
    """
    texts = {name: value for name, value in outcome if isinstance(value, str)}
    clean = {
        name: text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        for name, text in texts.items()
    }
    return outcome if clean == texts else outcome.model_copy(update=clean)
