"""Recipes: YAML that names a component for each slot. All mistakes are found at once, located."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reasonpix import plugins
from reasonpix.errors import PluginError, RecipeError
from reasonpix.slots import Options

PIPELINE = ("captioner", "extractor", "grounder", "planner", "editor")
"""The slots of a pipeline, in the order of the data."""


@dataclass(frozen=True)
class Use:
    """A component as a recipe names it: `options` are checked against its model."""

    slot: str
    name: str
    options: Options

    def as_yaml(self) -> dict[str, Any]:
        """The block that gives this use again, defaults included."""
        fields = type(self.options).model_fields
        options = {
            name: value
            for name, value in self.options.model_dump(mode="json").items()
            if value is not None or fields[name].default is not None
        }
        return {"use": self.name, **options}


@dataclass(frozen=True)
class Recipe:
    """What `reasonpix generate` does: a source, a component for each slot, and filters.

    `captioner` is None when the source itself gives captions (Part II).
    """

    seed: int
    shard_size: int
    source: Use
    captioner: Use | None
    extractor: Use
    grounder: Use
    planner: Use
    editor: Use
    filters: tuple[Use, ...]

    @property
    def uses(self) -> Iterator[Use]:
        """All components named, in the order of the data."""
        yield self.source
        yield from (use for slot in PIPELINE if (use := getattr(self, slot)) is not None)
        yield from self.filters

    def as_yaml(self) -> str:
        """The resolved recipe: every option spelled out, and the packages it ran with."""
        packages = sorted({_package(use.name) for use in self.uses})
        body = {
            "seed": self.seed,
            "shard_size": self.shard_size,
            "source": self.source.as_yaml(),
            "pipeline": {
                slot: use.as_yaml() for slot in PIPELINE if (use := getattr(self, slot)) is not None
            },
            "filters": [use.as_yaml() for use in self.filters],
        }
        head = "".join(f"# {package}\n" for package in packages)
        return head + yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


def _package(plugin: str) -> str:
    dist = plugins.entry(plugin).dist
    return f"{dist.name} {dist.version}" if dist else "?"


class _Pipeline(BaseModel):
    """The component of each slot, by name or as a block with `use:` and options."""

    model_config = ConfigDict(extra="forbid")

    captioner: Any = Field(None, description="Left out when the source gives captions")
    extractor: Any = Field(description="Candidate categories from a caption (Eq. 4)")
    grounder: Any = Field(description="Boxes for categories (Eq. 5)")
    planner: Any = Field(description="Selected category, target and instruction (Eq. 6)")
    editor: Any = Field(description="Object replacement (Eq. 7)")


class _Document(BaseModel):
    """A recipe for `reasonpix generate`."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(0, ge=0, description="Every random choice follows from it")
    shard_size: int = Field(32, ge=1, description="Records computed and stored together")
    source: Any = Field(description="Where input images come from")
    pipeline: _Pipeline
    filters: list[Any] = Field([], description="What to reject, by stored scores")


_Path = tuple[str | int, ...]


class _Marks(dict[_Path, str]):
    """Where each value stands: `file:line:column`, or the `--set` that gave it."""

    def nearest(self, path: _Path) -> str:
        while path and path not in self:
            path = path[:-1]
        return self[path]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are `a.b=value` (value is YAML) and win over the file.

    Raises `RecipeError` with every problem found, each as `file:line:column: path: what`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: cannot read the recipe: {error}"]) from error
    data, marks = _parse(text, str(path))
    problems: list[str] = []
    for override in overrides:
        _override(data, marks, override, problems)

    def complain(where: _Path, what: str) -> None:
        dotted = ".".join(map(str, where))
        problems.append(f"{marks.nearest(where)}: {f'{dotted}: ' if dotted else ''}{what}")

    document = _check(_Document, data, (), complain)
    uses: dict[str, Use | None] = dict.fromkeys(PIPELINE)
    if "source" in data:
        uses["source"] = _use("source", data["source"], ("source",), complain)
    pipeline = data.get("pipeline")
    named = pipeline if isinstance(pipeline, dict) else {}
    for slot in PIPELINE:
        if slot in named and not (slot == "captioner" and named[slot] is None):
            uses[slot] = _use(slot, named[slot], ("pipeline", slot), complain)
    listed = data.get("filters")
    filters = [
        _use("filter", value, ("filters", i), complain)
        for i, value in enumerate(listed if isinstance(listed, list) else [])
    ]
    seen: set[str] = set()
    for i, use in enumerate(filters):
        if use and use.name in seen:
            complain(("filters", i), f"filter {use.name!r} stands here twice; keep one")
        seen.add(use.name if use else "")
        needs = getattr(plugins.find("filter", use.name), "uses", ()) if use else ()
        for slot in sorted(slot for slot in needs if named.get(slot) is None):
            complain(("filters", i), f"it needs the pipeline's {slot}, and there is none")
    if problems or document is None:
        raise RecipeError(problems)
    return Recipe(
        seed=document.seed,
        shard_size=document.shard_size,
        filters=tuple(use for use in filters if use),
        **uses,  # type: ignore[arg-type]
    )


