"""Exported networks computed by ONNX Runtime, on a CPU or an NVIDIA GPU.

IO binding reads inputs from and writes results to PyTorch's tensors without copying, also on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonpix.editing.runtimes.base import Network
from reasonpix.editing.runtimes.binding import ExportedNetwork, match_inputs, resolve_shape
from reasonpix.editing.runtimes.manifest import Export, Graph
from reasonpix.errors import ReasonpixError, WeightsError, require_extra

_ELEMENTS = {"float32": 1, "bool": 9, "float16": 10, "bfloat16": 16}
"""ONNX's TensorProto.DataType of each type."""


def load(export: Export, device: torch.device, threads: int | None = None) -> dict[str, Network]:
    """Load the networks of an export on a CPU or a GPU.

    `threads`: CPU threads, by default as many as PyTorch uses. Raises `ReasonpixError` if ONNX
    Runtime is not installed or does not support the device, `WeightsError` for a damaged export.
    """
    on_gpu = device.type == "cuda"
    with require_extra("onnx-gpu" if on_gpu else "onnx"):
        import onnxruntime
    provider: Any = "CPUExecutionProvider"
    if on_gpu:
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ReasonpixError(
                f"onnx: the installed ONNX Runtime {onnxruntime.__version__} computes on the CPU "
                "alone: pip uninstall onnxruntime, then pip install 'reasonpix[onnx-gpu]'; or "
                "choose --device cpu"
            )
        onnxruntime.preload_dlls()  # CUDA libraries that PyTorch ships
        device = torch.device("cuda", device.index or 0)
        # TF32 loses precision, and an exhaustive search picks a different algorithm each time.
        options = {"device_id": device.index, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
        provider = ("CUDAExecutionProvider", options)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    settings.intra_op_num_threads = threads or torch.get_num_threads()
    # Spinning threads are no faster, and take cores from other work.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    networks: dict[str, Network] = {}
    for part, graph in export.manifest.graphs.items():
        session = _session(export.file(part), settings, provider)
        networks[part] = OnnxNetwork(session, graph, device)
    return networks


def _session(file: Path, settings: Any, provider: Any) -> Any:
    from onnxruntime import InferenceSession

    try:
        session = InferenceSession(file, settings, providers=[provider])
    except Exception as error:  # its errors have no common base class
        raise WeightsError(
            f"{file}: ONNX Runtime cannot load it ({str(error).splitlines()[0]}); on a CPU it "
            "computes fp32 and int8 exports; or choose another runtime"
        ) from error
    # Without CUDA's libraries it silently falls back to the CPU.
    wanted = provider if isinstance(provider, str) else provider[0]
    if wanted not in session.get_providers():
        raise ReasonpixError(
            "onnx: ONNX Runtime cannot use the GPU (see its messages above); its CUDA and cuDNN "
            "must be the versions of PyTorch's: pip install 'reasonpix[onnx-gpu]'; or choose "
            "--device cpu"
        )
    return session


class OnnxNetwork(ExportedNetwork):
    """A network computed by an ONNX Runtime session."""

    def __init__(self, session: Any, graph: Graph, device: torch.device) -> None:
        super().__init__(graph, device)
        self._session = session

    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        """Return a function that computes the network on these contiguous tensors."""
        tensors, sizes = match_inputs(self._graph, inputs, self._device)
        port = self._graph.output
        shape = resolve_shape(port, sizes)
        tensors[port.name] = torch.empty(shape, dtype=self.dtype, device=self._device)
        binding = self._session.io_binding()
        place = (self._device.type, self._device.index or 0)
        for put, ports in (
            (binding.bind_input, self._graph.inputs),
            (binding.bind_output, [port]),
        ):
            for each in ports:
                tensor = tensors[each.name]
                put(
                    each.name, *place, _ELEMENTS[each.dtype], tuple(tensor.shape), tensor.data_ptr()
                )
        return _Bound(self._session, binding, tensors, tensors[port.name])


@dataclass(frozen=True)
class _Bound:
    """A session with its tensors, which must live as long as their memory is bound."""

    session: Any
    binding: Any
    tensors: dict[str, Tensor]
    output: Tensor

    def __call__(self) -> Tensor:
        if self.output.is_cuda:  # the session uses its own stream, and waits for that at the end
            torch.cuda.current_stream(self.output.device).synchronize()
        self.session.run_with_iobinding(self.binding)
        return self.output
