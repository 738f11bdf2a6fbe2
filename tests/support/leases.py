"""Leases of run folders, as another machine would write them."""

from __future__ import annotations

import json
import time


def foreign_lease(seconds_ago: float, token: str = "t") -> bytes:
    """The file `holder` of a process on another machine, as of so many seconds ago."""
    facts = {"who": "process 7 on far", "machine": "far", "pid": 7, "token": token}
    return json.dumps({**facts, "time": time.time() - seconds_ago}).encode()
