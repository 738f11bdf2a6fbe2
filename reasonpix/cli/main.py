"""The command line. A command imports what is heavy when it is called, so that help is fast."""

from __future__ import annotations

from typing import Any

import click

from reasonpix.cli import edit, evaluate, export, generate, recipes, runs, serve, train
from reasonpix.cli.plugin_commands import PluggableGroup
from reasonpix.core.network import exempt_this_machine


class _Commands(PluggableGroup):
    """Prints the package's own errors without a traceback, unless --debug asks for it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from reasonpix.errors import ReasonpixError, RecipeError

            if ctx.params.get("debug") or not isinstance(error, ReasonpixError):
                raise
            click.echo(str(error), err=True)
            ctx.exit(2 if isinstance(error, RecipeError) else 1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reasonpix")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def cli(debug: bool) -> None:
    """Make datasets for reasoning-based image editing; train, evaluate and serve models on them."""
    exempt_this_machine()


for module in (generate, runs, train, edit, evaluate, export, serve, recipes):
    for command in module.COMMANDS:
        cli.add_command(command)
