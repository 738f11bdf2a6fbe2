"""Recipes: YAML that names a component for each slot. All mistakes are found at once, located."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field

from reasonpix.core.files import yaml_locations
from reasonpix.errors import PluginError, RecipeError
from reasonpix.generation import recipe_catalog
from reasonpix.generation.chains import CHAINS, chain_of, declared, slots_of
from reasonpix.generation.resources import Resources
from reasonpix.plugin import registry
from reasonpix.plugin.components import Planner, PlannerTask, Scorer, Source
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.spec import Complain, ComponentSpec, check, read_spec, slot_schemas
from reasonpix.plugin.stages import Part, StageSpec

_PART_SETTINGS = ("candidates", "selection_orders")
"""Settings that only some parts have."""


@dataclass(frozen=True)
class Recipe:
    """What `reasonpix generate` does: a source, a component for each slot, and filters.

    `part: replace` makes new edits: Part III, or Part II when the source gives the captions.
    `part: rewrite` rewrites the instructions of edits that the source gives: Part I.
    """

    part: Part
    seed: int
    shard_size: int
    candidates: int
    selection_orders: int
    source: ComponentSpec
    pipeline: Mapping[str, ComponentSpec]
    """By slot; slots that the recipe leaves empty are missing."""
    filters: tuple[ComponentSpec, ...]
    resources: Mapping[str, Resources] = field(default_factory=dict)
    """By the stage's name."""

    @property
    def chain(self) -> tuple[StageSpec, ...]:
        """The stages in the order of the data, without those of the filters."""
        return chain_of(self.part, self.pipeline)

    @property
    def settings(self) -> Mapping[str, int]:
        """What a `StageSpec` may name as its settings."""
        return {
            "run_seed": self.seed,
            "candidates": self.candidates,
            "selection_orders": self.selection_orders,
        }

    @property
    def uses(self) -> Iterator[ComponentSpec]:
        """All components, in the order of the data."""
        yield self.source
        yield from self.pipeline.values()
        yield from self.filters

    def component(self, slot: str) -> ComponentSpec | None:
        """The component in a slot, if there is one."""
        return self.source if slot == "source" else self.pipeline.get(slot)

    def as_yaml(self) -> str:
        """The resolved recipe: every option spelled out, and the packages it ran with."""
        packages = {use.package for use in self.uses} | {
            package for slot in self.pipeline if (package := registry.slot_package(slot))
        }
        body = {
            "part": self.part,
            "seed": self.seed,
            "shard_size": self.shard_size,
            **{name: self.settings[name] for name in _settings_of(self.chain)},
            "source": self.source.as_yaml(),
            "pipeline": {slot: use.as_yaml() for slot, use in self.pipeline.items()},
            "filters": [use.as_yaml() for use in self.filters],
        }
        if self.resources:
            body["resources"] = {
                name: resources.model_dump(exclude_defaults=True)
                for name, resources in self.resources.items()
            }
        head = "".join(f"# {package}\n" for package in sorted(packages))
        return head + yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


def _settings_of(chain: Sequence[StageSpec]) -> list[str]:
    return [name for name in _PART_SETTINGS if any(name in spec.settings for spec in chain)]


class _Document(BaseModel):
    """A recipe for `reasonpix generate`."""

    model_config = ConfigDict(extra="forbid")

    part: Part = Field(
        "replace",
        description="replace makes edits (Parts II and III); rewrite rewrites the instructions of "
        "edits that the source gives (Part I)",
    )
    seed: int = Field(0, ge=0, description="Every random choice depends on it")
    shard_size: int = Field(32, ge=1, description="Records computed and stored together")
    candidates: int = Field(
        4, ge=1, description="n of Eq. 2: instructions to choose from, with part: rewrite"
    )
    selection_orders: int = Field(
        2,
        ge=1,
        description="Times P_select is asked (Eq. 3), each time with the candidates in another "
        "order, with part: rewrite",
    )
    source: Any = Field(description="Where input images come from")
    pipeline: dict[str, Any] = Field(
        description="The component of each slot, by name or as a block with `use:` and options"
    )
    filters: list[Any] = Field([], description="What to reject, by stored scores")
    resources: dict[str, Resources] = Field(
        {}, description="What a stage takes of a machine, by its name, such as caption"
    )


