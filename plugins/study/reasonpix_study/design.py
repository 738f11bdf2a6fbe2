"""Who judges what in a study, and in which order the candidates stand."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Trial:
    """A sample as one worker sees it."""

    case: int
    """The place of the case among the study's cases."""
    kind: str
    order: tuple[str, ...]
    """The methods from the first candidate to the last."""


class Design(BaseModel):
    """How a study is laid out. A sample is a case with one kind of instruction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    benchmark: str
    kinds: tuple[str, ...]
    methods: tuple[str, ...]
    cases: int
    per_worker: int
    """Samples of one sheet, at most as many as there are cases."""
    seed: int

    @property
    def samples(self) -> int:
        """All samples."""
        return self.cases * len(self.kinds)

    @property
    def sheets(self) -> int:
        """The number of sheets with which every sample is judged at least once."""
        return -(-self.samples // self.per_worker)

    def sheet(self, number: int) -> list[Trial]:
        """What one worker judges, in this order. Sheets are numbered from 0, without an end.

        They go round the cases, with another kind in each round: no sheet has a case twice, not
        even by two kinds, and after any number of sheets no sample has been judged more than once
        more often than another. Within a sheet every method stands in every place equally often
        for each kind, or once more.
        """
        rng = random.Random(f"{self.seed}/sheet/{number}")
        drawn = []
        for turn in range(number * self.per_worker, (number + 1) * self.per_worker):
            lap, case = divmod(turn, self.cases)
            drawn.append((case, self.kinds[(case + lap) % len(self.kinds)]))
        rng.shuffle(drawn)
        counts = Counter(kind for _, kind in drawn)
        orders = {kind: iter(self._orders(counts[kind], rng)) for kind in self.kinds}
        return [Trial(case, kind, next(orders[kind])) for case, kind in drawn]

    def _orders(self, count: int, rng: random.Random) -> list[tuple[str, ...]]:
        """Rows of Latin squares, each a cyclic one with its rows, columns and methods shuffled."""
        size = len(self.methods)
        orders: list[tuple[str, ...]] = []
        while len(orders) < count:
            methods = rng.sample(self.methods, size)
            rows = rng.sample(range(size), size)
            columns = rng.sample(range(size), size)
            orders += [tuple(methods[(row + column) % size] for column in columns) for row in rows]
        return orders[:count]
