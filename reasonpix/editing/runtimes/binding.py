"""Exported networks and their ports: matching tensors to inputs, and the shape of the output.

A dimension of a port is a number, a name such as `height`, or a multiple such as `8*height`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reasonpix.editing.runtimes.base import Network
from reasonpix.editing.runtimes.manifest import Graph, Port


class ExportedNetwork(Network):
    """A network of an export, computed by a runtime other than PyTorch."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._graph, self._device = graph, device

    @property
    def device(self) -> torch.device:
        """The CPU, or a GPU with its index."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the output."""
        dtype: torch.dtype = getattr(torch, self._graph.output.dtype)
        return dtype


def match_inputs(
    graph: Graph, inputs: Mapping[str, Tensor | None], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensor of each input, and the size of each named dimension.

    A missing mask becomes all ones. Raises `ValueError` for tensors that the network cannot read in
    place.
    """
    names = [port.name for port in graph.inputs]
    if unknown := sorted(set(inputs) - set(names)):
        raise ValueError(f"{', '.join(unknown)}: {graph.file} has {', '.join(names)}")
    sizes: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for port in graph.inputs:
        if (tensor := inputs.get(port.name)) is not None:
            _check(port, tensor, device, sizes)
            tensors[port.name] = tensor
        elif port.dtype != "bool":
            raise ValueError(f"{port.name} is missing")
    for port in graph.inputs:
        if port.name not in tensors:
            shape = resolve_shape(port, sizes)
            tensors[port.name] = torch.ones(shape, dtype=torch.bool, device=device)
    return tensors, sizes


def resolve_shape(port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The port's shape, given the sizes of named dimensions."""
    sides = (_parsed(side) for side in port.shape)
    return tuple(times * sizes[name] if name else times for times, name in sides)


def _parsed(side: int | str) -> tuple[int, str]:
    """Factor and name; the name of a number is empty."""
    if isinstance(side, int):
        return side, ""
    times, _, name = side.rpartition("*")
    return int(times or 1), name


def _check(port: Port, tensor: Tensor, device: torch.device, sizes: dict[str, int]) -> None:
    """Check a tensor, and add the sizes of its named dimensions to `sizes`."""
    if tensor.dtype != getattr(torch, port.dtype):
        raise ValueError(f"{port.name} is {tensor.dtype}, not torch.{port.dtype}")
    if tensor.device != device:
        raise ValueError(f"{port.name} is on {tensor.device}, not on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{port.name} is not contiguous")
    if tensor.ndim != len(port.shape):
        raise ValueError(f"{port.name} has {tensor.ndim} sides, not {len(port.shape)}")
    for number, (side, found) in enumerate(zip(port.shape, tensor.shape, strict=True)):
        times, name = _parsed(side)
        expected = times * sizes.setdefault(name, found // times) if name else times
        if found != expected or not found:
            raise ValueError(
                f"{port.name} has {found} for side {number} ({side}), not {expected or 'more'}"
            )
