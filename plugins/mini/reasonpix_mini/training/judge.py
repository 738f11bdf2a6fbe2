"""Train the judge: a small classifier that says which sticker stands in a box.

    python -m reasonpix_mini.training.judge --out runs/judge --steps 1500

It sees renders only, in all poses, and nothing that any other mini model made, so that it can
judge their edits. A classifier is a kind judge: report a distance to the ground truth beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from reasonpix_mini import world
from reasonpix_mini.training.vae import edited, to_tensor

SIDE = 32
"""Of what the judge sees: a box with a small margin, resampled to a square."""

MARGIN = 2
"""Around the box, in pixels."""


def network() -> nn.Sequential:
    """The untrained classifier: (n, 3, 32, 32) in [-1, 1] to (n, categories) logits."""

    def block(width_in: int, width_out: int) -> list[nn.Module]:
        return [
            nn.Conv2d(width_in, width_out, 3, padding=1),
            nn.GroupNorm(8, width_out),
            nn.ReLU(),
            nn.Conv2d(width_out, width_out, 3, padding=1),
            nn.GroupNorm(8, width_out),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(3, 24),
        nn.MaxPool2d(2),
        *block(24, 48),
        nn.MaxPool2d(2),
        *block(48, 96),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96 * 16, len(world.categories())),
    )


def crop(pixels: NDArray[np.uint8], box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    """What the judge sees of `box` in a picture (h, w, 3): (SIDE, SIDE, 3)."""
    x0, y0, x1, y1 = box
    height, width = pixels.shape[:2]
    seen = (
        max(0, x0 - MARGIN),
        max(0, y0 - MARGIN),
        min(width, x1 + MARGIN),
        min(height, y1 + MARGIN),
    )
    resized = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=seen)
    return np.asarray(resized)


class Judge:
    """The trained classifier of `folder`."""

    def __init__(self, folder: Path) -> None:
        self.network = network().eval()
        weights = load_file(folder / "model.safetensors")
        self.network.load_state_dict({name: w.float() for name, w in weights.items()})
        self.names = list(world.categories())

    def names_in(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        boxes: Sequence[tuple[float, float, float, float]],
    ) -> list[str]:
        """The category in each picture's box."""
        crops = np.stack([crop(*pair) for pair in zip(pictures, boxes, strict=True)])
        with torch.inference_mode():
            return [self.names[i] for i in self.network(to_tensor(crops)).argmax(1).tolist()]


def samples(
    split: world.Split, indices: range, jitter: int = 0
) -> tuple[NDArray[np.uint8], torch.Tensor]:
    """Crops (n, SIDE, SIDE, 3) of all objects of the scenes, and their category numbers."""
    numbers = {name: number for number, name in enumerate(world.categories())}
    rng = np.random.default_rng(17)
    crops, labels = [], []
    for index in indices:
        scene = edited(split, index)
        pixels = scene.render()
        for placement in scene.placements:
            x0, y0, x1, y1 = np.add(placement.box, rng.integers(-jitter, jitter + 1, size=4))
            crops.append(crop(pixels, (x0, y0, x1, y1)))
            labels.append(numbers[placement.category])
    return np.stack(crops), torch.tensor(labels)


def main() -> None:
    """Train, print the accuracy on held-out scenes, write float16 safetensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=6000)
    args = parser.parse_args()
    torch.manual_seed(0)
    start = time.time()
    crops, labels = samples("train", range(args.scenes), jitter=2)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for _ in range(args.steps):
        rows = torch.randint(len(crops), (64,))
        batch = to_tensor(crops[rows.numpy()])
        batch = batch + 0.05 * torch.randn_like(batch)
        loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # What is shipped is what is measured.
    model.half().float().eval()
    figures: dict[str, float] = {"minutes": (time.time() - start) / 60, "loss": loss.item()}
    with torch.inference_mode():
        splits: list[world.Split] = ["validation", "test"]
        for split in splits:
            seen, truth = samples(split, range(500))
            right = (model(to_tensor(seen)).argmax(1) == truth).float().mean()
            figures |= {f"{split}_crops": len(truth), f"{split}_accuracy": right.item()}
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: w.half().contiguous() for name, w in model.state_dict().items()}
    save_file(weights, args.out / "model.safetensors")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
