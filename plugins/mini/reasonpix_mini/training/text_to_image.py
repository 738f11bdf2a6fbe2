"""Train the mini Stable Diffusion: scenes of the sticker world from their captions.

    python -m reasonpix_mini.training.text_to_image --base mini/instruct-pix2pix --out runs/sd
    python -m reasonpix_mini.training.text_to_image --out runs/sd --export runs/stable-diffusion

It is to the mini world what Stable Diffusion 1.5 is to photographs: the text-to-image model that
methods of editing without training start from. VAE, tokenizer and the frozen text encoder are those
of the mini InstructPix2Pix, so only a UNet is learnt.

As there, a head on the UNet's features, thrown away afterwards, is asked what stands in each cell:
the loss of a diffusion model alone is slow to connect words and drawings.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from reasonpix.editing import read_parts
from reasonpix.plugin import ModelOptions
from reasonpix_mini import world
from reasonpix_mini.training import text
from reasonpix_mini.training.diffusion import Training, scheduler
from reasonpix_mini.training.judge import Judge
from reasonpix_mini.training.vae import to_pixels, to_tensor

BATCH = 32
DROPOUT = 0.1
"""Share of the scenes without their caption, for classifier-free guidance."""
BACKGROUND_WEIGHT = 0.3
"""Of the loss in cells without an object."""
CELLS = 8
"""Side of the grid on which the head answers."""


def unet() -> UNet2DConditionModel:
    """The untrained UNet, 1.48 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=text.WIDTH,
        block_out_channels=(48, 64, 56),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
    )


@dataclass(frozen=True)
class Pool:
    """Scenes as tensors."""

    captions: list[str]
    latents: torch.Tensor
    """(scenes, 4, 16, 16), the posterior's mode, scaled, float16."""
    seen: torch.Tensor
    """What stands in each cell, (scenes, CELLS, CELLS): 0 for nothing."""


def pool(vae: AutoencoderKL, scenes: list[world.Scene]) -> Pool:
    """The scenes' captions, latents and facts."""
    numbers = {name: number for number, name in enumerate(world.categories())}
    side = world.SIZE // CELLS
    seen = torch.zeros(len(scenes), CELLS, CELLS, dtype=torch.uint8)
    for row, scene in enumerate(scenes):
        masks = scene.masks().reshape(-1, CELLS, side, CELLS, side).mean((2, 4))
        for mask, placement in zip(masks, scene.placements, strict=True):
            seen[row][torch.from_numpy(mask > 0.25)] = numbers[placement.category] + 1
    return Pool([scene.caption for scene in scenes], _encode(vae, scenes), seen)


@torch.inference_mode()
def _encode(vae: AutoencoderKL, scenes: list[world.Scene]) -> torch.Tensor:
    parts = []
    for i in range(0, len(scenes), 32):
        pixels = np.stack([scene.render() for scene in scenes[i : i + 32]])
        latents = vae.encode(to_tensor(pixels)).latent_dist.mode()
        parts.append((latents * vae.config.scaling_factor).half())
    return torch.cat(parts).clone()


