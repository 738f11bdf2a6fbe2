"""Find recipes and the command each is for. `mini/part3` is the name of recipes/mini/part3.yaml."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from reasonpix.core.files import yaml_locations
from reasonpix.core.files.encodings import read_text
from reasonpix.errors import RecipeError
from reasonpix.plugin.registry import nearest

Command = Literal["generate", "train", "evaluate"]
"""The commands that take a recipe; each has its own form."""

Overrides = Sequence[str] | Mapping[str, Any]
"""Changes to a recipe: `["seed=1"]`, where values are YAML, or `{"seed": 1}`. Keys are dotted."""


def _folder() -> Path:
    here = Path(__file__).parent.parent
    installed = here / "shipped_recipes"
    # In a checkout the recipes are beside the package.
    return installed if installed.is_dir() else here.parent / "recipes"


def shipped() -> dict[str, Path]:
    """All shipped recipes by name, sorted."""
    folder = _folder()
    paths = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def locate(recipe: str | Path) -> Path:
    """The file of a recipe given by path, or by the name of a shipped one."""
    path = Path(recipe)
    if path.is_file():
        return path
    name = str(recipe).removesuffix(".yaml").removeprefix("recipes/")
    if name in shipped():
        return shipped()[name]
    raise RecipeError([f"{recipe}: no such file, and no shipped recipe{nearest(name, shipped())}"])


def command_of(path: Path) -> Command:
    """The command that a recipe is for, by its blocks. Raises `RecipeError`."""
    return _command(yaml_locations.read(path)[0]) or "generate"


def _command(recipe: Mapping[str, Any]) -> Command | None:
    """By the blocks that there are, even where one is missing yet; None for none of them."""
    blocks = set(recipe)
    if {"benchmark", "methods"} & blocks:
        return "evaluate"
    if {"source", "pipeline"} & blocks:
        return "generate"
    return "train" if {"data", "encoder"} & blocks else None


def read(
    recipe: str | Path, command: Command, overrides: Overrides = ()
) -> tuple[dict[str, Any], yaml_locations.SourceMap, list[str]]:
    """A recipe for `command` as plain values, the location of each, and errors in the overrides.

    Raises `RecipeError` if there is no such file or recipe, or if it is for another command.
    """
    path = locate(recipe)
    data, marks = yaml_locations.read(path)
    if (other := _command(data)) not in (None, command):
        raise RecipeError([f"{path} is a recipe for `reasonpix {other}`, not for `{command}`"])
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    elif isinstance(overrides, str):  # a string is a sequence of strings too
        overrides = [overrides]
    problems: list[str] = []
    for override in overrides:
        yaml_locations.override_value(data, marks, override, problems)
    return data, marks, problems


def schema_head() -> dict[str, Any]:
    """What the JSON schemas of all recipes begin with."""
    anchors = {"description": "Anchors for other values (`<<: *name`)"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "patternProperties": {f"^{yaml_locations.ANCHORS}": anchors},
    }


def summary(path: Path) -> str:
    """The first comment line of a recipe."""
    first = read_text(path).split("\n", 1)[0]
    return first.removeprefix("#").strip()
