"""Questions to a language model while they wait: found in the ledger, joined, queued, handed on.

How they are put (`calling`, `jobs`) builds on this.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappush
from typing import Any, Protocol

from reasonpix.errors import CostLimit, ReasonpixError, RecipeError
from reasonpix.llm.ledger import InFlight, Ledger, Request, Settlement
from reasonpix.llm.requests import answer_key, canonical_json
from reasonpix.llm.types import Completion, Conversation, Price, Unavailable
from reasonpix.plugin.types import Problem

OVERLOADS_PER_RETRY = 10
"""A call may be refused for overload this many times for each retry it may fail.

A strict limit refuses often and is no fault: the call keeps its place at the head of the queue
until it is let in. With 6 retries and no Retry-After, one that is never let in gives up after about
half an hour.
"""

STOPPED = "the run was stopped; run the same command again to go on"
"""What those are told who ask after the end."""

GIVEN_UP_IN_A_ROW = 5
"""Questions given up, with no answer in between, after which the server is taken to be gone."""

TOKENS_PER_MESSAGE = 16
TOKENS_PER_CALL = 64
"""Allowances for what a chat template adds, in tokens."""

Attempt = Completion | Problem | Unavailable
"""How an attempt can end."""


class LanguageModel(Protocol):
    """What is to be known of a language model to ask it."""

    @property
    def concurrency(self) -> int:
        """Calls of `complete` that may be under way at once."""

    @property
    def batch_size(self) -> int:
        """Conversations in a call of `complete`."""

    @property
    def max_retries(self) -> int:
        """How often a call that failed is made again."""

    @property
    def price(self) -> Price | None:
        """What its tokens cost, if known."""

    @property
    def longest_answer(self) -> int | None:
        """The most completion tokens an answer can have, if there is a bound."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Facts that change an answer, such as model and temperature (JSON values)."""

    @property
    def jobs(self) -> bool:
        """Whether `submit` and `collect` are called in the place of `complete`."""

    def complete(self, conversations: Sequence[Conversation], /) -> Sequence[Attempt]:
        """One attempt to continue each conversation, in order.

        An `Unavailable` is asked again. A `ReasonpixError` concerns all calls and stops the run.
        """

    def submit(self, conversations: Mapping[str, Conversation], /) -> str:
        """Hand in a job and return its id.

        The same conversations handed in again give the id of the job that holds them already.
        """

    def collect(self, job_id: str, /) -> Mapping[str, Attempt] | None:
        """What became of the conversations of a job; None while it has not ended."""


def longest_prompt(conversation: Conversation) -> int:
    """An upper bound of the prompt tokens of a conversation: a token has at least one byte."""
    turns = conversation.messages
    schema = len(canonical_json(conversation.answer_schema).encode())
    text = sum(len(turn.content.encode(errors="replace")) for turn in turns)
    return text + schema + TOKENS_PER_MESSAGE * len(turns) + TOKENS_PER_CALL


class Waiter:
    """One call of `answers`: over when all it asked for is there, or nothing more will come."""

    def __init__(self) -> None:
        self.missing = 1  # until all is asked
        self.over = threading.Event()
        self.new: list[PendingRequest] = []


@dataclass(eq=False)
class PendingRequest:
    """A question in the queue or under way."""

    number: int
    call: Request
    waits: list[Waiter] = field(default_factory=list)
    result: Completion | Problem | None = None
    failures: int = 0
    refusals: int = 0
    alone: bool = False
    """Whether it shares no batch any more, because one that it was in broke."""

    def __lt__(self, other: PendingRequest) -> bool:
        """Whether it was asked earlier."""
        return self.number < other.number

    @property
    def attempts(self) -> int:
        """The attempts that ended, and the one under way."""
        return self.failures + self.refusals + 1


