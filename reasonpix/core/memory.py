"""Memory that runs out, of the machine or of its accelerator: tell it apart, and make room."""

from __future__ import annotations

import gc
import sys


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out.

    torch tells of a full GPU by a class of its own, of a full machine by a RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in told or "can't allocate memory" in told
    )


def free_memory() -> None:
    """Give back what nothing holds any more; not before the error is gone: its frames hold much."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
