"""Train the mini InstructPix2Pix from scratch: UNet and CLIP text encoder together.

    python -m reasonpix_mini.training.instruct_pix2pix --vae VAE --judge JUDGE --out runs/ip2p
    python -m reasonpix_mini.training.instruct_pix2pix --out runs/ip2p --export runs/pipeline

It is to the mini world what `timbrooks/instruct-pix2pix` is to photographs: a UNet that edits by
instruction, from which `reasonpix train` goes on. Instructions are direct and, in equal share,
reasoning ones of the training hints.

The loss of a diffusion model alone teaches slowly where an edit belongs. Heads on the UNet's
features, thrown away afterwards, are asked what stands in each cell, where the edit is, and what
comes there.
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
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from reasonpix.plugin import RewriteRequest, Rewriting
from reasonpix_mini import lexicon, world
from reasonpix_mini.training import text
from reasonpix_mini.training.diffusion import Training
from reasonpix_mini.training.judge import Judge
from reasonpix_mini.training.vae import psnr, to_pixels, to_tensor

BATCH = 32
LENGTH = 48
"""Longest instruction, in tokens with start and end."""
OUTSIDE_WEIGHT = 0.25
"""Of the loss where nothing changes, relative to the box of the edit."""
DROPOUT = 0.05
"""InstructPix2Pix's p: 5 % without text, 5 % without image, 5 % without both."""
CELLS = 8
"""Side of the grid on which the heads answer."""


def unet() -> UNet2DConditionModel:
    """The untrained UNet, 3.2 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,  # noisy latents, input latents
        out_channels=4,
        cross_attention_dim=text.WIDTH,
        block_out_channels=(48, 96, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
    )


@dataclass(frozen=True)
class Edit:
    """One object of a scene replaced."""

    before: world.Scene
    after: world.Scene
    number: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Of the old object, XYXY in pixels."""
        return self.before.placements[self.number].box

    @property
    def target(self) -> str:
        """The category that comes."""
        return self.after.placements[self.number].category


def edit(split: world.Split, index: int) -> Edit:
    """Edit number `index`: half of the targets are of the old object's group."""
    rng = np.random.default_rng([23, index])
    scene = world.scene(split, index, objects=int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3])))
    number = int(rng.integers(len(scene.placements)))
    every = world.categories()
    group = every[scene.placements[number].category].group
    anything = rng.random() < 0.5
    targets = [
        name
        for name, category in every.items()
        if name not in scene.names and (anything or category.group == group)
    ]
    return Edit(scene, scene.replaced(number, str(rng.choice(targets))), number)


@dataclass(frozen=True)
class Pool:
    """Edits as tensors."""

    edits: list[Edit]
    source: torch.Tensor
    """Latents of the input (edits, 4, 16, 16), the posterior's mode, not scaled, float16."""
    target: torch.Tensor
    """Latents of the edited image, scaled, float16."""
    seen: torch.Tensor
    """What stands in each cell of the input, (edits, CELLS, CELLS): 0 for nothing."""
    hole: torch.Tensor
    """Cells that the edit's box covers by half, (edits, CELLS, CELLS), float32."""
    comes: torch.Tensor
    """(edits,) number of the target category."""


def pool(vae: AutoencoderKL, edits: list[Edit]) -> Pool:
    """The edits' latents and facts."""
    numbers = {name: number for number, name in enumerate(world.categories())}
    side = world.SIZE // CELLS
    seen = torch.zeros(len(edits), CELLS, CELLS, dtype=torch.long)
    hole = torch.zeros(len(edits), CELLS, CELLS)
    for row, one in enumerate(edits):
        masks = one.before.masks().reshape(-1, CELLS, side, CELLS, side).mean((2, 4))
        for mask, placement in zip(masks, one.before.placements, strict=True):
            seen[row][torch.from_numpy(mask > 0.25)] = numbers[placement.category] + 1
        box = np.zeros((world.SIZE, world.SIZE))
        x0, y0, x1, y1 = one.box
        box[y0:y1, x0:x1] = 1
        covered = box.reshape(CELLS, side, CELLS, side).mean((1, 3)) >= 0.5
        hole[row] = torch.from_numpy(covered)
    return Pool(
        edits,
        _encode(vae, [one.before for one in edits]),
        _encode(vae, [one.after for one in edits]) * vae.config.scaling_factor,
        seen,
        hole,
        torch.tensor([numbers[one.target] for one in edits]),
    )


