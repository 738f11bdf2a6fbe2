"""The OpenAPI description: every route, every response it can give, the limits of requests."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from reasonpix.core.images import FORMATS
from reasonpix.deployment.server.request import EditFields

DESCRIPTION = "Edit images with one model, by instructions."

_MEDIA_TYPES = {"JPEG": "image/jpeg", "PPM": "image/x-portable-pixmap"}


class PngResponse(Response):
    """A PNG."""

    media_type = "image/png"


class MetricsResponse(Response):
    """Metrics in the Prometheus text format."""

    media_type = "text/plain"


class Error(BaseModel):
    """Why there is no edit."""

    detail: str = Field(description="Where, what, and how to fix it")


class Status(BaseModel):
    """The state of the server."""

    status: str


class ModelInfo(BaseModel):
    """The model, its settings and the limits."""

    name: str
    runtime: str
    device: str
    settings: dict[str, int | float] = Field(description="Defaults for what a request leaves out")
    limits: dict[str, int | float] = Field(description="The largest values a request may have")


_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def _error(description: str, **headers: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": _ERROR, "headers": headers}


def _busy(description: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1}
    return _error(
        description, **{"Retry-After": {"description": "Seconds to wait", "schema": schema}}
    )


_UNAUTHORIZED = {
    401: _error(
        "The token is missing or wrong",
        **{"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}}},
    )
}
_FAILED = {500: _error("Internal error; see the server's log")}


def _request_body() -> dict[str, Any]:
    schema = EditFields.model_json_schema()
    media_types = ", ".join(_MEDIA_TYPES.get(name, f"image/{name.lower()}") for name in FORMATS)
    image = {
        "type": "string",
        "format": "binary",
        "description": f"A file: {', '.join(FORMATS)}; EXIF rotation is applied",
    }
    for field in schema["properties"].values():
        # A form has no null: fields are left out instead.
        if options := field.pop("anyOf", None):
            field |= options[0]
            field.pop("default", None)
    form = {
        "type": "object",
        "additionalProperties": False,
        "required": ["image", *schema["required"]],
        "properties": {"image": image, **schema["properties"]},
    }
    content = {"schema": form, "encoding": {"image": {"contentType": media_types}}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": content}}}


EDITS: dict[str, Any] = {
    "operation_id": "edit",
    "summary": "Edit an image",
    "description": "The same image, fields and model always give the same pixels.",
    "response_class": PngResponse,
    "responses": {
        200: {
            "description": "The edited image, in the size of the (upright) input",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        },
        400: _error("The body is not a valid form"),
        **_UNAUTHORIZED,
        408: _error("The request did not arrive in time"),
        413: _error("The image has too many bytes or pixels"),
        415: _error("The request is not multipart/form-data"),
        422: _error("A field is wrong, or the image cannot be read or edited"),
        429: _busy("The queue is full"),
        **_FAILED,
        503: _busy("The model is loading, the server is shutting down, or memory ran out"),
        504: _error("The edit took too long"),
    },
    "openapi_extra": _request_body(),
}
MODEL: dict[str, Any] = {
    "operation_id": "model",
    "summary": "The model, its settings and the limits",
    "response_model": ModelInfo,
    "responses": {
        **_UNAUTHORIZED,
        **_FAILED,
        503: _busy("The model is loading or the server is shutting down"),
    },
}
METRICS: dict[str, Any] = {
    "operation_id": "metrics",
    "summary": "Metrics for Prometheus",
    "response_class": MetricsResponse,
    "responses": {**_UNAUTHORIZED, **_FAILED},
}
HEALTHZ: dict[str, Any] = {
    "operation_id": "healthz",
    "summary": "Whether the process is alive",
    "response_model": Status,
    "responses": _FAILED,
}
READYZ: dict[str, Any] = {
    "operation_id": "readyz",
    "summary": "Whether edits are accepted",
    "response_model": Status,
    "responses": {**_FAILED, 503: _busy("The model is loading or the server is shutting down")},
}


def build_document(app: FastAPI, has_token: bool, maxima: dict[str, int]) -> dict[str, Any]:
    """The OpenAPI document; `maxima` are the largest values of form fields, where known."""
    document = deepcopy(app.openapi())
    document["components"]["schemas"]["Error"] = Error.model_json_schema()
    if has_token:
        scheme = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"token": scheme}
        for operations in document["paths"].values():
            for operation in operations.values():
                if "401" in operation["responses"]:
                    operation["security"] = [{"token": []}]
    body = document["paths"]["/v1/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    for name, maximum in maxima.items():
        body["schema"]["properties"][name]["maximum"] = maximum
    return document
