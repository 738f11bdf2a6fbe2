"""What reaches Gradio of a browser's requests, and what its answers carry.

Gradio offers more than the page needs: an API of its own, a proxy, downloads of addresses that a
client names, files of any path when it is mounted. So only the paths that the page itself asks for
reach it, in requests of bounded size whose files are uploads; and a browser is told to load nothing
from elsewhere.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DISK_BYTES = 2 * 2**30
"""What uploads and results may take; the oldest go first."""

_CALL_BYTES = 64 * 1024
"""Of a call of the page: an instruction, a few numbers, and the names of files."""
_HEADERS = {
    # Gradio starts by inline scripts and styles.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_PAGE = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/login", "/logout")
_FILES = ("/assets/", "/static/", "/svelte/")
_CALLS = ("queue/join", "queue/data", "upload", "upload_progress", "startup-events", "cancel")
_SHOWN_FILE = "/gradio_api/file="


class PageRoute(Mount):
    """Matches only what the page asks for: all else is for the app to answer, with 404 or 405."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As Starlette's, of the page's paths."""
        if scope["type"] == "http" and _is_of_the_page(_path(scope)):
            return super().matches(scope)
        return Match.NONE, {}


def _path(scope: Scope) -> str:
    """That of a request, below the path that a proxy serves the app at."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _is_of_the_page(path: str) -> bool:
    call = path.removeprefix("/gradio_api/")
    return (
        path in _PAGE
        or path.startswith((*_FILES, _SHOWN_FILE))
        or (call != path and (call in _CALLS or call.startswith("heartbeat/")))
    )


class Gate:
    """Gradio's app behind checks of what it is sent, and with headers on what it sends.

    Uploads lie in `folder`, and have `max_bytes` at most.
    """

    def __init__(self, app: ASGIApp, folder: Path, max_bytes: int) -> None:
        self._app = app
        self._folder = folder
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        app: ASGIApp = self._app
        path = _path(scope)
        if path.startswith(_SHOWN_FILE) and not self._is_ours(path.removeprefix(_SHOWN_FILE)):
            app = _answer(403, "this file is not of the page")
        elif scope["method"] == "POST":
            upload = path == "/gradio_api/upload"
            limit = (self._max_bytes if upload else 0) + _CALL_BYTES
            size = dict(scope["headers"]).get(b"content-length", b"")
            if not size.isdigit():
                app = _answer(411, "Content-Length is missing: send it")
            elif int(size) > limit:
                app = _answer(413, f"{int(size)} bytes exceed the limit of {limit}")
            elif upload:
                await asyncio.to_thread(make_room, self._folder, limit)
            else:
                body = await _body(receive)
                receive = _replayed(body, receive)
                if path == "/gradio_api/queue/join" and not self._is_call(body):
                    app = _answer(400, "this is no call of the page")
        await app(scope, receive, send_with_headers)

    def _is_ours(self, path: Any) -> bool:
        """Whether a file that a client names is one that was uploaded or made here."""
        if not isinstance(path, str) or "\0" in path:
            return False
        return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self._folder)

    def _is_call(self, body: bytes) -> bool:
        """Whether the values are plain, and files uploads: Gradio would fetch any other."""
        try:
            values = json.loads(body)["data"]
            return all(
                self._is_ours(it.get("path")) if isinstance(it, dict) else not isinstance(it, list)
                for it in values
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return False


def _answer(status: int, words: str) -> ASGIApp:
    return JSONResponse({"detail": f"page: {words}"}, status)


async def _body(receive: Receive) -> bytes:
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    first = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(first, None) or await receive()

    return replay


def make_room(folder: Path, size: int) -> None:
    """Remove the oldest files where `size` bytes more would be too many."""
    files = [(it.stat(), it) for it in folder.rglob("*") if it.is_file()]
    free = DISK_BYTES - sum(status.st_size for status, _ in files)
    for status, file in sorted(files, key=lambda found: found[0].st_mtime):
        if free >= size:
            break
        file.unlink(missing_ok=True)
        free += status.st_size