class RequestQueue(ABC):
    """The queue of the questions to one model; `_work` is what its threads do.

    Raises `RecipeError` when the ledger has a cost limit and nobody says what a call can cost.
    """

    threads: int
    """How many threads work at most."""

    def __init__(self, llm: LanguageModel, ledger: Ledger) -> None:
        if ledger.max_cost is not None:
            check_price(llm)
        self._llm = llm
        self._ledger = ledger
        self._parameters = llm.parameters
        self._changed = threading.Condition()  # guards all that follows
        self._threads: list[threading.Thread] = []
        self._count = 0
        self._asked: dict[str, PendingRequest] = {}
        self._ready: list[PendingRequest] = []  # heap, the oldest first
        self._last_asked = 0.0
        self._under_way = 0
        self._given_up = 0
        self._stopped: BaseException | None = None

    def answers(
        self, verb: str, conversations: Sequence[Conversation]
    ) -> list[Completion | Problem]:
        """The answer to each conversation, in order; may be called from several threads at once.

        What keeps one conversation from being answered is its `Problem`. What stops the run
        (`CostLimit`, another `ReasonpixError` of the model, KeyboardInterrupt) is raised in all
        threads, once the calls under way are stored; the caller stays stopped.
        """
        wait = Waiter()
        try:
            keys = [answer_key(self._parameters, asked) for asked in conversations]
            found = [self._find(wait, verb, *it) for it in zip(keys, conversations, strict=True)]
            self._begin(wait)
            wait.over.wait()
        except BaseException as error:
            self._stop(error)
            self._let_finish()
            raise
        if wait.missing:
            self._let_finish()
        if wait.missing:
            assert self._stopped is not None
            raise self._stopped
        results = [it.result if isinstance(it, PendingRequest) else it for it in found]
        return [it for it in results if it is not None]

    @property
    def stopped(self) -> bool:
        """Whether nothing more is asked: calls under way may as well end without an answer."""
        return self._stopped is not None

    def close(self) -> None:
        """Let calls under way finish, drop the others, end the threads. Jobs stay open."""
        self._stop(ReasonpixError(STOPPED))
        self._let_finish()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._stop(error)  # else those who wait would wait for ever

    @abstractmethod
    def _work(self) -> None:
        """Put questions until `_stopped`. Runs in each thread."""

    @abstractmethod
    def _retry(self, asked: PendingRequest, outcome: Unavailable) -> None:
        """Queue another attempt."""

    def _waits_already(self, key: str) -> bool:
        """Whether an answer to this question will come without putting it again."""
        return False

    def _find(
        self, wait: Waiter, verb: str, key: str, conversation: Conversation
    ) -> PendingRequest | Completion:
        """The stored answer, or the question, asked already or now."""
        with self._changed:
            asked = self._asked.get(key)
            # Looked up under the lock: an answer that is stored leaves `_asked` after that.
            if asked is None and (stored := self._ledger.get(key)) is not None:
                return stored
            if self._stopped is not None:
                raise self._stopped
            if asked is None:
                self._count += 1
                price, longest = self._llm.price, self._llm.longest_answer or 0
                worst = 0.0 if price is None else price.of(longest_prompt(conversation), longest)
                asked = PendingRequest(self._count, Request(verb, key, conversation, worst))
                self._asked[key] = asked
                if not self._waits_already(key):
                    wait.new.append(asked)
            if wait not in asked.waits:
                asked.waits.append(wait)
                wait.missing += 1
            return asked

    def _begin(self, wait: Waiter) -> None:
        """Queue what is new, all at once so that it fills batches."""
        with self._changed:
            for asked in wait.new:
                self._enqueue(asked)
            while len(self._threads) < min(self.threads, len(self._asked)):
                thread = threading.Thread(target=self._run, name="language model", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
            self._count_down(wait)

    def _enqueue(self, asked: PendingRequest) -> None:
        heappush(self._ready, asked)
        self._last_asked = time.monotonic()

    def _count_down(self, wait: Waiter) -> None:
        wait.missing -= 1
        if not wait.missing:
            wait.over.set()

    def _reserved(self, wanted: Sequence[PendingRequest]) -> list[PendingRequest]:
        """As many of these, from the first on, as the cost limit allows now."""
        batch = []
        for asked in wanted:
            if not self._ledger.budget.reserve(asked.call.worst):
                break
            batch.append(asked)
        if wanted and not batch and not self._ledger.budget.under_way:
            spent = self._ledger.spent()
            taken = spent.cost + spent.lost_cost + self._ledger.budget.reserved
            self._stop(
                CostLimit(
                    f"the next call can cost {wanted[0].call.worst:.6g}, and {taken:.6g} "
                    f"of the limit of {self._ledger.max_cost:.6g} is spent; "
                    "raise --max-cost and run the same command again to go on"
                )
            )
        return batch

    def _finish(self, asked: PendingRequest, outcome: Attempt) -> None:
        """Hand on how an attempt ended, or queue the next one."""
        if isinstance(outcome, Unavailable):
            if self._stopped is not None:
                return  # it is asked again when the run goes on
            if outcome.overloaded and not self._llm.jobs:
                asked.refusals += 1
            else:
                asked.failures += 1
            retries = self._llm.max_retries
            if asked.failures <= retries and asked.refusals <= OVERLOADS_PER_RETRY * retries:
                self._retry(asked, outcome)
                return
            reason = f"no answer after {asked.attempts - 1} attempts: {outcome.reason}"
            outcome = Problem(status="failed", reason=reason)
            self._given_up += 1
            if self._given_up == GIVEN_UP_IN_A_ROW:
                # An outage is not the fault of the records that it meets.
                gone = f"{self._given_up} questions in a row were given up, the last with {reason}"
                self._stop(ReasonpixError(f"{gone}; run the same command again to go on"))
                return
        else:
            self._given_up = 0
        asked.result = outcome
        del self._asked[asked.call.key]
        for wait in asked.waits:
            self._count_down(wait)

    def _ended(
        self,
        sent: InFlight,
        outcome: Attempt,
        attempts: int,
        seconds: float = 0.0,
    ) -> Settlement:
        if not isinstance(outcome, Completion):
            charged = isinstance(outcome, Unavailable) and outcome.may_be_charged
            return Settlement(sent, may_be_charged=charged)
        cost = None
        if (price := self._llm.price) is not None:
            cost = price.of(outcome.prompt_tokens, outcome.completion_tokens)
            if not outcome.prompt_tokens and not outcome.completion_tokens:
                cost = sent.worst  # the server does not tell
        return Settlement(sent, outcome, cost, seconds, attempts)

    def _stop(self, error: BaseException) -> None:
        """Send nothing more. The first error is the one that is raised."""
        if isinstance(error, Exception) and not isinstance(error, ReasonpixError):
            # Raised as it is, it would pass for a fault of every single record.
            what = f"the language model cannot be asked: {type(error).__name__}: {error}"
            unexpected = ReasonpixError(f"{what}; run the same command again to go on")
            unexpected.__cause__ = error
            error = unexpected
        with self._changed:
            self._stopped = self._stopped or error
            for asked in self._asked.values():
                for wait in asked.waits:
                    wait.over.set()
            self._changed.notify_all()

    def _let_finish(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._under_way == 0)

    def _step_ended(self) -> None:
        with self._changed:
            self._under_way -= 1
            if self._stopped is not None:
                self._changed.notify_all()
            else:
                self._changed.notify()


def check_price(llm: LanguageModel) -> None:
    """Raise `RecipeError` when it is not known what a call can cost, so no limit can be kept."""
    problems = []
    if llm.price is None:
        problems.append(
            "--max-cost needs the planner's prices: add `price: {prompt: …, completion: …}` "
            "(per million tokens) to its options"
        )
    if llm.longest_answer is None:
        problems.append(
            "--max-cost needs a bound on the length of an answer: set the planner's option for "
            "the most tokens it may generate"
        )
    if problems:
        raise RecipeError(problems)


def storable(outcome: Attempt) -> Attempt:
    """The same with text that UTF-8 can hold: JSON may smuggle in half of a surrogate pair."""
    try:
        for _, value in outcome:
            if isinstance(value, str):
                value.encode()
    except UnicodeEncodeError:
        texts = {name: value for name, value in outcome if isinstance(value, str)}
        clean = {name: text.encode(errors="replace").decode() for name, text in texts.items()}
        return outcome.model_copy(update=clean)
    return outcome
