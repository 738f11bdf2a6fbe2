"""Wall time of a run over the time of its slowest stage alone: how well stages overlap.

    python benchmarks/overlap.py [--shards 40]

Real runs of the components of tests/trial, which wait at each batch as those do whose work is done
by a GPU or a server. Each stage is timed alone first: the same run, with no other one waiting.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe

TRIAL = Path(__file__).parents[1] / "tests" / "trial"
ROWS = 8
PAUSES = {
    "captioner": 0.20,
    "extractor": 0.03,
    "grounder": 0.15,
    "planner": 0.20,
    "editor": 0.25,
    "filter": 0.12,
}
"""Seconds that a batch, which is a shard, takes each component."""


def wall(shards: int, pauses: Mapping[str, float]) -> float:
    """Seconds of a run in which the components pause so long."""
    uses = {slot: {"use": f"trial-{slot}", "pause_s": pauses.get(slot, 0.0)} for slot in PAUSES}
    captions = [f"a bee {number}" for number in range(ROWS * shards)]
    recipe = {
        "shard_size": ROWS,
        "source": {"use": "trial-source", "captions": captions},
        "filters": [uses.pop("filter")],
        "pipeline": uses,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(recipe))
        checked = load_recipe(path)
        started = time.perf_counter()
        generate(checked, Path(folder, "run"))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=40)
    shards = parser.parse_args().shards
    sys.path.insert(0, str(TRIAL))
    print(f"{shards} shards of {ROWS} records; seconds")
    nothing = wall(shards, {})
    print(f"{'no stage waits':>20} {nothing:7.2f}")
    alone = {}
    for slot, pause in PAUSES.items():
        alone[slot] = wall(shards, {slot: pause})
        print(f"{slot + ' alone':>20} {alone[slot]:7.2f}  waits {pause * shards:.2f}")
    every = wall(shards, PAUSES)
    slowest = max(alone.values())
    waits = sum(PAUSES.values()) * shards
    print(f"{'all stages':>20} {every:7.2f}  wait {waits:.2f} in all")
    verdict = "reached" if every / slowest <= 1.15 else "missed"
    print(f"wall / slowest alone: {every / slowest:.3f} (wanted: at most 1.15, {verdict})")


if __name__ == "__main__":
    main()
