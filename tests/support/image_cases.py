"""Image files of all kinds and kinds of damage, each with what must come of it.

The pixels that are expected are computed with numpy alone: nothing here asks the code under test.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from tests.support.image_files import (
    Array,
    adam7,
    bmp,
    chunk,
    encoded,
    gif,
    png,
    rows_of,
    tiff,
    with_exif,
)

COLOURS = np.array(
    [[(230, 20, 40), (20, 200, 60), (30, 60, 220)], [(240, 220, 30), (128, 128, 128), (0, 0, 0)]],
    np.uint8,
)
PICTURE: Array = COLOURS.repeat(8, 0).repeat(8, 1)
"""16x24 pixels, no two of its turns and mirrors alike; its blocks are those of JPEG."""
ALPHA: Array = np.array([[255, 128, 0], [64, 255, 200]], np.uint8).repeat(8, 0).repeat(8, 1)

NEAR = 12
NO_IMAGE = "not an image, or a format that cannot be read"
DAMAGED = "damaged image|not an image"
TOO_LARGE = "limit"
GREYS = "its greys are not 8-bit or 16-bit integers"


@dataclass(frozen=True)
class Case:
    """A file, and what must come: these pixels, or this reason to fail."""

    name: str
    data: bytes
    pixels: Array | None = None
    within: int = 0
    """How far off each value may be; from `NEAR` on, in a lossy format, all of them on average."""
    reason: str = ""

    def __post_init__(self) -> None:
        assert (self.pixels is None) == bool(self.reason)

    def is_met_by(self, pixels: Array) -> bool:
        """Whether these are the expected pixels."""
        assert self.pixels is not None
        if pixels.shape != self.pixels.shape:
            return False
        off = np.abs(pixels.astype(int) - self.pixels)
        return bool((off.mean() if self.within >= NEAR else off.max()) <= self.within)


def grey(values: Array) -> Array:
    """Greys as RGB."""
    return np.stack([values] * 3, -1).astype(np.uint8)


def over_white(colours: Array, alpha: Array) -> Array:
    share = alpha[..., None] / 255
    return np.round(colours * share + 255 * (1 - share)).astype(np.uint8)


LOSSLESS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": ("png", "PNG", {}),
    "bmp": ("bmp", "BMP", {}),
    "tiff": ("tif", "TIFF", {}),
    "tiff-lzw": ("tiff", "TIFF", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("tif", "TIFF", {"compression": "tiff_adobe_deflate"}),
    "tiff-packbits": ("tif", "TIFF", {"compression": "packbits"}),
    "webp-lossless": ("webp", "WEBP", {"lossless": True}),
    "gif": ("gif", "GIF", {}),
}
LOSSY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("jpg", "JPEG", {"quality": 95, "subsampling": 0}),
    "jpeg-subsampled": ("jpeg", "JPEG", {"quality": 95, "subsampling": 2}),
    "jpeg-progressive": ("jpg", "JPEG", {"quality": 95, "progressive": True}),
    "jpeg-restarts": ("jpg", "JPEG", {"quality": 95, "restart_marker_rows": 1}),
    "tiff-jpeg": ("tif", "TIFF", {"compression": "jpeg", "quality": 95}),
    "webp": ("webp", "WEBP", {"quality": 95}),
}
FORMATS = LOSSLESS | LOSSY


def plain(kind: str) -> bytes:
    """The picture in one of the formats."""
    _, format, options = FORMATS[kind]
    return encoded(Image.fromarray(PICTURE), format, **options)


def _modes() -> Iterator[Case]:
    """Formats by colour modes."""
    bilevel = PICTURE[..., 0] > 127
    level = PICTURE[..., 1]
    palette = COLOURS.reshape(-1, 3)
    index = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(8, 0).repeat(8, 1)
    indexed = Image.fromarray(index).copy()
    indexed.putpalette(palette.tobytes())
    pa = indexed.convert("PA")
    pa.putalpha(Image.fromarray(ALPHA))
    cmyk = np.concatenate([255 - PICTURE, np.full((16, 24, 1), 51, np.uint8)], -1)
    inked = np.round((255 - cmyk[..., :3].astype(int)) * (255 - 51) / 255).astype(np.uint8)
    sixteen = level.astype(np.uint16) * 257
    ycc = Image.fromarray(PICTURE).convert("YCbCr")
    modes: dict[str, tuple[Image.Image, Array, str]] = {
        "1": (Image.fromarray(bilevel), grey(bilevel * 255), "png bmp tiff gif jpeg webp-lossless"),
        "L": (Image.fromarray(level), grey(level), "png bmp tiff tiff-lzw gif jpeg webp-lossless"),
        "LA": (
            Image.fromarray(np.stack([level, ALPHA], -1), "LA"),
            over_white(grey(level), ALPHA),
            "png tiff tiff-deflate webp-lossless",
        ),
        "P": (indexed, PICTURE, "png bmp tiff gif webp-lossless"),
        "PA": (pa, over_white(PICTURE, ALPHA), "tiff"),
        "RGB": (Image.fromarray(PICTURE), PICTURE, " ".join(FORMATS)),
        "RGBA": (
            Image.fromarray(np.dstack([PICTURE, ALPHA])),
            over_white(PICTURE, ALPHA),
            "png tiff tiff-lzw webp-lossless webp",
        ),
        "CMYK": (Image.fromarray(cmyk, "CMYK"), inked, "tiff tiff-lzw jpeg jpeg-progressive"),
        "YCbCr": (ycc, PICTURE, "tiff jpeg"),
        "I16": (Image.fromarray(sixteen), grey(level), "png tiff tiff-deflate"),
        "I": (Image.fromarray(sixteen.astype(np.int32)), grey(level), "tiff"),
    }
    for mode, (image, pixels, kinds) in modes.items():
        for kind in kinds.split():
            suffix, format, options = FORMATS[kind]
            # Pillow writes transparent colours of WebP only where it is told to.
            exact = {"exact": True} if format == "WEBP" else {}
            within = NEAR if kind in LOSSY else 2  # blending and inks are rounded
            data = encoded(image, format, **options, **exact)
            yield Case(f"mode {mode} {kind}.{suffix}", data, pixels, within)
    for number, values in enumerate(([0.0, 0.5], [np.nan] * 2, [np.inf, -np.inf], [0.0, 1e30])):
        data = tiff(np.array([values], np.float32), 1, sample_format=3)
        yield Case(f"mode F {number}.tif", data, reason=GREYS)
    for number, pair in enumerate(([0, 70_000], [-1, 5], [-(2**31), 2**31 - 1])):
        data = encoded(Image.fromarray(np.array([pair], np.int32)), "TIFF")
        yield Case(f"mode I {number}.tif", data, reason=GREYS)
    for index_, format in ((2, "PNG"), (2, "GIF"), (0, "PNG"), (5, "GIF")):
        clear = np.where((index == index_)[..., None], 255, PICTURE).astype(np.uint8)
        data = encoded(indexed, format, transparency=index_)
        yield Case(f"mode P clear {index_}.{format.lower()}", data, clear)
    alphas = bytes([255, 0, 128])  # of the palette's first colours; the others are opaque
    alpha = np.array([*alphas, 255, 255, 255], np.uint8)[index]
    data = encoded(indexed, "PNG", transparency=alphas)
    yield Case("mode P alphas.png", data, over_white(PICTURE, alpha), 1)
    white = Image.new("LAB", (4, 4), (255, 128, 128))
    yield Case("mode LAB.tif", encoded(white, "TIFF"), np.full((4, 4, 3), 255, np.uint8), 3)


def _upright(stored: Array, orientation: int) -> Array:
    """What EXIF says is to be seen (tag 0x0112: where the first row and the first column are)."""
    swapped = stored.transpose(1, 0, 2)
    return {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }.get(orientation, stored)


def _orientations() -> Iterator[Case]:
    for kind in ("png", "jpeg", "webp-lossless", "tiff"):
        suffix, format, options = FORMATS[kind]
        for orientation in (*range(1, 9), 0, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = encoded(Image.fromarray(PICTURE), format, exif=exif, **options)
            pixels, within = _upright(PICTURE, orientation), NEAR if kind in LOSSY else 0
            yield Case(f"exif {orientation} {kind}.{suffix}", data, pixels, within)
    jpeg, sound = plain("jpeg"), plain("png")
    rotated = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    damaged = {
        "garbage": b"garbage that is none",
        "short": b"II*\0\x08\0\0\0\xff\xff",
        "far": b"II*\0\xff\xff\xff\x7f",
        "text": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHI", 0x0112, 2, 4) + b"abc\0" + bytes(4),
    }
    for what, exif_bytes in damaged.items():
        yield Case(f"exif {what}.jpg", with_exif(jpeg, exif_bytes), PICTURE, NEAR)
        extra = sound[:33] + chunk(b"eXIf", exif_bytes) + sound[33:]
        yield Case(f"exif {what}.png", extra, PICTURE)
    torn = struct.pack("<HHII", 0x0110, 2, 400, 9999)  # a text beyond the end
    partly = b"II*\0\x08\0\0\0\2\0" + torn + rotated + bytes(4)
    yield Case("exif partly.jpg", with_exif(jpeg, partly), _upright(PICTURE, 6), NEAR)


def _truncated() -> Iterator[Case]:
    for kind, (suffix, _, _) in FORMATS.items():
        data = plain(kind)
        for share in (0.02, 0.3, 0.6, 0.8):
            cut = max(1, int(len(data) * share))
            yield Case(f"cut {share} {kind}.{suffix}", data[:cut], reason=DAMAGED)
    for kind in ("jpeg", "png", "gif", "webp"):
        suffix = FORMATS[kind][0]
        yield Case(f"cut none {kind}.{suffix}", b"", reason="the file is empty")


def _wrong_suffixes() -> Iterator[Case]:
    kinds = ("png", "jpeg", "webp-lossless", "gif", "bmp", "tiff")
    for number, kind in enumerate(kinds):
        for step in (1, 2, 3):
            suffix = FORMATS[kinds[(number + step) % len(kinds)]][0]
            within = NEAR if kind in LOSSY else 0
            yield Case(f"named {suffix} is {kind}.{suffix}", plain(kind), PICTURE, within)
    noise = np.random.default_rng(0).bytes(400)
    for suffix, what, data in (
        ("png", "svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("jpg", "html", b"<!doctype html><title>404</title>"),
        ("jpg", "text", b"not found"),
        ("png", "utf-16", "not found".encode("utf-16")),
        ("webp", "pdf", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
        ("gif", "zip", b"PK\5\6" + bytes(18)),
        ("png", "noise", noise),
        ("tif", "zeros", bytes(4096)),
        ("png", "parquet", b"PAR1" + bytes(40) + b"PAR1"),
        ("png", "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        ("png", "xbm", b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {\n0x00};"),
        ("jpg", "mp4", b"\0\0\0\x18ftypmp42" + bytes(40)),
        ("png", "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("bmp", "two-letters", b"BM"),
        ("jpg", "start-of-image", b"\xff\xd8"),
        ("png", "signature", b"\x89PNG\r\n\x1a\n"),
        ("webp", "riff", b"RIFF\x24\0\0\0WAVEfmt " + bytes(20)),
    ):
        yield Case(f"named {suffix} is {what}.{suffix}", data, reason=NO_IMAGE)


def _animated() -> Iterator[Case]:
    first = Image.fromarray(PICTURE)
    others = [Image.fromarray(PICTURE[::-1]), Image.fromarray(PICTURE[:, ::-1])]
    for kind in ("png", "gif", "webp-lossless", "tiff", "tiff-lzw"):
        suffix, format, options = FORMATS[kind]
        data = encoded(first, format, save_all=True, append_images=others, **options)
        yield Case(f"animated {kind}.{suffix}", data, PICTURE)
        if kind in ("png", "gif"):  # the first frame is whole
            yield Case(f"animated cut {kind}.{suffix}", data[: len(data) - 20], PICTURE)
    whole = Image.fromarray(PICTURE)
    data = encoded(whole, "PNG", save_all=True, append_images=others, default_image=True)
    yield Case("animated beside its image.png", data, PICTURE)
    many = [Image.new("L", (8, 8), value) for value in range(100)]
    data = encoded(many[0], "GIF", save_all=True, append_images=many[1:])
    yield Case("animated hundred.gif", data, np.zeros((8, 8, 3), np.uint8))
    two = encoded(first, "MPO", save_all=True, append_images=others[:1], quality=95, subsampling=0)
    yield Case("animated pictures.jpg", two, PICTURE, NEAR)


def _huge() -> Iterator[Case]:
    for width, height in (
        (10_001, 10_000),
        (60_000, 60_000),
        (2**31 - 1, 2**31 - 1),
        (2**31 - 1, 1),
    ):
        yield Case(f"huge {width}x{height}.png", png((width, height), 8, 2, b""), reason=TOO_LARGE)
    yield Case("huge in truth not.png", png((10_000, 10_000), 1, 0, b""), reason=DAMAGED)
    yield Case("huge screen.gif", gif((65535, 65535), (0, 0, 1, 1)), reason=TOO_LARGE)
    yield Case("huge frame.gif", gif((2, 2), (0, 0, 60000, 60000)), reason=TOO_LARGE)
    yield Case("huge.bmp", bmp(60000, 60000, 24, b""), reason=TOO_LARGE)
    jpeg = plain("jpeg")
    sizes = jpeg.index(b"\xff\xc0") + 5
    data = jpeg[:sizes] + struct.pack(">HH", 60000, 60000) + jpeg[sizes + 4 :]
    yield Case("huge.jpg", data, reason=TOO_LARGE)
    lie = tiff(PICTURE, 2).replace(
        struct.pack("<HHIHH", 256, 3, 1, 24, 0), b"\0\1\4\0\1\0\0\0\0\0\1\0"
    )
    lie = lie.replace(struct.pack("<HHIHH", 257, 3, 1, 16, 0), b"\1\1\4\0\1\0\0\0\0\0\1\0")
    yield Case("huge.tif", lie, reason=TOO_LARGE)
    canvas = struct.pack("<I", 16383 | 16383 << 14)  # 14 bits each, less one
    webp = b"WEBPVP8L" + struct.pack("<I", 8) + b"\x2f" + canvas + bytes(3)
    yield Case(
        "huge.webp", b"RIFF" + struct.pack("<I", len(webp)) + webp, reason=f"{TOO_LARGE}|{DAMAGED}"
    )
    sound = plain("png")
    bomb = zlib.compress(bytes(8 << 20))
    for kind, body in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        data = sound[:33] + chunk(kind, body + bomb) + sound[33:]
        yield Case(f"huge {kind.decode()}.png", data, reason="too large")
    text = chunk(b"tEXt", b"a\0" + b"x" * (3 << 20))
    yield Case("huge tEXt.png", sound[:33] + text + sound[33:], PICTURE)


def _odd_png() -> Iterator[Case]:
    sound = plain("png")
    size = (24, 16)
    for name, values, kind, pixels in (
        ("rgb", PICTURE, 2, PICTURE),
        ("grey", PICTURE[..., 1], 0, grey(PICTURE[..., 1])),
        ("rgba", np.dstack([PICTURE, ALPHA]), 6, over_white(PICTURE, ALPHA)),
    ):
        yield Case(
            f"png interlaced {name}.png",
            png(size, 8, kind, adam7(values), interlaced=True),
            pixels,
            1,
        )
        deep = values.astype(np.uint16) * 257
        yield Case(f"png 16 bits {name}.png", png(size, 16, kind, rows_of(deep)), pixels, 1)
    torn = png(size, 8, 2, adam7(PICTURE)[:-100], interlaced=True)
    yield Case("png interlaced torn.png", torn, reason=DAMAGED)
    la = np.stack([PICTURE[..., 1], ALPHA], -1).astype(np.uint16) * 257
    yield Case(
        "png 16 bits grey alpha.png",
        png(size, 16, 4, rows_of(la)),
        over_white(grey(PICTURE[..., 1]), ALPHA),
        1,
    )
    for bits in (1, 2, 4):
        steps = np.arange(8) % 2**bits
        packed = sum(int(s) << bits * (7 - i) for i, s in enumerate(steps)).to_bytes(bits, "big")
        greys = grey(steps[None] * 255 // (2**bits - 1))
        yield Case(f"png {bits} bits.png", png((8, 1), bits, 0, b"\0" + packed), greys)
        for key in sorted({0, 1, 2**bits - 1}):
            extra = chunk(b"tRNS", struct.pack(">H", key))
            clear = np.where(steps[None, :, None] == key, 255, greys).astype(np.uint8)
            data = png((8, 1), bits, 0, b"\0" + packed, extra)
            yield Case(f"png {bits} bits clear {key}.png", data, clear)
        colours = np.random.default_rng(bits).integers(0, 256, (2**bits, 3), dtype=np.uint8)
        data = png((8, 1), bits, 3, b"\0" + packed, chunk(b"PLTE", colours.tobytes()))
        yield Case(f"png {bits} bits palette.png", data, colours[steps][None])
    deep = np.array([[100 * 257, 5000, 65535]], np.uint16)
    clear = np.array([[100, 255, 255]], np.uint8)
    key = chunk(b"tRNS", struct.pack(">H", 5000))
    yield Case("png 16 bits grey clear.png", png((3, 1), 16, 0, rows_of(deep), key), grey(clear), 1)
    deep = np.array([[[5000, 300, 65535], [5000, 300, 257]]], np.uint16)
    key = chunk(b"tRNS", struct.pack(">3H", 5000, 300, 65535))
    pixels = np.array([[[255, 255, 255], [19, 1, 1]]], np.uint8)
    yield Case("png 16 bits rgb clear.png", png((2, 1), 16, 2, rows_of(deep), key), pixels, 1)
    stored = bytearray(png(size, 8, 2, rows_of(PICTURE), level=0))
    yield Case("png stored.png", bytes(stored), PICTURE)
    stored[stored.index(b"IDAT") + 30] ^= 255
    yield Case("png one byte flipped.png", bytes(stored), reason=DAMAGED)
    yield Case("png trailing garbage.png", sound + b"garbage" * 99, PICTURE)
    yield Case("png without end.png", sound[:-12], PICTURE)
    yield Case(
        "png private chunk.png", sound[:33] + chunk(b"prVt", b"\0" * 99) + sound[33:], PICTURE
    )
    yield Case(
        "png checksum of a text.png",
        sound[:33] + chunk(b"tEXt", b"a\0b")[:-1] + b"~" + sound[33:],
        reason=DAMAGED,
    )
    yield Case(
        "png checksum of its head.png", sound[:29] + b"\0\0\0\0" + sound[33:], reason=DAMAGED
    )
    yield Case("png no data.png", sound[:33] + chunk(b"IEND", b""), reason=DAMAGED)
    for shape in ((0, 8), (8, 0), (0, 0)):
        yield Case(f"png {shape[0]}x{shape[1]}.png", png(shape, 8, 2, b""), reason=DAMAGED)
    yield Case("png depth 5.png", png((8, 8), 5, 2, bytes(200)), reason=DAMAGED)
    yield Case("png kind 7.png", png((8, 8), 8, 7, bytes(200)), reason=DAMAGED)
    yield Case("png unknown filter.png", png((2, 1), 8, 0, b"\x09ab"), reason=DAMAGED)
    yield Case(
        "png one pixel.png", png((1, 1), 8, 2, b"\0\1\2\3"), np.array([[[1, 2, 3]]], np.uint8)
    )
    yield Case("png one line.png", png((500, 1), 8, 0, bytes(501)), np.zeros((1, 500, 3), np.uint8))


def _odd_others() -> Iterator[Case]:
    jpeg, first = plain("jpeg"), Image.fromarray(PICTURE)
    yield Case("jpeg trailing garbage.jpg", jpeg + b"garbage" * 99, PICTURE, NEAR)
    yield Case("jpeg leading garbage.jpg", b"garbage" + jpeg, reason=NO_IMAGE)
    yield Case("jpeg without end.jpg", jpeg[:-2], reason=DAMAGED)
    yield Case(
        "jpeg comment.jpg",
        encoded(first, "JPEG", quality=95, subsampling=0, comment=b"x" * 60000),
        PICTURE,
        NEAR,
    )
    yield Case("jpeg no tables.jpg", jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :], reason=DAMAGED)
    sizes = jpeg.index(b"\xff\xc0") + 5
    yield Case("jpeg 0x0.jpg", jpeg[:sizes] + bytes(4) + jpeg[sizes + 4 :], reason=DAMAGED)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("jpeg", "png", "webp-lossless", "tiff"):
        suffix, format, options = FORMATS[kind]
        within = NEAR if kind in LOSSY else 0
        for what, icc in (("profile", profile), ("damaged profile", b"garbage" * 30)):
            data = encoded(first, format, icc_profile=icc, **options)
            yield Case(f"{what} {kind}.{suffix}", data, PICTURE, within)
    deep = PICTURE.astype(np.uint16) * 257
    level = PICTURE[..., 1]
    for order, name in (("<", "little"), (">", "big")):
        yield Case(f"tiff 16 bits rgb {name}.tif", tiff(deep, 2, order=order), PICTURE, 1)
        yield Case(
            f"tiff 16 bits grey {name}.tif", tiff(deep[..., 1], 1, order=order), grey(level), 1
        )
        yield Case(f"tiff 8 bits {name}.tif", tiff(PICTURE, 2, order=order), PICTURE)
    yield Case("tiff white is zero.tif", tiff(level, 0), grey(255 - level))
    floats = PICTURE.astype(np.float32) / 255
    yield Case("tiff float rgb.tif", tiff(floats, 2, sample_format=3), reason=f"{DAMAGED}|{GREYS}")
    yield Case(
        "tiff doubles.tif",
        tiff(floats[..., 0].astype(np.float64), 1, 3),
        reason=f"{DAMAGED}|{GREYS}",
    )
    yield Case("tiff no directory.tif", b"II*\0\x08\0\0\0" + bytes(6), reason=DAMAGED)
    yield Case(
        "tiff directory of itself.tif",
        b"II*\0\x08\0\0\0\1\0" + bytes(12) + b"\x08\0\0\0",
        reason=DAMAGED,
    )
    upside = PICTURE[::-1, :, ::-1]
    yield Case("bmp.bmp", bmp(24, 16, 24, upside.tobytes()), PICTURE)
    yield Case("bmp top down.bmp", bmp(24, -16, 24, PICTURE[..., ::-1].tobytes()), PICTURE)
    five = (
        (upside[..., 2] >> 3).astype(np.uint16) << 10
        | (upside[..., 1] >> 3).astype(np.uint16) << 5
        | upside[..., 0] >> 3
    )
    yield Case("bmp 16 bits.bmp", bmp(24, 16, 16, five.astype("<u2").tobytes()), PICTURE, 8)
    yield Case(
        "bmp negative.bmp", bmp(-24, 16, 24, upside.tobytes()), reason=f"{DAMAGED}|{TOO_LARGE}"
    )
    yield Case("bmp 3 bits.bmp", bmp(24, 16, 3, bytes(600)), reason=DAMAGED)
    yield Case(
        "gif small frame.gif", gif((1, 1), (0, 0, 1, 1)), np.array([[[255, 0, 0]]], np.uint8)
    )
    yield Case("gif no frame.gif", gif((1, 1), (0, 0, 1, 1))[:19] + b";", reason=DAMAGED)
    yield Case("gif 0x0.gif", gif((0, 0), (0, 0, 0, 0)), reason=DAMAGED)
    interlaced = encoded(first, "GIF", interlace=1)
    yield Case("gif interlaced.gif", interlaced, PICTURE)
    yield Case("webp of no size.webp", b"RIFF\0\0\0\0WEBP", reason=DAMAGED)
    yield Case("pixmap.png", encoded(first, "PPM"), PICTURE)
    for number in range(3):
        yield Case(f"copy {number}.png", plain("png"), PICTURE)


def _named() -> Iterator[Case]:
    for name in (
        "two  blanks",
        "new\nline",
        "'quoted'",
        '"both"',
        "日本語",
        "🐝",
        "-dash",
        "a" * 240,
        "tab\t",
    ):
        yield Case(f"{name}.png", plain("png"), PICTURE)
    yield Case("LOUD.PNG", plain("png"), PICTURE)
    yield Case("many.dots.tar.jpeg", plain("jpeg"), PICTURE, NEAR)
    yield Case("deep/er/in.png", plain("png"), PICTURE)
    yield Case("folder.png/in.png", plain("png"), PICTURE)


def cases() -> list[Case]:
    """All of them; the names are paths in a folder."""
    parts = (_modes, _orientations, _truncated, _wrong_suffixes, _animated, _huge, _odd_png)
    return [case for part in (*parts, _odd_others, _named) for case in part()]
