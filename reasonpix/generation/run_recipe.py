"""The resolved recipe in a run folder, and the packages that the run was made with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reasonpix.errors import PluginError, RecipeError, RunError
from reasonpix.generation.recipe import Recipe, load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.plugin import registry
from reasonpix.plugin.components import Component

_NAME = "recipe.yaml"


def recipe_text(run: RunFolder) -> str:
    """The text of the run's recipe. Raises `RunError` if the run has no recipe."""
    try:
        return run.storage.read(_NAME).decode()
    except FileNotFoundError as error:
        raise RunError(
            f"{run} has no {_NAME}; make a run with `reasonpix generate RECIPE --out DIR`"
        ) from error


def recipe_of(run: RunFolder, overrides: Sequence[str] = ()) -> Recipe:
    """The run's recipe, changed by `overrides` (see `load_recipe`).

    A `RecipeError` also names the packages that the run was made with and that are missing here.
    """
    text = recipe_text(run)
    try:
        return _loaded(run, text, overrides)
    except RecipeError as error:
        raise RecipeError(error.problems + missing_packages(run)) from error


def find_component(run: RunFolder, slot: str, name: str) -> type[Component[Any]]:
    """The class of a component that the run was made with.

    Raises `PluginError`; it also names the packages of the run that are missing here.
    """
    try:
        return registry.find(slot, name)
    except PluginError as error:
        raise PluginError("\n".join([str(error), *missing_packages(run)])) from error


def missing_packages(run: RunFolder) -> list[str]:
    """A line for each package that the run was made with and that is not installed here."""
    return [
        f"{run}/{_NAME}: made with {name} {version}, which is not installed here; "
        f"install it: pip install {name}=={version}"
        for name, version in packages_of(run).items()
        if not _is_installed(name)
    ]


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _loaded(run: RunFolder, text: str, overrides: Sequence[str]) -> Recipe:
    if run.storage.local is not None:
        return load_recipe(run.storage.local / _NAME, overrides)
    with TemporaryDirectory() as folder:
        path = Path(folder) / _NAME
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)


def packages_of(run: RunFolder) -> dict[str, str]:
    """The packages that the run was made with, and their versions, from the head of its recipe."""
    lines = (line.split() for line in recipe_text(run).splitlines() if line.startswith("# "))
    return {words[1]: words[2] for words in lines if len(words) == 3}


def write_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Replace the run's recipe. It still names the package versions that made the results."""
    made_with = packages_of(run)

    def with_old_version(line: str) -> str:
        words = line.split()
        if line.startswith("# ") and len(words) == 3 and words[1] in made_with:
            return f"# {words[1]} {made_with[words[1]]}"
        return line

    text = "".join(f"{with_old_version(line)}\n" for line in recipe.as_yaml().splitlines())
    run.storage.write(_NAME, text.encode())
