"""What a client sends for an edit: checked before it is read, bounded while it is, then decoded.

Whatever a client sends ends in an edit or in a `HTTPException` that says what to mend.
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
from reasonpix.errors import ReasonpixError
from reasonpix.plugin.spec import check

SEEDS = 2**62
"""The largest seed."""
READ_S = 30
"""Seconds within which the whole of a request has to arrive."""
_FIELD_BYTES = 16 * 1024
"""Of the longest field but the image."""
_FRAME_BYTES = 64 * 1024
"""What the fields and the frame of a form may add to the image."""


class EditForm(BaseModel):
    """The fields of an edit, but for its image. What is left out is as the model's settings say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: str = Field(min_length=1, max_length=2000, description="What to do with the image")
    seed: int = Field(0, ge=0, le=SEEDS, description="Of the noise: the same gives the same edit")
    steps: int | None = Field(None, ge=1, description="Denoising steps")
    guidance_scale: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="How much the instruction counts; 1 is plain"
    )
    image_guidance_scale: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="How much the image counts; 1 is plain"
    )
    resolution: int | None = Field(
        None, ge=8, description="Longer side in which the model sees the image, in pixels"
    )


def check_head(request: Request, max_bytes: int) -> None:
    """Raise `HTTPException` for a request of which nothing more need be read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise HTTPException(
            415, f"content-type: {kind or 'none'}: send multipart/form-data, with the image as file"
        )
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > max_bytes + _FRAME_BYTES:
        raise _too_long(max_bytes)


async def read_form(request: Request, max_bytes: int, seconds: float) -> FormData:
    """The form that a request holds, to be closed by the caller; large files lie on disk.

    Raises `HTTPException` for what is malformed, longer than `max_bytes`, or not here in time;
    `ClientDisconnect`.
    """
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > max_bytes + _FRAME_BYTES:
            raise _too_long(max_bytes)
        return message

    bounded = Request(request.scope, counted)
    fields = len(EditForm.model_fields)
    try:
        async with asyncio.timeout(seconds):
            return await bounded.form(max_files=1, max_fields=fields, max_part_size=_FIELD_BYTES)
    except TimeoutError as error:
        raise HTTPException(408, f"the request was not here within {seconds:g} s") from error
    except (HTTPException, ClientDisconnect):
        raise
    except OSError as error:
        raise HTTPException(503, f"the upload cannot be kept: {error.strerror}") from error
    except Exception as error:  # parsers raise nearly anything on damaged bytes
        raise HTTPException(400, f"body: no multipart/form-data: {error}") from error


def _too_long(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"image: more than {max_bytes} bytes, the limit here; send a smaller")


def checked(form: FormData, max_bytes: int) -> tuple[UploadFile, EditForm]:
    """The image's file and the other fields. Raises `HTTPException`."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    image: UploadFile | None = None
    for name, value in form.multi_items():
        if name in values or (name == "image" and image):
            problems.append(f"{_shortened(name)}: given twice")
        elif name == "image":
            if isinstance(value, UploadFile):
                image = value
            else:
                problems.append("image: a file is wanted: give its part a filename")
        elif isinstance(value, UploadFile):
            problems.append(f"{_shortened(name)}: a text is wanted, not a file")
        else:
            values[name] = value
    if image is None and not problems:
        problems.append("'image' is missing: send it as a file")
    try:
        edit = checked_values(values)
    except ReasonpixError as error:
        problems.append(str(error))
    if problems or image is None:
        raise HTTPException(422, "\n".join(problems))
    if (image.size or 0) > max_bytes:
        raise _too_long(max_bytes)
    return image, edit


def checked_values(values: dict[str, Any]) -> EditForm:
    """The fields as a form. Raises `ReasonpixError` that tells of each mistake."""
    problems: list[str] = []
    if isinstance(words := values.get("instruction"), str):
        values = {**values, "instruction": words.strip()}

    def complain(where: tuple[Any, ...], what: str) -> None:
        problems.append(": ".join([*(_shortened(str(it)) for it in where), _shortened(what)]))

    form: EditForm | None = check(EditForm, values, (), complain)
    if form is None:
        raise ReasonpixError("\n".join(problems))
    return form


def _shortened(what: str) -> str:
    return what if len(what) <= 300 else f"{what[:300]}…"


def read_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image, RGB and upright. Its size is looked at before anything is decoded.

    Raises `HTTPException`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Exception:  # decoding says it better
        width = height = 0
    if width * height > max_pixels:
        raise HTTPException(
            413, f"image: {width}x{height} pixels, and {max_pixels} is the limit here; shrink it"
        )
    try:
        return decode(data)
    except UndecodableImage as error:
        raise HTTPException(422, f"image: {error}") from error
