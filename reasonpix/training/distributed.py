"""Errors in several processes, and memory that runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object

from reasonpix.core.memory import is_out_of_memory
from reasonpix.errors import ReasonpixError, RunError


@contextmanager
def raise_in_all_processes() -> Iterator[None]:
    """Wait for all processes at the end of the block; raise an error of one in each of them."""
    errors: list[tuple[type[ReasonpixError], str]] = []
    try:
        yield
    except ReasonpixError as error:
        errors = [(type(error), str(error))]
    if errors := gather_object(errors):
        raise errors[0][0]("\n".join(dict.fromkeys(text for _, text in errors)))


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Raise `RunError` with `advice` when memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"memory ran out; {advice}, and run the same command again") from error
