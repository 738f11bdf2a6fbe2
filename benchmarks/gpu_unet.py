"""Time a forward pass of Stable Diffusion 1.5's UNet with each runtime; run by `gpu.sh`.

    python benchmarks/gpu_unet.py [--minutes 8] [--batch 3 12] [--out TABLE.md]
    python benchmarks/gpu_unet.py --tiny --device cpu       # the same in small, without a GPU

The UNet reads 8 channels of 64x64 latents and 77 states of width 768, and has random weights. A
batch of 3 is one edit of 512x512 pixels: three branches of guidance. Each runtime is the product's
own network (`reasonpix.editing.runtimes.base`), measured in a process of its own: after a warm-up,
the median of rounds of forwards that read their tensors in place. The difference is to the same
weights in float32 without TF32, in shares of the largest and of the mean absolute value there.

Runs that do not fit into `--minutes` are stopped or skipped, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TINY = {
    "cross_attention_dim": 768,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
FULL = {"cross_attention_dim": 768}
"""All else is as diffusers' defaults, which are those of Stable Diffusion 1.5."""
TOKENS = 77
RESERVE = 15
"""Seconds of the budget that are kept for the end."""


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    name: str
    runtime: str
    precision: str
    package: str = "torch"
    least: int = 20
    """Seconds below which it is not begun, and that rows before it leave it."""


EXPORT = Way("export", "export", "fp16", "onnxscript", 60)
WAYS = (
    Way("PyTorch, eager", "torch", "fp32"),
    Way("PyTorch, eager", "torch", "bf16"),
    Way("PyTorch, eager", "torch", "fp16"),
    Way("TensorRT", "tensorrt", "fp16", "tensorrt", 60),
    Way("onnxruntime", "onnx", "fp16", "onnxruntime", 30),
    Way("torch.compile", "compile", "bf16", least=60),
)
BASELINE = WAYS[1]


@dataclass
class Found:
    """What was measured of a row; seconds by batch."""

    seconds: dict[int, float] = field(default_factory=dict)
    difference: tuple[float, float] | None = None
    ready: float | None = None
    note: str = ""


# ---------------------------------------------------------------- in a process for each row


def unet(arguments: argparse.Namespace, dtype: Any) -> Any:
    """The UNet, with the same random weights in every process on this device."""
    import torch
    from diffusers import UNet2DConditionModel

    from reasonpix.editing.runtimes.modules import UNetGraph

    torch.manual_seed(0)
    with torch.device(arguments.device):
        made = UNet2DConditionModel(
            sample_size=arguments.side,
            in_channels=8,
            out_channels=4,
            **(TINY if arguments.tiny else FULL),
        )
    return UNetGraph(made.to(dtype).eval().requires_grad_(False))


def inputs(arguments: argparse.Namespace, batch: int, device: Any, dtype: Any) -> dict[str, Any]:
    """The same numbers everywhere. There is no mask, as in InstructPix2Pix itself."""
    import torch

    numbers = torch.Generator().manual_seed(batch)
    side = arguments.side
    sample = torch.randn(batch, 8, side, side, generator=numbers)
    states = torch.randn(batch, TOKENS, 768, generator=numbers)
    return {
        "sample": sample.to(device, dtype),
        "timestep": torch.full((batch,), 500.0, device=device),
        "encoder_hidden_states": states.to(device, dtype),
        "encoder_attention_mask": None,
    }


def network(arguments: argparse.Namespace) -> Any:
    """The row's network, ready to be bound."""
    import torch

    from reasonpix.editing.runtimes.base import TorchNetwork
    from reasonpix.editing.runtimes.manifest import read_export

    runtime, folder = arguments.runtime, Path(arguments.folder)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if runtime == "torch":
        return TorchNetwork(unet(arguments, dtype[arguments.precision]))
    if runtime == "compile":
        return TorchNetwork(torch.compile(unet(arguments, dtype[arguments.precision])))
    from importlib import import_module

    export = read_export(folder, runtime)
    assert export is not None
    device = torch.device(arguments.device)
    return import_module(f"reasonpix.editing.runtimes.{runtime}").load(export, device)["unet"]


