"""What language models cost: what was spent, and a limit that is never passed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from reasonpix.llm.types import Completion

_UNITS = 10**12
# Money is added up as integers: floats would drift, and what just fits a limit would not fit.


@dataclass(frozen=True)
class Spending:
    """What answers took. `verbs` splits a total by what was asked (rewrite, select, …)."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """Price of the answers, in the currency of the prices."""
    unpriced: int = 0
    """Answers whose price is not known; they add nothing to `cost`."""
    lost: int = 0
    """Calls that were sent, have no answer, and may be charged."""
    lost_cost: float = 0.0
    """The most that lost calls can have cost."""
    verbs: Mapping[str, Spending] = field(default_factory=dict)

    def __add__(self, other: Spending) -> Spending:
        """Both together, not split by verbs."""
        names = [part.name for part in fields(self) if part.name != "verbs"]
        return Spending(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Budget:
    """What was spent, and what calls under way can cost; together never more than `max_cost`.

    Usable from several threads. A call reserves the most it can cost before it is sent; the
    reservation ends when it is `answered`, `lost` or `released`.
    """

    def __init__(self, max_cost: float | None = None) -> None:
        self.max_cost = max_cost
        self._lock = threading.Lock()
        self._verbs: dict[str, Spending] = {}
        self._spent = 0
        self._reserved = 0
        self._under_way = 0

    @property
    def reserved(self) -> float:
        """The most that calls under way, and those waiting in jobs, can cost."""
        return self._reserved / _UNITS

    @property
    def under_way(self) -> int:
        """Calls of this process that hold a reservation."""
        return self._under_way

    def spent(self) -> Spending:
        """What was spent so far, in all and by verb."""
        with self._lock:
            verbs = dict(sorted(self._verbs.items()))
        return replace(sum(verbs.values(), Spending()), verbs=verbs)

    def reserve(self, worst: float) -> bool:
        """Keep `worst` for one call, or say that the limit might then be passed."""
        with self._lock:
            reserved = self._reserved + _units(worst)
            if self.max_cost is not None and self._spent + reserved > _units(self.max_cost):
                return False
            self._reserved = reserved
            self._under_way += 1
            return True

    def answered(self, verb: str, worst: float, completion: Completion, cost: float | None) -> None:
        """A call was answered, at this cost (None: not known)."""
        self._end(
            verb,
            worst,
            Spending(
                answers=1,
                prompt_tokens=completion.prompt_tokens,
                completion_tokens=completion.completion_tokens,
                cost=cost or 0.0,
                unpriced=int(cost is None),
            ),
        )

    def lost(self, verb: str, worst: float) -> None:
        """A call got no answer and may be charged: it counts as paid."""
        self._end(verb, worst, Spending(lost=1, lost_cost=worst))

    def released(self, verb: str, worst: float) -> None:
        """A call got no answer and costs nothing."""
        self._end(verb, worst, Spending())

    def _end(self, verb: str, worst: float, spending: Spending) -> None:
        with self._lock:
            self._reserved -= _units(worst)
            self._under_way -= 1
            self._add(verb, spending)

    def _add(self, verb: str, spending: Spending) -> None:
        self._spent += _units(spending.cost) + _units(spending.lost_cost)
        self._verbs[verb] = self._verbs.get(verb, Spending()) + spending

    # -- What an earlier process left

    def found(self, verb: str, spending: Spending) -> None:
        """It was spent before."""
        with self._lock:
            self._add(verb, spending)

    def waiting(self, worst: float) -> None:
        """A call waits in a job: it is reserved, but not under way in this process."""
        with self._lock:
            self._reserved += _units(worst)

    def adopted(self, calls: int) -> None:
        """So many calls that were waiting are under way in this process."""
        with self._lock:
            self._under_way += calls


def _units(cost: float) -> int:
    return round(cost * _UNITS)