def _encode(vae: AutoencoderKL, scenes: list[world.Scene]) -> torch.Tensor:
    parts = []
    with torch.inference_mode():
        for i in range(0, len(scenes), 32):
            pixels = np.stack([scene.render() for scene in scenes[i : i + 32]])
            parts.append(vae.encode(to_tensor(pixels)).latent_dist.mode().half())
    return torch.cat(parts).clone()


class Instructions:
    """Words for edits, and their tokens."""

    def __init__(self, words: CLIPTokenizer) -> None:
        self.words = words
        self.planner = lexicon.Lexicon(lexicon.LexiconOptions())

    def direct(self, rng: np.random.Generator, one: Edit) -> str:
        """By one of the templates."""
        categories = world.categories()
        source = categories[one.before.placements[one.number].category]
        return lexicon.direct(rng, source, categories[one.target])

    def reasoning(self, rng: np.random.Generator, one: Edit) -> str:
        """By one of the training hints."""
        request = RewriteRequest(
            instruction="",
            caption=one.before.caption,
            edited_caption=one.after.caption,
            seed=int(rng.integers(2**31)),
        )
        (rewriting,) = self.planner.rewrite([request])
        assert isinstance(rewriting, Rewriting)
        return rewriting.instruction

    def ids(self, texts: list[str]) -> torch.Tensor:
        """(texts, LENGTH) token ids."""
        return self.words(
            texts,
            padding="max_length",
            max_length=LENGTH,
            truncation=True,
            return_tensors="pt",
        ).input_ids


