"""The commands that list and describe recipes and plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reasonpix.cli.options import set_option

if TYPE_CHECKING:
    from reasonpix.evaluation.recipe import EvaluationRecipe
    from reasonpix.generation.recipe import Recipe
    from reasonpix.generation.recipe_catalog import Command
    from reasonpix.training.recipe import TrainingRecipe

    AnyRecipe = Recipe | TrainingRecipe | EvaluationRecipe


@click.group("recipes")
def recipes_group() -> None:
    """List, show, copy and check recipes."""


@recipes_group.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from reasonpix.generation.recipe_catalog import shipped, summary

    for name, path in shipped().items():
        click.echo(f"{name:24} {summary(path)}")


@recipes_group.command("show")
@click.argument("recipe")
def recipes_show(recipe: str) -> None:
    """Print RECIPE."""
    from reasonpix.generation.recipe_catalog import locate

    click.echo(locate(recipe).read_text(encoding="utf-8"), nl=False)


@recipes_group.command("copy")
@click.argument("recipe")
@click.argument("to", type=click.Path(path_type=Path))
def recipes_copy(recipe: str, to: Path) -> None:
    """Copy RECIPE to the file TO, for you to edit."""
    from reasonpix.errors import RecipeError
    from reasonpix.generation.recipe_catalog import locate

    if to.exists():
        raise RecipeError([f"{to} exists; name a new file"])
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(locate(recipe).read_text(encoding="utf-8"), encoding="utf-8")
    click.echo(to)


@recipes_group.command("check")
@click.argument("recipe")
@set_option("seed=1")
def recipes_check(recipe: str, overrides: tuple[str, ...]) -> None:
    """Validate RECIPE and print it with every option spelled out."""
    from reasonpix.generation.recipe_catalog import locate

    click.echo(load_any(locate(recipe), overrides).as_yaml(), nl=False)


def load_any(path: Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Load and validate a recipe of any kind. Raises `RecipeError`."""
    from reasonpix.evaluation.recipe import load_evaluation_recipe
    from reasonpix.generation.recipe import load_recipe
    from reasonpix.generation.recipe_catalog import command_of
    from reasonpix.training.recipe import load_training_recipe

    loaders: Mapping[Command, Callable[[Path, Sequence[str]], AnyRecipe]] = {
        "generate": load_recipe,
        "train": load_training_recipe,
        "evaluate": load_evaluation_recipe,
    }
    return loaders[command_of(path)](path, overrides)


@recipes_group.command("schema")
@click.option(
    "--for",
    "command",
    type=click.Choice(["generate", "train", "evaluate"]),
    default="generate",
    show_default=True,
    help="The command that reads these recipes.",
)
def recipes_schema(command: Command) -> None:
    """Print the JSON schema of recipes, for completion and checks in an editor."""
    import json

    from reasonpix.evaluation import recipe as evaluation_recipe
    from reasonpix.generation import recipe
    from reasonpix.training import recipe as training_recipe

    modules = {"generate": recipe, "train": training_recipe, "evaluate": evaluation_recipe}
    click.echo(json.dumps(modules[command].schema(), indent=2))


@click.group("plugins")
def plugins_group() -> None:
    """List and describe plugins."""


@plugins_group.command("ls")
def plugins_ls() -> None:
    """List the installed plugins and the slots they fill."""
    from reasonpix.errors import PluginError
    from reasonpix.plugin import registry

    for name in registry.names():
        try:
            slots = ", ".join(registry.offers(name)) or "checkpoints"
            package = registry.package_of(registry.entry(name))
        except PluginError as error:
            click.echo(f"{name:20} broken: {error}")
        else:
            click.echo(f"{name:20} {slots:12} {package}")
    for name in registry.added_slots():
        try:
            registry.slot(name)
        except PluginError as error:
            click.echo(f"{name:20} broken: {error}")
        else:
            click.echo(f"{name:20} {'slot':12} {registry.slot_package(name)}")


@plugins_group.command("show")
@click.argument("name")
def plugins_show(name: str) -> None:
    """Describe plugin NAME: its module, package and options."""
    from reasonpix.plugin import registry

    entry_point = registry.entry(name)
    dist = entry_point.dist
    click.echo(f"{name}: {entry_point.value}{f' of {dist.name} {dist.version}' if dist else ''}")
    for slot, component in registry.offers(name).items():
        click.echo(f"\n{slot}: {(component.__doc__ or '').strip()}\n")
        for option, field in component.Options.model_fields.items():
            default = "required" if field.is_required() else f"default {field.default!r}"
            click.echo(f"  {option}: {field.description} ({default})")


COMMANDS = (recipes_group, plugins_group)
