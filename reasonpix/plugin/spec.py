"""A component in a recipe: `use:` and options, validated by the component's `Options`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from reasonpix.core.files import yaml_locations
from reasonpix.errors import PluginError
from reasonpix.plugin import registry
from reasonpix.plugin.components import Component, ModelOptions, Options

Complain = Callable[[yaml_locations.Path, str], None]
"""Called with the location and the description of each mistake."""


@dataclass(frozen=True)
class ComponentSpec:
    """A component that a recipe names, with validated `options`."""

    slot: str
    name: str
    options: Options

    def as_yaml(self) -> dict[str, Any]:
        """The recipe block of this component, defaults included."""
        fields = type(self.options).model_fields
        options = {
            name: value
            for name, value in self.options.model_dump(mode="json").items()
            if value is not None or fields[name].default is not None
        }
        return {"use": self.name, **options}

    @property
    def package(self) -> str:
        """The package that offers it, and its version."""
        return registry.package_of(registry.entry(self.name))

    @property
    def kind(self) -> str:
        """The slot whose components fill this one: `planner` for a resolver."""
        return registry.slot(self.slot).kind

    def build(self) -> Component[Any]:
        """The component, ready for `load`."""
        return registry.build(self.slot, self.name, self.options)


def check(model: type[Any], data: Any, at: yaml_locations.Path, complain: Complain) -> Any:
    """Validate `data` as a `model`; on errors report each at its location and return None."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        hidden = model.model_config.get("hide_input_in_errors", False)
        for detail in error.errors():
            got = "" if hidden else f", got {detail['input']!r}"
            where = at + tuple(detail["loc"])
            if detail["type"] == "extra_forbidden":
                fields = _fields(model, tuple(detail["loc"]))
                complain(where, f"no such option{registry.nearest(str(where[-1]), fields)}")
            elif detail["type"] == "missing":
                entry = "entry " if isinstance(where[-1], int) else ""
                complain(where[:-1], f"{entry}{where[-1]!r} is missing")
            elif detail["type"] in ("model_type", "dict_type"):
                complain(where, f"expected a mapping{got}")
            else:
                # Messages of our own validators are shown unchanged.
                what = str(detail.get("ctx", {}).get("error", _lowered(detail["msg"])))
                complain(where, f"{what}{got}" if where else what)  # without `got`: the whole file
    return None


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def _fields(model: type[BaseModel], path: yaml_locations.Path) -> list[str]:
    for name in path[:-1]:
        field = model.model_fields.get(str(name))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is None:
            break
        model = inner
    return list(model.model_fields)


def read_spec(
    slot: str, value: Any, at: yaml_locations.Path, complain: Complain
) -> ComponentSpec | None:
    """Read the component that a recipe's value names; report mistakes and return None."""
    if isinstance(value, str):
        value = {"use": value}
    if not isinstance(value, dict) or not isinstance(value.get("use"), str):
        complain(at, f"expected a plugin's name, or a mapping with 'use:', got {value!r}")
        return None
    options = {key: option for key, option in value.items() if key != "use"}
    try:
        component = registry.find(slot, value["use"])
    except PluginError as error:
        complain((*at, "use"), str(error))
        return None
    checked = check(component.Options, options, at, complain)
    if checked is None:
        return None
    for field in checked.weights if isinstance(checked, ModelOptions) else ():
        try:
            registry.checkpoint(getattr(checked, field) or "")
        except PluginError as error:
            complain((*at, field), str(error))
            return None
    return ComponentSpec(slot, value["use"], checked)


def slot_schemas(slot: str) -> dict[str, Any]:
    """JSON schema definitions of `slot` (a plugin's name or block), and of each plugin's block."""
    blocks: dict[str, Any] = {}
    short: list[str] = []
    for name in registry.names():
        try:
            component = registry.offers(name).get(slot)
        except PluginError:
            continue  # only a plugin that is used must work
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
