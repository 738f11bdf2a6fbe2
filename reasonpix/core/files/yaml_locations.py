"""Parse YAML to plain values with the location of each, and apply command-line overrides."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import yaml

from reasonpix.core.files.encodings import read_text
from reasonpix.errors import RecipeError

ANCHORS = "x-"
"""What top-level keys begin with that only hold anchors."""

_MERGE = "tag:yaml.org,2002:merge"
_MAX_VALUES = 100_000

_Entries = dict[str, tuple[yaml.Node, yaml.Node]]

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
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise RecipeError([f"{path}: cannot read the recipe: {error}"]) from error
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], SourceMap]:
    """Parse YAML to plain values and their locations: for merged keys (`<<:`), in their anchor.

    Top-level keys that begin with `x-` only hold anchors, and are left out. Raises `RecipeError`,
    also for repeated keys.
    """
    document = _Document(name)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        data = document.value(root, ()) if root else {}
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
    problems = [what for _, what in sorted(document.problems.items())]
    if not isinstance(data, dict):
        problems.append(f"{name}:1:1: a recipe is a mapping, got {data!r}")
    if problems:
        raise RecipeError(problems)
    plain = {key: value for key, value in data.items() if not key.startswith(ANCHORS)}
    return plain, document.marks


class _Document:
    """A YAML document while its nodes are turned into values."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._scalars = yaml.SafeLoader("")
        self._count = 0
        self.marks = SourceMap({(): f"{name}:1:1"})
        self.problems: dict[tuple[int, int], str] = {}
        """By line and column: an anchor that is merged several times repeats its mistakes."""

    def value(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node; its locations are kept in `marks`."""
        self._count_node()
        self.marks[path] = self._place(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key, (key_node, value_node) in self._entries(node, path).items():
                values[key] = self.value(value_node, (*path, key))
                self.marks[(*path, key)] = self._place(key_node)
            return values
        try:
            return self._scalars.construct_object(node)
        except ValueError as error:  # such as the 30th of February
            self._complain(node, f"not valid YAML: {error}")
            return None

    def _entries(self, node: yaml.MappingNode, path: Path) -> _Entries:
        """The key and value nodes of a mapping: its own, then those that it merges."""
        self._count_node()
        entries: _Entries = {}
        merged: yaml.Node | None = None
        for key_node, value_node in node.value:
            key = str(key_node.value)
            is_merge = key_node.tag == _MERGE
            if key in entries or (is_merge and merged is not None):
                dotted = ".".join(map(str, (*path, key)))
                self._complain(key_node, f"{dotted}: given twice")
            if is_merge:
                merged = value_node
            else:
                entries[key] = (key_node, value_node)
        if merged is not None:
            for other in merged.value if isinstance(merged, yaml.SequenceNode) else [merged]:
                if isinstance(other, yaml.MappingNode):
                    entries = self._entries(other, path) | entries
                else:
                    what = "<<: expected a mapping such as *name, or a list of them"
                    self._complain(other, what)
        return entries

    def _count_node(self) -> None:
        self._count += 1
        if self._count > _MAX_VALUES:  # a few lines of anchors can stand for billions
            raise RecipeError([f"{self._name}: its anchors give more than {_MAX_VALUES} values"])

    def _place(self, node: yaml.Node) -> str:
        return f"{self._name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _complain(self, node: yaml.Node, what: str) -> None:
        at = (node.start_mark.line, node.start_mark.column)
        self.problems.setdefault(at, f"{self._place(node)}: {what}")


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
