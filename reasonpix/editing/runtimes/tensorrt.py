"""TensorRT: engines, built from an export's ONNX files on the GPU that runs them.

An engine works on one GPU model, driver and TensorRT version, and for the sizes of its optimization
profile. It is built on first use, which takes minutes, and cached as `tensorrt/engines/KEY.engine`.
KEY is a digest of everything it depends on, so outdated engines are never read. Engines may be
deleted at any time. They contain executable code: never use one from an untrusted source.

Written against NVIDIA's Python API of TensorRT 10 and 11. The functions above `load` need neither
TensorRT nor a GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from reasonpix.core.atomic import replace_file
from reasonpix.editing.runtimes.base import Network
from reasonpix.editing.runtimes.binding import ExportedNetwork, match_inputs, resolve_shape
from reasonpix.editing.runtimes.manifest import Export, Graph, Part, Shapes
from reasonpix.errors import ReasonpixError, WeightsError, require_extra

ENGINES = "REASONPIX_ENGINES"
"""Environment variable: a folder for engines, if the export's folder is read-only."""

Shape = tuple[int, ...]
Span = tuple[Shape, Shape, Shape]
"""Shapes of an input: smallest, the one to optimize for, largest."""

_LOG = logging.getLogger(__name__)
_DIGEST = 32
"""Bytes at the start of a cached engine: the SHA-256 of the rest."""


def profile_shapes(part: Part, graph: Graph, profile: Shapes) -> dict[str, Span]:
    """The optimization profile of a network: the smallest, usual and largest shape of each input.

    `profile` is in latents; a VAE computes one image at a time.
    """
    sizes = profile.model_dump()
    if part != "unet":
        sizes["batch"] = (1, 1, 1)
    least, usual, most = ({name: values[at] for name, values in sizes.items()} for at in range(3))
    return {
        port.name: (
            resolve_shape(port, least),
            resolve_shape(port, usual),
            resolve_shape(port, most),
        )
        for port in graph.inputs
    }


