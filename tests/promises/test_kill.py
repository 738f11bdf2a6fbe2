"""Runs that are killed again and again publish the bytes of one that nobody disturbed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill.py"

pytest.importorskip("reasonpix_mini", reason="the sticker world is not installed")


@pytest.mark.parametrize(
    ("executor", "times", "records"), [("local", 50, 200), ("ray", 3, 60)], ids=["local", "ray"]
)
def test_kills_change_no_byte(executor: str, times: int, records: int) -> None:
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("the extra reasonpix[ray] is not installed")
    asked = f"--executor {executor} --times {times} --records {records}".split()
    done = subprocess.run([sys.executable, SCRIPT, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{executor}: {times} kills" in done.stdout
    assert "equal, byte for byte" in done.stdout
