"""What changes from one training step to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class TrainingState:
    """Weights, their average and the optimizer after a number of steps."""

    step: int
    """Optimizer steps taken, those of alignment included."""
    parameters: dict[str, nn.Parameter]
    """The trained weights by name."""
    average: dict[str, Tensor]
    """Their exponential moving averages; empty during alignment."""
    optimizer: torch.optim.Optimizer
    data: str
    """Digest of the training examples and their features."""

    def start_average(self) -> None:
        """Begin averaging with the weights as they are."""
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    def update_average(self, step: int, decay: float) -> None:
        """Include the weights after `step` steps; the decay warms up to `decay`."""
        torch._foreach_lerp_(
            list(self.average.values()),
            [value.detach() for value in self.parameters.values()],
            1 - min(decay, (1 + step) / (10 + step)),
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have its averaged weights within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name in self.average:
            parameter = self.parameters[name]
            parameter.data, self.average[name] = self.average[name], parameter.data
