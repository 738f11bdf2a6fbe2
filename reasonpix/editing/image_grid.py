"""Images in rows and columns on white."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

GAP = 8
"""Pixels between two images."""
CELL = 512
"""Longest side of an image in a grid, in pixels."""


def arrange_grid(rows: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
    """Arrange rows of images, each centred in its cell; the cell of None is empty.

    A column is as wide as its widest image, a row as high as its highest.
    """
    widths = [max(_size(image)[0] for image in column) for column in zip(*rows, strict=True)]
    heights = [max(_size(image)[1] for image in row) for row in rows]
    size = sum(widths) + GAP * (len(widths) - 1), sum(heights) + GAP * (len(heights) - 1)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for image, width in zip(row, widths, strict=True):
            if image:
                middle = (width - image.width) // 2, (height - image.height) // 2
                sheet.paste(image, (left + middle[0], top + middle[1]))
            left += width + GAP
        top += height + GAP
    return sheet


def _size(image: Image.Image | None) -> tuple[int, int]:
    return image.size if image else (0, 0)


def shrink(image: Image.Image, longest: int = CELL) -> Image.Image:
    """Scale an image down to sides of at most `longest` pixels."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
