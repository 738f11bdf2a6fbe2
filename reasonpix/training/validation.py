"""Pictures to look at while a model learns: input, edit and truth of examples it is not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from reasonpix.editing.checkpoint import LoadedModel
from reasonpix.editing.image_grid import grid
from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.plugin.components import MLLMEncoder, Options
from reasonpix.plugin.types import Problem
from reasonpix.training.feature_cache import CachedFeatures, OnlineFeatures


def sheet(
    checkpoint: LoadedModel,
    features: CachedFeatures | OnlineFeatures,
    examples: Sequence[int],
    device: torch.device,
) -> tuple[Image, list[str]]:
    """A row for each of `examples`, edited as the model's settings say, and their instructions."""
    pairs = features.pairs
    views = [pairs.view(number, 0) for number in examples]
    instructions = [pairs.examples[number].instruction for number in examples]
    states = features.get([(number, 0) for number in examples])
    known = CachedEncoder(
        {
            (view.tobytes(), instruction): feature.h.float().numpy()
            for (view, _), instruction, feature in zip(views, instructions, states, strict=True)
        }
    )
    model = ReasonPix2Pix(checkpoint, known, device=device, dtype=torch.float32)
    edited = model([before for before, _ in views], instructions)
    rows = [[before, after, truth] for (before, truth), after in zip(views, edited, strict=True)]
    return grid(rows), instructions


class CachedEncoder(MLLMEncoder[Options]):
    """States that are known already, by the bytes of the image and the instruction."""

    name = "remembered"

    def __init__(self, states: Mapping[tuple[bytes, str], NDArray[np.float32]]) -> None:
        super().__init__(Options())
        self.states = states

    def encode(
        self, images: Sequence[Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        """Those of each pair."""
        return [
            self.states[image.tobytes(), instruction]
            for image, instruction in zip(images, instructions, strict=True)
        ]
