"""What Grounding DINO mini is trained on: scenes, and prompts that ask for some stickers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer

from reasonpix_mini.world import SIZE, Split, categories, scene

# The library splits prompts at these ids, so the vocabulary must put the tokens there.
PAD, UNK, CLS, SEP, DOT, QUESTION = 0, 100, 101, 102, 1012, 1029
FIRST_WORD = 1030
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_OBJECTS = 3


def words() -> list[list[str]]:
    """The words that name each category: its name, its plural, then synonyms of one word."""
    return [
        list(dict.fromkeys([c.name, c.plural, *(s for s in c.synonyms if s.isalpha())]))
        for c in categories().values()
    ]


def tokenizer() -> BertTokenizer:
    """A BERT tokenizer of the world's words; everything else is [UNK]."""
    tokens = [f"[unused{i}]" for i in range(FIRST_WORD)]
    for index, token in {
        PAD: "[PAD]",
        UNK: "[UNK]",
        CLS: "[CLS]",
        SEP: "[SEP]",
        103: "[MASK]",
        DOT: ".",
        QUESTION: "?",
    }.items():
        tokens[index] = token
    tokens += sorted({word for names in words() for word in names})
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True)


@dataclass(frozen=True)
class Pool:
    """Rendered scenes."""

    images: NDArray[np.uint8]
    """(scenes, 64, 64, 3), RGB."""
    labels: NDArray[np.int64]
    """(scenes, 3), indices of categories, −1 where there is no object."""
    boxes: NDArray[np.float32]
    """(scenes, 3, 4), centre and size as shares of the side."""

    @classmethod
    def render(cls, split: Split, count: int, replaced: float = 0.0) -> Pool:
        """The first `count` scenes of a split, a share of them with an object replaced.

        A replacement is fitted into the old box, so it may be smaller than a scene's own objects:
        what edited images show when their new object is looked for.
        """
        index = {name: i for i, name in enumerate(categories())}
        images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
        labels = np.full((count, MOST_OBJECTS), -1, np.int64)
        boxes = np.zeros((count, MOST_OBJECTS, 4), np.float32)
        for i in range(count):
            drawn = scene(split, i)
            rng = np.random.default_rng([5, i])
            if rng.random() < replaced:
                others = [name for name in index if name not in drawn.names]
                which = int(rng.integers(len(drawn.placements)))
                drawn = drawn.replaced(which, str(rng.choice(others)))
            images[i] = drawn.render()
            for j, placement in enumerate(drawn.placements):
                x0, y0, x1, y1 = placement.box
                labels[i, j] = index[placement.category]
                boxes[i, j] = np.array([x0 + x1, y0 + y1, 2 * (x1 - x0), 2 * (y1 - y0)]) / 2 / SIZE
        return cls(images, labels, boxes)


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """(batch, 64, 64, 3) uint8 to normalised (batch, 3, 64, 64) float32, as the processor does."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def worn(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Some of the images as an editor's autoencoder leaves them: softer, with a little noise."""
    share = rng.uniform(0, 1, len(images)) * (rng.random(len(images)) < 0.4)
    amount = torch.from_numpy(share.astype(np.float32)).view(-1, 1, 1, 1)
    soft = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return images + amount * (soft - images + 0.15 * noise)


@dataclass(frozen=True)
class Batch:
    """What the network sees and should find."""

    pixels: Tensor
    input_ids: Tensor
    """(batch, tokens): [CLS] word . word . [SEP], the same number of words in every row."""
    positions: Tensor
    """(batch, 3): the token that names each object, −1 where the prompt does not ask for it."""
    labels: Tensor
    boxes: Tensor


def draw(
    pool: Pool, rng: np.random.Generator, size: int, asked: int, ids: list[list[int]]
) -> Batch:
    """A random batch whose prompts ask for `asked` categories each, present or absent.

    `ids` holds the token ids of each category's words, the name first.
    """
    rows = rng.integers(len(pool.images), size=size)
    images, labels, boxes = pool.images[rows], pool.labels[rows], pool.boxes[rows].copy()
    mirrored = rng.random(size) < 0.5
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    boxes[mirrored, :, 0] = 1 - boxes[mirrored, :, 0]
    input_ids = np.full((size, 2 * asked + 2), DOT, np.int64)
    input_ids[:, 0], input_ids[:, -1] = CLS, SEP
    positions = np.full((size, MOST_OBJECTS), -1, np.int64)
    for row in range(size):
        objects = [j for j in range(MOST_OBJECTS) if labels[row, j] >= 0]
        kept = [j for j in rng.permutation(objects) if rng.random() < 0.75][:asked]
        absent = [c for c in rng.permutation(len(ids)) if c not in labels[row]]
        prompt = [(labels[row, j], j) for j in kept]
        prompt += [(c, -1) for c in absent[: asked - len(kept)]]
        for slot, k in enumerate(rng.permutation(asked)):
            category, j = prompt[k]
            names = ids[category]
            word = names[0] if rng.random() < 0.8 else rng.choice(names)
            if j < 0 and rng.random() < 0.03:
                word = UNK
            input_ids[row, 2 * slot + 1] = word
            if j >= 0:
                positions[row, j] = 2 * slot + 1
    return Batch(
        worn(pixels(images), rng),
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        torch.from_numpy(labels),
        torch.from_numpy(boxes),
    )
