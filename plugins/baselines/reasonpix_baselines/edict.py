"""EDICT: two coupled copies of the latents, so that every step can be inverted exactly.

Wallace, Gokul and Naik, "EDICT: Exact Diffusion Inversion via Coupled Transformations", CVPR 2023,
and `edict_functions.py` of github.com/salesforce/EDICT. The latents are float64, as in that code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from reasonpix.plugin import MethodRequest, Problem
from reasonpix_baselines import EdictOptions
from reasonpix_baselines.latents import in_batches
from reasonpix_baselines.stable_diffusion import StableDiffusion


class EdictEditor:
    """The loaded weights. A pair of coupled latents is a tensor (2, …): x and y."""

    def __init__(self, options: EdictOptions) -> None:
        self.options = options
        self.model = StableDiffusion(options)
        steps = len(self.model.schedule)
        self._first = steps - max(1, int(steps * options.strength))

    @torch.inference_mode()
    def edit(self, requests: Sequence[MethodRequest]) -> list[Image | Problem]:
        """One result for each request. Requests for one image share its inversion."""
        sources = {_source(request): request for request in requests}
        pairs = self._in_batches(
            [(self._start(request), request.caption) for request in sources.values()],
            self.inverted,
        )
        noisy = dict(zip(sources, pairs, strict=True))
        generated = self._in_batches(
            [(noisy[_source(request)], self.options.target(request)) for request in requests],
            self.generated,
        )
        return [
            self.model.latents.image(pair[0], request.image.size)
            for pair, request in zip(generated, requests, strict=True)
        ]

    def inverted(self, pairs: Tensor, states: Tensor) -> Tensor:
        """Add noise to pairs (2, rows, c, h, w), as much as `strength` says; see `generated`."""
        p = self.options.mixing_weight
        x, y = pairs
        for number in reversed(range(self._first, len(self.model.schedule))):
            y = (y - (1 - p) * x) / p
            x = (x - (1 - p) * y) / p
            if self._x_comes_first(number):
                y = self.model.schedule.up(y, self._noise(x, number, states), number)
                x = self.model.schedule.up(x, self._noise(y, number, states), number)
            else:
                x = self.model.schedule.up(x, self._noise(y, number, states), number)
                y = self.model.schedule.up(y, self._noise(x, number, states), number)
        return torch.stack([x, y])

    def generated(self, pairs: Tensor, states: Tensor) -> Tensor:
        """Denoise pairs (2, rows, c, h, w) (Eq. 14).

        `states` (2 · rows, tokens, width) are those of the empty text, then those of the prompts.
        """
        p = self.options.mixing_weight
        x, y = pairs
        for number in range(self._first, len(self.model.schedule)):
            if self._x_comes_first(number):
                x = self.model.schedule.down(x, self._noise(y, number, states), number)
                y = self.model.schedule.down(y, self._noise(x, number, states), number)
            else:
                y = self.model.schedule.down(y, self._noise(x, number, states), number)
                x = self.model.schedule.down(x, self._noise(y, number, states), number)
            x = p * x + (1 - p) * y
            y = (1 - p) * x + p * y
        return torch.stack([x, y])

    def _x_comes_first(self, number: int) -> bool:
        """x and y alternate (the authors' leapfrog steps)."""
        return (number - self._first) % 2 == 0

    def _noise(self, other: Tensor, number: int, states: Tensor) -> Tensor:
        """Guided noise, predicted from the other latents of the pair."""
        without, prompted = self.model.noise(torch.cat([other, other]), number, states).chunk(2)
        return without + self.options.guidance_scale * (prompted - without)

    def _start(self, request: MethodRequest) -> Tensor:
        """An image's pair (2, c, h, w): twice its latents, drawn from the posterior."""
        posterior = self.model.latents.posterior(request.image)
        generator = torch.Generator().manual_seed(request.seed)
        drawn = torch.randn(posterior.mean.shape[1:], generator=generator)
        latents = posterior.mean[0] + posterior.std[0] * drawn.to(posterior.mean)
        return (latents * self.model.latents.scale).double().expand(2, *latents.shape)

    def _in_batches(
        self, items: list[tuple[Tensor, str]], compute: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """Apply `compute` to pairs and the states of their prompts, in batches."""

        def compute_batch(items: list[tuple[Tensor, str]]) -> Sequence[Tensor]:
            prompts = [prompt for _, prompt in items]
            states = [self.model.states(prompt) for prompt in [""] * len(items) + prompts]
            pairs = torch.stack([pair for pair, _ in items], 1)
            computed: Sequence[Tensor] = compute(pairs, torch.stack(states)).unbind(1)
            return computed

        return in_batches(items, lambda item: item[0].shape, self.model.rows, compute_batch)


def _source(request: MethodRequest) -> tuple[Any, ...]:
    """What the inversion depends on."""
    return request.image.size, request.image.tobytes(), request.caption, request.seed