class Network(nn.Module):
    """UNet, the frozen text encoder, and the head that is thrown away."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.unet = unet()
        self.requires = nn.Conv2d(64, len(world.categories()) + 1, 1)

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """v (n, 4, 16, 16)."""
        with torch.no_grad():
            states = self.text_encoder(input_ids=ids).last_hidden_state
        return self.unet(noisy, steps, states).sample


class Trainer(Training):
    """The UNet of a Stable Diffusion."""

    seed, warmup, decay = 37, 200, 0.999

    def __init__(
        self, words: CLIPTokenizer, text_encoder: CLIPTextModel, scenes: Pool, learning_rate: float
    ) -> None:
        super().__init__(words, Network(text_encoder), learning_rate)
        self.features: dict[str, torch.Tensor] = {}
        # The last 8×8 on the way up, which knows the words.
        self.network.unet.up_blocks[1].attentions[-1].register_forward_hook(
            lambda module, given, out: self.features.update(sees=out[0])
        )
        self.scenes = scenes
        self.shown: dict[str, float] = {}

    def ids(self, texts: list[str]) -> torch.Tensor:
        """Token ids (texts, tokens), padded as diffusers' pipelines pad them."""
        return self.words(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Of v, mostly where objects are, and a tenth of what the head gets wrong."""
        losses = self._losses(rng)
        for name, value in losses.items():
            self.shown[name] = 0.98 * self.shown.get(name, value.item()) + 0.02 * value.item()
        return losses["v"] + 0.1 * losses["sees"]

    def _losses(self, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        rows = torch.from_numpy(rng.integers(len(self.scenes.captions), size=BATCH))
        clean, seen = self.scenes.latents[rows].float(), self.scenes.seen[rows].long()
        worded = torch.rand(BATCH) >= DROPOUT
        texts = [self.scenes.captions[row] if worded[i] else "" for i, row in enumerate(rows)]
        # From nothing but noise, the first sampling step decides where things are.
        steps = torch.where(torch.rand(BATCH) < 0.15, 999, torch.randint(0, 1000, (BATCH,)))
        share = self.cumulated[steps].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
        # The flash kernel's backward is several times slower than MATH in bfloat16 on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = self.network(noisy, steps, self.ids(texts))
            told = self.network.sees(self.features["sees"]).float()
        weight = F.interpolate((seen > 0)[:, None].float(), scale_factor=2)
        weight = weight + BACKGROUND_WEIGHT * (1 - weight)
        error = (predicted.float() - velocity).square().mean(1, keepdim=True)
        return {
            "v": (weight * error).sum() / weight.sum(),
            "sees": F.cross_entropy(told[worded], seen[worded]),
        }


@torch.no_grad()
def validate(
    trainer: Trainer, vae: AutoencoderKL, judge: Judge, scenes: list[world.Scene], start: int = 800
) -> float:
    """How often the judge sees a new object where the old one was.

    The first object's name in the caption is exchanged for another, and the scene is drawn anew
    from its latents as noisy as at step `start`: 8 DDIM steps, guidance 3. This is what methods
    without training build on.
    """
    names = list(world.categories())
    targets = [names[(names.index(one.placements[0].category) + 7) % len(names)] for one in scenes]
    wanted = [one.replaced(0, target).caption for one, target in zip(scenes, targets, strict=True)]
    sampler = scheduler()
    sampler.set_timesteps(10)
    steps = [step for step in sampler.timesteps if step <= start]
    latents = _encode(vae, scenes).float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    latents = sampler.add_noise(latents, noise, steps[0])
    ids = trainer.ids([*wanted, *[""] * len(scenes)])
    for step in steps:
        both = trainer.ema(latents.repeat(2, 1, 1, 1), step.expand(len(ids)), ids)
        worded, wordless = both.chunk(2)
        latents = sampler.step(wordless + 3 * (worded - wordless), step, latents).prev_sample
    drawn = to_pixels(vae.decode(latents / vae.config.scaling_factor).sample)
    seen = judge.names_in(list(drawn), [one.placements[0].box for one in scenes])
    return float(np.mean([name == target for name, target in zip(seen, targets, strict=True)]))


def export(run: Path, folder: Path) -> None:
    """Write what a run has come to as a StableDiffusionPipeline of diffusers, float16."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(run / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(run / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(run / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(run / "unet"),
        # The pipeline insists on the offset, which "trailing" steps do not have.
        scheduler=DDIMScheduler.from_pretrained(run / "scheduler", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    for config in folder.rglob("config.json"):
        facts = json.loads(config.read_text())
        facts.pop("_name_or_path", None)  # where it was trained
        config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Train until `--steps` or `--minutes`, saving as it goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="InstructPix2Pix whose VAE and text encoder it shares")
    parser.add_argument("--judge", type=Path, help="folder that training.judge wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier than --steps")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export", type=Path, help="write what --out holds there, and end")
    args = parser.parse_args()
    if args.export:
        return export(args.out, args.export)
    if not (args.base and args.judge):
        parser.error("--base and --judge are needed to train")
    torch.manual_seed(0)
    base = read_parts(ModelOptions(model=args.base))
    assert base.text is not None
    vae = base.vae
    args.out.mkdir(parents=True, exist_ok=True)
    vae.save_pretrained(args.out / "vae")
    scenes = pool(vae, [world.scene("train", i) for i in range(args.scenes)])
    trainer = Trainer(base.text.tokenizer, base.text.encoder, scenes, args.learning_rate)
    if args.resume:
        trainer.resume(args.out)
    judge = Judge(args.judge)
    held_out = [world.scene("validation", i) for i in range(96)]
    limit, before = args.minutes * 60, time.time()
    while trainer.done < args.steps and trainer.seconds < limit:
        trainer.step(max(trainer.done / args.steps, trainer.seconds / limit))
        trainer.seconds += time.time() - before
        before = time.time()
        if trainer.done % 100 == 0:
            figures = {name: round(value, 4) for name, value in trainer.shown.items()}
            print(trainer.done, round(trainer.seconds / 60, 1), json.dumps(figures), flush=True)
        if trainer.done % 500 == 0:
            print("new object seen:", validate(trainer, vae, judge, held_out), flush=True)
            trainer.save(args.out)
    trainer.save(args.out)


if __name__ == "__main__":
    main()
