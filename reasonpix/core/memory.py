"""Recognise that the machine or its accelerator is out of memory, and free memory."""

from __future__ import annotations

import gc
import sys


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. torch raises a plain RuntimeError when the machine is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in message or "can't allocate memory" in message
    )


def free_memory() -> None:
    """Free unreferenced memory. Call it after the error is gone, whose frames hold references."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
