"""Random CLIP and ViT models, so small that a test can build and run them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, ViTConfig, ViTModel

from tests.support.tiny_model import TOKENS, tiny_text

CLIP_SIDE = 32
DINO_SIDE = 28
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.25, 0.2)
"""Of CLIP's preprocessing."""


def write_clip(folder: Path, seed: int = 0) -> Path:
    """With a tokenizer that spells; its images are far apart, some from texts by more than 90°."""
    torch.manual_seed(seed)
    text = tiny_text()
    words = text.encoder.config
    config = CLIPConfig(
        text_config={
            "vocab_size": words.vocab_size,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": TOKENS,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        vision_config={
            "image_size": CLIP_SIDE,
            "patch_size": 8,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        projection_dim=12,
    )
    _save(CLIPModel(config), folder)
    text.tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_SIDE}, crop_size=CLIP_SIDE, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


def write_dino(folder: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=DINO_SIDE,
        patch_size=7,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    _save(ViTModel(config, add_pooling_layer=False), folder)
    return folder


def _save(model: torch.nn.Module, folder: Path) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:  # as they are drawn, all images would be alike
                value.mul_(2 if "patch" in name else 6)
    model.save_pretrained(folder)
