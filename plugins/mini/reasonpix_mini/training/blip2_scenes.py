"""Training scenes of the mini BLIP-2, with what each patch shows, and their captions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonpix_mini import world

QUERIES = 4
"""One query for each object: no scene has more than four."""

PATCH = 8
IGNORED = -100
"""The label that losses skip."""
GRID = world.SIZE // PATCH
_LONG_SIDES = {1: (24, 46), 2: (20, 34), 3: (17, 28), 4: (16, 23)}


class Scenes:
    """An endless supply of training scenes, much faster than `world.scene`.

    Drawings and backgrounds are rendered once by the world's own code, in many poses and sizes, and
    only their layout is new in every scene: 1–4 objects, in somewhat wider ranges of sizes than the
    world's, so that an edited scene is no surprise.
    """

    def __init__(self, seed: int, poses: int = 200, backgrounds: int = 1500) -> None:
        """Render `poses` drawings of each category and `backgrounds` backgrounds."""
        rng = np.random.default_rng(seed)
        self.names = list(world.categories())
        self.backgrounds = [world._background(rng).render() for _ in range(backgrounds)]
        self.drawings = [[self._drawing(rng, name) for _ in range(poses)] for name in self.names]
        self.sides = [
            np.array([max(drawing.shape[:2]) for drawing in drawings]) for drawings in self.drawings
        ]

    @staticmethod
    def _drawing(rng: np.random.Generator, name: str) -> NDArray[np.float32]:
        pose = (bool(rng.integers(2)), float(rng.integers(-9, 10)), int(rng.integers(-6, 7)))
        height, width = world._posed.__wrapped__(name, *pose).shape[:2]
        scale = np.exp(rng.uniform(np.log(16), np.log(46))) / max(height, width)
        box = (0, 0, max(1, round(width * scale)), max(1, round(height * scale)))
        return world._drawing.__wrapped__(world.Placement(name, box, *pose))

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`size` new scenes.

        Returns pixel values (size, 3, SIZE, SIZE), float32; per patch, row by row, the category and
        the rank from the left, both (size, patches), where 0 is background and -100 means "too
        little of an object to say"; and the categories from left to right (size, 4), 0 for none.
        """
        pixels = np.empty((size, world.SIZE, world.SIZE, 3), np.float32)
        category = np.zeros((size, GRID * GRID), np.int64)
        rank = np.zeros((size, GRID * GRID), np.int64)
        order = np.zeros((size, QUERIES), np.int64)
        for i in range(size):
            placed = self._layout(rng)
            placed.sort(key=lambda p: (2 * p[1] + p[3].shape[1], p[2]))
            canvas = self.backgrounds[rng.integers(len(self.backgrounds))].copy()
            if rng.random() < 0.5:
                canvas = canvas[:, ::-1].copy()
            for k, (name, x, y, drawing) in enumerate(placed):
                h, w = drawing.shape[:2]
                alpha = drawing[..., 3:]
                view = canvas[y : y + h, x : x + w]
                view *= 1 - alpha * np.float32(1 / 255)
                view += drawing[..., :3]
                mask = np.zeros((world.SIZE, world.SIZE), np.float32)
                mask[y : y + h, x : x + w] = alpha[..., 0] >= 128
                cover = mask.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).reshape(-1)
                touched = (cover >= 4) & (category[i] <= 0)
                category[i][touched] = IGNORED
                category[i][cover >= 16] = name + 1
                order[i, k] = name + 1
                rank[i][touched] = IGNORED
                rank[i][cover >= 16] = k + 1
            pixels[i] = canvas
        values = torch.from_numpy(np.rint(pixels)).permute(0, 3, 1, 2).div_(127.5).sub_(1)
        return values, torch.from_numpy(category), torch.from_numpy(rank), torch.from_numpy(order)

    def _layout(self, rng: np.random.Generator) -> list[tuple[int, int, int, NDArray[np.float32]]]:
        """Category, x, y and drawing of objects that keep two pixels between them."""
        count = int(rng.choice([1, 2, 3, 4], p=[0.1, 0.25, 0.4, 0.25]))
        low, high = _LONG_SIDES[count]
        while True:
            placed: list[tuple[int, int, int, NDArray[np.float32]]] = []
            for name in rng.choice(len(self.names), count, replace=False):
                fitting = np.flatnonzero((self.sides[name] >= low) & (self.sides[name] <= high))
                drawing = self.drawings[name][rng.choice(fitting)]
                h, w = drawing.shape[:2]
                for _ in range(20):
                    x, y = rng.integers(0, world.SIZE - w + 1), rng.integers(0, world.SIZE - h + 1)
                    if all(
                        x + w + 2 <= ox
                        or ox + other.shape[1] + 2 <= x
                        or y + h + 2 <= oy
                        or oy + other.shape[0] + 2 <= y
                        for _, ox, oy, other in placed
                    ):
                        placed.append((int(name), int(x), int(y), drawing))
                        break
            if len(placed) == count:
                return placed


def caption(names: list[str]) -> str:
    """The world's caption of objects with these names, from left to right."""
    row = tuple(world.Placement(name, (k, 0, k + 1, 1)) for k, name in enumerate(names))
    black = (0, 0, 0)
    background = world.Background("linear", black, black, angle=0, level=0)
    return world.Scene("train", 0, background, row).caption
