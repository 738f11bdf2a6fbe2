"""A run of 4,000 records and one of 400,000: memory, time, files, and going on after a kill.

    python benchmarks/scale.py [--small 4000] [--large 400000] [--shard-size 250] [--folder DIR]

All components are the fakes that ship with reasonpix, so that the run itself is what is measured.
The large run is killed (SIGKILL) in the middle and started again; the seconds are those from the
start of the new process to the first file of a shard that it commits.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

RECIPE = {
    "source": {"use": "fake-source"},
    "pipeline": {
        "captioner": "fake-captioner",
        "extractor": "fake-extractor",
        "grounder": "fake-grounder",
        "planner": "fake-planner",
        "editor": "fake-editor",
    },
    "filters": ["fake-scorer"],
}
STAGES = 7  # and the source's rows


@dataclass
class Process:
    """A `reasonpix generate` that has ended."""

    seconds: float
    peak_mb: float
    first_commit_s: float
    """From its start to the first shard that it committed."""


def committed(run: Path) -> dict[Path, float]:
    """The files of all shards, and when they appeared."""
    found = {}
    for folder in (run / "stages").glob("*"):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".parquet") and not entry.name.startswith("."):
                    found[Path(entry.path)] = entry.stat().st_mtime
    return found


def generate(recipe: Path, run: Path, kill_at: int | None = None) -> Process:
    """Run to the end, or until so many shards are committed."""
    before = set(committed(run))
    command = [
        sys.executable,
        "-m",
        "reasonpix",
        "generate",
        str(recipe),
        "--out",
        str(run),
    ]
    began = time.time()
    with (run.parent / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        ended = 0
        while not ended and kill_at is not None:
            time.sleep(0.2)
            if len(committed(run)) >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not ended:
            _, status, usage = os.wait4(process.pid, 0)
    seconds = time.time() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit((run.parent / "log").read_text())
    new = [when for path, when in committed(run).items() if path not in before]
    return Process(seconds, usage.ru_maxrss / 1024, min(new) - began)


def write_recipe(folder: Path, records: int, shard_size: int) -> Path:
    folder.mkdir()
    source = {**RECIPE["source"], "count": records}  # type: ignore[dict-item]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"shard_size": shard_size, **RECIPE, "source": source}))
    return path


def tell(records: int, run: Path, processes: list[Process]) -> float:
    """Print a line; gives the peak memory in MB."""
    sizes = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    seconds, peak = sum(p.seconds for p in processes), max(p.peak_mb for p in processes)
    line = f"{records:9} {seconds:9.1f} {records / seconds:10.0f} {peak:8.0f}"
    print(f"{line} {len(sizes):7} {sum(sizes) / 1e6:8.0f}", flush=True)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", type=int, default=4_000)
    parser.add_argument("--large", type=int, default=400_000)
    parser.add_argument("--shard-size", type=int, default=250)
    parser.add_argument("--folder", help="where the runs are; a temporary folder's by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        print(
            f"{'records':>9} {'seconds':>8} {'records/s':>10} {'peak MB':>8} {'files':>7} {'MB':>8}"
        )
        recipe = write_recipe(Path(name, "small"), given.small, given.shard_size)
        run = recipe.with_name("run")
        small = tell(given.small, run, [generate(recipe, run)])
        recipe = write_recipe(Path(name, "large"), given.large, given.shard_size)
        run = recipe.with_name("run")
        middle = STAGES * -(-given.large // given.shard_size) // 2
        # The files of the source's rows come first.
        killed = generate(recipe, run, kill_at=middle + given.large // given.shard_size)
        resumed = generate(recipe, run)
        large = tell(given.large, run, [killed, resumed])
    for what, value, wanted in (
        ("peak memory, large / small", large / small, 1.1),
        ("seconds to the first commit after a kill", resumed.first_commit_s, 2.0),
    ):
        verdict = "reached" if value <= wanted else "missed"
        print(f"{what}: {value:.2f} (wanted: at most {wanted}, {verdict})")


if __name__ == "__main__":
    main()
