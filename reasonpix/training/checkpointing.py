"""Checkpoints to resume from: `out/state/<steps>/`, weights as safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reasonpix.core.atomic import atomic_dir, write_atomically
from reasonpix.errors import RunError
from reasonpix.training.recipe import TrainingRecipe
from reasonpix.training.state import TrainingState

KEPT = 2
"""Checkpoints on disk: the newest, and the one before in case the newest is damaged."""

_MAY_CHANGE = {
    "steps",
    "save_every",
    "data.path",
    "data.revision",
    "validation.every",
    "micro_batch_size",
    "gradient_checkpointing",
    "cache",
    "sampling",
    "trackers",
}
"""Options that a resumed run may change: the steps taken so far do not depend on them."""


def claim_folder(recipe: TrainingRecipe, out: Path) -> None:
    """Make `out` the folder of a run of `recipe`, new or resumed.

    Raises `RunError` if it holds something else, or a run of a recipe that differs.
    """
    text, file = recipe.as_yaml(), out / "recipe.yaml"
    if file.exists() or any(path.name != "holder" for path in out.iterdir()):
        previous = _read_recipe(file)
        if previous is None:
            raise RunError(
                f"{out} is not empty and is not the folder of a training run; choose another"
            )
        # A run without a checkpoint has learnt nothing that a change could spoil.
        if saved := checkpoints(out):
            _check_resumable(recipe, previous, out, int(saved[-1].name))
    write_atomically(out / "recipe.yaml", text.encode())


def _check_resumable(
    recipe: TrainingRecipe, previous: dict[str, Any], out: Path, steps_taken: int
) -> None:
    excluded = {f"encoder.{name}" for name in recipe.encoder.options.fingerprint_exclude}
    different = set(_differences(previous, yaml.safe_load(recipe.as_yaml())))
    if different := different - excluded - {"model.cache_dir"}:
        raise RunError(
            f"{out} was trained by a recipe that differs in {', '.join(sorted(different))}; choose "
            "a new folder, or restore the old values"
        )
    if steps_taken > recipe.total_steps:
        raise RunError(
            f"{out} was already trained for {steps_taken} steps, and the recipe asks for "
            f"{recipe.total_steps}; choose a new folder, or set at least as many steps"
        )


def _read_recipe(file: Path) -> dict[str, Any] | None:
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    is_training = isinstance(recipe, dict) and {"data", "encoder", "model"} <= set(recipe)
    return recipe if is_training else None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before, after = _flatten(old), _flatten(new)
    for name in before.keys() | after.keys():
        # With a cosine schedule all learning rates depend on the number of steps.
        is_fixed = name == "steps" and new["schedule"] == "cosine"
        may_change = name in _MAY_CHANGE or name.partition(".")[0] in _MAY_CHANGE
        if (is_fixed or not may_change) and before.get(name) != after.get(name):
            yield name


def _flatten(recipe: dict[str, Any]) -> dict[str, Any]:
    """Options by their path, such as data.resolution."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in _flatten(value).items()}
        elif value is not None:
            flat[name] = value
    return flat


def checkpoints(out: Path) -> list[Path]:
    """The folders of the checkpoints, oldest first."""
    folders = (out / "state").glob("*/") if (out / "state").is_dir() else ()
    return sorted((path for path in folders if path.name.isdecimal()), key=lambda p: int(p.name))


def write_state(out: Path, state: TrainingState) -> None:
    """Save a checkpoint, complete or not at all, and delete the oldest."""
    names = {id(parameter): name for name, parameter in state.parameters.items()}
    moments = {
        f"{names[id(parameter)]}:{key}": value.contiguous()
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }
    weights = {name: value.detach().contiguous() for name, value in state.parameters.items()}
    with replace_dir(out / "state" / f"{state.step:08}") as draft:
        save_file(weights, draft / "weights.safetensors")
        save_file(state.average, draft / "average.safetensors")
        save_file(moments, draft / "optimizer.safetensors")
        facts = {"done": state.step, "data": state.data}
        (draft / "state.json").write_text(json.dumps(facts) + "\n")
    for old in checkpoints(out)[:-KEPT]:
        shutil.rmtree(old)


def read_state(folder: Path, state: TrainingState) -> None:
    """Load the checkpoint `folder` into `state`.

    Raises `RunError` if it is damaged, or was trained on data other than `state.data`.
    """
    try:
        weights = load_file(folder / "weights.safetensors")
        average = load_file(folder / "average.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        facts = json.loads((folder / "state.json").read_text())
        step, data = facts["done"], facts["data"]
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                parameter.copy_(weights[name])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{folder} is damaged: {error}; remove it to resume from the one before"
        ) from error
    if data != state.data:
        raise RunError(
            f"{folder.parent.parent} was trained on other data, or with another encoder or "
            "VAE; choose a new folder, or restore the old ones. To continue training on new data, "
            "set the recipe's model.model to the old folder's model/"
        )
    state.step = step
    # In the order of the parameters, not of the file: the two are averaged pair by pair.
    state.average = {
        name: average[name].to(parameter.device)
        for name, parameter in state.parameters.items()
        if name in average
    }
    for key, value in moments.items():
        name, _, moment = key.rpartition(":")
        parameter = state.parameters[name]
        state.optimizer.state[parameter][moment] = value.to(parameter.device)


@contextmanager
def replace_dir(folder: Path) -> Iterator[Path]:
    """`atomic_dir` that replaces `folder`. Raises `RunError` if it cannot be written."""
    try:
        with atomic_dir(folder, replace=True) as draft:
            yield draft
    except (OSError, SafetensorError) as error:  # a full disk raises either
        raise RunError(f"{folder} cannot be written: {error}; the old one is kept") from error
