"""Train the mini CLIP: captions and pictures of the sticker world in one space.

    python -m reasonpix_mini.training.clip --out runs/clip [--steps 2000] [--resume]

CLIP's contrastive loss (Radford et al. 2021) on scenes of the train split and their captions. Every
scene is in its batch together with the same scene after an edit, so that the two differ in one
object alone: what tells them apart is that object, never the background. Pictures with equal
captions are no negatives of each other.

What is saved is an exponential moving average of the weights, in float16.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from reasonpix_mini import stickers, world
from reasonpix_mini.training import text
from reasonpix_mini.training.grounding_scenes import worn

WIDTH = 64
"""Of the shared space and of the text's states."""

PATCH = 8
LENGTH = 32
"""Longest text, in tokens with start and end."""


def network(words: CLIPTokenizer) -> CLIPModel:
    """The untrained network, 0.30 M parameters."""
    written = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=WIDTH,
        max_position_embeddings=LENGTH,
        # The text's embedding is the state at the first token of this id.
        eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
    )
    seen = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=WIDTH,
        image_size=world.SIZE,
        patch_size=PATCH,
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=written.to_dict(), vision_config=seen.to_dict(), projection_dim=WIDTH
        )
    )
    with torch.no_grad():
        places = model.vision_model.embeddings.position_embedding.weight
        places[1:] = waves(world.SIZE // PATCH, WIDTH)
    return model


def waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (grid · grid, width): neighbours are alike."""
    angle = torch.arange(grid)[:, None] * 2.0 ** -torch.arange(0, 4, 16 / width)
    line = 0.3 * torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([line.repeat_interleave(grid, 0), line.repeat(grid, 1)], 1)


def pictures(split: world.Split, count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """The first `count` scenes, each followed by itself after its edit, and their captions.

    Pixels are (2 · count, 64, 64, 3).
    """
    pixels = np.empty((2 * count, world.SIZE, world.SIZE, 3), np.uint8)
    captions = []
    for index in range(count):
        before = world.scene(split, index)
        for row, scene in enumerate((before, stickers.edit(before).after)):
            pixels[2 * index + row] = scene.render()
            captions.append(scene.caption)
    return pixels, captions


def reworded(rng: np.random.Generator, caption: str) -> str:
    """The caption with other words for some of the categories that have them."""

    def other(match: re.Match[str]) -> str:
        category = world.categories().get(match[1])
        if category is None or not category.synonyms or rng.random() < 0.5:
            return match[0]
        return world.indefinite(str(rng.choice(category.synonyms)))

    return re.sub(r"\ban? (\w+)", other, caption)


def loss(similarities: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over (n, n), image by text; `same` are no negatives."""
    others = same & ~torch.eye(len(same), dtype=torch.bool)
    similarities = similarities.masked_fill(others, -torch.inf)
    right = torch.arange(len(same))
    return (F.cross_entropy(similarities, right) + F.cross_entropy(similarities.T, right)) / 2


@torch.no_grad()
def validate(model: CLIPModel, pixels: Tensor, tokens: Tensor, same: Tensor) -> dict[str, float]:
    """On scenes, each followed by its edit: how often captions and pictures find each other.

    `recall` is the share of captions whose nearest picture has that caption; `ordered`, that of
    edits nearer to the edited caption than their input is.
    """
    similarities = model(input_ids=tokens, pixel_values=pixels).logits_per_text
    found = same[torch.arange(len(same)), similarities.argmax(1)]
    edited = torch.arange(1, len(same), 2)
    ordered = similarities[edited, edited] > similarities[edited, edited - 1]
    return {name: x.float().mean().item() for name, x in (("recall", found), ("ordered", ordered))}


class Pool:
    """Scenes of a split with their edits, ready for the network."""

    def __init__(self, split: world.Split, count: int, words: CLIPTokenizer) -> None:
        rng = np.random.default_rng(3)
        self.pixels, captions = pictures(split, count)
        texts = captions + [reworded(rng, caption) for caption in captions]
        ids = words(texts, padding=True, return_tensors="pt").input_ids
        self.tokens, self.reworded = ids.chunk(2)
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        self.numbers = torch.tensor([numbers[caption] for caption in captions])

    def same(self, rows: Tensor) -> Tensor:
        """Which of the rows have equal captions: (n, n)."""
        return self.numbers[rows][:, None] == self.numbers[rows]


def normalise(pixels: NDArray[np.uint8], mean: Tensor, std: Tensor) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float32, as the image processor does."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (scaled - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def colours(pixels: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of pixels in [0, 1], four digits."""
    flat = torch.from_numpy(pixels[:2000]).reshape(-1, 3).float() / 255
    return flat.mean(0).mul(1e4).round() / 1e4, flat.std(0).mul(1e4).round() / 1e4


def optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), weight_decay=decay)


def follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Move the average's parameters towards the model's: `keep` of the old stays."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


def train(out: Path, steps: int, batch: int, resume: bool, scenes: int, rate: float = 2e-3) -> None:
    """Train for `steps` and leave the checkpoint in `out`/checkpoint."""
    torch.manual_seed(0)
    words = text.tokenizer(text.names(), LENGTH)
    model = network(words)
    average = copy.deepcopy(model)
    first = 0
    if resume:
        first = json.loads((out / "step.json").read_text())["step"]
        model.load_state_dict(load_file(out / "weights.safetensors"))
        average.load_state_dict(load_file(out / "average.safetensors"))
    adam = optimizer(model, rate, 0.05)
    pool, held_out = Pool("train", scenes, words), Pool("validation", 150, words)
    mean, std = colours(pool.pixels)
    everything = torch.arange(len(held_out.pixels))
    validation = (normalise(held_out.pixels, mean, std), held_out.tokens, held_out.same(everything))
    started, shown = time.time(), 4.0
    for step in range(first, steps):
        rng = np.random.default_rng([13, step])
        for group in adam.param_groups:
            warm = min(1.0, (step - first + 1) / 100)
            group["lr"] = rate * warm * (0.51 + 0.49 * np.cos(np.pi * step / steps))
        chosen = 2 * rng.choice(scenes, min(batch // 2, scenes), replace=False)
        rows = torch.from_numpy(np.concatenate([chosen, chosen + 1]))
        pixels = worn(normalise(pool.pixels[rows.numpy()], mean, std), rng)
        plain = torch.from_numpy(rng.random(len(rows)) < 0.8)[:, None]
        tokens = torch.where(plain, pool.tokens[rows], pool.reworded[rows])
        value = loss(model(input_ids=tokens, pixel_values=pixels).logits_per_image, pool.same(rows))
        adam.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        follow(average, model, min(0.998, (1 + step) / (10 + step)))
        shown += 0.02 * (value.item() - shown)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            figures = {"loss": shown} | validate(average, *validation)
            figures = {name: round(figure, 3) for name, figure in figures.items()}
            print(step + 1, round(time.time() - started), json.dumps(figures), flush=True)
            out.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), out / "weights.safetensors")
            save_file(average.state_dict(), out / "average.safetensors")
            (out / "step.json").write_text(json.dumps({"step": step + 1}))
            write(average, words, mean, std, out / "checkpoint")


def write(model: CLIPModel, words: CLIPTokenizer, mean: Tensor, std: Tensor, folder: Path) -> None:
    """Write the checkpoint, float16, with all that `from_pretrained` reads."""
    copy.deepcopy(model).half().save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": world.SIZE},
        crop_size={"height": world.SIZE, "width": world.SIZE},
        image_mean=[round(x, 4) for x in mean.tolist()],
        image_std=[round(x, 4) for x in std.tolist()],
    ).save_pretrained(folder)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the mini CLIP.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=96, help="pictures a step, half of them edits")
    parser.add_argument("--scenes", type=int, default=6_000, help="scenes of the train split")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.steps, args.batch, args.resume, args.scenes)


if __name__ == "__main__":
    main()
