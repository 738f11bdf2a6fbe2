"""Exported networks computed by OpenVINO on a CPU.

Inputs are read and results written in the memory of PyTorch's tensors. A network is compiled for
each set of shapes (seconds), since that is a tenth faster at each step than one for all; the last
few are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from reasonpix.editing.runtimes.base import Network
from reasonpix.editing.runtimes.binding import ExportedNetwork, fitted, shape_of
from reasonpix.editing.runtimes.manifest import Export, Graph, Precision
from reasonpix.errors import ReasonpixError, WeightsError, require_extra

KEPT = 2
"""Sets of shapes that a network stays compiled for; each takes the memory of its weights."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def load(export: Export, device: torch.device, threads: int | None = None) -> dict[str, Network]:
    """The networks of an export, ready to compute on a CPU.

    `threads` are as many as PyTorch computes with unless they are given. Raises `ReasonpixError`
    for another device and where OpenVINO is not installed, `WeightsError` for what it cannot load.
    """
    openvino = import_openvino()
    if device.type != "cpu":
        raise ReasonpixError(f"openvino computes on the CPU here, not on {device}: --device cpu")
    core = openvino.Core()
    options = _options(export.manifest.precision, threads or torch.get_num_threads())
    networks: dict[str, Network] = {}
    for part, graph in export.manifest.graphs.items():
        file = export.file(part)
        try:
            model = core.read_model(file)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise WeightsError(
                f"{file}: OpenVINO cannot read it ({reason}); export the model again"
            ) from error
        networks[part] = OpenVINONetwork(core, model, options, graph)
    return networks


def import_openvino() -> Any:
    """The package, without its telemetry: it would tell Google Analytics of each import, unasked.

    Raises `ReasonpixError` where it is not installed.
    """
    # Both it and nncf do without the package that sends.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    with require_extra("openvino"):
        import openvino
    return openvino


def _options(precision: Precision, threads: int) -> dict[str, Any]:
    """Properties of the CPU plugin. Left alone it computes in bfloat16 where the CPU can."""
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # Or several processes would share the first cores, and leave the others idle.
        "ENABLE_CPU_PINNING": False,
    }
    if precision == "int8":  # of weights alone: activations are not quantised
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return options


class OpenVINONetwork(ExportedNetwork):
    """A model of OpenVINO, compiled for the shapes that it is bound to."""

    def __init__(self, core: Any, model: Any, options: dict[str, Any], graph: Graph) -> None:
        super().__init__(graph, torch.device("cpu"))
        self._core, self._model, self._options = core, model, options
        self._compiled = lru_cache(KEPT)(self._compile)

    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        """What computes the network on these tensors, which must be contiguous."""
        from openvino import Tensor as Shared

        tensors, sizes = fitted(self._graph, inputs, self.device)
        request = self._compiled(
            tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        ).create_infer_request()
        port = self._graph.output
        tensors[port.name] = torch.empty(shape_of(port, sizes), dtype=self.dtype)
        for name, tensor in tensors.items():
            request.set_tensor(name, Shared(tensor.numpy(), shared_memory=True))
        return _Bound(request, tensors, tensors[port.name])

    def _compile(self, shapes: Shapes) -> Any:
        model = self._model.clone()
        model.reshape({name: list(shape) for name, shape in shapes})
        return self._core.compile_model(model, "CPU", self._options)


@dataclass(frozen=True)
class _Bound:
    """A request and its tensors, which must live as long as it reads their memory."""

    request: Any
    tensors: dict[str, Tensor]
    output: Tensor

    def __call__(self) -> Tensor:
        self.request.infer(share_inputs=True)
        return self.output
