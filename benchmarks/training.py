"""Examples a second while training: features cached against computed each time, and diffusers.

    python benchmarks/training.py [--steps 12] [--model mini/instruct-pix2pix]

On the same data, UNet, batch and precision (float32), in sequence in one process:

- `diffusers`: what its example script `train_instruct_pix2pix.py` does in a step, reimplemented:
  images from a `datasets` data set through a DataLoader, VAE twice, text encoder, conditioning
  dropout, backward pass, clipping, AdamW, EMA.
- `online` and `cached`: `reasonpix train` with CLIP text for an encoder, without and with a cache.
- `llava online` and `llava cached`: the same with LLaVA-mini.

Time is measured from the end of the second step to the end of the last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from reasonpix.datasets.publishing import publish
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.recipe_catalog import locate
from reasonpix.plugin import registry
from reasonpix.training.recipe import load_training_recipe
from reasonpix.training.trainer import Progress, train

BATCH = 32
WARM = 2
"""Warm-up steps, which are not measured."""


def dataset(folder: Path) -> Path:
    """Some hundred pairs of the mini world, published."""
    overrides = ["source.split=train", "source.count=200", "source.unchanged=0"]
    run = generate(load_recipe(locate("mini/part1"), overrides), folder / "run")
    publish(run, folder / "dataset")
    return folder / "dataset"


def rate(ends: list[float]) -> float:
    """Examples a second from the times at which steps ended."""
    return BATCH * (len(ends) - WARM) / (ends[-1] - ends[WARM - 1])


def measure_reasonpix(
    data: Path, out: Path, model: str, steps: int, encoder: str, cache: bool
) -> float:
    """The rate of `reasonpix train`."""
    overrides = [
        f"data.path={data}",
        "data.instructions=[edit_prompt]",
        "data.align=null",
        "align=null",
        f"encoder={encoder}",
        f"model.model={model}",
        f"cache={str(cache).lower()}",
        f"steps={steps}",
        f"batch_size={BATCH}",
        f"micro_batch_size={BATCH}",
        "precision=fp32",
        f"save_every={steps}",
        "validation=null",
    ]
    if "clip-text" in encoder:
        overrides.append("model.connector=identity")
    ends: list[float] = []

    def report(progress: Progress) -> None:
        if progress.stage == "train":
            ends.append(time.perf_counter())

    train(load_training_recipe(locate("mini/train"), overrides), out, report)
    return rate(ends)


def measure_diffusers(data: Path, folder: Path, steps: int) -> float:
    """The rate of the steps of diffusers' example script."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float()
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").float()
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").float().train()
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    text.requires_grad_(False)
    vae.requires_grad_(False)
    accelerator = Accelerator()
    average = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    side = vae.config.sample_size

    def transformed(rows: dict[str, list]) -> dict[str, list]:
        columns = {}
        for name in ("input_image", "edited_image"):
            squares = [image.convert("RGB").resize((side, side)) for image in rows[name]]
            pixels = np.stack([np.asarray(square) for square in squares])
            columns[name] = list(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
        columns["ids"] = list(tokens(rows["edit_prompt"]))
        return columns

    def tokens(texts: list[str]) -> torch.Tensor:
        return tokenizer(
            texts,
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids

    rows = load_dataset("parquet", data_files=str(data / "data" / "*.parquet"), split="train")
    loader = torch.utils.data.DataLoader(
        rows.with_transform(transformed), batch_size=BATCH, shuffle=True, drop_last=True
    )
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    uncond_states = text(tokens([""]))[0]

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from loader

    ends: list[float] = []
    for batch, _ in zip(batches(), range(steps), strict=False):
        latents = vae.encode(batch["edited_image"]).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (BATCH,))
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        states = text(batch["ids"])[0]
        source = vae.encode(batch["input_image"]).latent_dist.mode()
        chance = torch.rand(BATCH, 1, 1)
        states = torch.where(chance < 0.1, uncond_states, states)
        source = source * ~((chance >= 0.05) & (chance < 0.15))[..., None]
        predicted = unet(torch.cat([noisy, source], 1), timesteps, states).sample
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
        if noise_scheduler.config.prediction_type == "epsilon":
            target = noise
        loss = F.mse_loss(predicted.float(), target.float())
        accelerator.gather(loss.repeat(BATCH)).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        loss.detach().item()
        ends.append(time.perf_counter())
    return rate(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", default="mini/instruct-pix2pix")
    args = parser.parse_args()
    folder = Path(registry.checkpoint(args.model) or args.model)
    clip = f"{{use: clip-text, model: {args.model}}}"
    recipe = load_training_recipe(locate("mini/train"), [f"model.model={args.model}"])
    options = recipe.encoder.as_yaml()
    llava = "{" + ", ".join(f"{name}: {value!r}" for name, value in options.items()) + "}"
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = dataset(root)

        def ours(name: str, encoder: str, steps: int, cache: bool) -> Callable[[], float]:
            return lambda: measure_reasonpix(data, root / name, args.model, steps, encoder, cache)

        few = max(WARM + 2, args.steps // 4)
        measured = {
            "diffusers": lambda: measure_diffusers(data, folder, args.steps),
            "online": ours("online", clip, args.steps, False),
            "cached": ours("cached", clip, args.steps, True),
            "llava online": ours("llava-online", llava, few, False),
            "llava cached": ours("llava-cached", llava, args.steps, True),
        }
        rates = {}
        for name, measure in measured.items():
            rates[name] = measure()
            print(f"{name:14} {rates[name]:8.2f} examples/s", flush=True)
    print(f"online / diffusers           {rates['online'] / rates['diffusers']:.2f}")
    print(f"cached / diffusers           {rates['cached'] / rates['diffusers']:.2f}")
    print(f"llava cached / llava online  {rates['llava cached'] / rates['llava online']:.2f}")


if __name__ == "__main__":
    main()
