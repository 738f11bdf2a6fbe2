"""Requests to the server made by hand, with the status that each may get.

What bodies hold is right in all but the one thing that a case is named for. Images of all kinds and
kinds of damage are those of `image_cases`.
"""

from __future__ import annotations

import gzip
import json
import random
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tests.support.image_cases import PICTURE, cases, plain
from tests.support.image_files import chunk, encoded, png

EDITS = "/v1/edits"
PAGES = (EDITS, "/v1/model", "/healthz", "/readyz", "/metrics", "/openapi.json")
EDITED = frozenset({200})
REFUSED = frozenset({400, 413, 415, 422})
EITHER = EDITED | REFUSED
LOST = frozenset({404, 405})
"""There is no such page, or it has no such method."""

SOUND = encoded(Image.fromarray(PICTURE), "PNG")
"""24x16 pixels, in a PNG as any program writes them."""
BOUNDARY = "----reasonpix"


@dataclass(frozen=True)
class Request:
    """A whole request of HTTP."""

    name: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    path: str = EDITS
    statuses: Collection[int] = REFUSED


@dataclass(frozen=True)
class Wire:
    """What a client does that does not speak HTTP, or not to the end."""

    name: str
    pieces: tuple[bytes | float, ...]
    """What it sends, and for how many seconds it rests."""
    statuses: Collection[int] = ()
    """Of the answers it may get; where there are none, it leaves without reading."""
    must: bool = False
    """Whether it must get one: others may be hung up on."""


@dataclass(frozen=True)
class Part:
    """A part of a form."""

    name: str
    value: bytes
    filename: str | None = None
    content_type: str | None = None

    def encoded(self) -> bytes:
        head = f'Content-Disposition: form-data; name="{self.name}"'
        if self.filename is not None:
            head += f'; filename="{self.filename}"'
        if self.content_type is not None:
            head += f"\r\nContent-Type: {self.content_type}"
        return head.encode() + b"\r\n\r\n" + self.value


IMAGE = Part("image", SOUND, "image.png", "image/png")
WORDS = Part("instruction", b"make it rain")
STEPS = Part("steps", b"1")
WHOLE = (IMAGE, WORDS, STEPS)


def framed(*parts: bytes, boundary: bytes = BOUNDARY.encode(), end: bytes = b"\r\n") -> bytes:
    """Parts in a body of multipart/form-data."""
    between = b"--" + boundary
    return b"".join(between + end + it + end for it in parts) + between + b"--" + end


def form(*parts: Part) -> bytes:
    return framed(*(it.encoded() for it in parts))


