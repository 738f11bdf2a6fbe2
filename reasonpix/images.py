"""Decoding and encoding of images, the one place where formats and colour modes are settled."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Images beyond this are taken for decompression bombs."""


class UndecodableImage(ValueError):
    """The bytes are no image that can be read; the message says why."""


def decode(data: bytes) -> Image.Image:
    """An encoded image as RGB: EXIF rotation applied, transparency over white, first frame.

    16-bit greys are scaled to 8 bits. Raises `UndecodableImage`, also for greys of 32 bits and of
    floats: nothing says which of their values is white.
    """
    if not data:
        raise UndecodableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs and odd metadata; what matters is checked here.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise UndecodableImage(
                    f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS}"
                )
            image.load()
            return rgb(ImageOps.exif_transpose(image))
    except UndecodableImage:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableImage("not an image, or a format that cannot be read") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImage(f"{error}") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise UndecodableImage(f"damaged image: {error}") from error


def rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB, transparency over white, 16-bit greys scaled to 8 bits.

    Raises `UndecodableImage` for greys of 32 bits and of floats.
    """
    if image.mode.startswith("I") or image.mode == "F":
        lowest, highest = image.getextrema()
        if image.mode == "F" or lowest < 0 or highest > 65535:  # type: ignore[operator]
            raise UndecodableImage("its greys are no 8 or 16-bit numbers; convert it to 8 bits")
        grey = image.convert("F").point(lambda value: value / 257 + 0.0)
        return grey.convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """A lossless PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    # Metadata is left behind: it would make equal pixels differ.
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
