"""What the scripts of all peers share: the records, the clock, and the line that tells of them.

Imported before a peer is, it keeps it from the network.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without this Ray listens on every interface of the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "DO_NOT_TRACK": "1",
}

STAGES = 6
BATCH = 1000


def records(count: int) -> list[dict[str, str]]:
    """Rows with an id and a caption."""
    return [
        {"record_id": f"{number:012x}", "caption": f"a bee and a rabbit, {number}"}
        for number in range(count)
    ]


def results(batch: Mapping[str, Sequence[str]]) -> list[str]:
    """What each stage does: take each record of a batch of columns, and give an empty result."""
    taken = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    return ["{}" for _record in taken]


class timer:
    """Seconds of a `with` block."""

    seconds: float

    def __enter__(self) -> "timer":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started


def emit(peer: str, version: str, count: int, seconds: float, settings: str) -> None:
    """The one line that `stages.py` reads."""
    facts = {
        "peer": peer,
        "version": version,
        "records": count,
        "seconds": round(seconds, 3),
        "records_per_s": round(count / seconds),
        "settings": settings,
    }
    print(json.dumps(facts), flush=True)
