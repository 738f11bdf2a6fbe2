"""The server's life: it listens, loads the model, serves, and stops in order.

The socket answers from the start, and says by /readyz when edits are taken. The first SIGTERM or
SIGINT lets it take no more and finish what it has, the second one ends it at once.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI
from PIL import Image

from reasonpix.deployment.server.app import Service, create_app, front
from reasonpix.errors import require_extra

_SENT_S = 5
"""Seconds that are added to the time of an edit for all that has to be sent."""


class _Server(uvicorn.Server):
    """Signals are passed on to `told`, instead of ending it with edits under way."""

    told: Callable[[], object]
    signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals > 1:
            os.write(2, b"stopped at once\n")
            os._exit(128 + sig)
        self.told()


def serve(
    service: Service,
    listening: socket.socket,
    *,
    page: bool,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal ends it; `ready` is called when edits are taken.

    With `page` there is one for the browser at /. Raises what kept the model from being loaded.
    """
    # Their size is checked here, and a warning would only be noise.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    asyncio.run(_serve(service, listening, page, ready))
    service.pixels.shutdown(wait=False, cancel_futures=True)
    if not service.batcher.close():
        # It loads, or is amid a step: the interpreter's own end would wait, or crash.
        sys.stdout.flush()
        os._exit(0)


def config(app: FastAPI) -> uvicorn.Config:
    """How the app of `create_app` is served."""
    return uvicorn.Config(
        front(app),
        http="h11",  # it bounds what headers may take
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )


async def _serve(
    service: Service, listening: socket.socket, page: bool, ready: Callable[[], None]
) -> None:
    app = create_app(service)
    server = _Server(config(app))
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    server.told = functools.partial(loop.call_soon_threadsafe, stop.set)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    stopped = asyncio.create_task(stop.wait())
    loaded = asyncio.wrap_future(service.batcher.model)
    end_page: Callable[[], None] = lambda: None  # noqa: E731
    async with AsyncExitStack() as stack:
        try:
            await asyncio.wait((running, stopped, loaded), return_when=asyncio.FIRST_COMPLETED)
            if loaded.done() and not stop.is_set():
                loaded.result()
                if page:
                    end_page = await asyncio.to_thread(_mount, app, service)
                    await stack.enter_async_context(app.router.lifespan_context(app))
                ready()
                await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
            await _finish(service)
        finally:
            end_page()
            server.should_exit = True
            await running
            stopped.cancel()


async def _finish(service: Service) -> None:
    """Take no more edits, and wait for those that are held: their own time limit bounds it."""
    service.batcher.stop()
    with suppress(TimeoutError):
        async with asyncio.timeout(service.limits.timeout + _SENT_S):
            while service.batcher.held:
                await asyncio.sleep(0.05)


def _mount(app: FastAPI, service: Service) -> Callable[[], None]:
    with require_extra("serve"):
        from reasonpix.deployment.server import ui

    return ui.mount(
        app,
        service.edit,
        service.model.settings,
        service.name,
        token=service.token,
        max_bytes=service.limits.max_bytes,
        max_steps=service.max_steps,
        read=service.read,
    )
