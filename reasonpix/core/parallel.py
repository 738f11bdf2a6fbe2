"""Prefetching in threads, size limits, and the type of progress callbacks."""

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
    """Size limit of a file or group: it is closed when it reaches either number."""

    rows: int
    bytes: int


def prefetch(work: Callable[[T], R], items: Iterator[T], threads: int = 4) -> Iterator[R]:
    """The results in order, computed a few items ahead in threads."""
    with ThreadPoolExecutor(threads, thread_name_prefix="publish") as workers:
        pending: deque[Future[R]] = deque(
            workers.submit(work, item) for item in islice(items, 2 * threads)
        )
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(workers.submit(work, item) for item in islice(items, 1))
        finally:
            for future in pending:
                future.cancel()


THREADS = max(2, min(16, os.cpu_count() or 2))


Report = Callable[[int, int], None]
"""Progress callback: how many items are done, and how many there are."""


def quiet(done: int, total: int) -> None:
    """A progress callback that does nothing."""
