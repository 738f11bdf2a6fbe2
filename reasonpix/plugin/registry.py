"""Find plugins by entry-point name without importing them; load only what is named."""

from __future__ import annotations

import difflib
import os
import pkgutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

import pluggy

from reasonpix.core.api_version import check_api_version
from reasonpix.errors import PluginError
from reasonpix.plugin import hookspecs
from reasonpix.plugin.components import Component, ModelOptions, Options, Source
from reasonpix.plugin.model_files import automatic_variants
from reasonpix.plugin.slots import SLOTS, SlotSpec
from reasonpix.plugin.stages import StageSpec
from reasonpix.plugin.weights import digest

GROUP = "reasonpix"
SLOT_GROUP = "reasonpix.slots"

T = TypeVar("T")


@cache
def _entries(path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    """The entry points on the import path; reading all installed packages takes a while."""
    return tuple(entry_points(group=group))


def names() -> list[str]:
    """All installed plugin names, sorted, without importing the plugins."""
    return _names(GROUP)


def _names(group: str) -> list[str]:
    return sorted({entry.name for entry in _entries(tuple(sys.path), group)})


def entry(name: str, group: str = GROUP) -> EntryPoint:
    """The entry point `name`. Raises `PluginError` if there is not exactly one."""
    matches = {
        (e.value, e.dist.name if e.dist else "?"): e
        for e in _entries(tuple(sys.path), group)
        if e.name == name
    }
    if not matches:
        raise PluginError(f"no plugin {name!r}{nearest(name, _names(group))}")
    if len(matches) > 1:
        packages = " and ".join(sorted(package for _, package in matches))
        raise PluginError(f"plugin {name!r} is offered twice, by {packages}: uninstall one of them")
    return next(iter(matches.values()))


def package_of(where: EntryPoint) -> str:
    """The package of an entry point, and its version."""
    return f"{where.dist.name} {where.dist.version}" if where.dist else "?"


def nearest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean …?" with the choice most similar to `word`, or a list of all choices."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(choices)}" if choices else ""


# -- Slots and stages


def slots() -> dict[str, SlotSpec]:
    """Core's slots and those that plugins add, by name; broken plugins are skipped."""
    by_name = dict(SLOTS)
    for name in added_slots():
        with suppress(PluginError):
            by_name[name] = slot(name)
    return by_name


def added_slots() -> list[str]:
    """The names of the slots that plugins add, sorted, without importing the plugins."""
    return [name for name in _names(SLOT_GROUP) if name not in SLOTS]


def slot(name: str) -> SlotSpec:
    """A slot of core or of a plugin. Raises `PluginError` if it is unknown or broken."""
    if name in SLOTS:
        return SLOTS[name]
    if name not in added_slots():
        raise PluginError(f"no slot {name!r}{nearest(name, slots())}")
    return _extension(name)[0]


def slot_package(name: str) -> str:
    """The package that adds a slot, and its version; empty for core's slots."""
    return "" if name in SLOTS else package_of(entry(name, SLOT_GROUP))


def added_stages(slot_name: str) -> tuple[StageSpec, ...]:
    """The stages that a plugin adds together with a slot; none for core's slots."""
    return () if slot_name in SLOTS else _extension(slot_name)[1]


def _extension(name: str) -> tuple[SlotSpec, tuple[StageSpec, ...]]:
    """The slot that a plugin adds, and the stages that run in it."""
    where = entry(name, SLOT_GROUP)
    hooks = _register(where, core_hooks()).hook
    specs = _declared(name, hooks.slots, SlotSpec)
    added = [spec for spec in specs if spec.name == name]
    if len(added) != 1:
        raise PluginError(f"plugin {name!r}: hook slots() must return one slot of this name")
    if hasattr(core_hooks().hook, added[0].hook) or not added[0].hook.isidentifier():
        raise PluginError(f"plugin {name!r}: {added[0].hook!r} cannot be the name of its hook")
    declared = _declared(name, hooks.stages, StageSpec)
    if strays := sorted({stage.slot for stage in declared} - {spec.name for spec in specs}):
        raise PluginError(f"plugin {name!r}: a stage names {strays[0]!r}, which is not its slot")
    stages = [stage for stage in declared if stage.slot == name]
    for stage in stages:
        if stage.if_empty != "skip":
            raise PluginError(f"plugin {name!r}: stage {stage.name!r} must have if_empty='skip'")
        if stage.name == "source" or stage.name.startswith("score-"):
            raise PluginError(f"plugin {name!r}: {stage.name!r} cannot be the name of a stage")
    return added[0], tuple(stages)


def _declared(name: str, hook: pluggy.HookCaller, kind: type[T]) -> list[T]:
    """What a plugin declares with a hook. Raises `PluginError` for anything but a `kind`."""
    items = _offered(name, hook)
    for item in items:
        if not isinstance(item, kind):
            raise PluginError(
                f"plugin {name!r}: hook {hook.name}() returned {item!r}, "
                f"which is not a {kind.__name__}"
            )
    return items


def contract(slot_name: str) -> type[Any]:
    """The class of contract tests for the components of a slot."""
    spec = slot(slot_name)
    where = spec.contract or f"reasonpix.plugin.testing:{spec.component.__name__}Contract"
    cls = pkgutil.resolve_name(where)
    assert isinstance(cls, type)
    return cls


# -- Plugins and their components


def core_hooks() -> pluggy.PluginManager:
    """A plugin manager that knows core's hooks."""
    manager = pluggy.PluginManager("reasonpix")
    manager.add_hookspecs(hookspecs)
    return manager


