"""Image files made by hand: what Pillow writes only whole and sound, and what it cannot write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def png(
    size: tuple[int, int],
    depth: int,
    colour_type: int,
    rows: bytes,
    extra: bytes = b"",
    interlaced: bool = False,
    level: int = 6,
) -> bytes:
    """A PNG of raw rows, each with its filter's byte."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, interlaced)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, level))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def rows_of(values: Array) -> bytes:
    """An array's rows, big-endian, unfiltered."""
    big = values.astype(values.dtype.newbyteorder(">"))
    return b"".join(b"\0" + row.tobytes() for row in big)


def adam7(values: Array) -> bytes:
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4))
    passes += ((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    return b"".join(rows_of(values[y::down, x::right]) for y, x, down, right in passes)


def tiff(values: Array, photometric: int, sample_format: int = 1, order: str = "<") -> bytes:
    """An uncompressed TIFF of one strip."""
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    bits = values.dtype.itemsize * 8
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    fields = {256: width, 257: height, 259: 1, 262: photometric, 277: samples, 278: height}
    entries = [(tag, 3, 1, struct.pack(order + "HH", value, 0)) for tag, value in fields.items()]
    beyond = 8 + 2 + 12 * 10 + 4  # where what does not fit in an entry begins
    for tag, value, place in ((258, bits, beyond), (339, sample_format, beyond + 8)):
        field = (
            struct.pack(order + "I", place) if samples > 2 else struct.pack(order + "HH", value, 0)
        )
        entries.append((tag, 3, samples, field))
    entries.append((273, 4, 1, struct.pack(order + "I", beyond + 16)))
    entries.append((279, 4, 1, struct.pack(order + "I", len(data))))
    packed = [struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in sorted(entries)]
    directory = struct.pack(order + "H", len(packed)) + b"".join(packed) + bytes(4)
    arrays = struct.pack(order + "8H", *[bits] * 4, *[sample_format] * 4)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    return head + directory + arrays + data


def bmp(width: int, height: int, bits: int, data: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + head + data


def gif(screen: tuple[int, int], frame: tuple[int, int, int, int]) -> bytes:
    """A GIF of one red pixel: its screen, and the frame's place and size on it."""
    table = b"\xff\0\0\0\xff\0"
    head = b"GIF89a" + struct.pack("<HH", *screen) + b"\x80\0\0" + table
    return head + b"," + struct.pack("<HHHHB", *frame, 0) + b"\x02\x02\x44\x01\x00;"


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    """A JPEG with this in its first APP1 segment."""
    body = b"Exif\0\0" + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]
