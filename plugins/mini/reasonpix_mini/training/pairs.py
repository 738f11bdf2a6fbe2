"""Pairs to train the mini GLIGEN on: scenes before and after their objects were replaced.

A pair's latents are computed once, so that a training step costs the UNet alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from reasonpix_mini import world
from reasonpix_mini.training.vae import to_tensor

MOST = 4
"""Objects in a scene, at most."""

JITTER = 2
"""How far a box's sides may lie from the object's, in pixels: a grounder is not exact."""


@dataclass(frozen=True)
class Pair:
    """A scene, and the same with every object replaced inside its box."""

    source: NDArray[np.uint8]
    target: NDArray[np.uint8]
    boxes: list[tuple[int, int, int, int]]
    categories: list[str]
    caption: str
    """Of the target."""


def pair(split: world.Split, index: int) -> Pair:
    """Pair number `index`. Outside the boxes its two pictures (64, 64, 3) are equal."""
    rng = np.random.default_rng([11, index])
    scene = world.scene(
        split, index, objects=int(rng.choice([1, 2, 3, 4], p=[0.3, 0.3, 0.25, 0.15]))
    )
    source = scene.render()
    target = source.copy()
    after, boxes, categories = scene, [], []
    for number, placement in enumerate(scene.placements):
        box = placement.box
        if rng.random() < 0.5:
            offset = rng.integers(-JITTER, JITTER, size=4, endpoint=True)
            box = tuple(int(v) for v in np.clip(np.add(box, offset), 0, world.SIZE))  # type: ignore[assignment]
        category = str(rng.choice(list(world.categories())))
        alone = replace(scene, placements=(world.fitted(category, box),)).render()
        x0, y0, x1, y1 = box
        target[y0:y1, x0:x1] = alone[y0:y1, x0:x1]
        after = after.replaced(number, category, box)
        boxes.append(box)
        categories.append(category)
    return Pair(source, target, boxes, categories, after.caption)


@dataclass(frozen=True)
class Pool:
    """Pairs as tensors. Boxes are XYXY as shares of the side; an absent object has category -1."""

    source: torch.Tensor
    """Scaled latents (pairs, 4, 16, 16), float16."""
    target: torch.Tensor
    boxes: torch.Tensor
    """(pairs, MOST, 4), float32."""
    categories: torch.Tensor
    """(pairs, MOST), int64, the position in `world.categories()`."""
    captions: list[str]


def encode(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> torch.Tensor:
    """(n, 64, 64, 3) uint8 to scaled latents (n, 4, 16, 16), float16: the posterior's mode."""
    with torch.inference_mode():
        parts = [
            vae.encode(to_tensor(pixels[i : i + 32])).latent_dist.mode()
            for i in range(0, len(pixels), 32)
        ]
    return (torch.cat(parts) * vae.config.scaling_factor).half()


def pool(vae: AutoencoderKL, pairs: list[Pair]) -> Pool:
    """The pairs' latents and facts."""
    numbers = {name: number for number, name in enumerate(world.categories())}
    boxes = torch.zeros(len(pairs), MOST, 4)
    categories = torch.full((len(pairs), MOST), -1)
    for row, one in enumerate(pairs):
        boxes[row, : len(one.boxes)] = torch.tensor(one.boxes) / world.SIZE
        categories[row, : len(one.boxes)] = torch.tensor([numbers[c] for c in one.categories])
    return Pool(
        encode(vae, np.stack([one.source for one in pairs])),
        encode(vae, np.stack([one.target for one in pairs])),
        boxes,
        categories,
        [one.caption for one in pairs],
    )
