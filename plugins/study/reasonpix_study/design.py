"""Which worker judges which samples, and in which order the candidates are shown."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Trial:
    """A sample as shown to one worker."""

    case: int
    """Index of the case among the study's cases."""
    kind: str
    order: tuple[str, ...]
    """The methods in the order of their candidates."""


class Design(BaseModel):
    """The design of a study. A sample is a case with one kind of instruction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    benchmark: str
    kinds: tuple[str, ...]
    methods: tuple[str, ...]
    cases: int
    per_worker: int
    """Samples on a worker's sheet; at most `cases`."""
    seed: int

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.cases * len(self.kinds)

    @property
    def sheets(self) -> int:
        """The number of sheets it takes to judge every sample at least once."""
        return -(-self.samples // self.per_worker)

    def sheet(self, number: int) -> list[Trial]:
        """The samples that one worker judges, in order. Sheets are numbered from 0, without limit.

        Sheets cycle through the cases, with another kind in each round. So a sheet has each case
        at most once, and after any number of sheets the samples' numbers of judgements differ by
        at most one. On a sheet, for each kind, the numbers of times that the methods appear in a
        position also differ by at most one.
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
        """Rows of cyclic Latin squares with shuffled rows, columns and methods."""
        size = len(self.methods)
        orders: list[tuple[str, ...]] = []
        while len(orders) < count:
            methods = rng.sample(self.methods, size)
            rows = rng.sample(range(size), size)
            columns = rng.sample(range(size), size)
            orders += [tuple(methods[(row + column) % size] for column in columns) for row in rows]
        return orders[:count]
