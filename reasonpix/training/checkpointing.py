"""What a training run keeps on disk to go on from: `state/<steps done>/`, safetensors all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reasonpix.core.atomic import atomic_dir, write_atomically
from reasonpix.errors import RunError
from reasonpix.training.recipe import TrainingRecipe

KEPT = 2
"""Checkpoints on disk: the newest, and the one before it should that one be damaged."""

_FREE = {
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
"""What may change when a run goes on: nothing of what it has learnt so far depends on it."""


@dataclass
class State:
    """What changes from step to step."""

    done: int
    """Optimizer steps, those of alignment among them."""
    named: dict[str, nn.Parameter]
    """The trained weights by name."""
    average: dict[str, Tensor]
    """Their averages; empty during alignment."""
    optimizer: torch.optim.Optimizer
    data: str
    """Digest of the examples that are trained on."""


def claim(recipe: TrainingRecipe, out: Path) -> None:
    """Make `out` the folder of a run of `recipe`.

    Raises `RunError` when it holds something else, or the run of another recipe.
    """
    text, file = recipe.as_yaml(), out / "recipe.yaml"
    if file.exists() or any(path.name != "holder" for path in out.iterdir()):
        known = _read_recipe(file)
        if known is None:
            raise RunError(f"{out} is not empty, and no folder of a training run; name another")
        # What failed before its first checkpoint has learnt nothing that a change could spoil.
        given = _differences(known, yaml.safe_load(text)) if checkpoints(out) else ()
        fingerprint_exclude = {
            f"encoder.{name}" for name in recipe.encoder.options.fingerprint_exclude
        }
        fingerprint_exclude |= {"model.cache_dir"}
        different = sorted(set(given) - fingerprint_exclude)
        if different:
            raise RunError(
                f"{out} was trained by a recipe that differs in {', '.join(different)}; name a new "
                "folder, or give the old values"
            )
        total = recipe.steps + (recipe.align.steps if recipe.align else 0)
        if checkpoints(out) and int(checkpoints(out)[-1].name) > total:
            raise RunError(
                f"{out} was trained for {int(checkpoints(out)[-1].name)} steps already, and the "
                f"recipe asks for {total}; name a new folder, or give as many steps or more"
            )
    write_atomically(out / "recipe.yaml", text.encode())


def _read_recipe(file: Path) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) and {"data", "encoder", "model"} <= set(found) else None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before, after = _flat(old), _flat(new)
    for name in before.keys() | after.keys():
        # A cosine that ends elsewhere was another one all along.
        bound = name == "steps" and new["schedule"] == "cosine"
        if not bound and (name in _FREE or name.partition(".")[0] in _FREE):
            continue
        if before.get(name) != after.get(name):
            yield name


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """With options of blocks by their paths, such as data.resolution."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in _flat(value).items()}
        elif value is not None:
            flat[name] = value
    return flat


def checkpoints(out: Path) -> list[Path]:
    """The folders of the checkpoints, oldest first."""
    found = (out / "state").glob("*/") if (out / "state").is_dir() else ()
    return sorted((path for path in found if path.name.isdecimal()), key=lambda p: int(p.name))


def write_state(out: Path, state: State) -> None:
    """Keep `state`; it appears as a whole, and the oldest checkpoint goes."""
    place = {id(parameter): name for name, parameter in state.named.items()}
    moments = {
        f"{place[id(parameter)]}:{key}": value.contiguous()
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }
    with replace_dir(out / "state" / f"{state.done:08}") as draft:
        weights = {name: value.detach().contiguous() for name, value in state.named.items()}
        save_file(weights, draft / "weights.safetensors")
        save_file(state.average, draft / "average.safetensors")
        save_file(moments, draft / "optimizer.safetensors")
        (draft / "state.json").write_text(
            json.dumps({"done": state.done, "data": state.data}) + "\n"
        )
    for old in checkpoints(out)[:-KEPT]:
        shutil.rmtree(old)


def read_state(folder: Path, state: State) -> None:
    """Fill `state` with what `folder` holds. Raises `RunError` when it is damaged."""
    try:
        weights = load_file(folder / "weights.safetensors")
        average = load_file(folder / "average.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        facts = json.loads((folder / "state.json").read_text())
        done, data = facts["done"], facts["data"]
        with torch.no_grad():
            for name, parameter in state.named.items():
                parameter.copy_(weights[name])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{folder} is damaged: {error}; remove it, and training goes on from the one before"
        ) from error
    if data != state.data:
        raise RunError(
            f"{folder.parent.parent} was trained on other data, or with another encoder or "
            "VAE, than there is now; name a new folder, or give the old ones. To train what was "
            "learnt on new data, name its model/ as the recipe's model"
        )
    state.done = done
    # In the order of the weights, which is not that of the file: they are averaged pair by pair.
    state.average = {
        name: average[name].to(parameter.device)
        for name, parameter in state.named.items()
        if name in average
    }
    for key, value in moments.items():
        name, _, moment = key.rpartition(":")
        parameter = state.named[name]
        state.optimizer.state[parameter][moment] = value.to(parameter.device)


@contextmanager
def replace_dir(folder: Path) -> Iterator[Path]:
    """`atomic_dir` that replaces `folder`. Raises `RunError` when it cannot be written."""
    try:
        with atomic_dir(folder, replace=True) as draft:
            yield draft
    except (OSError, SafetensorError) as error:  # a full disk raises either
        raise RunError(f"{folder} cannot be written: {error}; the old one is kept") from error
