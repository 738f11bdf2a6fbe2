"""`reasonpix --help` beside a Python that does nothing: `python benchmarks/help_time.py`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CALLS = 20


def seconds(*command: str) -> float:
    """The median time of a command."""
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


nothing = seconds(sys.executable, "-c", "pass")
asked = seconds(sys.executable, "-m", "reasonpix", "--help")
print(f"python -c pass    {nothing:.3f} s")
print(f"reasonpix --help  {asked:.3f} s   ({asked / nothing:.1f} times as long)")
