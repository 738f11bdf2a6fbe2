"""Requests for an edit: headers checked first, the body read within limits, the image decoded.

Whatever a client sends leads to an edit or to an `HTTPException` that says what to mend.
"""

from __future__ import annotations

import asyncio
import io
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from reasonpix.core.images import FORMATS, UndecodableImage, decode
from reasonpix.deployment.server.batcher import RETRY_AFTER_S
from reasonpix.plugin.spec import check

MAX_SEED = 2**62
READ_TIMEOUT_S = 30
"""Seconds in which the whole request must arrive."""
_FIELD_BYTES = 16 * 1024
"""Limit for each field except the image."""
_FORM_BYTES = 64 * 1024
"""Limit for everything in the form except the image."""


class EditFields(BaseModel):
    """The form fields of an edit except the image. Omitted ones default to the model's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: str = Field(
        min_length=1, max_length=2000, description="What to change in the image"
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="The same seed gives the same edit")
    steps: int | None = Field(None, ge=1, description="Denoising steps")
    guidance_scale: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="How closely to follow the instruction; 1 is off",
    )
    image_guidance_scale: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="How much of the image to keep; 1 is off"
    )
    resolution: int | None = Field(
        None, ge=8, description="Longer side at which the model sees the image, in pixels"
    )


def check_headers(request: Request, max_bytes: int) -> None:
    """Raise `HTTPException` if the headers alone show that the request cannot be accepted."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise HTTPException(
            415,
            f"content-type: {kind or 'none'}: send multipart/form-data, with the image as a file",
        )
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > max_bytes + _FORM_BYTES:
        raise _too_large(max_bytes)


async def read_form(request: Request, max_bytes: int, seconds: float) -> FormData:
    """The request's form; the caller closes it. Large files are spooled to disk.

    Raises `HTTPException` if it is malformed, has an image above `max_bytes` or does not arrive
    within `seconds`, and `ClientDisconnect`.
    """
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > max_bytes + _FORM_BYTES:
            raise _too_large(max_bytes)
        return message

    limited = Request(request.scope, receive_limited)
    max_fields = len(EditFields.model_fields)
    try:
        async with asyncio.timeout(seconds):
            return await limited.form(
                max_files=1, max_fields=max_fields, max_part_size=_FIELD_BYTES
            )
    except TimeoutError as error:
        raise HTTPException(408, f"the request did not arrive within {seconds:g} s") from error
    except (HTTPException, ClientDisconnect):
        raise
    except OSError as error:
        detail = f"the server cannot store the upload: {error.strerror}"
        raise HTTPException(503, detail, {"Retry-After": str(RETRY_AFTER_S)}) from error
    except Exception as error:  # parsers raise nearly anything on damaged bytes
        raise HTTPException(400, f"body: not valid multipart/form-data: {error}") from error


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"image: larger than the limit of {max_bytes} bytes; shrink it")


def validate_form(form: FormData, max_bytes: int) -> tuple[UploadFile, EditFields]:
    """The image file and the other fields. Raises `HTTPException` that lists every mistake."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    image: UploadFile | None = None
    for name, value in form.multi_items():
        if name in values or (name == "image" and image):
            problems.append(f"{_truncate(name)}: sent twice")
        elif name == "image":
            if isinstance(value, UploadFile):
                image = value
            else:
                problems.append("image: must be a file: give its part a filename")
        elif isinstance(value, UploadFile):
            problems.append(f"{_truncate(name)}: must be text, not a file")
        else:
            values[name] = value
    if image is None and not problems:
        problems.append("'image' is missing: send it as a file")
    if isinstance(instruction := values.get("instruction"), str):
        values["instruction"] = instruction.strip()

    def complain(where: tuple[Any, ...], what: str) -> None:
        problems.append(": ".join(_truncate(str(part)) for part in (*where, what)))

    fields: EditFields | None = check(EditFields, values, (), complain)
    if problems or image is None or fields is None:
        raise HTTPException(422, "\n".join(problems))
    if (image.size or 0) > max_bytes:
        raise _too_large(max_bytes)
    return image, fields


def _truncate(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}…"


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image, RGB and upright. Its size is checked before anything is decoded.

    Raises `HTTPException`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Exception:  # decoding fails too, with a better message
        width = height = 0
    if width * height > max_pixels:
        raise HTTPException(
            413, f"image: {width}x{height} pixels exceed the limit of {max_pixels}; shrink it"
        )
    try:
        return decode(data)
    except UndecodableImage as error:
        raise HTTPException(422, f"image: {error}") from error
