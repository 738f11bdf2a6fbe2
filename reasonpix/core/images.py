"""Decoding and encoding of images: the only module that handles formats and colour modes."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

T = TypeVar("T")

MAX_PIXELS = 100_000_000
"""Larger images are rejected as decompression bombs."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Supported formats; file names do not matter. Of Pillow's other formats some start programs (EPS),
some match almost any text (XBM), and some hide that a file is truncated (JPEG 2000).
"""

_OTHER_FORMATS = {".eps", ".exr", ".hdr", ".heic", ".heif", ".hif", ".ico", ".j2k", ".jp2", ".jpx"}
_OTHER_FORMATS |= {".jxl", ".psd", ".svg", ".svgz", ".tga", ".xcf"}
_RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"}
"""Suffixes of raw photographs. They look like TIFF, but only their preview could be read."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by its EXIF orientation."""


class UndecodableImage(ValueError):
    """The bytes cannot be decoded as an image; the message says why."""


class _WarningsSuppressed:
    """Suppress Pillow's warnings about bombs and odd metadata: this module checks what matters.

    `warnings.catch_warnings` is not thread-safe, so the first thread to enter suppresses the
    warnings and the last to leave restores them.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module="PIL")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._saved.__exit__(None, None, None)


_no_warnings = _WarningsSuppressed()


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of `FORMATS`, in lower case, with their dots."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in FORMATS)


def why_not_image(path: str) -> str | None:
    """Why a file does not count as an image; None if its name or content is an image's.

    A file with an image's name counts even if it cannot be read: that is an error to report for
    this file. Other files are read to see.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in suffixes():
        return None
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait
            return "not a regular file"
        if status.st_size == 0:
            return "an empty file"
        if suffix not in _RAW and _looks_like_image(path):
            return None
    except FileNotFoundError:
        return "a broken link"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    if suffix in _OTHER_FORMATS | _RAW:
        return f"an image in a format that cannot be read ({suffix}); convert it to PNG or JPEG"
    return f"not an image ({suffix or 'no suffix'})"


def _looks_like_image(path: str) -> bool:
    """Whether a file begins as one of `FORMATS`. Raises `OSError` if it cannot be opened."""
    with open(path, "rb") as file, _no_warnings:
        try:
            Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            return True
        except Exception:  # texts that begin like a header raise nearly anything
            return False
    return True


def decode(data: bytes) -> Image.Image:
    """An encoded image as RGB: EXIF rotation applied, transparency over white, first frame.

    16-bit greys are scaled to 8 bits. Colour profiles are ignored: values are taken as sRGB.
    Raises `UndecodableImage`, also for 32-bit and float greys, whose white level is undefined.
    """
    return _decoded(data, rgb)


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """The marked pixels of a mask, (height, width): the transparent ones, or else the white ones.

    Raises `UndecodableImage`, also for an image without transparency that is not black and white,
    and for a mask that marks nothing.
    """
    return _decoded(data, _marked)


def _marked(image: Image.Image) -> NDArray[np.bool_]:
    marked: NDArray[np.bool_] = np.asarray(image.convert("RGBA").getchannel("A")) < 128
    if not marked.any():
        grey = np.asarray(rgb(image).convert("L"))
        # The edges in a JPEG are soft.
        if np.mean((grey > 63) & (grey < 192)) > 0.1:
            raise UndecodableImage("it has no transparent pixels, and it is not black and white")
        marked = grey > 127
    if not marked.any():
        raise UndecodableImage("it marks nothing")
    return marked


def _decoded(data: bytes, convert: Callable[[Image.Image], T]) -> T:
    if not data:
        raise UndecodableImage("the file is empty")
    try:
        with _no_warnings:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise UndecodableImage(
                    f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS}"
                )
            _match_depth(image)
            image.load()
            return convert(_upright(image))
    except UndecodableImage:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableImage("not an image, or a format that cannot be read") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImage(f"{error}") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise UndecodableImage(f"damaged image: {str(error) or type(error).__name__}") from error


def _match_depth(image: ImageFile.ImageFile) -> None:
    """Scale a PNG's transparent colour to the bit depth of its decoded pixels; Pillow does not."""
    key = image.info.get("transparency")
    match image.tile[0].args if image.tile else None, key:
        case "L;2", int():
            image.info["transparency"] = key * 85
        case "L;4", int():
            image.info["transparency"] = key * 17
        case "RGB;16B", tuple():
            image.info["transparency"] = tuple(value >> 8 for value in key)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation. Damaged EXIF data are ignored."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # parsers raise nearly anything on damaged bytes
        return image
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    turned.info.pop("exif", None)  # or other programs would turn it again
    return turned


def rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB, transparency over white, 16-bit greys scaled to 8 bits.

    Raises `UndecodableImage` for 32-bit and float greys.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UndecodableImage(
                "its greys are not 8-bit or 16-bit integers; convert it to 8 bits"
            )
        grey = (values // 257).astype(np.uint8)
        if isinstance(key := image.info.get("transparency"), int):
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at `size` (width, height), resized bicubically if it has another size."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def pixel_digest(image: Image.Image) -> bytes:
    """Equal for RGB images of the same size and pixels, and only for them."""
    return hashlib.blake2b(b"%d %d " % image.size + image.tobytes(), digest_size=16).digest()


def encode_png(image: Image.Image) -> bytes:
    """A lossless PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    # A new image, without metadata: equal pixels must give equal bytes.
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def data_url(image: Image.Image, lossless: int = 256, shown: int = 480) -> str:
    """A data URL of an RGB image for an HTML page: PNG up to `lossless` pixels a side.

    Larger images become JPEGs of at most `shown` pixels a side, to keep the page small.
    """
    if max(image.size) <= lossless:
        return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"
    image = image.copy()
    image.thumbnail((shown, shown))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
