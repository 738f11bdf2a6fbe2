"""A socket to serve from, made before anything slow is done: a taken port is told at once."""

from __future__ import annotations

import socket

from reasonpix.errors import ReasonpixError


def listen(host: str, port: int, backlog: int = 128) -> socket.socket:
    """A socket that takes connections; port 0 is any free one. Raises `ReasonpixError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        raise ReasonpixError(
            f"{host}:{port} cannot be served: {error}; name others by --host and --port"
        ) from error


def address(host: str, listening: socket.socket) -> str:
    """The URL that leads to it, such as http://127.0.0.1:8000."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"
