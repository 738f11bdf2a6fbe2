"""Choose the runtime of an editing model, and load its networks in it.

| runtime | where | needs |
|---|---|---|
| `torch` | anywhere | the model's own weights |
| `compile` | where `torch.compile` finds a compiler | the same; minutes for each new size |
| `onnx` | CPU, NVIDIA GPU | an export, `reasonpix[onnx]` or `reasonpix[onnx-gpu]` |
| `openvino` | CPU | an export, `reasonpix[openvino]` |
| `tensorrt` | NVIDIA GPU | an export, `reasonpix[tensorrt]` |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from reasonpix.editing.runtimes.base import Networks
from reasonpix.editing.runtimes.manifest import Export, has_export, read_export
from reasonpix.editing.runtimes.modules import torch_networks
from reasonpix.editing.runtimes.names import DEVICES, FORMATS, PACKAGES, Format, Runtime
from reasonpix.errors import WeightsError
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.weights import choose_device, usable_device

_PREFERRED: dict[str, tuple[Runtime, ...]] = {
    "cpu": ("openvino", "onnx", "torch"),
    "cuda": ("tensorrt", "torch", "onnx"),
}
"""What `auto` tries on a device type: the fastest first."""


@dataclass(frozen=True)
class RuntimeChoice:
    """A runtime, and the device on which it computes."""

    runtime: Runtime
    """Never `auto`."""
    device: torch.device

    @property
    def reads_weights(self) -> bool:
        """Whether it computes with the UNet's own weights, not with an export."""
        return self.runtime in ("torch", "compile")


def choose_runtime(runtime: Runtime, options: ModelOptions) -> RuntimeChoice:
    """The runtime of the model that `options` names; `auto` takes the best one available.

    That is PyTorch, or an export that fits the device and whose package is installed. If a `dtype`
    is set it is PyTorch, as exports have their own. Raises `WeightsError` if the model has no such
    export, or the export does not support the device.
    """
    folder = _folder_of(options.model)
    exports = [format for format in FORMATS if has_export(folder, format)]
    has_weights = not folder.is_dir() or any((folder / "unet").glob("*.safetensors"))
    if runtime == "auto":
        device = usable_device(options)
        for candidate in _PREFERRED.get(device.type, ("torch",)):
            if has_weights and (candidate == "torch" or options.dtype != "auto"):
                return RuntimeChoice("torch", device)
            if candidate in exports and _installed(candidate):
                return RuntimeChoice(candidate, device)
        if has_weights or not exports:  # loading it explains what is missing
            return RuntimeChoice("torch", device)
        runtime = exports[0]
    if runtime in ("torch", "compile"):
        if not has_weights and exports:
            raise WeightsError(
                f"model: {options.model!r} is an export without PyTorch weights; choose "
                f"--runtime {exports[0]}, or name the model that it was made from"
            )
        return RuntimeChoice(runtime, usable_device(options))
    if runtime not in exports:
        raise WeightsError(_why_no_export(runtime, options.model, folder, exports))
    return RuntimeChoice(runtime, choose_export_device(runtime, options))


def _folder_of(model: str) -> Path:
    return Path(registry.checkpoint(model) or model)


def _installed(format: Format) -> bool:
    return find_spec(PACKAGES[format]) is not None


def _why_no_export(format: Runtime, model: str, folder: Path, exports: list[Format]) -> str:
    command = f"reasonpix export {model} --to {format} --samples BENCHMARK"
    if folder.is_dir():
        others = (
            f"there are exports for {', '.join(exports)}" if exports else "there are no exports"
        )
        return f"model: {model!r} has no export for {format} ({others}); make one: {command}"
    return f"model: {model!r} is not a local folder, as exports are; make one: {command} --out DIR"


def choose_export_device(format: Format, options: ModelOptions) -> torch.device:
    """The device for an export. Raises `WeightsError` if the format does not support it."""
    if DEVICES[format] == ("cpu",) and options.device == "auto":
        options = options.model_copy(update={"device": "cpu"})
    device = choose_device(options)
    if device.type not in DEVICES[format]:
        raise WeightsError(
            f"device: {format} computes on {' or '.join(DEVICES[format])}, not on {device.type}; "
            "choose another runtime, or another device"
        )
    return usable_device(options)


def read_chosen_export(runtime: Runtime, options: ModelOptions) -> Export | None:
    """The export that `choose_runtime` takes, with checksums verified; None if it takes PyTorch.

    Raises `WeightsError`.
    """
    chosen = choose_runtime(runtime, options).runtime
    return read_export(_folder_of(options.model), chosen) if chosen in FORMATS else None


def load_networks(
    choice: RuntimeChoice, model: str, unet: UNet2DConditionModel, vae: AutoencoderKL
) -> Networks:
    """Load the model's networks in the chosen runtime; PyTorch computes those an export lacks.

    `unet` and `vae` are on the chosen device; the UNet needs weights only if the runtime reads
    them. Raises `ReasonpixError`.
    """
    networks = torch_networks(unet, vae, compiled=choice.runtime == "compile")
    if choice.reads_weights:
        return networks
    assert choice.runtime in FORMATS
    export = read_export(_folder_of(model), choice.runtime)
    assert export is not None, "choose_runtime has checked that it exists"
    module = import_module(f"reasonpix.editing.runtimes.{choice.runtime}")
    return replace(networks, runtime=choice.runtime, **module.load(export, choice.device))