def _check(model: type[Any], data: Any, at: _Path, complain: Any) -> Any:
    """`data` as a `model`, or None after complaining of each error at its place."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for detail in error.errors():
            where = at + tuple(detail["loc"])
            if detail["type"] == "extra_forbidden":
                fields = _fields(model, tuple(detail["loc"]))
                complain(where, f"no such option{plugins.nearest(str(where[-1]), fields)}")
            elif detail["type"] == "missing":
                entry = "entry " if isinstance(where[-1], int) else ""
                complain(where[:-1], f"{entry}{where[-1]!r} is missing")
            elif detail["type"] == "model_type":
                complain(where, f"expected a mapping, got {detail['input']!r}")
            else:
                # What a validator of ours raised is told in its own words.
                what = str(detail.get("ctx", {}).get("error", _lowered(detail["msg"])))
                complain(where, f"{what}, got {detail['input']!r}")
    return None


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def _fields(model: type[BaseModel], path: _Path) -> list[str]:
    for name in path[:-1]:
        field = model.model_fields.get(str(name))
        if field is None or not isinstance(field.annotation, type):
            break
        model = field.annotation
    return list(model.model_fields)


def _use(slot: str, value: Any, at: _Path, complain: Any) -> Use | None:
    """The component that a recipe's value names, or None after complaining."""
    if isinstance(value, str):
        value = {"use": value}
    if not isinstance(value, dict) or not isinstance(value.get("use"), str):
        complain(at, f"expected a plugin's name, or a mapping with 'use:', got {value!r}")
        return None
    options = {key: option for key, option in value.items() if key != "use"}
    try:
        component = plugins.find(slot, value["use"])
    except PluginError as error:
        complain((*at, "use"), str(error))
        return None
    checked = _check(component.Options, options, at, complain)
    if checked is None:
        return None
    try:
        if isinstance(model := getattr(checked, "model", None), str):
            plugins.checkpoint(model)
    except PluginError as error:
        complain((*at, "model"), str(error))
        return None
    return Use(slot, value["use"], checked)


def _parse(text: str, name: str) -> tuple[dict[str, Any], _Marks]:
    """YAML as plain values, with the place of each. Keys given twice are errors."""
    marks = _Marks({(): f"{name}:1:1"})
    problems: list[str] = []

    def walk(node: yaml.Node, path: _Path) -> Any:
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


def _override(data: dict[str, Any], marks: _Marks, override: str, problems: list[str]) -> None:
    """Put the value of `a.b=value` into `data`; a component's short form grows into a block."""
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
    keys: _Path = ()
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


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, with the options of all installed plugins."""
    document = _Document.model_json_schema()
    pipeline = document.pop("$defs")["_Pipeline"]
    definitions: dict[str, Any] = {}
    for slot in ("source", *PIPELINE, "filter"):
        definitions |= _slot_schemas(slot)
    for slot in PIPELINE:
        pipeline["properties"][slot] |= {"$ref": f"#/$defs/{slot}"}
        pipeline["properties"][slot].pop("default", None)
    properties = document["properties"]
    properties["pipeline"] = pipeline
    properties["source"] |= {"$ref": "#/$defs/source"}
    properties["filters"]["items"] = {"$ref": "#/$defs/filter"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **document,
        "title": "reasonpix recipe",
        "$defs": definitions,
    }


def _slot_schemas(slot: str) -> dict[str, Any]:
    """Definitions: of `slot`, by a plugin's name or as a block, and of each plugin's block."""
    blocks: dict[str, Any] = {}
    short: list[str] = []
    for name in plugins.names():
        try:
            component = plugins.offers(name).get(slot)
        except PluginError:
            continue  # a broken plugin that nobody asked for hurts nobody
        if component is None:
            continue
        title = f"{slot}-{name}"
        block = component.Options.model_json_schema(ref_template=f"#/$defs/{title}/$defs/{{model}}")
        if not block.get("required"):
            short.append(name)
        block["properties"] = {"use": {"const": name}} | block.get("properties", {})
        block["required"] = ["use", *block.get("required", [])]
        blocks[title] = block | {"title": f"{slot} {name}"}
    choices = [{"enum": short}, *({"$ref": f"#/$defs/{title}"} for title in blocks)]
    return {slot: {"anyOf": choices}} | blocks
