"""The command line. Plugins that add commands may use the names below."""

from typing import TYPE_CHECKING

from reasonpix.core.lazy import lazy_exports

__all__ = ["STOPPED", "graceful_shutdown", "host_option", "port_option"]

if TYPE_CHECKING:
    from reasonpix.cli.console import STOPPED, graceful_shutdown
    from reasonpix.cli.options import host_option, port_option
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "console": ("STOPPED", "graceful_shutdown"),
            "options": ("host_option", "port_option"),
        },
    )