def load_recipe(path: str | Path, overrides: recipe_catalog.Overrides = ()) -> Recipe:
    """Read and check a recipe, given as a file or by the name of a shipped one.

    `overrides` win over the file: `["seed=1"]`, with values in YAML, or `{"seed": 1}`. Raises
    `RecipeError` with every problem found, each as `file:line:column: path: problem`.
    """
    data, marks, problems = recipe_catalog.read(path, "generate", overrides)
    complain = marks.into(problems)
    document = check(_Document, data, (), complain)
    source = (
        read_spec("source", data["source"], ("source",), complain) if "source" in data else None
    )
    listed = data.get("filters")
    block = data.get("pipeline")
    pipeline = _Pipeline(data.get("part", "replace"), block if isinstance(block, dict) else {})
    pipeline.read(complain)
    filters = [
        read_spec("filter", value, ("filters", i), complain)
        for i, value in enumerate(listed if isinstance(listed, list) else [])
    ]
    if isinstance(block, dict) and pipeline.part in CHAINS:
        pipeline.check_stages(complain)
        if pipeline.chain:  # else nothing is known about what the stages provide
            pipeline.check_requirements(complain)
            _check_settings(data, document, pipeline, complain)
        if pipeline.chain and source is not None:
            _check_source(source, pipeline, complain)
        if pipeline.chain:
            _check_filters(data, pipeline, filters, complain)
            _check_resources(data.get("resources"), pipeline, filters, complain)
    if problems or document is None or source is None:
        raise RecipeError(problems)
    return Recipe(
        part=document.part,
        seed=document.seed,
        shard_size=document.shard_size,
        candidates=document.candidates,
        selection_orders=document.selection_orders,
        source=source,
        pipeline={slot: use for slot, use in pipeline.uses.items() if use},
        filters=tuple(use for use in filters if use),
        resources=document.resources,
    )


class _Pipeline:
    """The block `pipeline:` while it is checked."""

    def __init__(self, part: Any, block: dict[str, Any]) -> None:
        # A list or a mapping cannot be looked up; `check` complains of it.
        self.part = cast(Part, part if isinstance(part, str) else "")
        self.block = block
        self.uses: dict[str, ComponentSpec | None] = {}
        """By slot that the recipe fills; None where what it names is wrong."""
        self.chain: tuple[StageSpec, ...] = ()
        self.required = {
            spec.slot: None
            for spec in CHAINS.get(self.part, ())
            if spec.if_empty == "refuse" and spec.slot != "source"
        }

    def read(self, complain: Complain) -> None:
        """Read the component of each slot."""
        slots = [name for name, spec in registry.slots().items() if spec.in_pipeline]
        for slot in self.block:
            if slot not in slots:
                complain(("pipeline", slot), _unknown_slot(str(slot), slots))
        for slot in slots:
            value = self.block.get(slot)
            # An empty slot is left out, unless the part needs it.
            if value is not None or (slot in self.block and slot in self.required):
                self.uses[slot] = read_spec(slot, value, ("pipeline", slot), complain)

    def check_stages(self, complain: Complain) -> None:
        """Check that the slots are those of the part, and that planners can do their tasks."""
        for slot in self.required:
            if slot not in self.block:
                complain(("pipeline",), f"{slot!r} is missing; `part: {self.part}` needs it")
        for slot in sorted(set(self.uses) - slots_of(self.part)):
            complain(
                ("pipeline", slot), f"`part: {self.part}` has no {slot}; remove it, or change part"
            )
        try:
            self.chain = chain_of(self.part, self.uses)
        except PluginError as error:
            complain(("pipeline",), str(error))
        tasks = [(slot, task) for slot in self.uses if (task := registry.slot(slot).task)]
        tasks += [(spec.slot, spec.task) for spec in self.chain if spec.task]
        for slot, task in tasks:
            if (use := self.uses.get(slot)) is not None:
                self._check_task(use, task, complain)

    def check_requirements(self, complain: Complain) -> None:
        """Check that the stages and slots that components require are there."""
        for slot, use in self.uses.items():
            if use is None:
                continue
            before = (spec.name for spec in takewhile(lambda s: s.slot != slot, self.chain))  # noqa: B023
            required = registry.find(slot, use.name).requires
            self.complain_of_missing(
                required - set(before) - set(self.uses), ("pipeline", slot), complain
            )

    def complain_of_missing(
        self, names: Iterable[str], at: yaml_locations.Path, complain: Complain
    ) -> None:
        """Say of stages, slots and fields that a component needs how to provide them."""
        by_remedy: dict[str, list[str]] = {}
        for name in sorted(names):
            by_remedy.setdefault(self._remedy(name), []).append(name)
        for remedy, missing in by_remedy.items():
            complain(at, f"it needs {', '.join(missing)}{remedy}")

    def _remedy(self, name: str) -> str:
        spec = declared(name)
        slot = spec.slot if spec else name
        if slot in slots_of(self.part) - set(self.uses):
            return f"; add `{slot}:` under `pipeline:`"
        if spec in self.chain:
            return ", which comes too late"
        if spec or slot in registry.slots() or name in Edit.__dataclass_fields__:
            return f", which `part: {self.part}` does not provide"
        hint = "plugins can add stages: is the package that adds it installed?"
        return f", which is unknown{registry.nearest(name, [s.name for s in self.chain])} ({hint})"

    def _check_task(self, use: ComponentSpec, task: PlannerTask, complain: Complain) -> None:
        planner = registry.find(use.slot, use.name)
        assert issubclass(planner, Planner)
        if not planner.can(task):
            complain(("pipeline", use.slot), f"{use.name!r} does not {task}; name another planner")


