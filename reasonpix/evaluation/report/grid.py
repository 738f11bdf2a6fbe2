"""A grid of edits as one image: input and methods side by side, as in Figures 9 to 14."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from reasonpix.core.images import UndecodableImage, decode, encode_png
from reasonpix.evaluation.comparison import Comparison
from reasonpix.evaluation.results import TRUTH

_CELL, _GAP, _MARGIN = 256, 8, 16
"""Side of an image's cell, space between cells, and around all; in pixels."""
_SIZE, _LINE = 15, 20
"""Height of the font and of a line, in pixels."""


def render_grid(comparison: Comparison, kind: str, cases: Sequence[str]) -> bytes:
    """A PNG: a row of images for each case with its instruction below, and a column each for the
    input, the ground truth if there is one, and every method. A failed edit leaves its cell empty.
    """
    folder = comparison.folder
    has_truth = any(folder.truth(case) for case in cases)
    columns = ["input", *([TRUTH] if has_truth else []), *comparison.methods]
    width = 2 * _MARGIN + len(columns) * (_CELL + _GAP) - _GAP
    font = _font()
    heads = [_lines(name, _CELL, font) for name in columns]
    texts = [
        _lines(folder.records[it].instructions[kind], width - 2 * _MARGIN, font) for it in cases
    ]
    top = _MARGIN + _LINE * max(map(len, heads))
    height = top + sum(_CELL + 2 * _GAP + _LINE * len(text) for text in texts) + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, head in enumerate(heads):
        _write(draw, head, _MARGIN + number * (_CELL + _GAP), _MARGIN, font)
    for case, text in zip(cases, texts, strict=True):
        paths: dict[str, object] = {"input": folder.input(case), TRUTH: folder.truth(case)}
        paths |= {method: folder.edit(method, kind, case) for method in comparison.methods}
        for number, name in enumerate(columns):
            if image := _image(paths[name]):
                left = _MARGIN + number * (_CELL + _GAP)
                middle = ((_CELL - image.width) // 2, (_CELL - image.height) // 2)
                sheet.paste(image, (left + middle[0], top + middle[1]))
        _write(draw, text, _MARGIN, top + _CELL + 2, font)
        top += _CELL + 2 * _GAP + _LINE * len(text)
    return encode_png(sheet)


def _image(path: object) -> Image.Image | None:
    """The image scaled to its cell; None if there is none or it cannot be read."""
    if not isinstance(path, Path):
        return None
    try:
        image = decode(path.read_bytes())
    except (OSError, UndecodableImage):
        return None
    scale = _CELL / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    enlarged = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
    return image.resize((size[0], size[1]), enlarged)


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib carries and which knows most scripts."""
    from matplotlib import font_manager

    return ImageFont.truetype(
        io.BytesIO(Path(font_manager.findfont("DejaVu Sans")).read_bytes()), _SIZE
    )


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The text broken into lines of at most `width` pixels."""
    widest = max(font.getlength(letter) for letter in text)
    return textwrap.wrap(text, max(1, int(width / widest))) or [""]


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    for number, line in enumerate(lines):
        draw.text((left, top + number * _LINE), line, "black", font)