def _register(where: EntryPoint, manager: pluggy.PluginManager) -> pluggy.PluginManager:
    """Import the module of an entry point, and register it."""
    check_api_version(where)
    try:
        manager.register(where.load(), name=where.name)
    except (Exception, SystemExit) as error:  # one plugin must not end a run that does not use it
        raise _broken(where, error) from error
    return manager


def _broken(where: EntryPoint, error: BaseException | str) -> PluginError:
    package = where.dist.name if where.dist else "?"
    what = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return PluginError(
        f"plugin {where.name!r} of package {package} is broken ({where.value}): {what}"
    )


def _hooks(name: str) -> Any:
    """Import the plugin `name`, check it against the hook specs, and return its hook callers."""
    where = entry(name)
    manager = core_hooks()
    if added := {slot: spec for slot, spec in slots().items() if slot not in SLOTS}:
        manager.add_hookspecs(type("hooks", (), hookspecs.component_hooks(added)))
    _register(where, manager)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = [hook for hook in vars(manager.hook) if getattr(manager.hook, hook).has_spec()]
        unknown = sorted(set(vars(manager.hook)) - set(known))
        if not unknown:
            raise _broken(where, error) from error
        what = f"unknown hook {unknown[0]!r}{nearest(unknown[0], sorted(known))}"
        raise _broken(where, what) from error
    return manager.hook


def offers(name: str) -> dict[str, type[Component[Any]]]:
    """The components named `name` that the plugin `name` offers, by slot."""
    hooks = _hooks(name)
    components: dict[str, type[Component[Any]]] = {}
    for slot_name, spec in slots().items():
        if spec.filled_by:
            continue
        for component in _offered(name, getattr(hooks, spec.hook)):
            if not (isinstance(component, type) and issubclass(component, spec.component)):
                raise PluginError(
                    f"plugin {name!r}: hook {spec.hook}() returned {component!r}, "
                    f"which is not a subclass of {spec.component.__name__}"
                )
            if getattr(component, "name", None) == name:
                if missing := sorted(component.__abstractmethods__):
                    methods = " and ".join(f"{method}()" for method in missing)
                    what = f"class {component.__name__} does not implement {methods}"
                    raise _broken(entry(name), what)
                components[slot_name] = component
    return components


def _offered(name: str, hook: pluggy.HookCaller) -> list[Any]:
    try:
        return [item for offered in hook() for item in offered]
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugin {name!r} is broken: hook {hook.name}() raised {type(error).__name__}: {error}"
        ) from error


def find(slot_name: str, name: str) -> type[Component[Any]]:
    """The component class for a slot that a recipe calls `name`."""
    kind = slot(slot_name).kind
    if name not in names():
        candidates = [n for n in names() if _offers_quietly(n, kind)]
        raise PluginError(
            f"no {kind} {name!r}{nearest(name, candidates)} "
            "(plugins are packages: is its package installed?)"
        )
    components = offers(name)
    if kind not in components:
        if not components:
            raise PluginError(f"plugin {name!r} offers no component of that name")
        slots_filled = " and ".join(f"`{slot_name}`" for slot_name in components)
        raise PluginError(f"plugin {name!r} is for the slot {slots_filled}, not for `{kind}`")
    return components[kind]


def _offers_quietly(name: str, kind: str) -> bool:
    try:
        return kind in offers(name)
    except PluginError:
        return False  # only a plugin that is used must work


def checkpoint(model: str) -> Path | None:
    """The folder or file of a checkpoint that a plugin carries (`mini/blip2`); None for others.

    Raises `PluginError` if the plugin carries checkpoints, but not this one.
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


def checkpoints() -> dict[str, Path]:
    """All checkpoints that installed plugins carry, by name; without those of broken plugins."""
    carried: dict[str, Path] = {}
    for name in names():
        with suppress(PluginError):
            for mapping in _hooks(name).checkpoints():
                carried |= mapping
    return carried


def build(slot_name: str, name: str, options: Options) -> Component[Any]:
    """The component, ready for `load`; the name of a carried checkpoint becomes its path."""
    cls = find(slot_name, name)
    if isinstance(options, ModelOptions):
        carried = {field: checkpoint(getattr(options, field) or "") for field in options.weights}
        options = options.model_copy(
            update={field: str(path) for field, path in carried.items() if path}
        )
    return cls(options)


def fingerprint_facts(slot_name: str, name: str, options: Options) -> dict[str, Any]:
    """Everything about a component that affects its results, as JSON values.

    Options enter as the recipe wrote them, weights in a folder or file by their content.
    """
    component = build(slot_name, name, options)
    facts: dict[str, Any] = {
        "slot": slot_name,
        "use": name,
        "version": component.version,
        "options": options.model_dump(mode="json", exclude=set(options.fingerprint_exclude)),
    }
    if isinstance(options, ModelOptions):
        for field in options.weights:
            named = getattr(component.options, field)
            if named and Path(named).exists():
                # The content counts, not the path.
                facts.setdefault("weights", {})[field] = digest(Path(named))
                facts["options"].pop(field)
                weights = component.options.model_copy(update={"model": named})
                if os.path.isdir(named) and (variants := automatic_variants(weights)):
                    facts.setdefault("variants", {})[field] = variants
    # For a hub id it depends on what is in the cache, which must not change a fingerprint.
    is_known = "weights" in facts or not isinstance(options, ModelOptions)
    if is_known and (intended := component.intended_images):
        facts["intended_images"] = intended.model_dump()
    if isinstance(component, Source) and component.domain:
        facts["domain"] = component.domain
    return facts | {"component": dict(component.fingerprint_facts())}
