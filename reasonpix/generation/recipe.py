"""Recipes: YAML that names a component for each slot. All mistakes are found at once, located."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from reasonpix.core import yaml_locations
from reasonpix.errors import RecipeError
from reasonpix.generation import recipe_catalog
from reasonpix.generation.resources import Resources
from reasonpix.plugin import registry
from reasonpix.plugin.components import Planner, PlannerTask, Scorer, Source
from reasonpix.plugin.spec import Complain, ComponentSpec, check, read_spec, slot_schemas

PIPELINE = ("captioner", "extractor", "grounder", "planner", "editor", "reader")
"""The places of a pipeline, in the order of the data."""

_SHOWN_OF_REPLACED = frozenset({"instruction", "box", "selected", "target", "synonyms"})
_SHOWN_OF_REWRITTEN = frozenset(
    {"instruction", "edited_caption", "direct_instruction", "candidates", "revealing", "agreement"}
)
"""Which fields of `slots.Edit` a scorer sees, beside images and captions."""

_REPLACING = ("captioner", "extractor", "grounder", "editor")
"""Those that only a recipe has which makes edits of its own (Parts II and III)."""


@dataclass(frozen=True)
class Recipe:
    """What `reasonpix generate` does: a source, a component for each slot, and filters.

    Without an `editor` the source gives whole edits, and their instructions are rewritten (Part I):
    then there is no `captioner`, `extractor` and `grounder` either. With one, `captioner` is None
    when the source itself gives captions (Part II).
    """

    seed: int
    shard_size: int
    candidates: int
    orders: int
    source: ComponentSpec
    captioner: ComponentSpec | None
    extractor: ComponentSpec | None
    grounder: ComponentSpec | None
    planner: ComponentSpec
    editor: ComponentSpec | None
    reader: ComponentSpec | None
    filters: tuple[ComponentSpec, ...]
    resources: Mapping[str, Resources] = field(default_factory=dict)
    """What a stage takes of a machine, by the stage's name."""

    @property
    def uses(self) -> Iterator[ComponentSpec]:
        """All components named, in the order of the data."""
        yield self.source
        yield from (use for slot in PIPELINE if (use := getattr(self, slot)) is not None)
        yield from self.filters

    def as_yaml(self) -> str:
        """The resolved recipe: every option spelled out, and the packages it ran with."""
        packages = sorted({use.package for use in self.uses})
        body = {
            "seed": self.seed,
            "shard_size": self.shard_size,
            **({} if self.editor else {"candidates": self.candidates, "orders": self.orders}),
            "source": self.source.as_yaml(),
            "pipeline": {
                slot: use.as_yaml() for slot in PIPELINE if (use := getattr(self, slot)) is not None
            },
            "filters": [use.as_yaml() for use in self.filters],
        }
        if self.resources:
            body["resources"] = {
                name: resources.model_dump(exclude_defaults=True)
                for name, resources in self.resources.items()
            }
        head = "".join(f"# {package}\n" for package in packages)
        return head + yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


class _Pipeline(BaseModel):
    """The component of each slot, by name or as a block with `use:` and options."""

    model_config = ConfigDict(extra="forbid")

    captioner: Any = Field(None, description="Left out when the source gives captions")
    extractor: Any = Field(None, description="Candidate categories from a caption (Eq. 4)")
    grounder: Any = Field(None, description="Boxes for categories (Eq. 5)")
    planner: Any = Field(description="What becomes what, and the instruction (Eq. 2, 3, 6)")
    editor: Any = Field(
        None, description="Object replacement (Eq. 7); left out when the source gives pairs"
    )
    reader: Any = Field(None, description="A planner that filters ask what an instruction is after")


class _Document(BaseModel):
    """A recipe for `reasonpix generate`."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(0, ge=0, description="Every random choice follows from it")
    shard_size: int = Field(32, ge=1, description="Records computed and stored together")
    candidates: int = Field(
        4, ge=1, description="n of Eq. 2: instructions to choose from, where pairs are rewritten"
    )
    orders: int = Field(
        2, ge=1, description="Times P_select is asked (Eq. 3), each time in another order"
    )
    source: Any = Field(description="Where input images come from")
    pipeline: _Pipeline
    filters: list[Any] = Field([], description="What to reject, by stored scores")
    resources: dict[str, Resources] = Field(
        {}, description="What a stage takes of a machine, by its name, such as caption"
    )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are `a.b=value` (value is YAML) and win over the file.

    Raises `RecipeError` with every problem found, each as `file:line:column: path: what`.
    """
    data, marks = recipe_catalog.read(path, "generate")
    problems: list[str] = []
    for override in overrides:
        yaml_locations.override_value(data, marks, override, problems)

    complain = marks.into(problems)
    document = check(_Document, data, (), complain)
    uses: dict[str, ComponentSpec | None] = dict.fromkeys(PIPELINE)
    if "source" in data:
        uses["source"] = read_spec("source", data["source"], ("source",), complain)
    pipeline = data.get("pipeline")
    named = pipeline if isinstance(pipeline, dict) else {}
    for slot in PIPELINE:
        if _is_named(named, slot):
            uses[slot] = read_spec(slot, named[slot], ("pipeline", slot), complain)
    listed = data.get("filters")
    filters = [
        read_spec("filter", value, ("filters", i), complain)
        for i, value in enumerate(listed if isinstance(listed, list) else [])
    ]
    if named:
        _check_part(data, document, named, uses, complain)
    _check_filters(data, named, filters, complain)
    _check_resources(data.get("resources"), named, filters, complain)
    if problems or document is None:
        raise RecipeError(problems)
    return Recipe(
        seed=document.seed,
        shard_size=document.shard_size,
        candidates=document.candidates,
        orders=document.orders,
        filters=tuple(use for use in filters if use),
        resources=document.resources,
        **uses,  # type: ignore[arg-type]
    )


