"""What training minimises, and the batches that it is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from reasonpix.editing.model import EditingModel
from reasonpix.errors import WeightsError


class Batch(NamedTuple):
    """What one forward pass of training reads: `b` examples."""

    h: list[Tensor]
    """(tokens, h_width) each."""
    instructions: list[str]
    source: Tensor
    """(b, 4, s, s): the mode of the input image's latents, not scaled."""
    target: Tensor
    """(b, 4, s, s): latents of the edited image, drawn from their posterior, scaled."""
    noise: Tensor
    """(b, 4, s, s)."""
    timesteps: Tensor
    """(b,)."""
    drop_text: list[bool]
    """Whose instruction is dropped."""
    drop_image: Tensor
    """(b,) whose input image is dropped."""
    align_text: list[str]
    """Texts of the `align` column, empty without one."""


class DiffusionLoss(nn.Module):
    """The losses, in one module, so that gradients meet in its forward pass on many devices."""

    def __init__(self, model: EditingModel, scheduler: Any) -> None:
        super().__init__()
        self.model = model
        self.noise = DDPMScheduler.from_config(scheduler.config)

    def forward(self, batch: Batch, aligning: bool) -> Tensor:
        """The mean loss of a batch: of the connector's tokens, or of the predicted noise."""
        if aligning:
            return self._alignment(batch)
        device = batch.noise.device
        source = batch.source * ~batch.drop_image[:, None, None, None]
        noisy = self.noise.add_noise(batch.target, batch.noise, batch.timesteps)
        given = self.model.condition(batch.h, batch.instructions, batch.drop_text)
        predicted = self.model(noisy, source, batch.timesteps, given)
        match self.noise.config.prediction_type:
            case "epsilon":
                wanted = batch.noise
            case "v_prediction":
                wanted = self.noise.get_velocity(batch.target, batch.noise, batch.timesteps)
            case other:
                raise WeightsError(
                    f"model: its scheduler predicts {other!r}; epsilon or v_prediction"
                )
        return F.mse_loss(predicted.float(), wanted.to(device).float())

    def _alignment(self, batch: Batch) -> Tensor:
        text = self.model.text
        assert text is not None
        given = self.model.condition(batch.h, batch.instructions)
        error = (given.states.float() - text(batch.align_text).float()).square().mean(2)
        # All of the padding, which says one and the same, counts as much as one token.
        is_text = text.text_mask(batch.align_text)
        padding = (~is_text).sum(1, keepdim=True).clamp(min=1)
        weight = torch.where(is_text, torch.ones_like(error), 1 / padding)
        # By example, so that a batch may be computed in parts.
        return ((error * weight).sum(1) / weight.sum(1)).mean()
