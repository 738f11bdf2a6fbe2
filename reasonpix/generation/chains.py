"""The stages of a recipe's part: core's, with those that plugins add in their places."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from reasonpix.errors import PluginError
from reasonpix.generation.replace_stages import REPLACE
from reasonpix.generation.rewrite_stages import REWRITE
from reasonpix.plugin import registry
from reasonpix.plugin.stages import Part, StageSpec

CHAINS: Mapping[Part, tuple[StageSpec, ...]] = {"replace": REPLACE, "rewrite": REWRITE}
"""Core's stages of each part, in the order of the data."""

_CORE_NAMES = {spec.name for chain in CHAINS.values() for spec in chain}


CORE_STAGES = frozenset(spec.name for chain in CHAINS.values() for spec in chain)


def chain_of(part: Part, filled: Collection[str]) -> tuple[StageSpec, ...]:
    """The stages of a recipe that fills these slots, in the order of the data.

    Raises `PluginError` when a plugin's stage does not fit in.
    """
    chain = list(CHAINS[part])
    for slot in sorted(filled):
        for spec in registry.added_stages(slot):
            if part in spec.parts:
                _insert(chain, spec)
    return tuple(spec for spec in chain if spec.if_empty != "skip" or spec.slot in filled)


def _insert(chain: list[StageSpec], spec: StageSpec) -> None:
    names = [other.name for other in chain]
    if spec.name in names or spec.name in _CORE_NAMES:
        raise PluginError(f"stage {spec.name!r} is declared twice")
    if spec.after not in names:
        raise PluginError(
            f"stage {spec.name!r} follows {spec.after!r}, "
            f"which is not a stage{registry.nearest(spec.after, names)}"
        )
    # After those that follow the same stage and are already there.
    place = names.index(spec.after) + 1
    while place < len(chain) and chain[place].after == spec.after:
        place += 1
    if missing := sorted(set(spec.requires) - set(names[:place])):
        raise PluginError(
            f"stage {spec.name!r} requires {', '.join(missing)}, which does not come before it"
        )
    images = {"input", "paired", *(other.image for other in chain)}
    if spec.image is not None and spec.image in images:
        raise PluginError(f"stage {spec.name!r} makes the image {spec.image!r}, which exists")
    chain.insert(place, spec)


def slots_of(part: Part) -> set[str]:
    """The keys that the pipeline of a recipe of this part may have."""
    stages: dict[Part, set[str]] = {
        each: {spec.slot for spec in specs} for each, specs in CHAINS.items()
    }
    pipeline = {name for name, slot in registry.slots().items() if slot.in_pipeline}
    for name in pipeline:
        for spec in registry.added_stages(name):
            for each in spec.parts:
                stages[each].add(spec.slot)
    others = set().union(*stages.values()) - stages[part]
    # What belongs to no stage, such as the resolver, serves filters of every part.
    return pipeline - others


def declared(stage: str) -> StageSpec | None:
    """The declaration of a stage by name; None for filters, and without the plugin that adds it."""
    return next((spec for spec in _declarations() if spec.name == stage), None)


def _declarations() -> Iterator[StageSpec]:
    for chain in CHAINS.values():
        yield from chain
    for slot in registry.slots():
        yield from registry.added_stages(slot)
