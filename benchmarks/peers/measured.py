"""What the scripts of all peers share: the records, the clock, and the line that tells of them."""

import json
import os
import time

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
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


class timer:  # noqa: N801
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
