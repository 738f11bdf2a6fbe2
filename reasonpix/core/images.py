"""Decoding and encoding of images, the one place where formats and colour modes are settled."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

T = TypeVar("T")

MAX_PIXELS = 100_000_000
"""Images beyond this are taken for decompression bombs."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are read, whatever a file is called. Pillow knows more: some of them start programs
(EPS), some are text that anything can be taken for (XBM), some hide that they are cut (JPEG 2000).
"""

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
"""What turns an image upright, by its EXIF orientation."""


class UndecodableImage(ValueError):
    """The bytes are no image that can be read; the message says why."""


class _Silence:
    """Keeps Pillow from warning of bombs and odd metadata: what matters is checked here.

    `warnings.catch_warnings` alone is not for threads: the first in silences, the last out ends it.
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


_silence = _Silence()


def decode(data: bytes) -> Image.Image:
    """An encoded image as RGB: EXIF rotation applied, transparency over white, first frame.

    16-bit greys are scaled to 8 bits. Colour profiles are left aside: the numbers are taken for
    sRGB. Raises `UndecodableImage`, also for greys of 32 bits and of floats: nothing says which of
    their values is white.
    """
    return _decoded(data, rgb)


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """What an encoded mask marks, (height, width): where it is transparent, or else where white.

    Raises `UndecodableImage` also for a picture that is neither transparent anywhere nor black and
    white, and for a mask that marks nothing.
    """
    return _decoded(data, _marked)


def _marked(image: Image.Image) -> NDArray[np.bool_]:
    marked: NDArray[np.bool_] = np.asarray(image.convert("RGBA").getchannel("A")) < 128
    if not marked.any():
        grey = np.asarray(rgb(image).convert("L"))
        # The edges in a JPEG are soft.
        if np.mean((grey > 63) & (grey < 192)) > 0.1:
            raise UndecodableImage("nothing in it is transparent, and it is not black and white")
        marked = grey > 127
    if not marked.any():
        raise UndecodableImage("it marks nothing")
    return marked


def _decoded(data: bytes, convert: Callable[[Image.Image], T]) -> T:
    if not data:
        raise UndecodableImage("the file is empty")
    try:
        with _silence:
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
        what = str(error) or type(error).__name__
        raise UndecodableImage(f"damaged image: {what}") from error


def _match_depth(image: ImageFile.ImageFile) -> None:
    """Give a PNG's transparent colour the depth that its pixels will have; Pillow leaves it."""
    key = image.info.get("transparency")
    match image.tile[0].args if image.tile else None, key:
        case "L;2", int():
            image.info["transparency"] = key * 85
        case "L;4", int():
            image.info["transparency"] = key * 17
        case "RGB;16B", tuple():
            image.info["transparency"] = tuple(value >> 8 for value in key)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; damaged ones say nothing, and the pixels are sound."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # parsers raise nearly anything on damaged bytes
        return image
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    # Or others would turn it once more.
    turned.info.pop("exif", None)
    return turned


def rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB, transparency over white, 16-bit greys scaled to 8 bits.

    Raises `UndecodableImage` for greys of 32 bits and of floats.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UndecodableImage("its greys are no 8 or 16-bit numbers; convert it to 8 bits")
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
    """The image in `size`, width and height: bicubic, or itself where that is its size."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def pixel_digest(image: Image.Image) -> bytes:
    """Equal for RGB images of the same size and pixels alone, however they were encoded."""
    return hashlib.blake2b(b"%d %d " % image.size + image.tobytes(), digest_size=16).digest()


def encode_png(image: Image.Image) -> bytes:
    """A lossless PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    # Metadata is left behind: it would make equal pixels differ.
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def data_url(image: Image.Image, lossless: int = 256, shown: int = 480) -> str:
    """An RGB image to stand in a page: as it is when it has at most `lossless` pixels a side.

    Larger ones are JPEGs of at most `shown` pixels: as PNG, many photographs are too much.
    """
    if max(image.size) <= lossless:
        return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"
    image = image.copy()
    image.thumbnail((shown, shown))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
