"""A random editing model, so small that a test can build, save and sample it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from reasonpix.editing.checkpoint import LoadedModel, save_checkpoint
from reasonpix.editing.config import ConnectorConfig, ConnectorKind, SamplingSettings
from reasonpix.editing.connectors import build_connector
from reasonpix.editing.model import ClipTextEncoder, EditingModel
from reasonpix.plugin.components import Options
from reasonpix.plugin.spec import ComponentSpec

H_WIDTH = 8
"""Width of `fake-encoder`'s states."""
WIDTH = 16
"""Of the UNet's cross-attention."""
TOKENS = 12
RESOLUTION = 32
STRIDE = 8
"""Pixels: VAE and UNet halve the sides once and twice."""


def tiny_unet(in_channels: int = 8) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        in_channels=in_channels,
        out_channels=4,
        cross_attention_dim=WIDTH,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=RESOLUTION,
        scaling_factor=0.5,
    )


def tiny_text() -> ClipTextEncoder:
    """A random CLIP text encoder that spells, with texts of `TOKENS` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        model_max_length=TOKENS,
    )
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ClipTextEncoder(CLIPTextModel(config), tokenizer)


def tiny_scheduler(name: str = "DDIMScheduler", **options: Any) -> Any:
    """Any scheduler of diffusers, with Stable Diffusion's noise."""
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return getattr(diffusers, name).from_config(noise | options)


def tiny_model(
    kind: ConnectorKind = "text_tokens",
    scheduler: Any = None,
    seed: int = 0,
    **settings: float,
) -> LoadedModel:
    """A random editing model whose encoder is `fake-encoder`; `identity` reads its own text."""
    torch.manual_seed(seed)
    text = tiny_text()
    unet, vae = tiny_unet(), tiny_vae()
    config = ConnectorConfig(
        kind=kind,
        h_width=WIDTH if kind == "identity" else H_WIDTH,
        width=WIDTH,
        tokens=TOKENS,
        heads=2,
        depth=1,
    )
    model = EditingModel(unet, build_connector(config), text([""])[0], text)
    with torch.no_grad():
        if kind == "clip_residual":
            model.connector.gate.fill_(0.5)  # or the encoder would not be heard
        # Far from 1: a sampler that forgets to scale latents shall be found out.
        unet.conv_out.weight.mul_(3)
    return LoadedModel(
        model,
        vae,
        scheduler or tiny_scheduler(),
        ComponentSpec("encoder", "fake-encoder", Options()),
        False,
        SamplingSettings(**{"resolution": RESOLUTION, "num_inference_steps": 3} | settings),
    )


def write_tiny(folder: Path, kind: ConnectorKind = "text_tokens", **options: Any) -> Path:
    """The same in a folder, as training writes it."""
    folder.mkdir(parents=True)
    save_checkpoint(folder, tiny_model(kind, **options))
    return folder


def write_pipeline(folder: Path, channels: int = 4, **noise: Any) -> str:
    """A random pipeline of diffusers: text-to-image with 4 channels, InstructPix2Pix with 8."""
    torch.manual_seed(0)
    text = tiny_text()
    kind = (
        diffusers.StableDiffusionPipeline
        if channels == 4
        else diffusers.StableDiffusionInstructPix2PixPipeline
    )
    kind(
        vae=tiny_vae(),
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        unet=tiny_unet(channels),
        scheduler=tiny_scheduler(clip_sample=False, steps_offset=1, **noise),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def overwrite_number(folder: Path, tensor: str, value: float, row: int = 0) -> Path:
    """Set the first number of a row of one tensor, in the only weight file of `folder`."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[tensor].reshape(len(tensors[tensor]), -1)[row, 0] = value
    save_file(tensors, file, metadata)
    return folder


def make_x_nan(pipeline: str | Path) -> Path:
    """Let the text encoder of a folder of `write_pipeline` compute NaN for texts with an x."""
    folder = Path(pipeline)
    numbers = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    for word in ("x", "x</w>"):
        table = "embeddings.token_embedding.weight"
        overwrite_number(folder / "text_encoder", table, float("nan"), numbers[word])
    return folder
