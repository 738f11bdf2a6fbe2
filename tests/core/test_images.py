from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reasonpix.core.images import MAX_PIXELS, UndecodableImage, decode, encode_png


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> list[list[int]]:
    """The first row as RGB, after checking that it is RGB."""
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)[0].tolist()


def test_rgb_is_left_as_it_is() -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for format, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encoded(Image.fromarray(values), format, **options)
        assert np.array_equal(np.asarray(decode(data)), values), format


def test_bilevel_and_grey() -> None:
    bilevel = Image.new("1", (2, 1))
    bilevel.putpixel((1, 0), 1)
    assert pixels(encoded(bilevel)) == [[0, 0, 0], [255, 255, 255]]
    grey = Image.fromarray(np.array([[0, 99, 255]], np.uint8))
    assert pixels(encoded(grey)) == [[0] * 3, [99] * 3, [255] * 3]


def test_transparency_lies_over_white() -> None:
    colours = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    assert pixels(encoded(Image.fromarray(colours))) == [[200, 0, 0], [255] * 3, [127] * 3]
    grey = np.array([[[9, 255], [9, 0], [0, 128]]], np.uint8)
    assert pixels(encoded(Image.fromarray(grey, "LA"))) == [[9] * 3, [255] * 3, [127] * 3]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour(format: str) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for x in range(3):
        image.putpixel((x, 0), x)
    data = encoded(image, format, transparency=1)
    assert pixels(data) == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    assert pixels(encoded(image, format))[1] == [0, 255, 0]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_one_transparent_colour_without_alpha(mode: str) -> None:
    colour = (9, 8, 7) if mode == "RGB" else 9
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), 0)
    assert pixels(encoded(image, transparency=colour)) == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk(format: str) -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format)
    assert np.abs(np.array(pixels(data)) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize(
    ("kind", "format"), [("uint16", "PNG"), ("uint16", "TIFF"), ("int32", "TIFF"), ("int32", "PPM")]
)
def test_sixteen_bit_greys_are_scaled_not_clipped(kind: str, format: str) -> None:
    grey = np.array([[0, 257 * 100, 257 * 254, 65535]], kind)
    assert pixels(encoded(Image.fromarray(grey), format)) == [[v] * 3 for v in (0, 100, 254, 255)]


@pytest.mark.parametrize(
    "grey", [np.array([[0.0, 0.5, 1.0]], np.float32), np.array([[0, 70_000]], np.int32),
             np.array([[-1, 5]], np.int32)],
)  # fmt: skip
def test_greys_of_unknown_range_are_refused(grey: np.ndarray) -> None:
    with pytest.raises(UndecodableImage, match="not 8-bit or 16-bit integers; convert it"):
        decode(encoded(Image.fromarray(grey), "TIFF"))


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (32, 16), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 16, 16))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    upright = decode(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (16, 32)
    red, white = np.asarray(upright)[4, 8], np.asarray(upright)[28, 8]
    assert red[1] < 60 < 200 < white[1]


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0] == [255, 0, 0]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated_files_are_not_half_decoded(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    with pytest.raises(UndecodableImage, match=r"damaged image|not an image"):
        decode(data[: len(data) // 2])


def test_empty_and_foreign_bytes() -> None:
    with pytest.raises(UndecodableImage, match="the file is empty"):
        decode(b"")
    with pytest.raises(UndecodableImage, match="not an image"):
        decode(b"<html>not found</html>")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a huge image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("width", [MAX_PIXELS // 10_000 + 1, 60_000])
def test_bombs_are_refused_by_their_header(width: int) -> None:
    with pytest.raises(UndecodableImage, match="limit") as raised:
        decode(bomb(width, 10_000))
    assert "damaged" not in str(raised.value)


def test_equal_pixels_give_equal_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    plain = Image.fromarray(noise)
    tagged = decode(encoded(plain, dpi=(72, 72)))
    tagged.info["comment"] = "made today"
    assert encode_png(plain) == encode_png(tagged) == encode_png(decode(encode_png(plain)))
    assert np.array_equal(np.asarray(decode(encode_png(plain))), noise)
    assert encode_png(plain) != encode_png(plain.rotate(180))
