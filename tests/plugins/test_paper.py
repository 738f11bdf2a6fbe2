"""The commands that make the paper's table and figures are ones that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from reasonpix_mini.paper import Step, figure15, settings, table3

from reasonpix.cli.main import cli
from reasonpix.cli.recipes import load_any
from reasonpix.generation.recipe_catalog import locate

STEPS = [*table3(), *figure15(), *settings()]


def words(step: Step) -> list[str]:
    return list(step.command[3:]) if step.command[2] == "reasonpix" else []


@pytest.mark.parametrize("step", STEPS, ids=lambda step: " ".join(step.command[2:5]))
def test_each_step_is_a_command_with_a_recipe_that_checks(step: Step) -> None:
    if not (said := words(step)):
        return  # a script of the package
    command = cli.commands[said[0]]
    # A command keeps the names of its option for help as its first parent has them.
    parent = click.Context(cli, **cli.context_settings)
    with command.make_context(said[0], said[1:], parent) as context:
        given = context.params
    if "recipe" in given:
        load_any(locate(given["recipe"]), given["overrides"])


@pytest.mark.parametrize("steps", [table3, figure15, settings])
def test_what_a_step_reads_was_made_before(steps: Callable[[], Iterator[Step]]) -> None:
    made: set[Path] = set()
    for step in steps():
        said = words(step)
        if said[:1] == ["evaluate"]:
            recipe = load_any(locate(said[1]))
            read = [recipe.benchmark.path, *(use.options.model for use in recipe.methods.values())]
            paths = [Path(it) for it in read if it.startswith("runs/")]
            assert paths and set(paths) <= made
        made.add(step.result)
