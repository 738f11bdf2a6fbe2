"""The REST API of an editing model.

```
POST /v1/edits      an image and an instruction, as a form -> the edited image, PNG
GET  /v1/model      what is served, its settings, the limits
GET  /healthz       the process lives
GET  /readyz        the model is loaded, and the server is not stopping
GET  /metrics       Prometheus
GET  /openapi.json  all of this
```

A request is admitted before it is read, so that what waits is bounded: by slots, by bytes, by
pixels. Its image is shrunk to what the model sees before it waits, and the result enlarged again:
the same pixels as `reasonpix edit` gives. A client that leaves takes its edit with it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, BinaryIO

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL.Image import Image
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from reasonpix.core.images import encode_png, resized
from reasonpix.deployment.server import openapi
from reasonpix.deployment.server.batcher import Batcher, EditError, Full, Reservation, ServerBusy
from reasonpix.deployment.server.metrics import CONTENT_TYPE, Metrics
from reasonpix.deployment.server.middleware import PacedResponse, ResponseMiddleware
from reasonpix.deployment.server.request import (
    READ_S,
    EditForm,
    check_head,
    checked,
    checked_values,
    read_form,
    read_image,
)
from reasonpix.errors import ReasonpixError

if TYPE_CHECKING:
    from reasonpix.editing.config import SamplingSettings
    from reasonpix.editing.pipeline import EditTask, ReasonPix2Pix

_GONE = 499
"""The status that is counted for clients that left; nobody gets it."""
_STATUS: dict[type[ReasonpixError], int] = {Full: 429, ServerBusy: 503, EditError: 500}
"""Of errors that are not the request's own, the first that fits."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for; None is as the model suggests."""

    queue: int = 64
    """Edits that are held at once, from admission until they are sent."""
    timeout: float = 300
    """Seconds for one edit, and for sending it."""
    max_bytes: int = 20 * 2**20
    max_pixels: int = 25_000_000
    max_steps: int | None = None
    max_resolution: int | None = None


class Service:
    """An editing model and all that a server knows of it. Safe to call from any thread."""

    def __init__(
        self,
        load: Callable[[], ReasonPix2Pix],
        name: str,
        *,
        limits: Limits = Limits(),
        wait: float = 0.01,
        token: str | None = None,
    ) -> None:
        self.name = name
        self.limits = limits
        self.token = token
        self.metrics = Metrics()
        self.batcher = Batcher(load, limit=limits.queue, wait=wait, observer=self.metrics)
        self.metrics.watch(self.batcher)
        # What is decoded at once is bounded by their number.
        self.pixels = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "pixels")

    @property
    def model(self) -> ReasonPix2Pix:
        """The model. Raises `ServerBusy` before it is loaded."""
        self.batcher.check_ready()
        return self.batcher.model.result()

    @property
    def max_steps(self) -> int:
        """By default 100, the steps of InstructPix2Pix, or what the model takes by itself."""
        return self.limits.max_steps or max(100, self.model.settings.num_inference_steps)

    @property
    def max_resolution(self) -> int:
        """By default that of the model: time and memory grow with its square, or faster."""
        return self.limits.max_resolution or self.model.settings.resolution

    def facts(self) -> openapi.ModelFacts:
        """Raises `ServerBusy` before the model is loaded."""
        model, limits = self.model, self.limits
        return openapi.ModelFacts(
            name=self.name,
            runtime=model.runtime,
            device=str(model.device),
            settings=model.settings.model_dump(),
            limits={
                "queue": limits.queue,
                "timeout": limits.timeout,
                "max_bytes": limits.max_bytes,
                "max_pixels": limits.max_pixels,
                "max_steps": self.max_steps,
                "max_resolution": self.max_resolution,
            },
        )

    def resolve(self, form: EditForm) -> SamplingSettings:
        """The settings that are asked for. Raises `ReasonpixError` beyond the limits."""
        if form.steps and form.steps > self.max_steps:
            raise ReasonpixError(f"steps: {form.steps} exceed the limit of {self.max_steps}")
        if form.resolution and form.resolution > self.max_resolution:
            raise ReasonpixError(
                f"resolution: {form.resolution} exceeds the limit of {self.max_resolution}"
            )
        return self.model.resolve_settings(
            num_inference_steps=form.steps,
            guidance_scale=form.guidance_scale,
            image_guidance_scale=form.image_guidance_scale,
            resolution=form.resolution,
        )

    def seen(self, file: BinaryIO, settings: SamplingSettings) -> tuple[Image, tuple[int, int]]:
        """An encoded image in the size in which the model sees it, and the size that it has.

        Raises `HTTPException`.
        """
        image = read_image(file.read(), self.limits.max_pixels)
        return self.shrunk(image, settings), image.size

    def shrunk(self, image: Image, settings: SamplingSettings) -> Image:
        """An RGB image in the size in which the model sees it: what waits shall be small."""
        return resized(image, self.model.working_size(image.size, settings.resolution))

    def edit(
        self,
        image: Image,
        instruction: str,
        seed: int,
        guidance_scale: float,
        image_guidance_scale: float,
        steps: int,
    ) -> Image:
        """An edit, for the page: it blocks. Raises `ReasonpixError`."""
        values = {
            "instruction": instruction,
            "seed": seed,
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
            "steps": steps,
        }
        form = checked_values(values)
        with self.batcher.admit() as slot:
            settings = self.resolve(form)
            future = slot.submit(task(self.shrunk(image, settings), form), settings)
            try:
                edited = future.result(self.limits.timeout)
            except TimeoutError as error:
                raise ReasonpixError(self.late) from error
        return resized(edited, image.size)

    def read(self, data: bytes) -> Image:
        """An encoded image, for the page: it blocks. Raises `ReasonpixError`."""
        try:
            return self.pixels.submit(read_image, data, self.limits.max_pixels).result()
        except HTTPException as error:
            raise ReasonpixError(error.detail) from error

    @property
    def late(self) -> str:
        """What is said where an edit takes too long."""
        return (
            f"the edit was not made within {self.limits.timeout:g} s; ask for fewer steps, or try "
            "again when less is asked of the server"
        )