def export(arguments: argparse.Namespace) -> None:
    """Export the UNet as `reasonpix export` does, for both runtimes that read ONNX."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler

    from reasonpix.deployment.export.converters import convert, profile
    from reasonpix.editing.checkpoint import LoadedModel
    from reasonpix.editing.config import ConnectorConfig, SamplingSettings
    from reasonpix.editing.connectors import build_connector
    from reasonpix.editing.model import EditingModel
    from reasonpix.editing.runtimes.manifest import MANIFEST, Manifest, file_sha256
    from reasonpix.plugin.components import Options
    from reasonpix.plugin.spec import ComponentSpec

    width = FULL["cross_attention_dim"]
    connector = build_connector(ConnectorConfig(kind="identity", h_width=width, width=width))
    null = torch.zeros(TOKENS, width)
    own = unet(arguments, torch.float32).unet.cpu()
    checkpoint = LoadedModel(
        EditingModel(own, connector, null, None),
        AutoencoderKL(  # only how much it shrinks is asked for
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
        ),
        DDIMScheduler(),
        ComponentSpec("encoder", "none", Options()),
        False,
        SamplingSettings(resolution=8 * arguments.side),
    )
    for format in ("tensorrt", "onnx"):
        folder = Path(arguments.folder, format)
        folder.mkdir()
        graphs = convert(checkpoint, format, "fp16", ["unet"], folder)
        manifest = Manifest(
            format=format,
            precision="fp16",
            source="random weights",
            weights="",
            packages={},
            files={file.name: file_sha256(file) for file in folder.iterdir()},
            graphs=graphs,
            profile=profile(checkpoint),
            parity={},
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())


def seconds(compute: Callable[[], Any], device: str) -> float:
    """Of a call: the median of rounds, each of which takes some tenths of a second."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def take(calls: int) -> float:
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            compute()
        wait()
        return (time.perf_counter() - started) / calls

    take(2)
    calls = max(1, min(100, round(0.3 / take(1))))
    return statistics.median(take(calls) for _ in range(7))


