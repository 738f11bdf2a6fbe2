"""The server's manners in HTTP, around its app: headers, counts, early answers, slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
_LINGER_S = 5
"""Seconds for which the rest of a request is read that was answered before its end."""
_LINGER_BYTES = 2**26
_PIECE = 64 * 1024

Count = Callable[[str, int], None]
"""Told of each request's path and status."""


class ResponseMiddleware:
    """Passes requests to `app`, and sees to what all answers have in common.

    A request may be answered before it was read. The rest of it is then read and thrown away, for a
    while: many clients send all before they look at the answer, and would see nothing but a broken
    connection.
    """

    def __init__(self, app: ASGIApp, count: Count) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        assert scope["type"] == "http"
        headers = dict(scope["headers"])
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        held_back = b"expect" in headers  # such a client sends its body when it is asked for
        status = 499

        async def received() -> Message:
            nonlocal unread, held_back
            held_back = False
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                unread = False
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _complete(message["headers"], unread)}
            elif unread and not held_back and status != 408 and not message.get("more_body"):
                await send({**message, "more_body": True})
                await _discard(received)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            await self._app(scope, received, sent)
        finally:
            self._count(scope["path"], status)


async def _discard(receive: Receive) -> None:
    left = _LINGER_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


def _complete(headers: list[tuple[bytes, bytes]], closing: bool) -> list[tuple[bytes, bytes]]:
    """The headers with ours, where they are not the page's, which has a policy of its own."""
    given = {name.lower() for name, _ in headers}
    if b"content-security-policy" not in given:
        headers = [*headers, *((name, it) for name, it in _HEADERS.items() if name not in given)]
    return [*headers, (b"connection", b"close")] if closing else headers


class PacedResponse(Response):
    """A body that is sent as it is taken, within `seconds`: what is not taken is not buffered."""

    def __init__(self, content: bytes, media_type: str, seconds: float) -> None:
        super().__init__(content, media_type=media_type)
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says. The connection ends with the time."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        body = memoryview(self.body)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                for start in range(0, len(body), _PIECE):
                    piece = bytes(body[start : start + _PIECE])
                    message = {"type": "http.response.body", "body": piece, "more_body": True}
                    await send(message)
                await send({"type": "http.response.body"})
