"""Networks behind one small interface, whatever computes them: PyTorch or another runtime.

A network is *bound* to tensors once, and then computed as often as need be with what is in them: an
edit writes what stays the same in all its steps only once, and nothing is copied on the way in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Network(ABC):
    """A network that is ready to compute: tensors by name in, one tensor out.

    `reasonpix.editing.runtimes.modules` names the networks of an editing model.
    """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its tensors lie."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of its floating inputs and of what comes out; `timestep` is always float32."""

    @abstractmethod
    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        """What computes the network on these very tensors, with what is in them when it is called.

        What is returned may lie in a buffer that the next call overwrites. `None` is for an input
        that may be absent. Raises `ValueError` for tensors that the network cannot read.
        """


class TorchNetwork(Network):
    """A module of PyTorch, which takes the inputs as its keyword arguments."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def device(self) -> torch.device:
        """Of the module."""
        return next(self._module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the module."""
        return next(self._module.parameters()).dtype

    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        """A call of the module."""

        def compute() -> Tensor:
            computed: Tensor = self._module(**inputs)
            return computed

        return compute


@dataclass(frozen=True)
class Networks:
    """What an editing model computes for each image and step."""

    runtime: str
    """What computes them, or at least the UNet."""
    unet: Network
    vae_encoder: Network
    vae_decoder: Network
