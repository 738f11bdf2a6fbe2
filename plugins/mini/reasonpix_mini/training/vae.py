"""Train the VAE of the mini GLIGEN and of the mini editing model.

An `AutoencoderKL` with f = 4: 64 x 64 pixels become 16 x 16 x 4 latents. The first three quarters
of the steps see 32 px crops around objects, the last quarter whole pictures.

    python -m reasonpix_mini.training.vae --out runs/vae --steps 5000
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch.nn import functional as F

from reasonpix_mini import world

BATCH = 32
KL_WEIGHT = 3e-4
"""Of the mean KL divergence per latent element; small, so that latents stay sharp."""


def build() -> AutoencoderKL:
    """The untrained network, 0.74 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
    )


def to_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def edited(split: world.Split, index: int) -> world.Scene:
    """Scene `index` of a split; every second one after replacements, as the editor meets them."""
    scene = world.scene(split, index)
    if index % 2:
        rng = np.random.default_rng([7, index])
        for i, category in enumerate(rng.choice(list(world.categories()), len(scene.placements))):
            scene = scene.replaced(i, str(category))
    return scene


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, in dB."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-9))


@torch.no_grad()
def validate(vae: AutoencoderKL, scenes: int = 200) -> dict[str, float]:
    """Mean PSNR in dB of whole pictures and of object boxes, on the validation split."""
    drawn = [edited("validation", index) for index in range(scenes)]
    pixels = np.stack([scene.render() for scene in drawn])
    latents = vae.encode(to_tensor(pixels)).latent_dist.mode()
    decoded = to_pixels(vae.decode(latents).sample)
    inside = [
        psnr(a[y0:y1, x0:x1], b[y0:y1, x0:x1])
        for scene, a, b in zip(drawn, pixels, decoded, strict=True)
        for x0, y0, x1, y1 in (placement.box for placement in scene.placements)
    ]
    overall = [psnr(a, b) for a, b in zip(pixels, decoded, strict=True)]
    return {"psnr_db": float(np.mean(overall)), "psnr_in_boxes_db": float(np.mean(inside))}


def to_pixels(pictures: torch.Tensor) -> NDArray[np.uint8]:
    """(n, 3, h, w) in [-1, 1] to (n, h, w, 3) uint8."""
    scaled = ((pictures.float() + 1) * 127.5).round().clamp(0, 255)
    pixels: NDArray[np.uint8] = scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def main() -> None:
    """Train, print validation figures, write a diffusers folder to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--resume", action="store_true", help="start from the weights in --out")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = AutoencoderKL.from_pretrained(args.out) if args.resume else build()
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), args.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps + 1, pct_start=0.05
    )
    scenes = [edited("train", index) for index in range(args.scenes)]
    pictures = np.stack([scene.render() for scene in scenes])
    start = time.time()
    for step in range(args.steps):
        if step < args.steps * 3 // 4:
            chosen = rng.integers(len(scenes), size=BATCH)
            pixels = np.stack([_crop(rng, scenes[i], pictures[i]) for i in chosen])
        else:
            pixels = pictures[rng.integers(len(scenes), size=BATCH // 4)]
        pixels = pixels[:, :, ::-1].copy() if rng.integers(2) else pixels
        batch = to_tensor(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        kl = posterior.kl().float().sum() / posterior.mean.numel()
        loss = F.l1_loss(decoded.float(), batch) + F.mse_loss(decoded.float(), batch)
        optimizer.zero_grad()
        (loss + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == args.steps - 1:
            vae.eval()
            _scale(vae, pictures[:256])
            figures = validate(vae, 200 if step == args.steps - 1 else 64)
            vae.save_pretrained(args.out)
            vae.train()
            report = {"step": step, "minutes": (time.time() - start) / 60, "loss": loss.item()}
            print(json.dumps(report | {"kl": kl.item()} | figures), flush=True)


def _crop(
    rng: np.random.Generator, scene: world.Scene, picture: NDArray[np.uint8], side: int = 32
) -> NDArray[np.uint8]:
    """A square around a random point of a random object."""
    x0, y0, x1, y1 = scene.placements[rng.integers(len(scene.placements))].box
    x, y = rng.integers(x0, x1) - side // 2, rng.integers(y0, y1) - side // 2
    left, top = np.clip([x, y], 0, world.SIZE - side)
    return picture[top : top + side, left : left + side]


@torch.no_grad()
def _scale(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> None:
    """Make the scaled latents' standard deviation one."""
    latents = vae.encode(to_tensor(pictures)).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


if __name__ == "__main__":
    main()
