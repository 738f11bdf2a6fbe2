"""What training sees of a pair: a part of both images, and whether the edit shows in it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

SMALLEST_CROP = 0.8
"""The side of the smallest random crop, as a share of the whole, so that most of an edit stays."""

VISIBLE_CHANGE = 8
"""Levels of 255 by which an edit has to change a cell to show; JPEG changes fewer."""

_CELLS = 32
"""Cells per side, in which changes are averaged; at 256 pixels those of Stable Diffusion's VAE."""

Fit = Literal["stretch", "crop"]


class View(NamedTuple):
    """A part of an image, the same for both images of a pair.

    With `fit` "stretch" it has the image's aspect ratio, and `scale` times its sides; with "crop"
    it is a square of `scale` times the shorter side. `x` and `y` in [0, 1] are its position within
    the remaining width and height.
    """

    fit: Fit
    scale: float
    x: float
    y: float
    flip: bool

    def of(self, image: Image.Image) -> Image.Image:
        """This part of the image, not resized; mirrored when `flip` is set."""
        sides = image.size if self.fit == "stretch" else (min(image.size),) * 2
        width, height = (max(1, round(self.scale * side)) for side in sides)
        left = int(self.x * (image.width - width))
        top = int(self.y * (image.height - height))
        part = image.crop((left, top, left + width, top + height))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else part


def largest_change(before: Image.Image, after: Image.Image) -> int:
    """How much the edit changes the mean colour of a cell at most, in levels of 255.

    The images have the same size. Cells make JPEG's noise vanish, which differs from an edit by
    its mean, not by the number of pixels that it changes.
    """
    cells = (
        np.asarray(image.resize((_CELLS, _CELLS), Image.Resampling.BOX), dtype=np.int16)
        for image in (before, after)
    )
    return int(np.abs(np.subtract(*cells)).max())
