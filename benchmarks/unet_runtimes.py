"""Time a forward pass of an editing UNet, and a whole edit, with each runtime on a CPU.

    python benchmarks/unet_runtimes.py [--rounds 9] [--edits 3] [--no-compile] [--mini]

The UNet has 142 million parameters, Stable Diffusion's layout and random weights; with `--mini` it
is that of mini/reasonpix2pix. What runs is the product's own:
`reasonpix.deployment.export.converters` writes the networks,
`reasonpix.editing.runtimes.onnx` and `reasonpix.editing.runtimes.openvino` compute them.

- A forward is one step of one edit, three branches of guidance in one batch: 3x8x32x32 latents and
  77 states. `eager` is diffusers' UNet, called as its pipeline calls it, without a mask; the
  exports have one. The difference is the largest to it, in shares of the largest value there.
- An edit is 20 steps at 256x256 pixels (mini: 64x64) with VAE, against diffusers'
  `StableDiffusionInstructPix2PixPipeline` with the same weights, states and noise.

In each round every runtime takes its turn, so that other load on the machine affects all alike.
Ratios are medians of the ratios within rounds; seconds are medians. Compiling and loading do not
count.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reasonpix.deployment.export.converters import convert
from reasonpix.editing.checkpoint import LoadedModel, load_checkpoint
from reasonpix.editing.config import ConnectorConfig, SamplingSettings
from reasonpix.editing.connectors import build_connector
from reasonpix.editing.model import EditingModel
from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.editing.pipeline_parts import vae_scale_factor
from reasonpix.editing.runtimes import onnx as runtime_onnx
from reasonpix.editing.runtimes import openvino as runtime_openvino
from reasonpix.editing.runtimes.base import Network
from reasonpix.editing.runtimes.manifest import Export, Manifest, Part
from reasonpix.editing.runtimes.modules import torch_networks
from reasonpix.editing.runtimes.names import Format
from reasonpix.plugin.components import MLLMEncoder, ModelOptions, Options
from reasonpix.plugin.spec import ComponentSpec

CPU = torch.device("cpu")
TOKENS = 77
STEPS = 20
BRANCHES = 3
SEED = 7


class Given(MLLMEncoder[Options]):
    """States that are there already."""

    name: ClassVar[str] = "given"

    def __init__(self, states: Tensor) -> None:
        super().__init__(Options())
        self.states = states.numpy()

    def encode(
        self, images: Sequence[Image.Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        return [self.states for _ in images]


# -- the model ------------------------------------------------------------------------------------


def editing_model(mini: bool) -> LoadedModel:
    """Its UNet reads the encoder's states as they are."""
    torch.manual_seed(0)
    if mini:
        trained = load_checkpoint(ModelOptions(model="mini/reasonpix2pix"))
        unet, vae, scheduler = trained.model.unet, trained.vae, trained.scheduler
    else:
        unet = UNet2DConditionModel(
            sample_size=32,
            in_channels=8,
            cross_attention_dim=768,
            block_out_channels=(128, 256, 512, 512),
        )
        vae = AutoencoderKL(
            block_out_channels=(64, 128, 256, 256),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=2,
        )
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
    width = unet.config.cross_attention_dim
    config = ConnectorConfig(kind="identity", h_width=width, width=width)
    model = EditingModel(unet, build_connector(config), torch.randn(TOKENS, width), None)
    size = unet.config.sample_size * vae_scale_factor(vae)
    return LoadedModel(
        model.eval().requires_grad_(False),
        vae.eval().requires_grad_(False),
        scheduler,
        ComponentSpec("encoder", "given", Options()),
        False,
        SamplingSettings(
            resolution=size,
            num_inference_steps=STEPS,
            guidance_scale=7.5,
            image_guidance_scale=1.5,
        ),
    )


def written(checkpoint: LoadedModel, format: Format, folder: Path) -> Export:
    folder.mkdir()
    graphs = convert(checkpoint, format, "fp32", get_args(Part), folder)
    return Export(
        folder,
        Manifest(
            format=format,
            precision="fp32",
            source="",
            weights="",
            packages={},
            files={graph.file: "" for graph in graphs.values()},
            graphs=graphs,
            parity={},
        ),
    )


def in_bfloat16(export: Export) -> Export:
    """OpenVINO's differ in what they are computed in alone."""
    return replace(export, manifest=export.manifest.model_copy(update={"precision": "bf16"}))


