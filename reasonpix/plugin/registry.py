"""Find plugins by entry-point name without importing them; load only what is named."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from reasonpix.errors import PluginError
from reasonpix.plugin import hookspecs
from reasonpix.plugin.api_version import check_api_version
from reasonpix.plugin.components import SLOTS, Component, ModelOptions, Options
from reasonpix.plugin.weights import digest

GROUP = "reasonpix"

_HOOKS = {
    "source": "sources",
    "captioner": "captioners",
    "extractor": "extractors",
    "grounder": "grounders",
    "planner": "planners",
    "editor": "editors",
    "encoder": "encoders",
    "method": "methods",
    "filter": "scorers",
}


@cache
def _entries(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points on the import path; reading all installed packages takes a while."""
    return tuple(entry_points(group=GROUP))


def names() -> list[str]:
    """All installed plugin names, sorted; imports none of them."""
    return sorted({entry.name for entry in _entries(tuple(sys.path))})


def entry(name: str) -> EntryPoint:
    """The entry point `name`. Raises `PluginError` when there is none, or more than one."""
    found = {
        (e.value, e.dist.name if e.dist else "?"): e
        for e in _entries(tuple(sys.path))
        if e.name == name
    }
    if not found:
        raise PluginError(f"no plugin {name!r}{nearest(name, names())}")
    if len(found) > 1:
        packages = " and ".join(sorted(package for _, package in found))
        raise PluginError(f"plugin {name!r} is offered twice, by {packages}: uninstall one of them")
    return next(iter(found.values()))


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for the known word nearest to `word`, or a list of all."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(known)}" if known else ""


def _hooks(name: str) -> Any:
    """The hook callers of the one plugin `name`, imported and checked against the specs."""
    where = entry(name)
    check_api_version(where)
    package = where.dist.name if where.dist else "?"
    try:
        module = where.load()
        manager = pluggy.PluginManager("reasonpix")
        manager.add_hookspecs(hookspecs)
        manager.register(module, name=name)
        manager.check_pending()
    except Exception as error:
        raise PluginError(
            f"plugin {name!r} of package {package} is broken ({where.value}): "
            f"{type(error).__name__}: {error}"
        ) from error
    return manager.hook


def offers(name: str) -> dict[str, type[Component[Any]]]:
    """The components that plugin `name` offers under that name, by slot."""
    hooks = _hooks(name)
    found: dict[str, type[Component[Any]]] = {}
    for slot, hook in _HOOKS.items():
        try:
            components = [component for offered in getattr(hooks, hook)() for component in offered]
        except Exception as error:
            raise PluginError(
                f"plugin {name!r} is broken: hook {hook}() raised {type(error).__name__}: {error}"
            ) from error
        for component in components:
            if not (isinstance(component, type) and issubclass(component, SLOTS[slot])):
                raise PluginError(
                    f"plugin {name!r}: hook {hook}() returned {component!r}, "
                    f"which is no {SLOTS[slot].__name__}"
                )
            if getattr(component, "name", None) == name:
                found[slot] = component
    return found


def find(slot: str, name: str) -> type[Component[Any]]:
    """The component class of `slot` that a recipe calls `name`. A reader is a planner."""
    slot = "planner" if slot == "reader" else slot
    if name not in names():
        known = [n for n in names() if _offers_quietly(n, slot)]
        raise PluginError(
            f"no {slot} {name!r}{nearest(name, known)} "
            "(plugins are packages: is the one that offers it installed?)"
        )
    found = offers(name)
    if slot not in found:
        kinds = " and ".join(found) or "nothing under that name"
        raise PluginError(f"plugin {name!r} offers {kinds}, no {slot}")
    return found[slot]


def _offers_quietly(name: str, slot: str) -> bool:
    try:
        return slot in offers(name)
    except PluginError:
        return False  # a broken plugin that nobody asked for hurts nobody


def checkpoint(model: str) -> Path | None:
    """The folder or file of a checkpoint that a plugin carries (`mini/blip2`); None for others.

    Raises `PluginError` when the plugin carries checkpoints, but not this one.
    """
    prefix, slash, _ = model.partition("/")
    if not slash or os.path.isdir(model) or prefix not in names():
        return None
    carried: dict[str, Path] = {}
    for mapping in _hooks(prefix).checkpoints():
        carried |= mapping
    if not carried:
        return None
    if model not in carried:
        raise PluginError(f"no checkpoint {model!r}{nearest(model, carried)}")
    return carried[model]


def build(slot: str, name: str, options: Options) -> Component[Any]:
    """The component, ready for `load`; the name of a carried checkpoint becomes its path."""
    cls = find(slot, name)
    if isinstance(options, ModelOptions):
        carried = {field: checkpoint(getattr(options, field) or "") for field in options.weights}
        options = options.model_copy(
            update={field: str(path) for field, path in carried.items() if path}
        )
    return cls(options)


def fingerprint_facts(slot: str, name: str, options: Options) -> dict[str, Any]:
    """Everything about a component that affects its results, as JSON values.

    Options are taken as the recipe wrote them; weights in a folder enter by their content.
    """
    component = build(slot, name, options)
    facts: dict[str, Any] = {
        "slot": slot,
        "use": name,
        "version": component.version,
        "options": options.model_dump(mode="json", exclude=set(options.fingerprint_exclude)),
    }
    if isinstance(options, ModelOptions):
        for field in options.weights:
            named = getattr(component.options, field)
            if named and Path(named).exists():
                # A folder or file is what it holds, wherever it lies.
                facts.setdefault("weights", {})[field] = digest(Path(named))
                facts["options"].pop(field)
    return facts | {"component": dict(component.fingerprint_facts())}