class Network(nn.Module):
    """UNet, text encoder, and the heads that are thrown away."""

    def __init__(self, words: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = text.encoder(words)
        self.unet = unet()
        count = len(world.categories())
        self.requires = nn.Conv2d(96, count + 1, 1)
        self.edits = nn.Conv2d(80, count + 1, 1)

    def forward(
        self, noisy: torch.Tensor, source: torch.Tensor, steps: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """v (n, 4, 16, 16)."""
        states = self.text_encoder(input_ids=ids).last_hidden_state
        return self.unet(torch.cat([noisy, source], 1), steps, states).sample


class Trainer(Training):
    """UNet and text encoder of an InstructPix2Pix."""

    seed, warmup, decay = 29, 200, 0.999

    def __init__(self, edits: Pool, learning_rate: float) -> None:
        words = text.tokenizer(text.names() | text.instructions(), LENGTH)
        super().__init__(words, Network(words), learning_rate)
        self.features: dict[str, torch.Tensor] = {}
        # 8×8 before its downsampler, and the first 8×8 on the way up, which knows the words.
        self.network.unet.down_blocks[1].attentions[-1].register_forward_hook(
            lambda module, given, out: self.features.update(sees=out[0])
        )
        self.network.unet.up_blocks[0].register_forward_hook(
            lambda module, given, out: self.features.update(edits=out)
        )
        self.texts = Instructions(words)
        self.edits = edits
        self.shown: dict[str, float] = {}

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Of v, mostly inside the box, and a tenth of what the heads get wrong."""
        losses = self._losses(rng)
        for name, value in losses.items():
            self.shown[name] = 0.98 * self.shown.get(name, value.item()) + 0.02 * value.item()
        return losses["v"] + 0.1 * (losses["sees"] + losses["where"] + losses["what"])

    def _losses(self, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        rows = torch.from_numpy(rng.integers(len(self.edits.edits), size=BATCH))
        source, clean = self.edits.source[rows].float(), self.edits.target[rows].float()
        hole = self.edits.hole[rows]
        r = torch.rand(BATCH)
        wordless = r < 2 * DROPOUT
        imageless = (r >= DROPOUT) & (r < 3 * DROPOUT)
        whole = r >= 3 * DROPOUT
        source = source * ~imageless[:, None, None, None]
        texts = [
            ""
            if wordless[i]
            else (self.texts.direct if rng.random() < 0.5 else self.texts.reasoning)(
                rng, self.edits.edits[row]
            )
            for i, row in enumerate(rows.tolist())
        ]
        # The first sampling step, from nothing but noise, decides where and what.
        steps = torch.where(torch.rand(BATCH) < 0.4, 999, torch.randint(0, 1000, (BATCH,)))
        share = self.cumulated[steps].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
        # The flash kernel's backward is several times slower than MATH in bfloat16 on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = self.network(noisy, source, steps, self.texts.ids(texts))
            sees = self.network.sees(self.features["sees"]).float()
            edits = self.network.edits(self.features["edits"]).float()
        weight = F.interpolate(hole[:, None], scale_factor=2)
        weight = weight + OUTSIDE_WEIGHT * (1 - weight)
        error = (predicted.float() - velocity).square().mean(1, keepdim=True)
        inside = hole.bool() & whole[:, None, None]
        comes = self.edits.comes[rows][:, None, None].expand_as(hole)
        return {
            "v": (weight * error).sum() / weight.sum(),
            "sees": F.cross_entropy(sees[~imageless], self.edits.seen[rows][~imageless]),
            "where": F.binary_cross_entropy_with_logits(edits[whole, 0], hole[whole]),
            "what": F.cross_entropy(edits[:, 1:].permute(0, 2, 3, 1)[inside], comes[inside]),
        }


@torch.no_grad()
def validate(
    trainer: Trainer, vae: AutoencoderKL, held_out: Pool, judge: Judge
) -> dict[str, float]:
    """How well one step from pure noise without guidance edits, a lower bound for the sampler.

    Shares of edits in whose box the judge sees the target, by direct instructions and by reasoning
    ones of the training hints; PSNR in dB inside the box and outside it.
    """
    n = len(held_out.edits)
    noise = torch.randn(held_out.source.shape, generator=torch.Generator().manual_seed(0))
    figures: dict[str, float] = {}
    for kind in ("direct", "reasoning"):
        rng = np.random.default_rng(31)
        texts = [getattr(trainer.texts, kind)(rng, one) for one in held_out.edits]
        predicted = trainer.ema(
            noise, held_out.source.float(), torch.full((n,), 999), trainer.texts.ids(texts)
        )
        # At zero SNR v is minus the clean latents.
        drawn = to_pixels(vae.decode(-predicted / vae.config.scaling_factor).sample)
        seen = judge.names_in(list(drawn), [one.box for one in held_out.edits])
        right = [name == one.target for name, one in zip(seen, held_out.edits, strict=True)]
        inside, outside = [], []
        for one, picture in zip(held_out.edits, drawn, strict=True):
            truth, (x0, y0, x1, y1) = one.after.render(), one.box
            inside.append(psnr(truth[y0:y1, x0:x1], picture[y0:y1, x0:x1]))
            rest = np.ones(truth.shape[:2], bool)
            rest[y0:y1, x0:x1] = False
            outside.append(psnr(truth[rest], picture[rest]))
        figures |= {
            f"{kind}_judged": float(np.mean(right)),
            f"{kind}_psnr_in_box": float(np.mean(inside)),
            f"{kind}_psnr_outside": float(np.mean(outside)),
        }
    return figures


def export(run: Path, folder: Path) -> None:
    """Write what a run has come to as an InstructPix2Pix pipeline of diffusers, float32."""
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL.from_pretrained(run / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(run / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(run / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(run / "unet"),
        scheduler=DDIMScheduler.from_pretrained(run / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def main() -> None:
    """Train until `--steps` or `--minutes`, saving as it goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, help="folder that training.vae wrote")
    parser.add_argument("--judge", type=Path, help="folder that training.judge wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier than --steps")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export", type=Path, help="write what --out holds there, and end")
    args = parser.parse_args()
    if args.export:
        return export(args.out, args.export)
    if not (args.vae and args.judge):
        parser.error("--vae and --judge are needed to train")
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.vae)
    vae.save_pretrained(args.out / "vae")
    judge = Judge(args.judge)
    trainer = Trainer(pool(vae, [edit("train", i) for i in range(args.edits)]), args.learning_rate)
    if args.resume:
        trainer.resume(args.out)
    held_out = pool(vae, [edit("validation", i) for i in range(96)])
    limit, before = args.minutes * 60, time.time()
    while trainer.done < args.steps and trainer.seconds < limit:
        trainer.step(max(trainer.done / args.steps, trainer.seconds / limit))
        trainer.seconds += time.time() - before
        before = time.time()
        if trainer.done % 100 == 0:
            figures = {name: round(value, 4) for name, value in trainer.shown.items()}
            print(trainer.done, round(trainer.seconds / 60, 1), json.dumps(figures), flush=True)
        if trainer.done % 500 == 0:
            print(json.dumps(validate(trainer, vae, held_out, judge)), flush=True)
            trainer.save(args.out)
    trainer.save(args.out)


if __name__ == "__main__":
    main()