# -- measuring ------------------------------------------------------------------------------------


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds, and how many times as fast as the first, by way."""
    for way in ways.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - began)
    first = next(iter(taken.values()))
    return {
        name: (
            statistics.median(these),
            statistics.median(a / b for a, b in zip(first, these, strict=True)),
        )
        for name, these in taken.items()
    }


def show(title: str, last: str, rows: Mapping[str, tuple[float, float]], extra: Any) -> None:
    print(f"\n| {title} | seconds | speed-up | {last} |\n|---|---|---|---|")
    for name, (seconds, ratio) in rows.items():
        print(f"| {name} | {seconds:.3f} | {ratio:.2f} | {extra[name]} |", flush=True)


def forwards(
    checkpoint: LoadedModel, exports: Mapping[str, dict[str, Network]], rounds: int, compiled: bool
) -> None:
    unet = checkpoint.model.unet
    side = unet.config.sample_size
    sample = torch.randn(BRANCHES, unet.config.in_channels, side, side)
    states = torch.randn(BRANCHES, TOKENS, unet.config.cross_attention_dim)
    now = torch.tensor(500)
    half = copy.deepcopy(unet).to(torch.bfloat16)

    def eager(of: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
        x, h = sample.to(dtype), states.to(dtype)
        return lambda: of(x, now, encoder_hidden_states=h, return_dict=False)[0]

    def bound(network: Network) -> Callable[[], Tensor]:
        return network.bind(
            sample=sample,
            timestep=now.float().expand(BRANCHES).contiguous(),
            encoder_hidden_states=states,
            encoder_attention_mask=None,
        )

    ways = {"eager": eager(unet, torch.float32)}
    if compiled:
        ways["torch.compile"] = bound(torch_networks(unet, checkpoint.vae, compiled=True).unet)
        began = time.perf_counter()
        ways["torch.compile"]()
        print(f"torch.compile: {time.perf_counter() - began:.0f} s to compile", flush=True)
    ways["onnxruntime"] = bound(exports["onnxruntime"]["unet"])
    ways["OpenVINO f32"] = bound(exports["OpenVINO f32"]["unet"])
    ways["eager bf16"] = eager(half, torch.bfloat16)
    ways["OpenVINO bf16"] = bound(exports["OpenVINO bf16"]["unet"])
    results = {name: way().float().clone() for name, way in ways.items()}
    right = results["eager"]
    far = {
        name: f"{float((result - right).abs().max() / right.abs().max()):.1e}"
        for name, result in results.items()
    }
    show("forward", "largest difference", in_turn(ways, rounds), far)


def edits(checkpoint: LoadedModel, exports: Mapping[str, dict[str, Network]], rounds: int) -> None:
    model, vae, settings = checkpoint.model, checkpoint.vae, checkpoint.settings
    side = settings.resolution
    blots = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(blots).resize((side, side), Image.Resampling.BICUBIC)
    states = torch.randn(TOKENS, model.unet.config.cross_attention_dim)
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae, None, None, model.unet, checkpoint.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    cells = side // vae_scale_factor(vae)

    def diffusers() -> Image.Image:
        generator = torch.Generator().manual_seed(SEED)
        latents = torch.randn(
            1, model.unet.config.out_channels, cells, cells,
            generator=generator,
        )  # fmt: skip
        edited: Image.Image = pipeline(
            image=image,
            prompt_embeds=states[None],
            negative_prompt_embeds=model.uncond_states[None],
            latents=latents,
            generator=generator,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
        ).images[0]
        return edited

    def ours(networks: dict[str, Network]) -> Callable[[], Image.Image]:
        editor = ReasonPix2Pix(
            checkpoint,
            Given(states),
            device=CPU,
            dtype=torch.float32,
            # Of a small UNet several edits are computed at once, and this is one.
            batch_size=1,
            networks=replace(torch_networks(model.unet, vae), **networks),
        )
        return lambda: editor([image], "given", seed=SEED)[0]

    ways: dict[str, Callable[[], Image.Image]] = {"diffusers": diffusers, "torch": ours({})}
    ways |= {name: ours(networks) for name, networks in exports.items()}
    results = {name: np.asarray(way(), np.float64) for name, way in ways.items()}
    right = results["diffusers"]
    errors = {name: float(np.mean((it - right) ** 2)) for name, it in results.items()}
    decibels = {
        name: f"{10 * np.log10(255**2 / error):.1f} dB" if error else "the same"
        for name, error in errors.items()
    }
    show("edit", "PSNR", in_turn(ways, rounds), decibels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--edits", type=int, default=3, help="rounds of whole edits; 0: none")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--mini", action="store_true")
    options = parser.parse_args()
    # Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
    checkpoint = editing_model(options.mini)
    millions = sum(it.numel() for it in checkpoint.model.unet.parameters()) / 1e6
    print(f"UNet of {millions:.1f} M parameters, {torch.get_num_threads()} threads", flush=True)
    with TemporaryDirectory() as folder:
        onnx = written(checkpoint, "onnx", Path(folder, "onnx"))
        openvino = written(checkpoint, "openvino", Path(folder, "openvino"))
        exports = {
            "onnxruntime": runtime_onnx.load(onnx, CPU),
            "OpenVINO f32": runtime_openvino.load(openvino, CPU),
            "OpenVINO bf16": runtime_openvino.load(in_bfloat16(openvino), CPU),
        }
        with torch.inference_mode():
            forwards(checkpoint, exports, options.rounds, not options.no_compile)
            if options.edits:
                edits(checkpoint, exports, options.edits)


if __name__ == "__main__":
    main()
