"""Exported networks computed by OpenVINO on a CPU.

Inputs and results share memory with PyTorch's tensors. A network is compiled for each set of shapes
(seconds), which makes a step a tenth faster than dynamic shapes; the latest few are cached.
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
from reasonpix.editing.runtimes.binding import ExportedNetwork, match_inputs, resolve_shape
from reasonpix.editing.runtimes.manifest import Export, Graph, Precision
from reasonpix.errors import ReasonpixError, WeightsError, require_extra

KEPT = 2
"""Compiled sets of shapes to cache per network; each takes as much memory as the weights."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def load(export: Export, device: torch.device, threads: int | None = None) -> dict[str, Network]:
    """Load the networks of an export on a CPU.

    `threads`: by default as many as PyTorch uses. Raises `ReasonpixError` for another device or if
    OpenVINO is not installed, `WeightsError` for a damaged export.
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
    """Import OpenVINO without its telemetry, which reports each import to Google Analytics.

    Raises `ReasonpixError` if it is not installed.
    """
    # OpenVINO and nncf work without the telemetry package.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    with require_extra("openvino"):
        import openvino
    return openvino


def _options(precision: Precision, threads: int) -> dict[str, Any]:
    """Properties of the CPU plugin, which defaults to bfloat16 if the CPU supports it."""
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # Pinning lets several processes share the first cores and leaves the others idle.
        "ENABLE_CPU_PINNING": False,
    }
    if precision == "int8":  # weights only: activations are not quantized
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return options


class OpenVINONetwork(ExportedNetwork):
    """A network compiled by OpenVINO for the shapes it is bound to."""

    def __init__(self, core: Any, model: Any, options: dict[str, Any], graph: Graph) -> None:
        super().__init__(graph, torch.device("cpu"))
        self._core, self._model, self._options = core, model, options
        self._compiled = lru_cache(KEPT)(self._compile)

    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        """Return a function that computes the network on these contiguous tensors."""
        from openvino import Tensor as Shared

        tensors, sizes = match_inputs(self._graph, inputs, self.device)
        request = self._compiled(
            tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        ).create_infer_request()
        port = self._graph.output
        tensors[port.name] = torch.empty(resolve_shape(port, sizes), dtype=self.dtype)
        for name, tensor in tensors.items():
            request.set_tensor(name, Shared(tensor.numpy(), shared_memory=True))
        return _Bound(request, tensors, tensors[port.name])

    def _compile(self, shapes: Shapes) -> Any:
        model = self._model.clone()
        model.reshape({name: list(shape) for name, shape in shapes})
        return self._core.compile_model(model, "CPU", self._options)


@dataclass(frozen=True)
class _Bound:
    """An inference request with its tensors, which must live as long as it does."""

    request: Any
    tensors: dict[str, Tensor]
    output: Tensor

    def __call__(self) -> Tensor:
        self.request.infer(share_inputs=True)
        return self.output
