"""HTTP behaviour common to all responses: headers, counts, early answers, slow readers."""

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
"""After answering a request early, read the rest of it for at most this long."""
_LINGER_BYTES = 2**26
_CHUNK_BYTES = 64 * 1024

Count = Callable[[str, int], None]
"""Called with the path and status of each request."""


class ResponseMiddleware:
    """Adds security headers to the responses of `app` and counts them.

    A request may be answered before its body was read. The rest of it is then read and discarded
    for a while: many clients send everything before they read the response, and would otherwise see
    only a broken connection.
    """

    def __init__(self, app: ASGIApp, count: Count) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI request."""
        assert scope["type"] == "http"
        headers = dict(scope["headers"])
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        awaits_continue = b"expect" in headers  # the client sends its body only on request
        status = 499

        async def receive_body() -> Message:
            nonlocal unread, awaits_continue
            awaits_continue = False
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                unread = False
            return message

        async def send_response(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _add_headers(message["headers"], unread)}
            elif unread and not awaits_continue and status != 408 and not message.get("more_body"):
                await send({**message, "more_body": True})
                await _discard(receive_body)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            await self._app(scope, receive_body, send_response)
        finally:
            self._count(scope["path"], status)


async def _discard(receive: Receive) -> None:
    remaining = _LINGER_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while remaining > 0:
                message = await receive()
                remaining -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


def _add_headers(headers: list[tuple[bytes, bytes]], close: bool) -> list[tuple[bytes, bytes]]:
    """Add the default headers that the response does not set itself."""
    names = {name.lower() for name, _ in headers}
    headers = [*headers, *(item for item in _HEADERS.items() if item[0] not in names)]
    return [*headers, (b"connection", b"close")] if close else headers


class PacedResponse(Response):
    """Sends its body in chunks as the client reads them, for at most `seconds`; buffers nothing."""

    def __init__(self, content: bytes, media_type: str, seconds: float) -> None:
        super().__init__(content, media_type=media_type)
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; after `seconds` the connection is closed."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        body = memoryview(self.body)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                for start in range(0, len(body), _CHUNK_BYTES):
                    chunk = bytes(body[start : start + _CHUNK_BYTES])
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body"})
