"""Record beside the shipped checkpoints what they were trained on.

    python -m reasonpix_mini.training_data [--to CHECKPOINTS]

The training scripts draw scenes by number, so the images are rendered once more; their cards say
how many there were. Reasoning instructions are recorded by the training hints, which each of them
contains.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reasonpix.editing import TrainingData
from reasonpix_mini import lexicon, stickers, world
from reasonpix_mini.training.instruct_pix2pix import edit

EDITS, PART1, SCENES = 24_000, 3_500, 20_000
"""Edits that mini/instruct-pix2pix was trained on first, scenes of Part I for both editing models,
and scenes for mini/stable-diffusion."""


def main() -> None:
    """Write the file of each checkpoint that a method may use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "checkpoints")
    folder: Path = parser.parse_args().to
    edits = rendered_edits(EDITS)
    # The file of mini/reasonpix2pix, which was trained on the same, is a link to this one.
    (edits | part1(PART1)).write(folder / "instruct-pix2pix")
    # Its text encoder is that of mini/instruct-pix2pix; its UNet was trained on captions.
    texts = edits.model_copy(update={"datasets": (), "images": frozenset()})
    (scenes(SCENES) | texts).write(folder / "stable-diffusion")


def hints() -> Iterator[str]:
    """The hints that training instructions are made of."""
    return chain.from_iterable(category.hints for category in world.categories().values())


def rendered_edits(count: int) -> TrainingData:
    """What `reasonpix_mini.training.instruct_pix2pix` trains on."""
    edits = [edit("train", index) for index in range(count)]
    pairs = {(one.before.placements[one.number].category, one.target) for one in edits}
    return TrainingData.of_dataset(
        "rendered edits of the sticker world, train",
        count,
        images(scene for one in edits for scene in (one.before, one.after)),
        chain.from_iterable(lexicon.direct_instructions(*pair) for pair in sorted(pairs)),
        hints(),
    )


def part1(count: int) -> TrainingData:
    """The pairs that recipe mini/part1 publishes: its tenth of unchanged ones is rejected.

    The plain instructions that the connector is aligned to follow one of the direct templates.
    """
    options = stickers.StickersOptions(split="train", count=count, pairs=True, unchanged=0.1)
    source = stickers.Stickers(options)
    scenes = [world.scene("train", i) for i in range(count) if not source.is_unchanged(i)]
    edits = [stickers.edit(scene) for scene in scenes]
    return TrainingData.of_dataset(
        "mini/part1",
        len(edits),
        images([*scenes, *(one.after for one in edits)]),
        [one.instruction for one in edits],
        hints(),
    )


def scenes(count: int) -> TrainingData:
    """What `reasonpix_mini.training.text_to_image` trains on."""
    return TrainingData.of_dataset(
        "scenes of the sticker world, train",
        count,
        images(world.scene("train", index) for index in range(count)),
    )


def images(scenes: Iterable[world.Scene]) -> Iterator[Image.Image]:
    """The scenes rendered."""
    pixels: Iterator[NDArray[np.uint8]] = (scene.render() for scene in scenes)
    return map(Image.fromarray, pixels)


if __name__ == "__main__":
    main()