def _unknown_slot(name: str, slots: Sequence[str]) -> str:
    """Why a key of the pipeline is not a slot."""
    try:
        registry.slot(name)  # raises for a broken plugin
    except PluginError as error:
        if name in registry.added_slots():
            return str(error)
    hint = "plugins can add slots: is the package that adds it installed?"
    return f"no such slot{registry.nearest(name, slots)} ({hint})"


def _check_settings(
    data: dict[str, Any], document: _Document | None, pipeline: _Pipeline, complain: Complain
) -> None:
    """Check the settings that only some parts have."""
    settings = _settings_of(pipeline.chain)
    for key in _PART_SETTINGS:
        if key in data and key not in settings:
            complain((key,), f"`part: {pipeline.part}` has no such setting; remove it")
    if settings and document and document.selection_orders > document.candidates:
        complain(
            ("selection_orders",) if "selection_orders" in data else ("candidates",),
            f"there can be no more orders ({document.selection_orders}) than candidates "
            f"({document.candidates})",
        )


def _check_source(use: ComponentSpec, pipeline: _Pipeline, complain: Complain) -> None:
    """Check that the source gives the pairs and the captions that nothing else provides."""
    source = use.build()
    assert isinstance(source, Source)
    if pipeline.part == "rewrite" and not source.gives_pairs:
        complain(
            ("source",),
            f"{use.name!r} gives no edited images, and `part: rewrite` makes none; "
            "let the source give pairs, or set part: replace",
        )
    elif pipeline.part == "rewrite" and not source.gives_captions:
        complain(
            ("source",),
            f"{use.name!r} gives pairs without captions, and `part: rewrite` needs those of both "
            "images; name their columns, or use a source with captions",
        )
    elif not source.gives_captions and "captioner" not in pipeline.uses:
        what = "gives no captions, and nothing else does; add `captioner:` under `pipeline:`"
        complain(("source",), f"{use.name!r} {what}")


def _check_filters(
    data: dict[str, Any],
    pipeline: _Pipeline,
    filters: Sequence[ComponentSpec | None],
    complain: Complain,
) -> None:
    """Check that each filter is there once, and that the pipeline provides what it needs."""
    shown = {name for spec in pipeline.chain for name in (spec.name, *spec.shows)}
    names: set[str] = set()
    for i, use in enumerate(filters):
        if use is None:
            continue
        at = ("filters", i)
        if use.name in names:
            complain(at, f"filter {use.name!r} is listed twice; keep one")
        names.add(use.name)
        scorer = registry.find("filter", use.name)
        assert issubclass(scorer, Scorer)
        missing = scorer.requires - shown
        pipeline.complain_of_missing(
            missing | (scorer.needs_slots - set(pipeline.uses)), at, complain
        )
        if not missing and "agreement" in scorer.requires and data.get("selection_orders") == 1:
            complain(at, "it needs P_select to be asked in several orders; set selection_orders: 2")


def _check_resources(
    resources: Any,
    pipeline: _Pipeline,
    filters: Sequence[ComponentSpec | None],
    complain: Complain,
) -> None:
    """Check that each of the resources belongs to a stage."""
    stages = [spec.name for spec in pipeline.chain]
    stages += [f"score-{use.name}" for use in filters if use]
    for name in resources if isinstance(resources, dict) else ():
        if name not in stages:
            complain(("resources", name), f"no such stage{registry.nearest(name, stages)}")


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, with the options of all installed plugins."""
    document = _Document.model_json_schema()
    definitions = document.pop("$defs")
    properties = document["properties"]
    slots = {name: slot for name, slot in registry.slots().items() if slot.in_pipeline}
    for kind in ("source", "filter", *(name for name, slot in slots.items() if not slot.filled_by)):
        definitions |= slot_schemas(kind)
    properties["source"] |= {"$ref": "#/$defs/source"}
    properties["filters"]["items"] = {"$ref": "#/$defs/filter"}
    properties["pipeline"] |= {
        "properties": {
            name: {
                "description": slot.description,
                "anyOf": [{"$ref": f"#/$defs/{slot.kind}"}, {"type": "null"}],
            }
            for name, slot in slots.items()
        },
        "additionalProperties": False,
    }
    return {
        **recipe_catalog.schema_head(),
        **document,
        "title": "reasonpix recipe",
        "allOf": [_part_schema(part) for part in get_args(Part)],
        "$defs": definitions,
    }


def _part_schema(part: Part) -> dict[str, Any]:
    """What a recipe of one part must and must not have."""
    required = _Pipeline(part, {}).required
    settings = _settings_of(CHAINS[part])
    # Without the key it is the default part.
    absent = [] if part == _Document.model_fields["part"].default else ["part"]
    return {
        "if": {"properties": {"part": {"const": part}}, "required": absent},
        "then": {
            "properties": {
                "pipeline": {
                    "required": list(required),
                    "properties": {slot: {"not": {"type": "null"}} for slot in required},
                    "propertyNames": {"enum": sorted(slots_of(part))},
                },
                **{name: False for name in _PART_SETTINGS if name not in settings},
            }
        },
    }
