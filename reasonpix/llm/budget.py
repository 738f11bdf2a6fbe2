"""The cost of language models: a bound per request, the total spent, and its limit."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from reasonpix.errors import RecipeError
from reasonpix.llm.requests import canonical_json
from reasonpix.llm.types import Conversation, LanguageModel

TOKENS_PER_MESSAGE = 16
TOKENS_PER_CALL = 64
"""Allowances for what a chat template adds, in tokens."""

_UNITS = 10**12
# Costs are added as integers: floats drift, so that a cost equal to the limit would not fit.


def check_price(llm: LanguageModel) -> None:
    """Raise `RecipeError` if the cost of a request has no known bound, so no limit can hold."""
    problems = []
    if llm.price is None:
        problems.append(
            "--max-cost needs the planner's prices: add `price: {prompt: …, completion: …}` "
            "(per million tokens) to its options"
        )
    if llm.max_answer_tokens is None:
        problems.append(
            "--max-cost needs a bound on the length of an answer: set the planner's option for "
            "the maximum number of generated tokens"
        )
    if problems:
        raise RecipeError(problems)


def cost_bound(llm: LanguageModel, conversation: Conversation) -> float:
    """The most that a request can cost; 0 if the price is unknown."""
    if llm.price is None:
        return 0.0
    return llm.price.of(max_prompt_tokens(conversation), llm.max_answer_tokens or 0)


def max_prompt_tokens(conversation: Conversation) -> int:
    """An upper bound of a conversation's prompt tokens: a token has at least one byte."""
    turns = conversation.messages
    schema = len(canonical_json(conversation.answer_schema).encode())
    text = sum(len(turn.content.encode(errors="replace")) for turn in turns)
    return text + schema + TOKENS_PER_MESSAGE * len(turns) + TOKENS_PER_CALL


@dataclass(frozen=True)
class Spending:
    """What answers cost, in total and `by_task` (rewrite, select, …)."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """Price of the answers, in the currency of the prices."""
    unpriced: int = 0
    """Answers without a known price; they add nothing to `cost`."""
    estimated: int = 0
    """Answers whose tokens were not reported; their `cost` is the most that they can have cost."""
    lost: int = 0
    """Requests that were sent, got no answer, and may be charged."""
    lost_cost: float = 0.0
    """The most that lost requests can have cost."""
    by_task: Mapping[str, Spending] = field(default_factory=dict)

    def __add__(self, other: Spending) -> Spending:
        """The sum, not split by task."""
        names = [part.name for part in fields(self) if part.name != "by_task"]
        return Spending(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Budget:
    """What was spent, and what requests in flight can cost; together at most `max_cost`.

    Thread-safe. The cost bound of a request is reserved before it is sent, and until it is settled.
    """

    def __init__(self, max_cost: float | None = None) -> None:
        self.max_cost = max_cost
        self._lock = threading.Lock()
        self._by_task: dict[str, Spending] = {}
        self._spent = 0
        self._reserved = 0
        self._in_flight = 0

    @property
    def reserved(self) -> float:
        """The most that requests in flight, and those in open jobs, can cost."""
        return self._reserved / _UNITS

    @property
    def in_flight(self) -> int:
        """Requests of this process that hold a reservation."""
        return self._in_flight

    def spent(self) -> Spending:
        """What was spent so far, in total and by task."""
        with self._lock:
            by_task = dict(sorted(self._by_task.items()))
        return replace(sum(by_task.values(), Spending()), by_task=by_task)

    def reserve(self, cost_bound: float) -> bool:
        """Reserve the cost of a request; False if that could exceed the limit."""
        with self._lock:
            reserved = self._reserved + _units(cost_bound)
            if self.max_cost is not None and self._spent + reserved > _units(self.max_cost):
                return False
            self._reserved = reserved
            self._in_flight += 1
            return True

    def settle(self, task: str, cost_bound: float, spending: Spending) -> None:
        """A request ended: replace its reservation by what it cost."""
        with self._lock:
            self._reserved -= _units(cost_bound)
            self._in_flight -= 1
            self._add(task, spending)

    def _add(self, task: str, spending: Spending) -> None:
        self._spent += _units(spending.cost) + _units(spending.lost_cost)
        self._by_task[task] = self._by_task.get(task, Spending()) + spending

    # -- Left by earlier processes

    def add(self, task: str, spending: Spending) -> None:
        """Add what an earlier process spent; negative amounts correct it."""
        with self._lock:
            self._add(task, spending)

    def reserve_open(self, cost_bound: float) -> None:
        """Reserve a request in an open job, which is not in flight in this process."""
        with self._lock:
            self._reserved += _units(cost_bound)

    def adopted(self, requests: int) -> None:
        """Record that requests of an open job are now in flight in this process."""
        with self._lock:
            self._in_flight += requests


def _units(cost: float) -> int:
    return round(cost * _UNITS)
