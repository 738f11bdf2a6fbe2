"""Parse YAML to plain values with the location of each, and apply command-line overrides."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import yaml

from reasonpix.errors import RecipeError

Path = tuple[str | int, ...]
"""The keys and positions that lead to a value."""


class SourceMap(dict[Path, str]):
    """The location of each value: `file:line:column`, or the `--set` that gave it."""

    def nearest(self, path: Path) -> str:
        """The location of a value, or of the nearest value that contains it."""
        while path and path not in self:
            path = path[:-1]
        return self[path]

    def into(self, problems: list[str]) -> Callable[[Path, str], None]:
        """A function that appends a mistake at a path to `problems`, with its location."""

        def complain(path: Path, what: str) -> None:
            dotted = ".".join(map(str, path))
            problems.append(f"{self.nearest(path)}: {f'{dotted}: ' if dotted else ''}{what}")

        return complain


def read(path: pathlib.Path) -> tuple[dict[str, Any], SourceMap]:
    """Parse a YAML file; see `parse`. Raises `RecipeError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: cannot read the recipe: {error}"]) from error
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], SourceMap]:
    """Parse YAML to plain values and their locations.

    Raises `RecipeError`, also for repeated keys.
    """
    marks = SourceMap({(): f"{name}:1:1"})
    problems: list[str] = []

    def walk(node: yaml.Node, path: Path) -> Any:
        marks[path] = f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        if isinstance(node, yaml.SequenceNode):
            return [walk(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                mark = key_node.start_mark
                here = f"{name}:{mark.line + 1}:{mark.column + 1}"
                if key in values:
                    problems.append(f"{here}: {'.'.join(map(str, (*path, key)))}: given twice")
                values[key] = walk(value_node, (*path, key))
                marks[(*path, key)] = here
            return values
        try:
            return scalars.construct_object(node)
        except ValueError as error:  # such as the 30th of February
            problems.append(f"{marks[path]}: not valid YAML: {error}")
            return None

    scalars = yaml.SafeLoader("")
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        data = walk(root, ()) if root else {}
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        where = f"{name}:{at.line + 1}:{at.column + 1}" if at else name
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError([f"{where}: not valid YAML: {what}"]) from error
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise RecipeError([f"{name}: not valid YAML: {what}"]) from error
    except RecursionError as error:
        raise RecipeError([f"{name}: nested too deeply"]) from error
    if not isinstance(data, dict):
        problems.append(f"{name}:1:1: a recipe is a mapping, got {data!r}")
    if problems:
        raise RecipeError(problems)
    return data, marks


def override_value(
    data: dict[str, Any], marks: SourceMap, override: str, problems: list[str]
) -> None:
    """Apply the override `a.b=value` to `data`; a component's short form becomes a block."""
    path, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals or not path:
        problems.append(f"{where}: expected key=value, such as seed=1 or pipeline.planner.model=x")
        return
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        what = getattr(error, "problem", error)
        problems.append(f"{where}: the value is not valid YAML: {what}")
        return
    keys: Path = ()
    target: Any = data
    steps = path.split(".")
    for step in steps:
        is_entry = isinstance(target, list) and step.isdigit() and int(step) < len(target)
        key: str | int = int(step) if is_entry else step
        keys = (*keys, key)
        if not is_entry and not isinstance(target, dict):
            problems.append(f"{where}: there is no {'.'.join(map(str, keys))}")
            return
        if len(keys) == len(steps):
            break
        if not is_entry and key not in target:
            target[key] = {}
            marks[keys] = where
        if isinstance(target[key], str):
            target[key] = {"use": target[key]}
        target = target[key]
    target[key] = value
    for below in [place for place in marks if place[: len(keys)] == keys]:
        del marks[below]
    marks[keys] = where