def measure(arguments: argparse.Namespace) -> None:
    """Write what is found of the row into `--result`, after each batch anew."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference = Path(arguments.folder, "reference.safetensors")
    found: dict[str, Any] = {"seconds": {}}
    outputs: dict[str, Any] = {}
    started = time.perf_counter()
    with torch.inference_mode():
        ready = network(arguments)
        for batch in arguments.batch:
            given = inputs(arguments, batch, ready.device, ready.dtype)
            compute = ready.bind(**given)
            outputs[str(batch)] = compute().float().cpu().clone()
            if batch == arguments.batch[0]:
                found["ready"] = time.perf_counter() - started
            found["seconds"][batch] = seconds(compute, arguments.device)
            if reference.exists() and "difference" not in found:
                truth = load_file(reference)[str(batch)]
                off = (outputs[str(batch)] - truth).abs()
                found["difference"] = (
                    (off.max() / truth.abs().max()).item(),
                    (off.mean() / truth.abs().mean()).item(),
                )
            Path(arguments.result).write_text(json.dumps(found))
    if not reference.exists():
        save_file(outputs, reference)


# ---------------------------------------------------------------- in the process that asks


def absent(way: Way, device: str) -> str:
    """Why a row cannot be measured here; nothing where it can."""
    if find_spec(way.package) is None:
        return "not installed"
    if way.runtime == "tensorrt" and device == "cpu":
        return "needs a GPU"
    if way.runtime == "onnx" and device == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "not installed (onnxruntime without CUDA; onnxruntime-gpu has it)"
    return ""


def ask(way: Way, arguments: argparse.Namespace, folder: Path, left: float) -> Found:
    """Measure a row within so many seconds."""
    if left < way.least:
        return Found(note="left out: no time left")
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--runtime", way.runtime, "--precision", way.precision]
    command += ["--folder", str(folder), "--result", str(result), "--device", arguments.device]
    command += ["--side", str(arguments.side), "--batch", *map(str, arguments.batch)]
    command += ["--tiny"] if arguments.tiny else []
    note = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            note = f"failed: {lines[-1].strip()[:200]}" if lines else f"failed: {done.returncode}"
    except subprocess.TimeoutExpired:
        note = "ended: no time left"
    if not result.exists():
        return Found(note=note)
    told = json.loads(result.read_text())
    return Found(
        {int(batch): it for batch, it in told["seconds"].items()},
        tuple(told["difference"]) if "difference" in told else None,
        told.get("ready"),
        note,
    )


def table(found: dict[Way, Found], batches: Sequence[int]) -> str:
    """Markdown; ratios are how many times as fast as eager bf16."""
    base = found.get(BASELINE, Found()).seconds
    columns = [f"batch {batch}, s | × eager bf16" for batch in batches]
    lines = [
        f"| | precision | {' | '.join(columns)} | difference: largest, mean | first after, s |",
        f"|---|---|{'---:|---:|' * len(batches)}---:|---:|",
    ]
    for way, it in found.items():
        cells = []
        for batch in batches:
            took = it.seconds.get(batch)
            ratio = f"{base[batch] / took:.2f}" if took and batch in base else "–"
            cells.append(f"{took:.4f} | {ratio}" if took else f"{it.note or '–'} | –")
        off = "{:.1e}, {:.1e}".format(*it.difference) if it.difference else "–"
        ready = f"{it.ready:.0f}" if it.ready else "–"
        lines.append(f"| {way.name} | {way.precision} | {' | '.join(cells)} | {off} | {ready} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    """What was measured on, and with what."""
    import torch

    names = ("torch", "diffusers", "onnxruntime-gpu", "onnxruntime", "tensorrt")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    where = f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        from reasonpix.editing.runtimes.tensorrt import driver_version

        where = f"{torch.cuda.get_device_name()}, driver {driver_version()}"
    return f"{where}; {', '.join(versions)}"


def main() -> None:
    """Parse, then measure one row (as this script asks itself to), or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="for all of it")
    parser.add_argument("--batch", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--side", type=int, help="of the latents; 64, or 8 with --tiny")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small UNet")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    for own in ("--runtime", "--precision", "--folder", "--result"):
        parser.add_argument(own, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.side = arguments.side or (8 if arguments.tiny else 64)
    if arguments.runtime == "export":
        export(arguments)
    elif arguments.runtime:
        measure(arguments)
    else:
        everything(arguments)


def tell(what: str) -> None:
    """Say what is being done."""
    print(what, file=sys.stderr, flush=True)


def everything(arguments: argparse.Namespace) -> None:
    """Measure all rows within the budget, and print the table."""
    end = time.monotonic() + arguments.minutes * 60 - RESERVE

    missing = {way: absent(way, arguments.device) for way in WAYS}

    def left(way: Way) -> float:
        """For this row, so that each of those behind it has its least."""
        behind = WAYS[WAYS.index(way) + 1 :]
        return end - time.monotonic() - sum(it.least for it in behind if not missing[it])

    found: dict[Way, Found] = {}
    with TemporaryDirectory(prefix="reasonpix-gpu-") as name:
        folder = Path(name)
        exported: Found | None = None
        for way in WAYS:
            why = missing[way]
            if not why and way.runtime in ("onnx", "tensorrt"):
                if exported is None:
                    tell("exporting")
                    lacks = absent(EXPORT, arguments.device)
                    exported = Found(note=lacks and f"{EXPORT.package} is {lacks}")
                    exported = exported if lacks else ask(EXPORT, arguments, folder, left(way))
                why = exported.note and f"no export: {exported.note}"
            if not why:
                tell(f"{way.name}, {way.precision}: at most {max(0, left(way)):.0f} s")
            found[way] = Found(note=why) if why else ask(way, arguments, folder, left(way))
    made = f"{machine(arguments.device)}\n\n{table(found, arguments.batch)}\n"
    print(made)
    if arguments.out:
        arguments.out.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
