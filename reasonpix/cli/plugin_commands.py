"""Commands that installed packages add, through entry points of the group `reasonpix.commands`."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

import click

GROUP = "reasonpix.commands"
PACKAGES = {"study": "reasonpix-study"}
"""Commands of packages that may be missing, by name."""


class PluggableGroup(click.Group):
    """A group to which packages add commands. Its own commands cannot be replaced."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted. No package is imported."""
        return sorted({*super().list_commands(ctx), *entry_points(group=GROUP).names})

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


def _load(name: str, offers: list[EntryPoint]) -> click.Command:
    packages = " and ".join(sorted({offer.dist.name if offer.dist else "?" for offer in offers}))
    if len({offer.value for offer in offers}) > 1:
        return _broken(name, f"command {name!r} is offered by {packages}: uninstall one of them")
    try:
        command = offers[0].load()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        if isinstance(command, click.Command):
            return command
        problem = f"{offers[0].value} is not a click command"
    return _broken(name, f"command {name!r} of package {packages} is broken: {problem}")


def _broken(name: str, message: str) -> click.Command:
    """A stand-in that explains why the command cannot run; `--help` of the group still works."""

    def fail() -> NoReturn:
        from reasonpix.errors import PluginError

        raise PluginError(message)

    return click.Command(
        name,
        callback=fail,
        short_help=f"({message})",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
