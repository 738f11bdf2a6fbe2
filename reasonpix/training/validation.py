"""Validation images: input, edit and ground truth of held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from reasonpix.editing.checkpoint import LoadedModel
from reasonpix.editing.image_grid import arrange_grid
from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.plugin.components import MLLMEncoder, Options
from reasonpix.plugin.types import Problem
from reasonpix.training.feature_cache import CachedFeatures
from reasonpix.training.features import OnlineFeatures


def validation_grid(
    checkpoint: LoadedModel,
    features: CachedFeatures | OnlineFeatures,
    examples: Sequence[int],
    device: torch.device,
) -> tuple[Image, list[str]]:
    """Edit `examples` with the model's settings; return a grid of rows, and instructions."""
    pairs = features.pairs
    views = [pairs.view(number, 0) for number in examples]
    instructions = [pairs.examples[number].instruction for number in examples]
    computed = features.get([(number, 0) for number in examples])
    encoder = CachedEncoder(
        {
            (view.tobytes(), instruction): feature.h.float().numpy()
            for (view, _), instruction, feature in zip(views, instructions, computed, strict=True)
        }
    )
    model = ReasonPix2Pix(checkpoint, encoder, device=device, dtype=torch.float32)
    edited = model([before for before, _ in views], instructions)
    rows = [[before, after, truth] for (before, truth), after in zip(views, edited, strict=True)]
    return arrange_grid(rows), instructions


class CachedEncoder(MLLMEncoder[Options]):
    """States computed before, by the image's bytes and the instruction."""

    name = "cached"

    def __init__(self, states: Mapping[tuple[bytes, str], NDArray[np.float32]]) -> None:
        super().__init__(Options())
        self.states = states

    def encode(
        self, images: Sequence[Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        """Look up the states of each pair."""
        return [
            self.states[image.tobytes(), instruction]
            for image, instruction in zip(images, instructions, strict=True)
        ]