def typed(body: bytes, more: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Body and headers of a request with such a form."""
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    return {"body": body, "headers": {"Content-Type": kind} | dict(more or {})}


def edit(name: str, *parts: Part, statuses: Collection[int] = REFUSED) -> Request:
    return Request(name, **typed(form(*parts)), statuses=statuses)


def having(name: str, value: bytes, statuses: Collection[int], what: str = "") -> Request:
    """A whole form with another value in one field."""
    parts = [it for it in WHOLE if it.name != name]
    label = what or f"{name} {value[:30]!r}"
    return edit(label, *parts, Part(name, value), statuses=statuses)


def requests() -> list[Request]:
    """All of them."""
    groups = (_images, _bombs, _numbers, _instructions, _parts, _framing, _types, _routes, _headers)
    return [it for group in groups for it in group()]


def _with_image(name: str, data: bytes, statuses: Collection[int], filename: str = "") -> Request:
    part = Part("image", data, filename or "image", "application/octet-stream")
    return edit(f"image {name}", part, WORDS, STEPS, statuses=statuses)


def _images() -> Iterator[Request]:
    for case in cases():
        statuses = EDITED if case.pixels is not None else REFUSED
        yield _with_image(case.name, case.data, statuses, case.name)


def _bombs() -> Iterator[Request]:
    """Small files of many pixels, and pictures of odd shapes."""
    side = 9_000
    rows = zlib.compress((b"\0" + bytes(side)) * side, 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    yield _with_image("bomb of 81 million pixels", bomb, REFUSED)
    many = Image.new("P", (8, 8))
    frames = [Image.new("P", (8, 8), n % 2) for n in range(500)]
    gif = encoded(many, "GIF", save_all=True, append_images=frames)
    yield _with_image("of 500 frames", gif, EDITED)
    for width, height in ((1, 1), (2, 1), (1, 300), (3000, 1), (1, 3000), (31, 33), (257, 64)):
        data = png((width, height), 1, 0, (b"\0" + bytes((width + 7) // 8)) * height)
        yield _with_image(f"of {width}x{height} pixels", data, EITHER)
    yield _with_image("gzipped", gzip.compress(SOUND), REFUSED)
    yield _with_image("after a byte order mark", b"\xef\xbb\xbf" + SOUND, REFUSED)
    yield _with_image("twice", SOUND * 2, EITHER)
    yield _with_image("hidden in a page", b"<html><img src=1>" + SOUND, REFUSED)
    rng = random.Random(0)
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        for number in range(20):
            data = bytearray(plain(kind))
            for _ in range(rng.choice((1, 4, 30))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield _with_image(f"{kind} spoilt {number}", bytes(data), EITHER)


def _numbers() -> Iterator[Request]:
    never = (b"", b" ", b"1.5", b"-1", b"0x10", b"nan", b"NaN", b"inf", b"-Infinity", b"true")
    never += (b"null", b"[1]", b'{"a": 1}', b"1\x002", b"\xff", b"1e400", b"9" * 5000, b"1,5")
    never += (b"1" + b"0" * 400, b"--1", b"1e", b"$1", b"1;DROP TABLE edits", b"\xc2\xb2")
    odd = (b"1e0", b"1_0", b"+1", b" 1 ", b"01", b"1.0", "１".encode(), b"1\n", b"\xe2\x88\x921")
    for name in ("seed", "steps", "resolution"):
        yield from (having(name, value, REFUSED) for value in never)
        yield from (having(name, value, EITHER) for value in odd)
    for value in (b"0", b"1", str(2**31).encode(), str(2**32 - 1).encode()):
        yield having("seed", value, EDITED)
    for value in (2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1):
        yield having("seed", str(value).encode(), EITHER)
    for value in (2**64, 2**65, 10**30, -(2**63), -(2**63) - 1):
        yield having("seed", str(value).encode(), REFUSED)
    for value in (0, 10**4, 2**31, 2**63, 2**64, 10**30):
        yield having("steps", str(value).encode(), REFUSED)
        yield having("resolution", str(value).encode(), REFUSED)
    for value in (1, 2, 7, 8, 9, 31, 33):
        yield having("resolution", str(value).encode(), EITHER)
    for name in ("guidance_scale", "image_guidance_scale"):
        for text in (b"", b"nan", b"-nan", b"inf", b"-inf", b"Infinity", b"1e400", b"1,5", b"one"):
            yield having(name, text, REFUSED)
        for text in (b"0", b"1", b"0.5", b"1e308", b"-1e308", b"1e-320", b"-0", b"1e39", b"-3"):
            yield having(name, text, EITHER)
        yield having(name, b"7.5", EDITED)


def _instructions() -> Iterator[Request]:
    for text in (b"", b" ", b"\n\t ", "\u3000".encode()):
        yield having("instruction", text, REFUSED)
    for text in (b"\xff\xfe", b"\xc3", b"\xed\xa0\x80"):  # no UTF-8
        yield having("instruction", text, EITHER)
    for text in ("\u200b", "\0", "a\0b", "\x1b[2J", "<image>", "{instruction}", "%s%n", "\ufeff"):
        yield having("instruction", text.encode(), EITHER)
    for text in ("🌧" * 40, "اجعلها تمطر", "雨を降らせて", "e\u0301" * 30, "\u202egnihtemos", "ﷺ"):
        yield having("instruction", text.encode(), EITHER, f"instruction {ascii(text)[:30]}")
    for text in ("<script>alert(1)</script>", "'; DROP TABLE edits; --", "../../etc/passwd"):
        yield having("instruction", text.encode(), EDITED)
    for count in (1_000, 10_000, 100_000, 1_000_000):
        yield having(
            "instruction", b"rain " * (count // 5), EITHER, f"instruction of {count} bytes"
        )


def _parts() -> Iterator[Request]:
    """Fields that are missing, twice there, or of the wrong kind."""
    yield edit("whole", *WHOLE, statuses=EDITED)
    yield edit("in another order", STEPS, WORDS, IMAGE, statuses=EDITED)
    yield edit("no part")
    for missing in (IMAGE, WORDS):
        yield edit(f"no {missing.name}", *(it for it in WHOLE if it is not missing))
    for twice in (*WHOLE, Part("seed", b"1")):
        yield edit(f"{twice.name} twice", *WHOLE, Part("seed", b"1"), twice, statuses=EITHER)
    yield edit("image without a file name", Part("image", SOUND), WORDS, STEPS, statuses=EITHER)
    yield edit("image is a text", Part("image", b"image.png"), WORDS)
    yield edit("image is an address", Part("image", b"http://127.0.0.1:1/image.png"), WORDS)
    yield edit("image is a path", Part("image", b"/etc/passwd"), WORDS)
    yield edit("image with no bytes", Part("image", b"", "image.png", "image/png"), WORDS)
    yield edit("image with no name nor bytes", Part("image", b"", "", "image/png"), WORDS)
    for name in ("instruction", "seed", "steps", "guidance_scale"):
        parts = [it for it in WHOLE if it.name != name]
        as_file = Part(name, b"1", "1.txt", "text/plain")
        yield edit(f"{name} is a file", *parts, as_file, statuses=EITHER)
    for name in (
        "x",
        "",
        "Image",
        "images[]",
        "image[0]",
        "__class__",
        "settings.steps",
        "é",
        "\0",
    ):
        yield edit(f"unknown field {name!r}", *WHOLE, Part(name, b"1"), statuses=EITHER)
    for name in ("../../x.png", "C:\\x.png", "\0.png", "é🌧.png", "a" * 5000, "%00", "x.php", '"'):
        part = Part("image", SOUND, name, "image/png")
        yield edit(f"file name {name[:12]!r}", part, WORDS, STEPS, statuses=EITHER)
    for kind in ("text/html", "", "image", "image/svg+xml", "x" * 2000, "image/png; a=\\"):
        part = Part("image", SOUND, "image.png", kind)
        yield edit(f"image of type {kind[:20]!r}", part, WORDS, STEPS, statuses=EITHER)
    for count in (100, 2000):
        some = [Part(f"x{n}", b"1") for n in range(count)]
        yield edit(f"{count} parts", *WHOLE, *some, statuses=EITHER)
        some = [Part("seed", b"1")] * count
        yield edit(f"{count} seeds", *WHOLE, *some, statuses=EITHER)
        some = [Part("image", SOUND, "image.png", "image/png")] * count
        yield edit(f"{count} images", WORDS, STEPS, *some, statuses=EITHER)


def _framing() -> Iterator[Request]:
    """Bodies that are not what multipart/form-data is."""
    body = form(*WHOLE)
    parts = [it.encoded() for it in WHOLE]

    def sent(name: str, data: bytes, statuses: Collection[int] = REFUSED) -> Request:
        return Request(f"frame {name}", **typed(data), statuses=statuses)

    yield sent("empty", b"")
    yield sent("no end", body[: -len(BOUNDARY) - 6], EITHER)
    yield sent("no last line", body[:-2], EITHER)
    yield sent("only an end", b"--" + BOUNDARY.encode() + b"--\r\n")
    yield sent("only a beginning", b"--" + BOUNDARY.encode() + b"\r\n")
    yield sent("of lines alone", framed(*parts, end=b"\n"), EITHER)
    yield sent("of another boundary", framed(*parts, boundary=b"other"))
    yield sent("preamble", b"This is multipart.\r\n" + body, EITHER)
    yield sent("epilogue", body + b"Bye.\r\n" * 99, EITHER)
    yield sent("no blank line", body.replace(b"\r\n\r\n", b"\r\n"))
    yield sent("header without a colon", framed(b"Nothing\r\n" + parts[0], *parts[1:]), EITHER)
    yield sent("header of controls", framed(b"A\x01B: c\r\n" + parts[0], *parts[1:]), EITHER)
    yield sent("no disposition", framed(b"X: y\r\n\r\n" + SOUND, *parts[1:]))
    yield sent("no name", framed(b"Content-Disposition: form-data\r\n\r\n1", *parts), EITHER)
    attached = parts[0].replace(b"form-data", b"attachment")
    yield sent("attachment", framed(attached, *parts[1:]), EITHER)
    yield sent("name in no quotes", body.replace(b'"image"', b"image"), EITHER)
    yield sent("name not closed", body.replace(b'"image"', b'"image'), EITHER)
    yield sent("name of no words", body.replace(b'"image"', b'"\xff\xfe"'))
    coded = b"Content-Transfer-Encoding: base64\r\n"
    yield sent("base64", framed(coded + parts[0], *parts[1:]), EITHER)
    charset = b"Content-Type: text/plain; charset=%s\r\n"
    for name in (b"utf-16", b"nothing", b"utf-7", b"\xff"):
        words = charset % name + parts[1]
        yield sent(f"charset {name!r}", framed(parts[0], words, parts[2]), EITHER)
    charset_field = Part("_charset_", b"utf-16")
    yield edit("frame _charset_ field", charset_field, *WHOLE, statuses=EITHER)
    yield sent(
        "long header", framed(b"A: " + b"b" * 100_000 + b"\r\n" + parts[0], *parts[1:]), EITHER
    )
    yield sent("many headers", framed(b"A: b\r\n" * 5_000 + parts[0], *parts[1:]), EITHER)
    nested = b"Content-Type: multipart/mixed; boundary=b\r\n"
    inner = framed(b"\r\n" + SOUND, boundary=b"b")
    head = b'Content-Disposition: form-data; name="image"\r\n'
    yield sent("nested", framed(head + nested + b"\r\n" + inner, *parts[1:]))
    rng = random.Random(1)
    for number in range(60):
        spoilt = bytearray(body)
        for _ in range(rng.choice((1, 3, 20))):
            # Mostly outside of the picture, which is spoilt elsewhere.
            where = rng.choice((rng.randrange(160), rng.randrange(len(body) - 250, len(body))))
            spoilt[where] = rng.randrange(256)
        yield sent(f"spoilt {number}", bytes(spoilt), EITHER)
    for number in range(20):
        yield sent(f"cut {number}", body[: rng.randrange(len(body))], EITHER)


def _types() -> Iterator[Request]:
    """Content types that the body is not of."""
    body = form(*WHOLE)
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "b" * 5000,
        "multipart/form-data; boundary=a b",
        "multipart/form-data; boundary=other",
        f"multipart/form-data; boundary=other; boundary={BOUNDARY}",
        f"multipart/form-data; charset=nothing; boundary={BOUNDARY}",
        f"multipart/form-data; charset=utf-16; boundary={BOUNDARY}",
        f"multipart/mixed; boundary={BOUNDARY}",
        f"multipart/form-dat; boundary={BOUNDARY}",
        "multipart/form-data; boundary*=utf-8''%2D",
        "application/x-www-form-urlencoded",
        "application/json",
        "application/octet-stream",
        "image/png",
        "text/plain; charset=utf-16",
        "text/xml",
        "",
        ";",
        "*/*",
        "a" * 4000,
    ):
        headers = {"Content-Type": kind}
        yield Request(f"type {kind[:60]!r}", body, headers, statuses=EITHER)
    yield Request("type none", body, statuses=REFUSED)
    yield Request("type none of nothing", statuses=REFUSED)
    values: tuple[Any, ...] = ({"image": "x", "instruction": "y"}, [], None, "x", 1e999)
    for value in values:
        data = json.dumps(value).encode()
        yield Request(f"json {value!r}", data, {"Content-Type": "application/json"})
    deep = b"[" * 100_000
    yield Request("json deep", deep, {"Content-Type": "application/json"})
    coded = "application/x-www-form-urlencoded"
    yield Request("urlencoded", b"image=x&instruction=y", {"Content-Type": coded})
    yield Request("bare image", SOUND, {"Content-Type": "image/png"})
    for coding in ("gzip", "deflate", "br", "zstd", "nothing"):
        data = gzip.compress(body) if coding == "gzip" else body
        more = {"Content-Encoding": coding}
        yield Request(f"coding {coding}", **typed(data, more), statuses=EITHER)


def _routes() -> Iterator[Request]:
    """Methods that pages do not have, and pages that are none."""
    for path in PAGES:
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"):
            if (method == "POST") == (path == EDITS) and method in ("POST", "GET"):
                continue
            if method == "HEAD" and path != EDITS:
                yield Request(f"HEAD {path}", method="HEAD", path=path, statuses=EDITED | LOST)
                continue
            yield Request(f"{method} {path}", b"x", method=method, path=path, statuses=LOST)
        if path != EDITS:
            yield Request(f"GET {path}", method="GET", path=path, statuses=EDITED)
            long = path + "?" + "a" * 10_000
            yield Request(f"GET {path} with a query", method="GET", path=long, statuses=EDITED)
    whole = typed(form(*WHOLE))
    yield Request("query", **whole, path=EDITS + "?steps=0&seed=nan", statuses=EITHER)
    for path in (
        "/nothing",
        "/v1",
        "/v1/",
        "/v1/edits/1",
        "/V1/EDITS",
        "/v1//edits",
        "//v1/edits",
        "/v1/edits%00",
        "/v1/../v1/nothing",
        "/..%2f..%2f..%2fetc/passwd",
        "/v1/edits;a=b",
        "/%ff%fe",
        "/%",
        "/%zz",
        "/docs",
        "/redoc",
        "/" + "a" * 20_000,
        "/" + "a/" * 5_000,
    ):
        yield Request(f"path {path[:30]}", **whole, path=path, statuses=LOST | {400, 414})
    for path in ("/v1/edits/", "/v1/edits%2F", "/v1/model/"):
        yield Request(f"path {path}", **whole, path=path, statuses=LOST | {307, 308})
    for path in ("/v1/%65dits", "/v1/edits%0a"):
        yield Request(f"path {path}", **whole, path=path, statuses=EDITED | LOST)


def _headers() -> Iterator[Request]:
    body = form(*WHOLE)
    for name, value in (
        ("Authorization", "Bearer"),
        ("Authorization", "Bearer " + "x" * 5000),
        ("Authorization", "Basic !!!"),
        ("Authorization", "\xe9"),
        ("Accept", "text/html"),
        ("Accept", ";;;"),
        ("Accept-Encoding", "gzip;q=nan"),
        ("Range", "bytes=0-1"),
        ("Range", "bytes=99999999999999999999-"),
        ("If-None-Match", "*"),
        ("If-Modified-Since", "never"),
        ("Cookie", "a=" + "b" * 4000),
        ("Cookie", ";;=;"),
        ("Origin", "null"),
        ("Host", ""),
        ("Host", "nothing:99999"),
        ("Referer", "\xff"),
        ("X-Forwarded-For", "nothing"),
        ("X-Forwarded-Proto", "gopher"),
        ("Upgrade", "websocket"),
        ("X-HTTP-Method-Override", "DELETE"),
        ("TE", "trailers"),
        ("Expect", "nothing"),
    ):
        sent = typed(body, {name: value})
        yield Request(f"header {name}: {value[:20]!r}", **sent, statuses=EDITED)
    many = {f"X-{n}": "1" for n in range(90)}
    yield Request("headers ninety", **typed(body, many), statuses=EDITED)
    for method, path in (("GET", "/v1/model"), ("GET", "/healthz")):
        large = {"Content-Length": "5", "Range": "bytes=5-1"}
        yield Request(f"body of {method} {path}", b"12345", large, method, path, EDITED)


def wires(limit: int) -> list[Wire]:
    """What goes wrong below a request; bodies may have `limit` bytes."""
    return list(_wires(limit))


def _head(*lines: str, first: str = f"POST {EDITS} HTTP/1.1") -> bytes:
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
    return "\r\n".join((first, "Host: x", kind, *lines, "", "")).encode("latin-1")


def _wires(limit: int) -> Iterator[Wire]:
    body = form(*WHOLE)
    length = f"Content-Length: {len(body)}"
    half = len(body) // 2
    broken = {400, 408, 411, 413, 414, 431}
    yield Wire("nothing", ())
    yield Wire("nothing for a while", (0.3,))
    yield Wire("noise", (random.Random(2).randbytes(2000),), broken)
    yield Wire("TLS", (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),), broken)
    yield Wire("HTTP/2", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(30),), broken | {404})
    yield Wire("HTTP/0.9", (b"GET /healthz\r\n\r\n",), broken | {200})
    yield Wire("HTTP/1.0", (b"GET /healthz HTTP/1.0\r\n\r\n",), {200}, must=True)
    yield Wire("HTTP/9.9", (b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n",), broken | {200, 505})
    yield Wire("no host", (b"GET /healthz HTTP/1.1\r\n\r\n",), broken | {200})
    yield Wire("small letters", (b"get /healthz http/1.1\r\nhost: x\r\n\r\n",), broken | LOST)
    yield Wire(
        "two hosts", (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",), broken | {200}
    )
    yield Wire("NUL in a header", (_head("A: b\0c", length) + body,), broken | {200})
    yield Wire("folded header", (_head("A: b\r\n c", length) + body,), broken | {200})
    yield Wire("large header", (_head("A: " + "b" * 200_000, length) + body,), broken | {200})
    many = [f"A{n}: b" for n in range(5_000)]
    yield Wire("many headers", (_head(*many, length) + body,), broken | {200})
    yield Wire(
        "long address", (_head(length, first=f"GET /{'a' * 200_000} HTTP/1.1"),), broken | LOST
    )
    for value in ("-1", "abc", "", "1e3", "0x10", "9" * 30, "+5", "5, 5", "1 0"):
        sent = (_head(f"Content-Length: {value}") + body,)
        yield Wire(f"length {value!r}", sent, broken | REFUSED)
    yield Wire("two lengths", (_head(length, "Content-Length: 1") + body,), broken | REFUSED)
    yield Wire("no length", (_head() + body,), broken | REFUSED)
    yield Wire("length too short", (_head(f"Content-Length: {half}") + body,), broken | REFUSED)
    for declared in (limit * 2, 2**40, 2**63):
        sent = (_head(f"Content-Length: {declared}"), 0.1)
        yield Wire(f"declares {declared} bytes", sent, {413}, must=True)
    chunked = "Transfer-Encoding: chunked"
    whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    yield Wire("chunked", (_head(chunked) + whole,), {200}, must=True)
    ones = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    yield Wire("chunks of one byte", (_head(chunked) + ones,), {200}, must=True)
    yield Wire("chunked and a length", (_head(chunked, length) + whole,), broken | {200})
    yield Wire("chunk of no number", (_head(chunked) + b"zz\r\nabc\r\n",), broken)
    yield Wire("chunk below zero", (_head(chunked) + b"-5\r\nabc\r\n",), broken)
    yield Wire("chunk without end", (_head(chunked) + b"5\r\nabcdefgh",), broken)
    yield Wire("trailers", (_head(chunked) + whole[:-2] + b"A: b\r\n\r\n",), broken | {200})
    yield Wire(
        "unknown coding", (_head("Transfer-Encoding: nothing") + body,), broken | {501} - {501}
    )
    piece = b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16))
    endless = (_head(chunked), *[piece] * (limit // (1 << 16) + 2), b"0\r\n\r\n")
    yield Wire("chunks beyond the limit", endless, {413, 400})
    yield Wire("expects to go on", (_head(length, "Expect: 100-continue"), 0.1, body), {100, 200})
    yield Wire("pipelined", ((_head(length) + body) * 3,), {200}, must=True)
    yield Wire("garbage after a request", (_head(length) + body + b"garbage\r\n\r\n",), {200, 400})
    slowly = [it for n in range(0, len(body), 40) for it in (body[n : n + 40], 0.02)]
    yield Wire("slow body", (_head(length), *slowly), {200}, must=True)
    letters = [it for byte in _head(length) for it in (bytes([byte]), 0.002)]
    yield Wire("slow head", (*letters, body), {200}, must=True)
    for share in (0, 1, half, len(body) - 1):
        yield Wire(f"leaves after {share} bytes", (_head(length) + body[:share], 0.05))
    for number in range(12):
        yield Wire(f"leaves before the answer {number}", (_head(length) + body, 0.01 * number))
    yield Wire("leaves amid the head", (_head(length)[:30], 0.05))
    for sent in (b"\r\n" * 50, b"\0" * 100, b" GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\n\n"):
        yield Wire(f"begins with {sent[:8]!r}", (sent,), broken | LOST | {200})
