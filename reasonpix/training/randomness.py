"""All that is random in training, from the seed, the step and the place in the batch alone.

So a run that was killed goes on as if it had not been, and the number of devices changes nothing
but a connector's dropout, which is drawn by micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class StepNoise(NamedTuple):
    """What chance decides for one example of one step."""

    example: int
    view: int
    posterior: Tensor
    """Noise for the latents of the edited image, of their shape, float32."""
    noise: Tensor
    """Noise that the UNet has to predict."""
    timestep: int
    drop_text: bool
    """The instruction is dropped."""
    drop_image: bool
    """The input image is dropped."""


class StepSampler:
    """The draws of every step."""

    def __init__(
        self,
        seed: int,
        examples: Sequence[int],
        views: int,
        batch_size: int,
        *,
        shape: Sequence[int],
        timesteps: int,
        dropout: float,
    ) -> None:
        self.seed, self.examples, self.views, self.batch_size = seed, examples, views, batch_size
        self.shape, self.timesteps, self.dropout = tuple(shape), timesteps, dropout

    def draw(self, step: int, place: int) -> StepNoise:
        """For the example at `place` of the batch of `step`.

        Each epoch sees every example once, in a new order. From one r in [0, 1) InstructPix2Pix
        drops the instruction where r < 2p and the image where p ≤ r < 3p.
        """
        epoch, position = divmod(step * self.batch_size + place, len(self.examples))
        generator = _generator(self.seed, 1, step, place)
        r = torch.rand((), generator=generator).item()
        p = self.dropout
        return StepNoise(
            self.examples[_order(self.seed, epoch, len(self.examples))[position]],
            int(torch.randint(self.views, (), generator=generator)),
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


def reseed(seed: int, step: int, part: int) -> None:
    """Before micro-batch number `part` of a step: for what draws by itself, as dropout."""
    torch.manual_seed(_state(seed, 2, step, part))


def _generator(*numbers: int) -> torch.Generator:
    """A generator whose stream has nothing to do with that of other numbers."""
    return torch.Generator().manual_seed(_state(*numbers))


def _state(*numbers: int) -> int:
    # SeedSequence spreads neighbouring numbers; torch's own seeding of small ones does not.
    from numpy.random import SeedSequence

    (state,) = SeedSequence(numbers).generate_state(1, "uint64")
    return int(state >> 1)
