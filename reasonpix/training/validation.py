"""Validation images: input, edit and ground truth of held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from reasonpix.core.images import resized
from reasonpix.editing.checkpoint import LoadedModel
from reasonpix.editing.image_grid import arrange_grid
from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.plugin.components import MLLMEncoder, Options
from reasonpix.plugin.types import Problem
from reasonpix.training.feature_cache import CachedFeatures
from reasonpix.training.features import OnlineFeatures, Request


def validation_grid(
    checkpoint: LoadedModel,
    features: CachedFeatures | OnlineFeatures,
    requests: Sequence[Request],
    device: torch.device,
) -> tuple[Image, list[str]]:
    """Edit views of held-out examples with the model's settings, in their own aspect ratio.

    Returns a grid with a row of input, edit and ground truth for each, and the instructions.
    """
    views = [features.view(*request) for request in requests]
    instructions = [features.pairs.examples[number].instruction for number, _ in requests]
    encoder = CachedEncoder(
        {
            (view.shown.tobytes(), instruction): feature.h.float().numpy()
            for view, instruction, feature in zip(
                views, instructions, features.get(requests), strict=True
            )
        }
    )
    model = ReasonPix2Pix(checkpoint, encoder, device=device, dtype=torch.float32)
    edited = model([view.shown for view in views], instructions)
    rows = [
        [view.shown, edit, resized(view.after, edit.size)]
        for view, edit in zip(views, edited, strict=True)
    ]
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
