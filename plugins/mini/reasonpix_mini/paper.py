"""The paper's table and figures at mini scale, each by one command, in ./runs.

    python -m reasonpix_mini.paper table3      # Table 3
    python -m reasonpix_mini.paper figure15    # Figures 15a and 15b, with their training
    python -m reasonpix_mini.paper settings    # the paper's settings and the recommended ones

Each step is a command of `reasonpix`, printed before it runs. A step whose result exists is
skipped; one that was interrupted continues.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PARTS = {
    "1": ("mini/part1", "start=0", "count=3500"),
    "2": ("mini/part2", "start=10000", "count=2000"),
    "3": ("mini/part3", "start=20000", "count=3000"),
}
"""Recipe and training scenes of each part; the test split shares none with them."""

PAPER_FILTERS = {
    "1": ("selection_orders=1", "filters=[{use: eq1, reject_fraction: 0.1}]"),
    "2": ("filters=[]",),
    "3": ("filters=[]",),
}
"""How the paper filters each part; the recipes in `PARTS` have the recommended filters."""

TRAINING = ("cache=runs/features", "steps=600", "save_every=300", "validation=null", "trackers=[]")
"""How models that are only compared depart from their recipes: fewer steps, h computed once."""


class Step(NamedTuple):
    """A command, and what is there when it has run. A folder that it resumes is its own sign."""

    result: Path
    command: Sequence[str]


def _reasonpix(*words: str) -> list[str]:
    return [sys.executable, "-m", "reasonpix", *words]


def _part(number: str, settings: Sequence[str] = (), name: str = "part") -> Iterator[Step]:
    """A part of the training data, published; other `settings` reuse the stages of the run."""
    recipe, *scenes = PARTS[number]
    run, dataset = f"runs/part{number}-run", Path(f"runs/{name}{number}")
    sets = [f"--set=source.{setting}" for setting in ("split=train", *scenes)]
    sets += [f"--set={setting}" for setting in settings]
    generate = _reasonpix("generate", recipe, "--out", run, "--shard-size", "50")
    yield Step(dataset, [*generate, *sets])
    yield Step(dataset, _reasonpix("publish", run, "--out", str(dataset)))


def _plain(number: str, name: str = "part") -> Step:
    """The same with a column of plain words, which the connector is aligned to."""
    out = Path(f"runs/{name}{number}-plain")
    module = [sys.executable, "-m", "reasonpix_mini.plain_instructions"]
    return Step(out, [*module, f"runs/{name}{number}", "--out", str(out)])


def _benchmark(name: str, parts: str) -> Iterator[Step]:
    """200 test cases, checked against the parts that are trained on."""
    run, out = "runs/mini-benchmark", Path("runs") / name
    others = [f"--disjoint-from=runs/part{number}" for number in parts]
    yield Step(out, _reasonpix("generate", "mini/benchmark", "--out", run))
    yield Step(out, [*_reasonpix("benchmark", run, "--out", str(out), "--count", "200"), *others])


def _trained(name: str, parts: str, *settings: str) -> Step:
    """A model of Figure 15, of some parts of the data."""
    out = Path("runs") / name
    paths = ", ".join(f"runs/part{number}-plain" for number in parts)
    sets = [f"--set={it}" for it in (f"data.path=[{paths}]", *TRAINING, *settings)]
    return Step(out / "model", [*_reasonpix("train", "mini/train", "--out", str(out)), *sets])


def _evaluated(name: str) -> Step:
    out = Path("runs") / name
    return Step(out / "report.html", _reasonpix("evaluate", f"mini/{name}", "--out", str(out)))


def table3() -> Iterator[Step]:
    """The benchmark, MagicBrush-mini, and all methods."""
    yield from _part("1")
    yield from _benchmark("benchmark", "1")
    train = _reasonpix("train", "mini/magicbrush", "--out", "runs/magicbrush")
    yield Step(Path("runs/magicbrush/model"), train)
    yield _evaluated("table3")


def figure15() -> Iterator[Step]:
    """Three parts of data, four models, two evaluations."""
    for number in PARTS:
        yield from _part(number)
        yield _plain(number)
    yield from _benchmark("benchmark-123", "123")
    yield _trained("parts-1", "1")
    yield _trained("parts-12", "12")
    yield _trained("parts-123", "123")
    yield _trained("aligned", "123", "steps=0")
    yield _evaluated("figure15a")
    yield _evaluated("figure15b")


def settings() -> Iterator[Step]:
    """Data and models by the paper's settings and by the recommended ones, and their evaluation."""
    for number in PARTS:
        yield from _part(number)
        yield _plain(number)
        yield from _part(number, PAPER_FILTERS[number], "paper-part")
        yield _plain(number, "paper-part")
    yield from _benchmark("benchmark-123", "123")
    recommended = ", ".join(f"runs/part{number}-plain" for number in PARTS)
    paper = ", ".join(f"runs/paper-part{number}-plain" for number in PARTS)
    for name, recipe, path in [
        ("paper-train", "mini/paper-train", paper),
        ("paper-ip2p", "mini/train", paper),
        ("recommended", "mini/train", recommended),
    ]:
        out = Path("runs") / name
        sets = [f"--set={it}" for it in (f"data.path=[{path}]", *TRAINING)]
        yield Step(out / "model", [*_reasonpix("train", recipe, "--out", str(out)), *sets])
    yield _evaluated("settings")


def main() -> None:
    """Run the steps, with the time that each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["table3", "figure15", "settings"])
    targets = {"table3": table3, "figure15": figure15, "settings": settings}
    steps = targets[parser.parse_args().what]
    began = time.monotonic()
    for step in steps():
        if step.result.exists():
            continue
        print(f"$ {shlex.join(step.command)}", flush=True)
        start = time.monotonic()
        done = subprocess.run(step.command)
        if done.returncode:
            sys.exit(done.returncode)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