def engine_key(export: Export, part: Part, platform: Mapping[str, str]) -> str:
    """Digest of everything an engine depends on: network, profile and `platform`."""
    assert export.manifest.profile is not None
    graph = export.manifest.graphs[part]
    depends = {
        "onnx": {
            name: digest
            for name, digest in export.manifest.files.items()
            if name == graph.file or name.startswith(f"{graph.file}.")
        },
        "profile": profile_shapes(part, graph, export.manifest.profile),
        "platform": dict(platform),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


def driver_version() -> str:
    """Version of NVIDIA's driver, such as 580.65.06, from nvidia-smi. Raises `ReasonpixError`."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ReasonpixError(
            "TensorRT: the driver's version is unknown because nvidia-smi failed "
            f"({error}); a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        ) from error


def load_or_build_engine(file: Path, build: Callable[[], bytes]) -> bytes:
    """Read the engine in `file`; build it if it is missing or damaged.

    Engines are written atomically; if several processes build the same one, the last wins. Raises
    `WeightsError`, before building, if the folder is not writable.
    """
    try:
        if (engine := _read(file)) is not None:
            return engine
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=file.parent):
            pass  # fails in a folder that is not writable
        engine = build()
        replace_file(file, hashlib.sha256(engine).digest() + engine)
    except OSError as error:
        raise WeightsError(
            f"{file.parent}: TensorRT's engine cannot be kept here ({error.strerror or error}), "
            "and building it takes minutes; let this folder be written, or name another by the "
            f"environment variable {ENGINES}"
        ) from error
    return engine


def _read(file: Path) -> bytes | None:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    digest, engine = content[:_DIGEST], content[_DIGEST:]
    if engine and hashlib.sha256(engine).digest() == digest:
        return engine
    _LOG.warning("%s is damaged and will be rebuilt", file)
    return None


def check_shapes(graph: Graph, profile: Mapping[str, Span], tensors: Mapping[str, Tensor]) -> None:
    """Raise `ReasonpixError` for input shapes outside the network's profile."""
    for name, (least, _, most) in profile.items():
        shape = tuple(tensors[name].shape)
        if not all(low <= n <= high for low, n, high in zip(least, shape, most, strict=True)):
            raise ReasonpixError(
                f"{graph.file}: {name} is {_sides(shape)}, and the export's profile for TensorRT "
                f"goes from {_sides(least)} to {_sides(most)}; choose a resolution, a batch size "
                "and an instruction within it, or another runtime"
            )


def _sides(shape: Shape) -> str:
    return "x".join(map(str, shape))


def load(export: Export, device: torch.device, threads: int | None = None) -> dict[str, Network]:
    """Load the networks of an export, building missing engines.

    `threads` is ignored. Raises `ReasonpixError` without a GPU or TensorRT, and if an engine cannot
    be built or written.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ReasonpixError(
            f"TensorRT computes on an NVIDIA GPU, not on {device}: choose another runtime (torch, "
            "onnx, openvino); on a machine with a GPU it needs a CUDA build of PyTorch, and "
            "pip install 'reasonpix[tensorrt]'"
        )
    with require_extra("tensorrt"):
        import tensorrt
    if export.manifest.profile is None:
        raise WeightsError(f"{export.folder}: the manifest has no profile; export the model again")
    folder = Path(os.environ.get(ENGINES) or export.folder / "engines")
    networks: dict[str, Network] = {}
    with torch.cuda.device(device):
        device = torch.device("cuda", torch.cuda.current_device())
        platform = {
            "gpu": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver": driver_version(),
            "tensorrt": str(tensorrt.__version__),
        }
        for part, graph in export.manifest.graphs.items():
            profile = profile_shapes(part, graph, export.manifest.profile)
            file = folder / f"{engine_key(export, part, platform)}.engine"
            build = partial(_build, tensorrt, export.file(part), profile)
            engine = _Engine(tensorrt, file, build)
            networks[part] = TensorRTNetwork(engine, graph, profile, device)
    return networks


class _Engine:
    """A loaded engine, with the objects that must live as long as it does."""

    def __init__(self, trt: Any, file: Path, build: Callable[[], bytes]) -> None:
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(load_or_build_engine(file, build))
        if self._engine is None:  # intact, but rejected by TensorRT
            file.unlink(missing_ok=True)
            self._engine = self._runtime.deserialize_cuda_engine(load_or_build_engine(file, build))
        self.context = self._engine and self._engine.create_execution_context()
        if self.context is None:
            raise WeightsError(
                f"{file}: TensorRT cannot run the engine that it built (see its messages "
                "above); free memory on the GPU, or choose another runtime"
            )


class TensorRTNetwork(ExportedNetwork):
    """A network computed by an engine, which reads and writes PyTorch's tensors in place."""

    def __init__(
        self, engine: _Engine, graph: Graph, profile: Mapping[str, Span], device: torch.device
    ) -> None:
        super().__init__(graph, device)
        self._engine, self._profile = engine, profile
        self._stream = torch.cuda.Stream(device)
        """On the default stream TensorRT would synchronize at each call."""

    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        """Return a function that runs the engine on these tensors; a missing mask is all ones.

        It is ordered with torch's current stream.
        """
        tensors, _ = match_inputs(self._graph, inputs, self._device)
        check_shapes(self._graph, self._profile, tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        context, output = self._engine.context, self._graph.output.name

        def set_addresses() -> None:
            for name, shape in shapes.items():
                self._check(context.set_input_shape(name, shape), f"shape of {name}")
            for name, tensor in tensors.items():
                self._check(context.set_tensor_address(name, tensor.data_ptr()), f"place of {name}")

        with torch.cuda.device(self._device):
            set_addresses()
            made = tuple(context.get_tensor_shape(output))
            tensors[output] = torch.empty(made, dtype=self.dtype, device=self._device)

        def compute() -> Tensor:
            with torch.cuda.device(self._device):
                set_addresses()  # the context may have been bound to other tensors since
                current = torch.cuda.current_stream()
                self._stream.wait_stream(current)
                self._check(context.execute_async_v3(self._stream.cuda_stream), "computation")
                current.wait_stream(self._stream)
            return tensors[output]

        return compute

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise ReasonpixError(
                f"{self._graph.file}: TensorRT rejects the {what} (see its messages above)"
            )


def _build(trt: Any, onnx: Path, profile: Mapping[str, Span]) -> bytes:
    """Build an engine in the precisions of the ONNX file; float32 without TF32."""
    _LOG.warning("TensorRT builds the engine of %s for this GPU; this takes minutes, once", onnx)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # The default in TensorRT 11; a later version may drop the flag.
    typed = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(str(parser.get_error(at)) for at in range(parser.num_errors))
        raise WeightsError(f"{onnx}: TensorRT {trt.__version__} cannot read it: {errors}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    shapes = builder.create_optimization_profile()
    for name, (least, usual, most) in profile.items():
        shapes.set_shape(name, least, usual, most)
    config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise WeightsError(
            f"{onnx}: TensorRT {trt.__version__} cannot build an engine (see its messages "
            "above); free memory on the GPU, or export with a smaller profile"
        )
    return bytes(engine)
