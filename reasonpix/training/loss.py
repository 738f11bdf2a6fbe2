"""The loss, and the batches that it reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from reasonpix.editing.model import EditingModel
from reasonpix.errors import WeightsError


class Batch(NamedTuple):
    """A micro-batch of `b` examples."""

    h: list[Tensor]
    """(tokens, h_width) each."""
    instructions: list[str]
    source: Tensor
    """(b, 4, s, s): the mode of the input image's latents, not scaled."""
    target: Tensor
    """(b, 4, s, s): latents of the edited image, sampled from their posterior, scaled."""
    noise: Tensor
    """(b, 4, s, s)."""
    timesteps: Tensor
    """(b,)."""
    drop_text: list[bool]
    """Examples whose instruction is dropped."""
    drop_image: Tensor
    """(b,), bool: examples whose input image is dropped."""
    align_text: list[str]
    """Texts of the `align` column; empty where a row has none."""


class DiffusionLoss(nn.Module):
    """Both losses in one module, as distributed training synchronizes one forward pass."""

    def __init__(self, model: EditingModel, scheduler: Any) -> None:
        super().__init__()
        self.model = model
        self.noise = DDPMScheduler.from_config(scheduler.config)

    def forward(self, batch: Batch, aligning: bool) -> Tensor:
        """Mean loss of a batch: of the connector's tokens if `aligning`, else of the prediction."""
        if aligning:
            return self._alignment_loss(batch)
        device = batch.noise.device
        source = batch.source * ~batch.drop_image[:, None, None, None]
        noisy = self.noise.add_noise(batch.target, batch.noise, batch.timesteps)
        conditioning = self.model.condition(batch.h, batch.instructions, batch.drop_text)
        predicted = self.model(noisy, source, batch.timesteps, conditioning)
        match self.noise.config.prediction_type:
            case "epsilon":
                target = batch.noise
            case "v_prediction":
                target = self.noise.get_velocity(batch.target, batch.noise, batch.timesteps)
            case other:
                raise WeightsError(
                    f"model: its scheduler predicts {other!r}; epsilon or v_prediction"
                )
        return F.mse_loss(predicted.float(), target.to(device).float())

    def _alignment_loss(self, batch: Batch) -> Tensor:
        text = self.model.text
        assert text is not None
        states = self.model.condition(batch.h, batch.instructions).states
        error = (states.float() - text(batch.align_text).float()).square().mean(2)
        # All padding tokens together count as one token: their states are the same.
        is_text = text.text_mask(batch.align_text)
        padding = (~is_text).sum(1, keepdim=True).clamp(min=1)
        weight = torch.where(is_text, torch.ones_like(error), 1 / padding)
        # Per example, so that micro-batches add up to the batch.
        return ((error * weight).sum(1) / weight.sum(1)).mean()
