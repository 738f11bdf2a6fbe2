"""Null-text inversion: the states of the empty text are optimized to reconstruct the image.

Mokady et al., "Null-text Inversion for Editing Real Images using Guided Diffusion Models", CVPR
2023, and `null_text_w_ptp.ipynb` of github.com/google/prompt-to-prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from reasonpix.plugin import MethodRequest, Problem
from reasonpix_baselines import NullTextOptions
from reasonpix_baselines.alignment import align
from reasonpix_baselines.attention import PromptToPrompt
from reasonpix_baselines.latents import in_batches
from reasonpix_baselines.stable_diffusion import StableDiffusion


class Inversion(NamedTuple):
    """How guidance by its caption reproduces one image, or each of several."""

    trajectory: Tensor
    """(steps + 1, c, h, w), or (steps + 1, rows, c, h, w): the latents, from noise to image."""
    nulls: Tensor
    """(steps, tokens, width), or (steps, rows, tokens, width): the states of the empty text."""


class NullTextEditor:
    """The loaded weights."""

    def __init__(self, options: NullTextOptions) -> None:
        self.options = options
        self.model = StableDiffusion(options)
        self._prompt_to_prompt = PromptToPrompt()
        self.model.unet.set_attn_processor(self._prompt_to_prompt)

    @torch.no_grad()
    def edit(self, requests: Sequence[MethodRequest]) -> list[Image | Problem]:
        """One result for each request. Requests for one image share its inversion."""
        sources = {_source(request): request for request in requests}
        inversions = in_batches(
            [(self._start(request), request.caption) for request in sources.values()],
            lambda item: item[0].shape,
            self.model.rows,
            self._inverted,
        )
        ready = dict(zip(sources, inversions, strict=True))
        latents = in_batches(
            [(ready[_source(it)], it.caption, self.options.target(it)) for it in requests],
            lambda item: item[0].trajectory.shape,
            self.model.rows,
            self._edited,
        )
        return [
            self.model.latents.image(one, request.image.size)
            for one, request in zip(latents, requests, strict=True)
        ]

    def _start(self, request: MethodRequest) -> Tensor:
        """Scaled latents (c, h, w) of an image, the posterior's mode, float32."""
        mode: Tensor = self.model.latents.posterior(request.image).mode()[0]
        return mode.float() * self.model.latents.scale

    def _inverted(self, items: list[tuple[Tensor, str]]) -> list[Inversion]:
        states = self._states([caption for _, caption in items])
        inversion = self.inverted(torch.stack([start for start, _ in items]), states)
        return [
            Inversion(inversion.trajectory[:, row], inversion.nulls[:, row])
            for row in range(len(items))
        ]

    def inverted(self, latents: Tensor, states: Tensor) -> Inversion:
        """The inversion of latents (rows, c, h, w) with captions' states (rows, tokens, width)."""
        pivots = self._pivots(latents, states)
        null = self._states([""] * len(latents))
        trajectory, nulls = [pivots[0]], []
        for number in range(len(self.model.schedule)):
            now = trajectory[-1]
            prompted = self.model.noise(now, number, states)
            null = self._optimised(null, now, pivots[number + 1], prompted, number)
            trajectory.append(self._down(now, prompted, null, number))
            nulls.append(null)
        return Inversion(torch.stack(trajectory), torch.stack(nulls))

    def _pivots(self, latents: Tensor, states: Tensor) -> list[Tensor]:
        """DDIM inversion without guidance (§3.2), from noise to image."""
        pivots = [latents]
        for number in reversed(range(len(self.model.schedule))):
            noise = self.model.noise(pivots[-1], number, states)
            pivots.append(self.model.schedule.up(pivots[-1], noise, number))
        return pivots[::-1]

    def _optimised(
        self, null: Tensor, now: Tensor, pivot: Tensor, prompted: Tensor, number: int
    ) -> Tensor:
        """The null states (rows, tokens, width) that bring the next latents closest to `pivot`.

        Each row has its own error and stops by itself (§3.3, Eq. 3).
        """
        # At 50 steps this is the authors' 0.01 · (1 − i/100), and 1e-5 + i · 2e-5.
        done = number / len(self.model.schedule)
        rate = self.options.learning_rate * (1 - done / 2)
        enough = self.options.early_stop + done * 1e-3
        learnt = null.clone().requires_grad_()
        optimizer = torch.optim.Adam([learnt], rate)
        unfinished = torch.ones(len(null), dtype=torch.bool, device=null.device)
        for _ in range(self.options.num_inner_steps):
            with torch.enable_grad():
                reached = self._down(now, prompted, learnt, number)
                errors = (reached - pivot).square().flatten(1).mean(1)
                (learnt.grad,) = torch.autograd.grad(errors.sum(), learnt)
            optimizer.step()
            null = torch.where(unfinished[:, None, None], learnt, null)
            unfinished = unfinished & (errors >= enough)
            if not unfinished.any():
                break
        return null.detach()

    def _down(self, latents: Tensor, prompted: Tensor, null: Tensor, number: int) -> Tensor:
        """A denoising step with guidance."""
        without = self.model.noise(latents, number, null)
        noise = without + self.options.guidance_scale * (prompted - without)
        return self.model.schedule.down(latents, noise, number)

    def _edited(self, items: list[tuple[Inversion, str, str]]) -> Tensor:
        """Latents (rows, c, h, w) generated from the images' noise with the target prompts."""
        inversions, captions, targets = zip(*items, strict=True)
        before, after = self._states(captions), self._states(targets)
        alignments = [
            align(caption, target, self.model.tokens, before.shape[1])
            for caption, target in zip(captions, targets, strict=True)
        ]
        trajectory = torch.stack([one.trajectory for one in inversions], 1)
        nulls = torch.stack([one.nulls for one in inversions], 1)
        steps = len(self.model.schedule)
        latents = trajectory[0]
        for number in range(steps):
            with self._prompt_to_prompt.injecting(
                alignments,
                in_cross=number < int((steps + 1) * self.options.cross_replace_steps),
                in_self=number < int(steps * self.options.self_replace_steps),
            ):
                noise = self.model.noise(
                    torch.cat([trajectory[number], latents, latents]),
                    number,
                    torch.cat([before, after, nulls[number]]),
                )
            _, prompted, without = noise.chunk(3)
            guided = without + self.options.guidance_scale * (prompted - without)
            latents = self.model.schedule.down(latents, guided, number)
        return latents

    def _states(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self.model.states(prompt) for prompt in prompts]).float()


def _source(request: MethodRequest) -> tuple[Any, ...]:
    """What the inversion depends on; it draws no noise."""
    return request.image.size, request.image.tobytes(), request.caption
