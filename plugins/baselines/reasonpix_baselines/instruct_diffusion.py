"""InstructDiffusion's sampling: its guidance formula, and Euler ancestral steps.

Geng et al., "InstructDiffusion: A Generalist Modeling Interface for Vision Tasks", CVPR 2024, and
`edit_cli.py` of github.com/cientgu/InstructDiffusion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL.Image import Image

from reasonpix.editing import (
    GuidanceBranches,
    TorchNetwork,
    UNetGraph,
    check_scheduler,
    denoise,
    load_checkpoint,
)
from reasonpix.plugin import MethodRequest, Problem, ReasonpixError, WeightsError
from reasonpix.plugin.weights import choose_device, choose_dtype
from reasonpix_baselines import InstructDiffusionOptions
from reasonpix_baselines.latents import Latents, in_batches, rows_of


def branches(guidance_scale: float, image_guidance_scale: float) -> GuidanceBranches:
    """½·[e(c_I,∅) + e(∅,c_T)] + s_T·[e(c_I,c_T) − e(c_I,∅)] + s_I·[e(c_I,c_T) − e(∅,c_T)]."""
    return GuidanceBranches(
        weights=(
            guidance_scale + image_guidance_scale,
            0.5 - guidance_scale,
            0.5 - image_guidance_scale,
        ),
        text=(True, False, True),
        image=(True, True, False),
    )


class InstructDiffusionEditor:
    """The loaded weights."""

    def __init__(self, options: InstructDiffusionOptions) -> None:
        self.options = options
        device = choose_device(options)
        dtype = choose_dtype(options, device)
        checkpoint = load_checkpoint(options)
        text = checkpoint.model.text
        if text is None or not checkpoint.own_text:
            raise WeightsError(
                f"model: {options.model!r} has no text encoder of its own that reads "
                "instructions, as InstructPix2Pix and InstructDiffusion do"
            )
        text.encoder.to(device, dtype)
        self._text = text
        self._model = checkpoint.model.to(device, dtype).eval().requires_grad_(False)
        self._latents = Latents(options, checkpoint.vae, self._model.unet, device, dtype)
        self._rows = rows_of(self._model.unet, device, options.batch_size)
        # As k-diffusion spaces them: from the last timestep to the first, evenly.
        self._scheduler = EulerAncestralDiscreteScheduler.from_config(
            checkpoint.scheduler.config, timestep_spacing="linspace"
        )
        check_scheduler(self._scheduler, options.model)
        if options.num_inference_steps > self._scheduler.config.num_train_timesteps:
            raise ReasonpixError(
                f"num_inference_steps: {options.num_inference_steps} are more than the "
                f"{self._scheduler.config.num_train_timesteps} of training"
            )
        self._branches = branches(options.guidance_scale, options.image_guidance_scale)

    @torch.inference_mode()
    def edit(self, requests: Sequence[MethodRequest]) -> list[Image | Problem]:
        """One edited image, or a problem, for each request."""
        sources = [self._latents.posterior(request.image).mode()[0] for request in requests]
        latents = in_batches(
            list(zip(requests, sources, strict=True)),
            lambda item: item[1].shape,
            self._rows,
            self._sampled,
        )
        return [
            self._latents.image(latent, request.image.size)
            for latent, request in zip(latents, requests, strict=True)
        ]

    def _sampled(self, items: list[tuple[MethodRequest, torch.Tensor]]) -> torch.Tensor:
        """Scaled latents (rows, c, h, w)."""
        # One text at a time, so that its states do not depend on the batch.
        instructions = [request.instruction for request, _ in items]
        texts = [self._text([instruction])[0] for instruction in instructions]
        count = len(self._branches.text)
        conditioning = self._model.condition(
            texts * count,
            instructions * count,
            dropped=[not has_text for has_text in self._branches.text for _ in items],
        )
        return denoise(
            TorchNetwork(UNetGraph(self._model.unet)),
            self._scheduler,
            [request.seed for request, _ in items],
            torch.stack([source for _, source in items]),
            conditioning,
            self._branches,
            self.options.num_inference_steps,
        )
