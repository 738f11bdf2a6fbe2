"""Metrics of pixels: L1 and L2, and PSNR and SSIM of the region to preserve."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from reasonpix.core.images import resized

IDENTICAL = 100.0
"""PSNR in dB for equal pixels, and its upper bound; mathematically it is infinite."""

Plane = NDArray[np.floating[Any]]
"""(height, width)"""

_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2


def distances(
    image: Image.Image, truth: Image.Image, where: NDArray[np.bool_] | None = None
) -> tuple[float, float]:
    """L1 and L2 of RGB images: mean absolute and mean squared difference, of values in [0, 1].

    `image` is resized to the size of `truth`; `where` (height, width) selects pixels.
    """
    difference = ImageChops.difference(resized(image, truth.size), truth)
    mask = None if where is None else Image.fromarray(where)
    # The histogram of differences gives exact sums.
    counts = np.array(difference.histogram(mask)).reshape(3, 256).sum(0)
    values = np.arange(256) / 255
    return float(counts @ values / counts.sum()), float(counts @ values**2 / counts.sum())


def psnr(image: Image.Image, reference: Image.Image, where: NDArray[np.bool_]) -> float:
    """Peak signal-to-noise ratio in dB over the pixels `where`, at most `IDENTICAL`."""
    _, squared = distances(image, reference, where)
    return min(IDENTICAL, -10 * math.log10(squared)) if squared else IDENTICAL


def ssim(image: Image.Image, reference: Image.Image, where: NDArray[np.bool_]) -> float:
    """Structural similarity (Wang et al., 2004), mean over the pixels `where` and the channels.

    Gaussian windows of 11 pixels, σ 1.5; images are mirrored at their borders. Other pixels are
    replaced by the reference's, so that a window that reaches them sees no change.
    """
    x = np.asarray(reference, np.float32) / 255
    y = np.where(where[..., None], np.asarray(image, np.float32) / 255, x)
    return float(np.mean([_ssim(x[..., c], y[..., c])[where].mean(dtype=float) for c in range(3)]))


def _ssim(x: Plane, y: Plane) -> Plane:
    """The SSIM map of two planes."""
    mean_x, mean_y = _blurred(x), _blurred(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance = _blurred(x * y) - product
    variances = _blurred(x**2 + y**2) - squares
    result: Plane = ((2 * product + _C1) * (2 * covariance + _C2)) / (
        (squares + _C1) * (variances + _C2)
    )
    return result


def _blurred(plane: Plane) -> Plane:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2).astype(np.float32)
    weights /= weights.sum()
    for _ in range(2):  # rows, then columns
        padded = np.pad(plane, ((_RADIUS, _RADIUS), (0, 0)), "symmetric")
        height = len(plane)
        blurred = weights[0] * padded[:height]
        for offset in range(1, len(weights)):
            blurred += weights[offset] * padded[offset : offset + height]
        plane = np.ascontiguousarray(blurred.T)
    return plane
