"""Sampling an editing model: guidance by image and instruction, and noise of each edit's own seed.

`c`, `h`, `w` are those of the latents; `branches` the predictions that guidance is made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonpix.editing.model import ConditioningTokens
from reasonpix.editing.runtimes.base import Network


@dataclass(frozen=True)
class GuidanceBranches:
    """What is predicted for both guidances (InstructPix2Pix, Eq. 3), in the form of a sum.

    e(∅,∅) + s_I·[e(c_I,∅) − e(∅,∅)] + s_T·[e(c_I,c_T) − e(c_I,∅)]
    = s_T·e(c_I,c_T) + (s_I − s_T)·e(c_I,∅) + (1 − s_I)·e(∅,∅).
    A prediction whose weight is 0 is not made: without guidance (1, 1) one is left of three.
    """

    weights: tuple[float, ...]
    text: tuple[bool, ...]
    """Whether a branch sees the instruction."""
    image: tuple[bool, ...]
    """Whether a branch sees the image."""

    @classmethod
    def of(cls, guidance_scale: float, image_guidance_scale: float) -> GuidanceBranches:
        """The branches that count for s_T and s_I."""
        every = (
            (guidance_scale, True, True),
            (image_guidance_scale - guidance_scale, False, True),
            (1 - image_guidance_scale, False, False),
        )
        weights, text, image = zip(*(branch for branch in every if branch[0]), strict=True)
        return cls(weights, text, image)

    def guided(self, predicted: Tensor) -> Tensor:
        """The sum (rows, …) of predictions (branches · rows, …): the rows of each in turn."""
        parts = predicted.chunk(len(self.weights))
        total = self.weights[0] * parts[0]
        for weight, part in zip(self.weights[1:], parts[1:], strict=True):
            total = total + weight * part
        return total


def stacked(given: Sequence[ConditioningTokens]) -> ConditioningTokens:
    """States of edits, (branches, n, width) each, as the rows of each branch in turn."""
    states = torch.stack([one.states for one in given], 1).flatten(0, 1)
    masks = [one.mask for one in given if one.mask is not None]
    return ConditioningTokens(states, torch.stack(masks, 1).flatten(0, 1) if masks else None)


def denoise(
    unet: Network,
    scheduler: Any,
    seeds: Sequence[int],
    source: Tensor,
    given: ConditioningTokens,
    branches: GuidanceBranches,
    steps: int,
    advance: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Latents (rows, c, h, w), scaled, float32, one for each seed.

    `unet` is as in `reasonpix.editing.runtimes.modules`, of a model that reads the image's latents
    after the noisy ones. Inputs that do not change between steps (image, states, mask) are bound
    once.
    `scheduler` is any of diffusers' that predict what the model was trained to; `source` (rows, c,
    h, w) are the image latents, not scaled; `given` are the states as `stacked` gives them.
    `advance` is told after each step how large a share of all it was.
    """
    # On the CPU in float32: the same numbers whatever the device and the precision.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(source.shape[1:], generator=it) for it in generators])
    # Schedulers that draw noise at each step, such as Euler's ancestral one, take a list.
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generators else {}
    sources = torch.cat([source * seen for seen in branches.image]).to(unet.device, unet.dtype)
    sample = torch.cat([torch.zeros_like(sources), sources], 1)
    noisy = sample[:, : source.shape[1]].unflatten(0, (len(branches.image), -1))
    # Some schedulers have timesteps between whole numbers.
    now = torch.zeros(len(sample), dtype=torch.float32, device=unet.device)
    predict = unet.bind(
        sample=sample,
        timestep=now,
        encoder_hidden_states=given.states.to(unet.device, unet.dtype),
        encoder_attention_mask=given.mask,
    )
    scheduler.set_timesteps(steps, device=unet.device)
    latents = noise.to(unet.device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy[:] = scheduler.scale_model_input(latents, timestep)
        now[:] = timestep
        predicted = predict()
        guided = branches.guided(predicted.float())
        latents = scheduler.step(guided, timestep, latents, **extra, return_dict=False)[0]
        advance(1 / len(scheduler.timesteps))  # some schedulers take two for a step
    return latents
