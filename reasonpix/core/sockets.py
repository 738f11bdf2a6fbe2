"""Bind the listening socket before any slow work, so that a port conflict shows immediately."""

from __future__ import annotations

import socket

from reasonpix.errors import ReasonpixError


def listen(host: str, port: int, backlog: int = 128) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one. Raises `ReasonpixError` if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        raise ReasonpixError(
            f"{host}:{port} cannot be served: {error}; choose others with --host and --port"
        ) from error


def url_of(host: str, listening: socket.socket) -> str:
    """The URL of a listening socket, such as http://127.0.0.1:8000."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"
