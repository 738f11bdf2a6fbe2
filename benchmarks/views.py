"""How many edits training sees: the share of pairs whose edit shows in their view.

    python benchmarks/views.py [--pairs 2000]

Each pair is a smooth random picture in which one box, at a random place, has other colours. The
sides of the box are 10 to 40 % of the square root of the picture's area. Views and the rule for
what shows are those of `reasonpix train`, at 256 pixels: an edit is visible if training would not
leave the pair out, and mostly visible if at least half of the box's pixels are in the view.
"""

from __future__ import annotations

import argparse
from typing import get_args

import numpy as np
from PIL import Image

from reasonpix.datasets.views import VISIBLE_CHANGE, Fit, View, largest_change

SIDE = 256
"""Side of the square that training sees, and of a square picture."""

RATIOS = ((1, 1), (4, 3), (16, 9), (21, 9))


def random_pair(
    rng: np.random.Generator, ratio: tuple[int, int]
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The input image, the edited image, and the edit's box as a mask."""
    wide = (ratio[0] / ratio[1]) ** 0.5
    width, height = size = round(SIDE * wide), round(SIDE / wide)
    if rng.random() < 0.5:  # half of the pictures are portraits
        width, height = size = height, width
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    box_width, box_height = (round(SIDE * rng.uniform(0.1, 0.4)) for _ in range(2))
    left = int(rng.integers(0, width - box_width + 1))
    top = int(rng.integers(0, height - box_height + 1))
    box = (left, top, left + box_width, top + box_height)
    edited, mask = picture.copy(), Image.new("L", size)
    edited.paste(tuple(rng.integers(0, 256, 3).tolist()), box)
    mask.paste(255, box)
    return picture, edited, mask


def shows(
    fit: Fit, before: Image.Image, after: Image.Image, mask: Image.Image
) -> tuple[bool, bool]:
    """Whether the edit is visible in the first view, and whether at least half of it is there."""
    view = View(fit, 1.0, 0.5, 0.5, flip=False)
    squares = (
        view.of(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in (before, after)
    )
    kept = np.count_nonzero(view.of(mask)) / np.count_nonzero(mask)
    return largest_change(*squares) > VISIBLE_CHANGE, kept >= 0.5


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure how many edits training sees.")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs of each aspect ratio")
    pairs = parser.parse_args().pairs
    fits = sorted(get_args(Fit))
    columns = [f"`fit: {fit}`: {what}" for fit in fits for what in ("visible", "mostly visible")]
    print("| aspect ratio |", " | ".join(columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for ratio in RATIOS:
        rng = np.random.default_rng(0)
        made = [random_pair(rng, ratio) for _ in range(pairs)]
        shares = [np.mean([shows(fit, *pair) for pair in made], axis=0) for fit in fits]
        cells = [f"{share:.1%}" for share in np.concatenate(shares)]
        print(f"| {ratio[0]}:{ratio[1]} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
