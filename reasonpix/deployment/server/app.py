"""The REST API of an editing model, and its page for the browser.

```
POST /v1/edits      an image and an instruction, as a form -> the edited image, PNG
GET  /v1/model      the model, its settings, the limits
GET  /healthz       the process is alive
GET  /readyz        the model is loaded and the server is not stopping
GET  /metrics       Prometheus
GET  /openapi.json  the description of all of this
GET  /              the page, which uses nothing but this API
```

A request is admitted before its body is read, so memory is bounded by the queue's length times the
limits on bytes and pixels. Images are shrunk to the model's working size before they are queued and
results enlarged again, which gives the same pixels as `reasonpix edit`. When a client disconnects,
its edit is cancelled.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from reasonpix.deployment.server import openapi
from reasonpix.deployment.server.batcher import EditError, QueueFull, Reservation, ServerBusy
from reasonpix.deployment.server.metrics import CONTENT_TYPE
from reasonpix.deployment.server.middleware import PacedResponse, ResponseMiddleware
from reasonpix.deployment.server.request import READ_TIMEOUT_S, check_headers, read_form
from reasonpix.deployment.server.service import Service
from reasonpix.errors import ReasonpixError

_CLIENT_CLOSED = 499
"""nginx's status for a client that disconnected; counted in the metrics, never received."""
_STATUS: dict[type[ReasonpixError], int] = {QueueFull: 429, ServerBusy: 503, EditError: 500}
"""The first matching class decides; all other errors are the request's own: 422."""

_STATIC = Path(__file__).parent / "static"
_PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEAD_PATHS = {"/healthz", "/readyz", *_PAGE_FILES}
"""Answered to HEAD as to GET: what load balancers and link checkers ask for."""
_PAGE_HEADERS = {
    # Images are shown from blob: URLs. Trusted types forbid innerHTML, so no text becomes HTML.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
}


def create_app(service: Service, *, page: bool = False) -> FastAPI:
    """The API of `service`; with `page` also the page for the browser at `/`."""
    app = FastAPI(
        title="reasonpix",
        description=openapi.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.service = service
    add = functools.partial(app.add_api_route, dependencies=[Depends(_require_token)])
    add("/v1/edits", _edits, methods=["POST"], **openapi.EDITS)
    add("/v1/model", _model, methods=["GET"], **openapi.MODEL)
    add("/metrics", _metrics, methods=["GET"], **openapi.METRICS)
    app.add_api_route("/healthz", _healthz, methods=["GET"], **openapi.HEALTHZ)
    app.add_api_route("/readyz", _readyz, methods=["GET"], **openapi.READYZ)
    app.add_api_route("/openapi.json", _openapi, methods=["GET"], include_in_schema=False)
    for path, (name, media_type) in _PAGE_FILES.items() if page else ():
        endpoint = _static_file((_STATIC / name).read_bytes(), media_type)
        app.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False)
    get_only = [r for r in app.routes if isinstance(r, APIRoute) and r.path in _HEAD_PATHS]
    for route in get_only:  # the server sends the headers of GET without its body
        app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    app.add_exception_handler(ReasonpixError, _on_reasonpix_error)
    app.add_exception_handler(Exception, _on_other_error)
    return app


def with_middleware(app: FastAPI) -> ResponseMiddleware:
    """The app of `create_app` as it should be served, with its requests counted by path."""
    service: Service = app.state.service
    paths = {route.path for route in app.routes if hasattr(route, "path")}

    def count(path: str, status: int) -> None:
        label = path if path in paths else "other"
        service.metrics.requests.labels(label, str(status)).inc()

    return ResponseMiddleware(app, count)


def _get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _require_token(request: Request) -> None:
    token = _get_service(request).token
    if token is None:
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secrets.compare_digest(
        sent.strip().encode("latin-1"), token.encode()
    ):
        raise HTTPException(
            401,
            "missing or wrong token: send the header Authorization: Bearer TOKEN",
            {"WWW-Authenticate": "Bearer"},
        )


async def _reserve(request: Request) -> AsyncIterator[Reservation]:
    """A place in the queue, kept until the response is sent."""
    service = _get_service(request)
    check_headers(request, service.limits.max_bytes)
    with service.batcher.admit() as reservation:
        yield reservation


async def _edits(
    request: Request, reservation: Annotated[Reservation, Depends(_reserve)]
) -> Response:
    service = _get_service(request)
    limits = service.limits
    try:
        form = await read_form(request, limits.max_bytes, min(READ_TIMEOUT_S, limits.timeout))
    except ClientDisconnect:
        return Response(status_code=_CLIENT_CLOSED)
    edit = asyncio.create_task(service.edit(form, reservation))
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        done, _ = await asyncio.wait(
            (edit, disconnect), timeout=limits.timeout, return_when=asyncio.FIRST_COMPLETED
        )
        if edit in done:
            return PacedResponse(edit.result(), "image/png", limits.timeout)
        if disconnect in done:
            return Response(status_code=_CLIENT_CLOSED)
        raise HTTPException(
            504,
            f"the edit took longer than {limits.timeout:g} s; use fewer steps, or try again when "
            "the server is less busy",
        )
    finally:
        edit.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _model(request: Request) -> openapi.ModelInfo:
    return _get_service(request).describe_model()


async def _metrics(request: Request) -> Response:
    metrics = _get_service(request).metrics.render()
    return Response(metrics, headers={"Content-Type": CONTENT_TYPE})


async def _healthz() -> openapi.Status:
    return openapi.Status(status="alive")


async def _readyz(request: Request) -> openapi.Status:
    _get_service(request).batcher.check_ready()
    return openapi.Status(status="ready")


async def _openapi(request: Request) -> Response:
    service = _get_service(request)
    maxima: dict[str, int] = {}
    with suppress(ServerBusy):
        maxima = {"steps": service.max_steps, "resolution": service.max_resolution}
    return JSONResponse(openapi.build_document(request.app, service.token is not None, maxima))


def _static_file(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def respond() -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return respond


async def _on_reasonpix_error(request: Request, error: Exception) -> Response:
    status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 422)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, ServerBusy) else None
    return JSONResponse({"detail": str(error)}, status, headers)


async def _on_other_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "internal error; see the server's log"}, 500)
