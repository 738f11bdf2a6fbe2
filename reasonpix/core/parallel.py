"""Work done ahead in threads, bounds of pieces, and progress that nobody is told of."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Size(NamedTuple):
    """A bound: what reaches one of the two is closed, and the next one begun."""

    rows: int
    bytes: int


def prefetch(work: Callable[[T], R], items: Iterator[T], threads: int = 4) -> Iterator[R]:
    """The results in order, a few computed ahead in threads: coding images is most of the work."""
    with ThreadPoolExecutor(threads, thread_name_prefix="publish") as workers:
        under_way: deque[Future[R]] = deque(
            workers.submit(work, item) for item in islice(items, 2 * threads)
        )
        try:
            while under_way:
                yield under_way.popleft().result()
                under_way.extend(workers.submit(work, item) for item in islice(items, 1))
        finally:
            for future in under_way:
                future.cancel()


THREADS = max(2, min(16, os.cpu_count() or 2))


Report = Callable[[int, int], None]
"""Is told how much is done, and how much there is."""


def quiet(done: int, total: int) -> None:
    """Tells nobody."""
