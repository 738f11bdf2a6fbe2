"""Where the model looks in an image of any shape, and what it sees of the box.

The model works on squares. A `Window` is the part of the image that becomes the square; boxes go
through it in one direction, the edited pixels come back in the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from reasonpix.plugin import Box

SMALLEST_SHARE = 1 / 64
"""A box that covers less of the model's square, in either direction, vanishes in its latents."""


@dataclass(frozen=True)
class Window:
    """A rectangle of whole pixels inside an image; right and lower ends are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @classmethod
    def around(cls, box: Box) -> Window:
        """The square of the image's short side that holds `box` as centrally as the image allows.

        A box longer than the short side stretches the window to its own length, which the model
        then sees squeezed; nothing is ever seen from outside the image.
        """
        short = min(box.width, box.height)
        x0, y0, x1, y1 = box.pixels()
        left, right = _centred(x0, x1, max(short, x1 - x0), box.width)
        top, bottom = _centred(y0, y1, max(short, y1 - y0), box.height)
        return cls(left, top, right, bottom)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return (self.right - self.left, self.bottom - self.top)

    def shares(self, box: Box) -> tuple[float, float, float, float]:
        """`box` as XYXY shares of the window's sides, in [0, 1]: GLIGEN's own coordinates."""
        width, height = self.size
        return (
            (box.x0 - self.left) / width,
            (box.y0 - self.top) / height,
            (box.x1 - self.left) / width,
            (box.y1 - self.top) / height,
        )

    def cut(self, image: Image.Image, side: int) -> Image.Image:
        """What the model sees: the window, resampled to `side` x `side` pixels."""
        part = image.crop((self.left, self.top, self.right, self.bottom))
        return _resized(part, (side, side))

    def paste(self, image: Image.Image, edited: Image.Image, box: Box) -> Image.Image:
        """A copy of `image` with the pixels that `box` touches taken from `edited`.

        `edited` is the model's square. Every pixel outside `box.pixels()` stays as it is.
        """
        x0, y0, x1, y1 = box.pixels()
        part = _resized(edited, self.size).crop(
            (x0 - self.left, y0 - self.top, x1 - self.left, y1 - self.top)
        )
        result = image.copy()
        result.paste(part, (x0, y0))
        return result


def cells(shares: tuple[float, float, float, float], side: int) -> tuple[int, int, int, int]:
    """The latent cells that a box touches, XYXY with exclusive ends, of a grid of `side` cells."""
    x0, y0, x1, y1 = (round(share * side, 6) for share in shares)  # 8.000000001 touches no ninth
    return (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))


def too_small(shares: tuple[float, float, float, float]) -> bool:
    """Whether the model cannot see a box of this size."""
    x0, y0, x1, y1 = shares
    return min(x1 - x0, y1 - y0) < SMALLEST_SHARE


def _centred(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """An interval of `length` in [0, limit] around [start, end]."""
    first = min(max((start + end - length) // 2, 0), limit - length)
    return first, first + length


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
