"""One small interface for networks, computed by PyTorch or by another runtime.

A network is *bound* to tensors once, then computed any number of times on their current contents.
So inputs that stay the same in all denoising steps are written once, and no input is copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Network(ABC):
    """A loaded network: named tensors in, one tensor out.

    `reasonpix.editing.runtimes.modules` names the networks of an editing model.
    """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of its inputs and output."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of its floating-point inputs and output, except `timestep`, which is float32."""

    @abstractmethod
    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        """Return a function that computes the network on the current contents of these tensors.

        Its result may be in a buffer that the next call overwrites. `None` omits an optional input.
        Raises `ValueError` for tensors that the network cannot read.
        """


class TorchNetwork(Network):
    """A PyTorch module that takes the inputs as keyword arguments."""

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
        """Return a function that calls the module."""

        def compute() -> Tensor:
            computed: Tensor = self._module(**inputs)
            return computed

        return compute


@dataclass(frozen=True)
class Networks:
    """The networks of an editing model."""

    runtime: str
    """The name of the runtime that computes the UNet."""
    unet: Network
    vae_encoder: Network
    vae_decoder: Network
