"""Which runtime computes an editing model, and the networks as it computes them.

| runtime | where | needs |
|---|---|---|
| `torch` | anywhere | the model's own weights |
| `compile` | where `torch.compile` has a compiler | the same; minutes for each new size |
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
"""By `auto`, on a device: the fastest that is sure to work."""


@dataclass(frozen=True)
class RuntimeChoice:
    """A runtime, and the device on which it computes."""

    runtime: Runtime
    """Never `auto`."""
    device: torch.device

    @property
    def reads_weights(self) -> bool:
        """Whether the UNet's own weights are computed with, not an export of them."""
        return self.runtime in ("torch", "compile")


def choose_runtime(runtime: Runtime, options: ModelOptions) -> RuntimeChoice:
    """The runtime for the model that `options` names, where `auto` stands for the best at hand.

    That is an export which the device is made for and whose package is installed, or PyTorch; where
    a `dtype` is asked for, PyTorch: an export has its own.
    Raises `WeightsError` for one that the model has no export for, or the device is not made for.
    """
    folder = Path(registry.checkpoint(options.model) or options.model)
    found = [it for it in FORMATS if has_export(folder, it)]
    has_weights = not folder.is_dir() or any((folder / "unet").glob("*.safetensors"))
    if runtime == "auto":
        device = usable_device(options)
        for candidate in _PREFERRED.get(device.type, ("torch",)):
            if has_weights and (candidate == "torch" or options.dtype != "auto"):
                return RuntimeChoice("torch", device)
            if candidate in found and _installed(candidate):
                return RuntimeChoice(candidate, device)
        if has_weights or not found:  # what is wrong with it is told when it is read
            return RuntimeChoice("torch", device)
        runtime = found[0]
    if runtime in ("torch", "compile"):
        if not has_weights and found:
            raise WeightsError(
                f"model: {options.model!r} is an export without PyTorch weights; choose "
                f"--runtime {found[0]}, or name the model that it was made of"
            )
        return RuntimeChoice(runtime, usable_device(options))
    if runtime not in found:
        there = f"there are exports for {', '.join(found)}" if found else "there is none"
        how = f"reasonpix export {options.model} --to {runtime} --samples BENCHMARK"
        raise WeightsError(
            f"model: {options.model!r} has no export for {runtime} ({there}); make one: {how}"
            if folder.is_dir()
            else f"model: {options.model!r} is not a local folder, as exports are; "
            f"make one: {how} --out DIR"
        )
    return RuntimeChoice(runtime, choose_export_device(runtime, options))


def choose_export_device(format: Format, options: ModelOptions) -> torch.device:
    """The device to compute an export on. Raises `WeightsError` for one that is not made for it."""
    if DEVICES[format] == ("cpu",) and options.device == "auto":
        options = options.model_copy(update={"device": "cpu"})
    device = choose_device(options)
    if device.type not in DEVICES[format]:
        raise WeightsError(
            f"device: {format} computes on {' or '.join(DEVICES[format])}, not on {device.type}; "
            "choose another runtime, or another device"
        )
    return usable_device(options)


def _installed(format: Format) -> bool:
    return find_spec(PACKAGES[format]) is not None


def read_chosen_export(runtime: Runtime, options: ModelOptions) -> Export | None:
    """The export that this runtime reads, every byte of it checked; None where it reads none.

    Raises `WeightsError`.
    """
    chosen = choose_runtime(runtime, options).runtime
    if chosen not in FORMATS:
        return None
    return read_export(Path(registry.checkpoint(options.model) or options.model), chosen)


def load_networks(
    choice: RuntimeChoice, model: str, unet: UNet2DConditionModel, vae: AutoencoderKL
) -> Networks:
    """The networks of the model, as the chosen runtime computes them.

    `unet` and `vae` are on its device; where the runtime reads no weights, the UNet has none. What
    an export leaves out, PyTorch computes. Raises `ReasonpixError`.
    """
    networks = torch_networks(unet, vae, compiled=choice.runtime == "compile")
    if choice.reads_weights:
        return networks
    assert choice.runtime in FORMATS
    export = read_export(Path(registry.checkpoint(model) or model), choice.runtime)
    assert export is not None, "choose_runtime saw it"
    opened = import_module(f"reasonpix.editing.runtimes.{choice.runtime}").load(
        export, choice.device
    )
    return replace(networks, runtime=choice.runtime, **opened)
