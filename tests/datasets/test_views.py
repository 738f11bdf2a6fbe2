"""Which part of a pair is seen, and whether an edit shows in it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from reasonpix.datasets.views import VISIBLE_CHANGE, Fit, View, largest_change
from tests.support.pair_files import picture

SHAPES = [(32, 32), (40, 30), (64, 36), (36, 64), (84, 36), (128, 8), (8, 128), (1, 1), (1, 50)]
"""Width and height: square, 4:3, 16:9, 9:16, 21:9, and beyond."""


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.size == other.size and image.tobytes() == other.tobytes()


@pytest.mark.parametrize("size", SHAPES)
def test_the_whole_image(size: tuple[int, int]) -> None:
    image = picture(1, size)
    assert same(View("stretch", 1.0, 0.5, 0.5, flip=False).of(image), image)


@pytest.mark.parametrize("size", SHAPES)
def test_the_centre_square(size: tuple[int, int]) -> None:
    image, side = picture(1, size), min(size)
    left, top = ((length - side) // 2 for length in size)
    part = View("crop", 1.0, 0.5, 0.5, flip=False).of(image)
    assert same(part, image.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_a_random_crop_is_a_part_of_the_image(fit: Fit, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = np.arange(size[0] * size[1], dtype=np.uint16).reshape(size[::-1])
    image = Image.fromarray(pixels)  # every pixel tells its place
    for _ in range(20):
        scale, x, y = rng.uniform(0.8, 1), *rng.uniform(0, 1, 2)
        part = np.asarray(View(fit, scale, x, y, flip=False).of(image), dtype=int)
        top, left = divmod(int(part[0, 0]), size[0])
        height, width = part.shape
        assert np.array_equal(part, pixels[top : top + height, left : left + width])
        sides = size if fit == "stretch" else (min(size),) * 2
        assert [width, height] == [max(1, round(scale * side)) for side in sides]


def test_a_crop_reaches_every_edge() -> None:
    image = picture(2, (50, 20))
    for x, y in ((0.0, 0.0), (0.9999, 0.9999)):
        part = View("crop", 0.8, x, y, flip=False).of(image)
        left, top = int(x * 34), int(y * 4)
        assert same(part, image.crop((left, top, left + 16, top + 16)))
    assert left == 33


def test_a_flip_mirrors_the_part() -> None:
    image = picture(3, (64, 40))
    view = View("stretch", 0.9, 0.2, 0.7, flip=False)
    mirrored = view.of(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert same(view._replace(flip=True).of(image), mirrored)


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_the_part_is_the_same_of_a_smaller_copy(fit: Fit) -> None:
    large = picture(3, (8, 5)).resize((128, 80), Image.Resampling.BICUBIC)
    small = large.resize((64, 40), Image.Resampling.BOX)
    view = View(fit, 0.85, 0.3, 0.9, flip=False)
    one, two = (
        view.of(image).resize((32, 32), Image.Resampling.LANCZOS) for image in (large, small)
    )
    assert np.abs(np.asarray(one, float) - np.asarray(two, float)).mean() < 4


# -- Whether an edit shows ------------------------------------------------------------------------


def compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def square(image: Image.Image) -> Image.Image:
    return image.resize((256, 256), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "rocket", "logo", "text"])
@pytest.mark.parametrize("quality", [60, 75, 95])
def test_compression_is_no_edit(name: str, quality: int) -> None:
    image = photograph(name)
    assert largest_change(square(image), square(compressed(image, quality))) <= VISIBLE_CHANGE


@pytest.mark.parametrize("quality", [60, 95])
@pytest.mark.parametrize(
    ("box", "colour"),
    [
        ((250, 100, 300, 150), (255, 0, 0)),
        ((0, 0, 24, 24), (40, 160, 220)),
        ((560, 380, 600, 400), (0, 0, 0)),
        ((300, 200, 312, 212), (255, 255, 255)),
    ],
)
def test_an_edit_shows(
    box: tuple[int, int, int, int], colour: tuple[int, ...], quality: int
) -> None:
    image = photograph("coffee")
    edited = image.copy()
    edited.paste(colour, box)
    edited = compressed(edited, quality)
    assert largest_change(square(image), square(edited)) > VISIBLE_CHANGE
    everywhere = Image.eval(image, lambda value: min(255, value + 12))  # "make it brighter"
    assert largest_change(square(image), square(everywhere)) > VISIBLE_CHANGE


@pytest.mark.parametrize("side", [8, 16, 64, 256])
def test_the_change_is_that_of_the_mean_of_a_cell(side: int) -> None:
    before = Image.new("RGB", (side, side), (100, 100, 100))
    assert largest_change(before, before.copy()) == 0
    after = before.copy()
    cell = max(1, side // 32)
    after.paste((100, 100, 160), (0, 0, cell, cell))
    assert largest_change(before, after) == largest_change(after, before) == 60
    if cell > 1:
        after.paste((100, 100, 100), (0, 0, cell // 2, cell))
        assert largest_change(before, after) == 30
