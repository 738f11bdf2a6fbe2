"""The pages on which workers judge: plain forms, with a script for faster input.

A GET request changes nothing, so that link previews do no harm. No response reveals a method. An
answer that is sent twice, late or from two devices redirects to the next sample.
"""

from __future__ import annotations

import hashlib
import re
import socket
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import parse_qs

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException as StarletteHTTPException

from reasonpix_study.store import Study, StudyError

_MAX_FORM = 1000
"""Longest form, in bytes."""
_SMALL = 128
"""Largest side, in pixels, of images that are enlarged without smoothing."""
_FOREVER = "public, max-age=31536000, immutable"
"""Caching of files that are named by their content."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; "
    "style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}
_ASSETS = {
    name: (files("reasonpix_study") / "pages" / name).read_bytes()
    for name in ("study.css", "study.js")
}
_MEDIA_TYPES = {"study.css": "text/css", "study.js": "text/javascript"}
_VERSION = hashlib.sha256(b"".join(_ASSETS.values())).hexdigest()[:12]
_TEMPLATE = Environment(
    loader=PackageLoader("reasonpix_study", "pages"), autoescape=True, undefined=StrictUndefined
).get_template("study.html")


def _study(request: Request) -> Study:
    study: Study = request.app.state.study
    return study


def _worker(code: str, study: Annotated[Study, Depends(_study)]) -> int:
    worker = study.worker(code)
    if worker is None:
        raise HTTPException(404)
    return worker


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, the last of each name."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM:
            raise HTTPException(413)
    return {name: values[-1] for name, values in parse_qs(body.decode("latin-1")).items()}


def study_app(study: Study) -> FastAPI:
    """The application. Any number of servers may serve one study."""
    app = FastAPI(openapi_url=None)
    app.state.study = study
    app.add_api_route("/images/{name}", _image, methods=["GET"])
    for name in _ASSETS:
        app.add_api_route(f"/{name}", _asset, methods=["GET"])
    app.add_api_route("/{code}", _current, methods=["GET"])
    app.add_api_route("/{code}/start", _start, methods=["POST"])
    app.add_api_route("/{code}/answer", _answer, methods=["POST"])
    app.add_exception_handler(StarletteHTTPException, _rejected)
    app.add_exception_handler(StudyError, _unavailable)
    return app


def _image(name: str, study: Annotated[Study, Depends(_study)]) -> Response:
    if not re.fullmatch(r"[0-9a-f]{64}\.png", name):
        raise HTTPException(404)
    try:
        data = study.image(name).read_bytes()
    except FileNotFoundError as error:
        raise HTTPException(404) from error
    # Without the file's date: files of one method might have been written together.
    return _immutable(data, "image/png")


def _asset(request: Request) -> Response:
    name = request.url.path.rpartition("/")[2]
    return _immutable(_ASSETS[name], _MEDIA_TYPES[name])


def _current(
    code: str, worker: Annotated[int, Depends(_worker)], study: Annotated[Study, Depends(_study)]
) -> Response:
    session = study.session(worker)
    small = session.task is not None and max(session.task.size) <= _SMALL
    view = "judge" if session.task else "end" if session.started else "begin"
    return _page(view, code=code, session=session, small=small)


def _start(
    code: str, worker: Annotated[int, Depends(_worker)], study: Annotated[Study, Depends(_study)]
) -> Response:
    study.start(worker)
    return _redirect(code)


def _answer(
    code: str,
    worker: Annotated[int, Depends(_worker)],
    study: Annotated[Study, Depends(_study)],
    form: Annotated[dict[str, str], Depends(_form)],
) -> Response:
    try:
        seconds = float(form["seconds"]) if "seconds" in form else None
        study.answer(worker, int(form["number"]), int(form["position"]), seconds)
    except (KeyError, ValueError, OverflowError) as error:
        raise HTTPException(400) from error
    return _redirect(code)


def _rejected(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _page("unknown" if error.status_code == 404 else "rejected", error.status_code)


def _unavailable(request: Request, error: Exception) -> Response:
    return _page("unavailable", 503)


def _page(view: str, status: int = 200, **context: Any) -> Response:
    content = _TEMPLATE.render(view=view, version=_VERSION, **context)
    return Response(content, status, _HEADERS, "text/html")


def _redirect(code: str) -> Response:
    """To the worker's current page; relative, so that it works behind a path prefix."""
    return Response(status_code=303, headers={**_HEADERS, "Location": f"../{code}"})


def _immutable(data: bytes, media_type: str) -> Response:
    return Response(data, 200, {**_HEADERS, "Cache-Control": _FOREVER}, media_type)


def serve_study(study: Study, listening: socket.socket) -> None:
    """Serve until a signal stops it; the signal is then raised again for the caller."""
    config = uvicorn.Config(
        study_app(study),
        log_level="warning",
        access_log=False,  # it would hold the codes
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listening])
