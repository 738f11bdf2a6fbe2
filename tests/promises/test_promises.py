"""What the documentation promises of the whole, checked over every hook, recipe and plugin."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pluggy
import pytest
import yaml
from jsonschema import Draft202012Validator

from reasonpix.cli.recipes import load_any
from reasonpix.evaluation import recipe as evaluation_recipe
from reasonpix.generation import recipe
from reasonpix.generation.recipe_catalog import Command, command_of, shipped
from reasonpix.plugin import API_VERSION, hookspecs, registry
from reasonpix.plugin.slots import SLOTS
from reasonpix.training import recipe as training_recipe

ROOT = Path(__file__).parents[2]
PUBLIC = (
    "reasonpix.plugin",
    "reasonpix.plugin.weights",
    "reasonpix.plugin.testing",
    "reasonpix.plugin.fakes",
    "reasonpix.llm",
    "reasonpix.editing",
    "reasonpix.evaluation",
    "reasonpix.core",
    "reasonpix.cli",
)
"""What a plugin may import from, and only what is in its `__all__`."""

SCHEMAS: dict[Command, Draft202012Validator] = {
    "generate": Draft202012Validator(recipe.schema()),
    "train": Draft202012Validator(training_recipe.schema()),
    "evaluate": Draft202012Validator(evaluation_recipe.schema()),
}

HOOKS = [
    name
    for name, value in vars(hookspecs).items()
    if callable(value) and hasattr(value, "reasonpix_spec")
]
EXTENDING = {"slots", "stages"}  # see tests/third_party/masker


def test_there_are_hooks() -> None:
    of_slots = {slot.hook for slot in SLOTS.values()}
    assert set(HOOKS) == of_slots | EXTENDING | {"checkpoints"}


@pytest.mark.parametrize("hook", sorted(set(HOOKS) - EXTENDING))
def test_every_hook_is_implemented_by_a_plugin(hook: str) -> None:
    implementing = []
    for entry in entry_points(group=registry.GROUP):
        manager = pluggy.PluginManager("reasonpix")
        manager.add_hookspecs(hookspecs)
        manager.register(entry.load())
        if getattr(manager.hook, hook).get_hookimpls():
            implementing.append(entry.name)
    assert implementing


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_explained(hook: str) -> None:
    assert getattr(hookspecs, hook).__doc__.startswith("Return the ")
    assert f"`{hook}`" in (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


def test_every_slot_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for slot, spec in SLOTS.items():
        assert f"`{spec.component.__name__}`" in text and f"`{spec.hook}`" in text, slot


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_modules_are_named_where_plugin_authors_look(module: str) -> None:
    assert f"`{module}`" in (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", registry.names())
def test_every_installed_plugin_works_and_describes_itself(name: str) -> None:
    for slot, component in registry.offers(name).items():
        assert component.__doc__, slot
        assert component.__doc__ != SLOTS[slot].component.__doc__
        options = component.Options
        for option, field in options.model_fields.items():
            assert field.description, f"{name}: {option}"
        assert options.fingerprint_exclude <= set(options.model_fields)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_checks(name: str, tmp_path: Path) -> None:
    path, resolved = shipped()[name], tmp_path / "resolved.yaml"
    checked = load_any(path)
    resolved.write_text(checked.as_yaml(), encoding="utf-8")
    assert load_any(resolved) == checked
    assert command_of(resolved) == command_of(path)


@pytest.mark.parametrize("name", sorted(shipped()))
@pytest.mark.parametrize("command", SCHEMAS)
def test_the_schema_of_its_command_accepts_a_shipped_recipe(name: str, command: Command) -> None:
    document = yaml.safe_load(shipped()[name].read_text(encoding="utf-8"))
    errors = [error.message for error in SCHEMAS[command].iter_errors(document)]
    assert (not errors) == (command == command_of(shipped()[name])), errors


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_starts_with_its_command(name: str) -> None:
    text = shipped()[name].read_text(encoding="utf-8")
    comments = [line for line in text.splitlines()[:4] if line.startswith("# ")]
    assert comments and text.startswith("# ")
    command = command_of(shipped()[name])
    assert any(line.startswith(f"# reasonpix {command} {name} ") for line in comments)
    if command != "generate":
        return
    # In the order of the data.
    slots = [slot for slot in yaml.safe_load(text)["pipeline"] if slot in SLOTS]
    assert slots == sorted(slots, key=list(SLOTS).index)
    assert "part" in yaml.safe_load(text)


PLUGIN_MODULES = sorted((ROOT / "plugins").glob("*/reasonpix_*/**/*.py"))


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_exists_and_nothing_else_passes_for_one(module: str) -> None:
    package = importlib.import_module(module)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


@pytest.mark.parametrize("path", PLUGIN_MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_plugins_use_what_any_plugin_may(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            assert not [module for module in modules if module.split(".")[0] == "reasonpix"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "reasonpix":
            assert node.module in PUBLIC, ast.unparse(node)
            public = set(importlib.import_module(node.module).__all__)
            assert {alias.name for alias in node.names} <= public, ast.unparse(node)


def test_every_plugin_is_a_package_of_its_own() -> None:
    for project in (ROOT / "plugins").glob("*/pyproject.toml"):
        text = project.read_text(encoding="utf-8")
        assert re.search(r'\[project\.entry-points\."?reasonpix[.\]]', text), project
        assert f'[project.entry-points."reasonpix.api"]\n"{API_VERSION}" = ' in text, project
        assert '"reasonpix"' in text, project
        package = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        assert [(project.parent / name / "py.typed").is_file() for name in package] == [True]


def test_mypy_checks_every_plugin() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    packages = {path.name for path in (ROOT / "plugins").glob("*/reasonpix_*") if path.is_dir()}
    assert {"reasonpix", *packages} <= set(settings["packages"])
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "plugins").glob("*/*.toml")}
    assert folders == set(settings["mypy_path"])
