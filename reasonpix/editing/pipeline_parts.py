"""The networks of a diffusers pipeline folder, and which encoder an editing model names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from reasonpix.editing.model import ClipTextEncoder
from reasonpix.editing.schedulers import read_scheduler
from reasonpix.errors import WeightsError
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.model_files import read_json
from reasonpix.plugin.weights import check_weights, pretrained


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a Stable Diffusion pipeline, editing or not. Float32, on the CPU."""

    options: ModelOptions
    """`options.model` is the local folder or the hub id that the parts were read from."""
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    text: ClipTextEncoder | None

    @property
    def tokens(self) -> int:
        """Tokens of "no instruction": as many as CLIP has, 77."""
        if self.text is not None:
            return self.text.tokens
        config = read_json(self.options, "connector/config.json")
        return int(config["tokens"]) if config else 77

    @property
    def resolution(self) -> int:
        """Side that the UNet was made for, in pixels."""
        return int(self.unet.config.sample_size * vae_scale_factor(self.vae))


def vae_scale_factor(vae: AutoencoderKL) -> int:
    """Pixels per side of a latent: 8 for Stable Diffusion."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def unet_stride(unet: UNet2DConditionModel, vae: AutoencoderKL) -> int:
    """Pixels per side of a cell at the UNet's coarsest level: 64 for Stable Diffusion."""
    return vae_scale_factor(vae) * int(2 ** (len(unet.config.block_out_channels) - 1))


def working_size(size: tuple[int, int], resolution: int, stride: int) -> tuple[int, int]:
    """Width and height at which the model works: the longer side is about `resolution` pixels.

    Both are multiples of `stride`; the aspect ratio is kept as far as that allows.
    """
    # Exact fractions: an image that already has a working size must keep it.
    cells = (round(Fraction(side * resolution, max(size) * stride)) for side in size)
    width, height = (max(1, count) * stride for count in cells)
    return width, height


def working_image(image: Image.Image, resolution: int, stride: int) -> Image.Image:
    """The whole image at its `working_size`: what encoder and UNet see of it at inference.

    Scaled with Lanczos, as in InstructPix2Pix, unless it already has this size.
    """
    size = working_size(image.size, resolution, stride)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def read_parts(options: ModelOptions, unet_weights: bool = True) -> PipelineParts:
    """Read the pipeline that `options.model` names: a folder, a hub id, or `mini/…`.

    Without `unet_weights` the UNet is on torch's "meta" device: it has shapes but no weights.
    Raises `WeightsError` for missing or damaged files.
    """
    options, index = open_pipeline(options)
    scheduler = read_scheduler(options)
    text = None
    if (index.get("text_encoder") or [None])[0]:
        text = ClipTextEncoder(
            pretrained(CLIPTextModel, options, subfolder="text_encoder"),
            pretrained(CLIPTokenizer, options, subfolder="tokenizer"),
        )
        text.encoder.float()
    return PipelineParts(
        options,
        _read_unet(options, unet_weights),
        pretrained(AutoencoderKL, options, subfolder="vae").float(),
        scheduler,
        text,
    )


def _read_unet(options: ModelOptions, weights: bool) -> UNet2DConditionModel:
    if weights:
        return pretrained(UNet2DConditionModel, options, subfolder="unet").float()
    config = read_json(options, "unet/config.json")
    if config is None:
        raise WeightsError(f"model: {options.model!r} lacks unet/config.json")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def check_channels(parts: PipelineParts, init: str) -> None:
    """Check that the UNet is of kind `init`: "sd15" or "ip2p". Raises `WeightsError`."""
    unet = parts.unet.config
    if unet.in_channels == (2 if init == "ip2p" else 1) * unet.out_channels:
        return
    raise WeightsError(
        f"model: the UNet of {parts.options.model!r} takes {unet.in_channels} channels, "
        + (
            "so it is not an editing model; to train one from it, set `init: sd15`"
            if init == "ip2p"
            else "so it is not a text-to-image model; to continue training an editing model, set "
            "`init: ip2p`"
        )
    )


def check_pipeline(options: ModelOptions) -> None:
    """Raise `WeightsError` if `options.model` is not a pipeline that can sample.

    Reads no weights.
    """
    options, _ = open_pipeline(options)
    read_scheduler(options)


def open_pipeline(options: ModelOptions) -> tuple[ModelOptions, dict[str, Any]]:
    """Resolve names such as `mini/…` to a folder, and read the pipeline's `model_index.json`."""
    name = options.model
    if carried := registry.checkpoint(name):
        options = options.model_copy(update={"model": str(carried)})
    if not os.path.isdir(options.model):
        check_weights(options)
    index = read_json(options, "model_index.json")
    if index is None:
        raise WeightsError(f"model: {_why_no_pipeline(name, options)}")
    check_weights(options)
    return options, index


def _why_no_pipeline(name: str, options: ModelOptions) -> str:
    folder = Path(options.model)
    if not folder.is_dir():
        from reasonpix.plugin.hub_client import is_offline

        if is_offline():
            return (
                f"{name!r} is neither a local folder nor in the cache, and HF_HUB_OFFLINE is set; "
                "download it once without HF_HUB_OFFLINE, or name a local folder"
            )
    elif (folder / "model" / "model_index.json").is_file():
        return f"{name!r} is the folder of a run; its model is {str(folder / 'model')!r}"
    elif (folder / "state").is_dir() and (folder / "recipe.yaml").is_file():
        return f"{name!r} is an unfinished run; its model/ is written at the end of training"
    return (
        f"{name!r} is not an editing model: it has no model_index.json; name a model that "
        "`reasonpix train` wrote, or an InstructPix2Pix pipeline"
    )