def task(image: Image, form: EditForm) -> EditTask:
    """What the model is given."""
    from reasonpix.editing.pipeline import EditTask

    return EditTask(image, form.instruction, form.seed)


def create_app(service: Service) -> FastAPI:
    """The API of `service`."""
    app = FastAPI(
        title="reasonpix",
        description=openapi.ABOUT,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.service = service
    add = functools.partial(app.add_api_route, dependencies=[Depends(_authorized)])
    add("/v1/edits", _edits, methods=["POST"], **openapi.EDITS)
    add("/v1/model", _model, methods=["GET"], **openapi.MODEL)
    add("/metrics", _metrics, methods=["GET"], **openapi.METRICS)
    app.add_api_route("/healthz", _healthz, methods=["GET"], **openapi.HEALTHZ)
    app.add_api_route("/readyz", _readyz, methods=["GET"], **openapi.READYZ)
    app.add_api_route("/openapi.json", _openapi, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(ReasonpixError, _explained)
    app.add_exception_handler(Exception, _failed)
    return app


def front(app: FastAPI) -> ResponseMiddleware:
    """The app as it is served."""
    service: Service = app.state.service
    paths = {getattr(route, "path", "") for route in app.routes}

    def count(path: str, status: int) -> None:
        known = path if path in paths and path else "other"
        service.metrics.requests.labels(known, str(status)).inc()

    return ResponseMiddleware(app, count)


def _of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _authorized(request: Request) -> None:
    token = _of(request).token
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secrets.compare_digest(
        given.strip().encode("latin-1"), token.encode()
    ):
        raise HTTPException(
            401,
            "a token is needed: send the header Authorization: Bearer TOKEN",
            {"WWW-Authenticate": "Bearer"},
        )


async def _slot(request: Request) -> AsyncIterator[Reservation]:
    """Room for the request, kept until its answer is sent."""
    service = _of(request)
    check_head(request, service.limits.max_bytes)
    with service.batcher.admit() as slot:
        yield slot


async def _edits(request: Request, slot: Annotated[Reservation, Depends(_slot)]) -> Response:
    service, limits = _of(request), _of(request).limits
    try:
        form = await read_form(request, limits.max_bytes, min(READ_S, limits.timeout))
    except ClientDisconnect:
        return Response(status_code=_GONE)
    work = asyncio.create_task(_edited(service, slot, form))
    gone = asyncio.create_task(_left(request))
    try:
        done, _ = await asyncio.wait(
            (work, gone), timeout=limits.timeout, return_when=asyncio.FIRST_COMPLETED
        )
        if work in done:
            return work.result()
        if gone in done:
            return Response(status_code=_GONE)
        raise HTTPException(504, service.late)
    finally:
        work.cancel()
        gone.cancel()


async def _left(request: Request) -> None:
    """Ends when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _edited(service: Service, slot: Reservation, form: FormData) -> Response:
    run = asyncio.get_running_loop().run_in_executor
    try:
        upload, asked = checked(form, service.limits.max_bytes)
        settings = service.resolve(asked)
        small, size = await run(service.pixels, service.seen, upload.file, settings)
    finally:
        await form.close()
    edited = await asyncio.wrap_future(slot.submit(task(small, asked), settings))
    png = await run(service.pixels, lambda: encode_png(resized(edited, size)))
    return PacedResponse(png, "image/png", service.limits.timeout)


async def _model(request: Request) -> openapi.ModelFacts:
    return _of(request).facts()


async def _metrics(request: Request) -> Response:
    return Response(_of(request).metrics.page(), headers={"Content-Type": CONTENT_TYPE})


async def _healthz() -> openapi.Status:
    return openapi.Status(status="alive")


async def _readyz(request: Request) -> openapi.Status:
    _of(request).batcher.check_ready()
    return openapi.Status(status="ready")


async def _openapi(request: Request) -> Response:
    service = _of(request)
    maxima: dict[str, int] = {}
    with suppress(ServerBusy):
        maxima = {"steps": service.max_steps, "resolution": service.max_resolution}
    return JSONResponse(openapi.document(request.app, service.token is not None, maxima))


async def _explained(request: Request, error: Exception) -> Response:
    status = next((it for kind, it in _STATUS.items() if isinstance(error, kind)), 422)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, ServerBusy) else None
    return JSONResponse({"detail": str(error)}, status, headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "the server failed; its log says why"}, 500)
