"""The life of the server process: listen, load the model, serve, shut down gracefully.

The socket answers from the start; `/readyz` says when edits are accepted. The first SIGTERM or
SIGINT stops new edits and finishes those already admitted; the second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI
from PIL import Image

from reasonpix.deployment.server.app import create_app, with_middleware
from reasonpix.deployment.server.service import Service

_SEND_S = 5
"""Seconds allowed for sending the last responses, on top of the time limit of an edit."""


class _Server(uvicorn.Server):
    """Calls `on_signal` for the first signal instead of dropping the edits under way."""

    on_signal: Callable[[], object]
    signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals > 1:
            os.write(2, b"stopped at once\n")
            os._exit(128 + sig)
        self.on_signal()


def run_server(
    service: Service,
    listener: socket.socket,
    *,
    page: bool,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve on `listener` until a signal arrives; `ready` is called once edits are accepted.

    `page` adds the page for the browser at `/`. Raises what loading the model raised.
    """
    # The size of images is checked when they are read; Pillow's warning would only be noise.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    asyncio.run(_serve(service, listener, page, ready))
    service.image_threads.shutdown(wait=False, cancel_futures=True)
    if not service.batcher.close():
        # The thread is loading the model or inside a step: a normal exit would wait, or crash.
        sys.stdout.flush()
        os._exit(0)


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the app of `create_app`."""
    return uvicorn.Config(
        with_middleware(app),
        http="h11",  # it limits the size of headers
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )


async def _serve(
    service: Service, listener: socket.socket, page: bool, ready: Callable[[], None]
) -> None:
    server = _Server(uvicorn_config(create_app(service, page=page)))
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    server.on_signal = lambda: loop.call_soon_threadsafe(stop.set)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    stopped = asyncio.create_task(stop.wait())
    loaded = asyncio.wrap_future(service.batcher.model)
    try:
        await asyncio.wait((running, stopped, loaded), return_when=asyncio.FIRST_COMPLETED)
        if loaded.done() and not stop.is_set():
            loaded.result()
            ready()
            await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
        await _finish_edits(service)
    finally:
        server.should_exit = True
        await running
        stopped.cancel()


async def _finish_edits(service: Service) -> None:
    """Admit no more edits and wait for the admitted ones, which their time limit bounds."""
    service.batcher.stop()
    with suppress(TimeoutError):
        async with asyncio.timeout(service.limits.timeout + _SEND_S):
            while service.batcher.admitted:
                await asyncio.sleep(0.05)
