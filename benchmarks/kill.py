"""Kill a run (SIGKILL) again and again, let it go on each time, and compare what it publishes.

    python benchmarks/kill.py [--times 50] [--executor local|ray] [--records 300] [--seed 0]
                              [--recipe NAME [--set KEY=VALUE]…]

Prints where the kills fell, and whether the published dataset and all shards are, byte for byte,
those of a local run that nobody disturbed; exits with 1 when they are not. Without --recipe it runs
sticker scenes through components that cost nothing, so that it is the run that is tested.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from reasonpix.datasets.publishing import publish
from reasonpix.generation.run_folder import RunFolder

STAGES = ("read", "caption", "extract", "ground", "plan", "edit", "score-no-op", "score-eq1")
LIGHT = {
    "source": {"use": "stickers", "split": "test", "captions": True},
    "pipeline": {
        "extractor": "fake-extractor",
        "grounder": "fake-grounder",
        "planner": "lexicon",
        "editor": "fake-editor",
    },
    "filters": ["no-op", {"use": "eq1", "reject_fraction": 0.1}],
    "resources": {stage: {"num_cpus": 0.1} for stage in STAGES},
}
IN_START = 0.2
"""Share of the kills that fall before the first shard is finished: in the start, or the plan."""


def committed(run: Path) -> int:
    """How many files of shards there are."""
    count = 0
    for folder in (run / "stages").glob("*"):
        with os.scandir(folder) as entries:
            count += sum(e.name.endswith(".parquet") and e.name[0] != "." for e in entries)
    return count


def finish(command: list[str], log: Path) -> float:
    """Let a run come to its end; the seconds it took."""
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.run(command, stdout=output, stderr=output)
    if process.returncode:
        raise SystemExit(log.read_text())
    return time.monotonic() - began


def disturb(
    command: list[str], run: Path, log: Path, draw: random.Random, most: int, start_s: float
) -> int | None:
    """Kill a run at a random moment; how many files there were then, None if it ended before."""
    before = committed(run)
    in_start = draw.random() < IN_START
    # After so many more files, or after so many seconds; and then not just when one appeared.
    further = 1 << 62 if in_start else draw.randint(1, max(1, most))
    deadline = time.monotonic() + (draw.uniform(0, start_s) if in_start else 1 << 31)
    pause = draw.uniform(0, 0.02)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while committed(run) < before + further and time.monotonic() < deadline:
            if process.poll() is not None:
                if process.returncode:
                    raise SystemExit(log.read_text())
                return None
            time.sleep(0.005)
        time.sleep(pause)
        process.kill()
        process.wait()
    return committed(run)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def result(run: Path) -> dict[str, bytes]:
    """All files of the published dataset, and all shards, of a finished run."""
    dataset = run.with_name(f"{run.name}-dataset")
    publish(RunFolder(run), dataset)
    return content(dataset) | {f"stages/{k}": v for k, v in content(run / "stages").items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    asked = parser.parse_args()
    began = time.monotonic()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="reasonpix-kill-") as root:
        folder, log = Path(root), Path(root) / "log"
        light = {**LIGHT, "source": {**LIGHT["source"], "count": asked.records}}
        (folder / "light.yaml").write_text(yaml.safe_dump(light))

        def command(run: Path, executor: str) -> list[str]:
            settings = [part for setting in asked.settings for part in ("--set", setting)]
            return [
                *(sys.executable, "-m", "reasonpix", "generate"),
                *(asked.recipe or str(folder / "light.yaml"), "--out", str(run)),
                *("--limit", str(asked.records), "--shard-size", "4", "--executor", executor),
                *settings,
            ]

        undisturbed = folder / "undisturbed"
        finish(command(undisturbed, "local"), log)
        expected, files = result(undisturbed), committed(undisturbed)
        start_s = {"local": 1.0, "ray": 15.0}[asked.executor]
        shares: list[float] = []
        equal, runs = True, 0
        while equal and (runs == 0 or len(shares) < asked.times):
            # A run that ends before it was killed often enough is followed by another.
            runs += 1
            run = folder / f"run{runs}"
            while len(shares) < asked.times:
                # So that the kills that are left fall on the whole of what is left.
                most = 2 * (files - committed(run)) // (asked.times - len(shares) + 1)
                there = disturb(command(run, asked.executor), run, log, draw, most, start_s)
                if there is None:
                    break
                shares.append(there / files)
                print(f"kill {len(shares)}: {there} of {files} files", flush=True)
            finish(command(run, asked.executor), log)
            equal = result(run) == expected
        fell = [round(100 * share) for share in shares] or [0]
        print(
            f"{asked.executor}: {len(shares)} kills of {runs} run(s) of {asked.records} records, "
            f"{files} files of shards; they fell when {min(fell)} % to {max(fell)} % "
            f"(median {statistics.median(fell):g} %) of the files were there; "
            f"{time.monotonic() - began:.0f} s"
        )
        print(f"dataset and shards {'equal' if equal else 'DIFFERENT'}, byte for byte")
        return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
