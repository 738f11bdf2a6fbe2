"""A training run, so small that a test can take it many times."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reasonpix.training.recipe import TrainingRecipe, load_training_recipe
from reasonpix.training.trainer import TrainingResult, train
from tests.support.pair_files import parquet, rows
from tests.support.tiny_model import RESOLUTION, write_tiny

ROOT = Path(__file__).parents[2]
ROWS = 10

LONG: dict[str, Any] = {
    "align": {"steps": 4, "batch_size": 4},
    "data__align": "plain",
    "steps": 6,
    "save_every": 3,
    "batch_size": 4,
    "validation": {"examples": 2, "every": 4},
}
"""All stages."""


def write_training(folder: Path, **changes: Any) -> Path:
    """A recipe in `folder`, with a dataset and a model to start from, unless they are there.

    `a__b` is the option b of the block a; an option that is "…" is left out.
    """
    if not (folder / "start").is_dir():
        write_tiny(folder / "start", "clip_residual")  # one with a text encoder
    if not (folder / "pairs.parquet").is_file():
        content = rows(ROWS)
        for number, row in enumerate(content):
            row["direct_instruction"] = "turn it " + "and again " * number
            row["plain"] = f"number {number}"
        parquet(folder / "pairs.parquet", content)
    recipe: dict[str, Any] = {
        "data": {"path": str(folder / "pairs.parquet"), "resolution": RESOLUTION, "flip": True},
        "encoder": "fake-encoder",
        "model": {
            "model": str(folder / "start"),
            "connector": {"kind": "query_resampler", "heads": 2, "depth": 1},
        },
        "steps": 5,
        "batch_size": 2,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "save_every": 2,
        "precision": "fp32",
        "sampling": {"num_inference_steps": 2},
    }
    for name, value in changes.items():
        *path, key = name.split("__")
        block = recipe
        for step in path:
            block = block.setdefault(step, {})
        block.pop(key, None)
        if value != "…":
            block[key] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def recipe(folder: Path, **changes: Any) -> TrainingRecipe:
    return load_training_recipe(write_training(folder, **changes))


def run(folder: Path, out: str = "out", **changes: Any) -> TrainingResult:
    """Train in `folder`/`out`."""
    return train(recipe(folder, **changes), folder / out)


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a function in a process of its own, in which all that is heavy is loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reasonpix.training.trainer", "tests.support.tiny_training"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        ensure_running()
    process = context.Process(target=alone, args=(function, *arguments))
    process.start()
    return process


def alone(function: Callable[..., Any], *arguments: Any) -> None:
    """What that process does, on one thread, as the tests do."""
    torch.set_num_threads(1)
    function(*arguments)


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, str, float, float]]:
    """Of each step: its number, stage, loss and learning rate."""
    return [(one["step"], one["stage"], one["loss"], one["learning_rate"]) for one in log(out)]


def files(folder: Path) -> dict[str, bytes]:
    """All files by name."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