def _check_part(
    data: dict[str, Any],
    document: _Document | None,
    named: dict[str, Any],
    uses: dict[str, ComponentSpec | None],
    complain: Complain,
) -> None:
    """What a recipe that rewrites (Part I) has, and what one that replaces has."""
    pipeline = ("pipeline",)
    if _replaces(named):
        for slot in ("extractor", "grounder", "editor"):
            if slot not in named:
                complain(pipeline, f"{slot!r} is missing")
        for key in ("candidates", "orders"):
            if key in data:
                complain((key,), "only a recipe that rewrites, one without an editor, asks for it")
    elif document and document.orders > document.candidates:
        complain(
            ("orders",) if "orders" in data else ("candidates",),
            f"there can be no more orders ({document.orders}) than candidates "
            f"({document.candidates})",
        )
    if not _replaces(named) and (use := uses.get("source")) is not None:
        source = use.build()
        assert isinstance(source, Source)
        if not source.gives_pairs:
            complain(
                ("source",),
                f"{use.name!r} gives no edited images, and the recipe names no editor to make "
                "them; ask the source for pairs, or name an editor",
            )
    verbs: list[tuple[str, PlannerTask]] = [("reader", "resolve")]
    if _replaces(named):
        verbs.append(("planner", "replace"))
    else:
        verbs += [("planner", "rewrite"), ("planner", "select")]
    for slot, verb in verbs:
        use = uses[slot]
        if use is None:
            continue
        cls = registry.find(slot, use.name)
        assert issubclass(cls, Planner)
        if not cls.can(verb):
            complain((*pipeline, slot), f"{use.name!r} does not {verb}; name another planner")


def _check_filters(
    data: dict[str, Any],
    named: dict[str, Any],
    filters: Sequence[ComponentSpec | None],
    complain: Complain,
) -> None:
    """Each filter once, and with all that it needs."""
    shown = _SHOWN_OF_REPLACED if _replaces(named) else _SHOWN_OF_REWRITTEN
    kind = "makes edits" if _replaces(named) else "rewrites instructions"
    seen: set[str] = set()
    for i, use in enumerate(filters):
        if use is None:
            continue
        at = ("filters", i)
        if use.name in seen:
            complain(at, f"filter {use.name!r} stands here twice; keep one")
        seen.add(use.name)
        scorer = registry.find("filter", use.name)
        assert issubclass(scorer, Scorer)
        for slot in sorted(slot for slot in scorer.needs_slots if named.get(slot) is None):
            complain(at, f"it needs the pipeline's {slot}, and there is none")
        if missing := ", ".join(sorted(scorer.requires - shown)):
            complain(at, f"it needs {missing}, and a recipe that {kind} has none")
        elif "agreement" in scorer.requires and data.get("orders") == 1:
            complain(at, "it needs P_select to be asked in several orders; set orders: 2")


def _check_resources(
    resources: Any,
    named: dict[str, Any],
    filters: Sequence[ComponentSpec | None],
    complain: Complain,
) -> None:
    """Each of a stage that there is."""
    own = ("extract", "ground", "plan", "edit") if _replaces(named) else ("rewrite", "select")
    scores = (f"score-{use.name}" for use in filters if use)
    stages = ["read", "caption", *own, *scores]
    for name in resources if isinstance(resources, dict) else ():
        if name not in stages:
            complain(("resources", name), f"no such stage{registry.nearest(name, stages)}")


def _replaces(named: dict[str, Any]) -> bool:
    """Whether a pipeline makes edits of its own."""
    return any(_is_named(named, slot) for slot in _REPLACING)


def _is_named(named: dict[str, Any], slot: str) -> bool:
    """Whether a pipeline names a component for the slot, or tries to."""
    return slot in named and not (slot in ("captioner", "reader") and named[slot] is None)


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, with the options of all installed plugins."""
    document = _Document.model_json_schema()
    definitions = document.pop("$defs")
    pipeline = definitions.pop("_Pipeline")
    for slot in ("source", *(slot for slot in PIPELINE if slot != "reader"), "filter"):
        definitions |= slot_schemas(slot)
    for slot in PIPELINE:
        filled_by = "planner" if slot == "reader" else slot
        pipeline["properties"][slot] |= {"$ref": f"#/$defs/{filled_by}"}
        pipeline["properties"][slot].pop("default", None)
    pipeline["dependentRequired"] = {
        slot: ["extractor", "grounder", "editor"] for slot in _REPLACING
    }
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
