"""Commands that installed packages add, through entry points of the group `reasonpix.commands`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

import click

from reasonpix.errors import PluginError

GROUP = "reasonpix.commands"
PACKAGES = {"study": "reasonpix-study"}
"""Commands of packages that may be missing, by name."""


class PluggableGroup(click.Group):
    """A group to which packages add commands. Its own commands cannot be replaced."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted. No package is imported."""
        return sorted({*super().list_commands(ctx), *entry_points(group=GROUP).names})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, and warn of those that packages cannot replace."""
        for name in sorted(entry_points(group=GROUP).names & self.commands.keys()):
            packages = _packages(entry_points(group=GROUP, name=name))
            click.echo(
                f"command {name!r} of package {packages} is ignored: reasonpix has a command of "
                "this name",
                err=True,
            )
        super().format_commands(ctx, formatter)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; it is imported if a package adds it."""
        own = super().get_command(ctx, cmd_name)
        if own:
            return own
        offers = list(entry_points(group=GROUP, name=cmd_name))
        if offers:
            return _load(cmd_name, offers)
        if cmd_name in PACKAGES:
            ctx.fail(f"no such command {cmd_name!r}; install {PACKAGES[cmd_name]}")
        return None


def _packages(offers: Iterable[EntryPoint]) -> str:
    return " and ".join(sorted({offer.dist.name if offer.dist else "?" for offer in offers}))


def _load(name: str, offers: list[EntryPoint]) -> click.Command:
    from reasonpix.core.api_version import check_api_version

    packages = _packages(offers)
    if len({offer.value for offer in offers}) > 1:
        return _broken(name, f"command {name!r} is offered by {packages}: uninstall one of them")
    try:
        check_api_version(offers[0], "command")
    except PluginError as error:
        return _broken(name, str(error))
    try:
        command = offers[0].load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may call sys.exit when it is imported
        problem = f"{type(error).__name__}: {error}"
    else:
        if isinstance(command, click.Command):
            return command
        problem = f"{offers[0].value} is not a click command"
    return _broken(name, f"command {name!r} of package {packages} is broken: {problem}")


def _broken(name: str, message: str) -> click.Command:
    """A stand-in that explains why the command cannot run; `--help` of the group still works."""

    def fail() -> NoReturn:
        raise PluginError(message)

    return click.Command(
        name,
        callback=fail,
        short_help=f"({message})",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
