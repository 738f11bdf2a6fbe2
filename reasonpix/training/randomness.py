"""Random numbers of training, which depend on seed, step and position in the batch only.

So a killed run resumes exactly, and the number of devices affects nothing but dropout, which is
drawn per micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class StepNoise(NamedTuple):
    """The random choices for one example of one step."""

    example: int
    view: int
    posterior: Tensor
    """Noise to sample the edited image's latents with, of their shape, float32."""
    noise: Tensor
    """Noise that the UNet learns to predict."""
    timestep: int
    drop_text: bool
    """The instruction is dropped."""
    drop_image: bool
    """The input image is dropped."""


class StepSampler:
    """Draws the examples, one of the `views` of each, and the noise of every step."""

    def __init__(
        self,
        seed: int,
        examples: Sequence[int],
        views: Mapping[int, Sequence[int]],
        batch_size: int,
        *,
        shape: Sequence[int],
        timesteps: int,
        dropout: float,
    ) -> None:
        self.seed, self.examples, self.views, self.batch_size = seed, examples, views, batch_size
        self.shape, self.timesteps, self.dropout = tuple(shape), timesteps, dropout

    def draw(self, step: int, position: int) -> StepNoise:
        """Draw for the example at a position of a step's batch.

        Each epoch has every example once, in a new order. As in InstructPix2Pix, one uniform r
        drops the instruction if r < 2p and the image if p ≤ r < 3p.
        """
        epoch, index = divmod(step * self.batch_size + position, len(self.examples))
        example = self.examples[_order(self.seed, epoch, len(self.examples))[index]]
        views = self.views[example]
        generator = _generator(self.seed, 1, step, position)
        r = torch.rand((), generator=generator).item()
        p = self.dropout
        return StepNoise(
            example,
            views[int(torch.randint(len(views), (), generator=generator))],
            torch.randn(self.shape, generator=generator),
            torch.randn(self.shape, generator=generator),
            int(torch.randint(self.timesteps, (), generator=generator)),
            r < 2 * p,
            p <= r < 3 * p,
        )


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=_generator(seed, 0, epoch)).tolist()
    return order


def seed_micro_batch(seed: int, step: int, part: int) -> None:
    """Seed torch's global generator, which dropout uses, for micro-batch `part` of a step."""
    torch.manual_seed(_state(seed, 2, step, part))


def _generator(*numbers: int) -> torch.Generator:
    """A generator whose stream is independent of that of other numbers."""
    return torch.Generator().manual_seed(_state(*numbers))


def _state(*numbers: int) -> int:
    # SeedSequence decorrelates neighbouring numbers; torch's own seeding does not.
    from numpy.random import SeedSequence

    (state,) = SeedSequence(numbers).generate_state(1, "uint64")
    return int(state >> 1)
