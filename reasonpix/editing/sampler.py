"""Sampling: guidance by image and instruction, and noise from each edit's own seed.

`c`, `h`, `w` are those of the latents; `branches` are the predictions that guidance combines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonpix.editing.connectors import ConditioningTokens
from reasonpix.editing.runtimes.base import Network


@dataclass(frozen=True)
class GuidanceBranches:
    """The predictions of InstructPix2Pix's guidance (Eq. 3), as a weighted sum.

    e(∅,∅) + s_I·[e(c_I,∅) − e(∅,∅)] + s_T·[e(c_I,c_T) − e(c_I,∅)]
    = s_T·e(c_I,c_T) + (s_I − s_T)·e(c_I,∅) + (1 − s_I)·e(∅,∅).
    Predictions of weight 0 are omitted: without guidance (1, 1) one of the three remains.
    """

    weights: tuple[float, ...]
    text: tuple[bool, ...]
    """Whether a branch sees the instruction."""
    image: tuple[bool, ...]
    """Whether a branch sees the image."""

    @classmethod
    def of(cls, guidance_scale: float, image_guidance_scale: float) -> GuidanceBranches:
        """The branches of nonzero weight for s_T and s_I."""
        every = (
            (guidance_scale, True, True),
            (image_guidance_scale - guidance_scale, False, True),
            (1 - image_guidance_scale, False, False),
        )
        weights, text, image = zip(*(branch for branch in every if branch[0]), strict=True)
        return cls(weights, text, image)

    def guided(self, predicted: Tensor) -> Tensor:
        """Combine predictions (branches · rows, …), all rows of a branch together, to (rows, …)."""
        parts = predicted.chunk(len(self.weights))
        total = self.weights[0] * parts[0]
        for weight, part in zip(self.weights[1:], parts[1:], strict=True):
            total = total + weight * part
        return total


def stack_branches(edits: Sequence[ConditioningTokens]) -> ConditioningTokens:
    """Stack edits, each (branches, n, width), to (branches · rows, n, width)."""
    states = torch.stack([edit.states for edit in edits], 1).flatten(0, 1)
    masks = [edit.mask for edit in edits if edit.mask is not None]
    return ConditioningTokens(states, torch.stack(masks, 1).flatten(0, 1) if masks else None)


def denoise(
    unet: Network,
    scheduler: Any,
    seeds: Sequence[int],
    source: Tensor,
    conditioning: ConditioningTokens,
    branches: GuidanceBranches,
    steps: int,
    on_step: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Sample scaled latents (rows, c, h, w), float32, one row for each seed.

    - `unet`: as in `reasonpix.editing.runtimes.modules`. Inputs that stay the same in all steps
      (image, conditioning) are bound once.
    - `scheduler`: any of diffusers' with the prediction type that the model was trained with.
    - `source` (rows, c, h, w): the image latents, not scaled.
    - `conditioning`: from `stack_branches`.
    - `on_step`: called after each step with its share of all steps.
    """
    # On the CPU in float32: the same noise on every device and in every precision.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack(
        [torch.randn(source.shape[1:], generator=generator) for generator in generators]
    )
    # Schedulers that draw noise at each step, such as Euler ancestral, accept a list.
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generators else {}
    sources = torch.cat([source * with_image for with_image in branches.image])
    sources = sources.to(unet.device, unet.dtype)
    sample = torch.cat([torch.zeros_like(sources), sources], 1)
    noisy = sample[:, : source.shape[1]].unflatten(0, (len(branches.image), -1))
    # float32: some schedulers have fractional timesteps.
    timesteps = torch.zeros(len(sample), dtype=torch.float32, device=unet.device)
    predict = unet.bind(
        sample=sample,
        timestep=timesteps,
        encoder_hidden_states=conditioning.states.to(unet.device, unet.dtype),
        encoder_attention_mask=conditioning.mask,
    )
    scheduler.set_timesteps(steps, device=unet.device)
    latents = noise.to(unet.device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy[:] = scheduler.scale_model_input(latents, timestep)
        timesteps[:] = timestep
        predicted = predict()
        guided = branches.guided(predicted.float())
        latents = scheduler.step(guided, timestep, latents, **extra, return_dict=False)[0]
        on_step(1 / len(scheduler.timesteps))  # more than `steps` for some schedulers
    return latents
