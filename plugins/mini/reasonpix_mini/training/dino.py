"""Train the mini DINO: a ViT that learns from pictures of the sticker world without any label.

    python -m reasonpix_mini.training.dino --out runs/dino [--steps 1500] [--resume]

Self-distillation with no labels (Caron et al. 2021). A teacher sees two large crops of a scene; a
student sees them and several small ones, in other colours, and must give the teacher's distribution
over prototypes. The teacher is an average of the student; centring and sharpening its output keeps
all pictures from looking the same to it. Prototypes and projection are thrown away.

Two additions make little data and small batches enough. Each scene is rendered on two backgrounds,
and its crops come from both: a background would be the easiest thing to know a scene by. And the
states of a batch are pushed apart a little (KoLeo, Sablayrolles et al. 2019, as in DINOv2).

What is saved is the teacher's ViT, in float16.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, ViTConfig, ViTModel

from reasonpix_mini import world
from reasonpix_mini.training.clip import follow, normalise, optimizer, waves
from reasonpix_mini.training.grounding_scenes import worn

SIDE = 48
"""Of what the network sees. Scenes of 64 px are resized to 55 and the centre is cut out."""

LOCAL_SIDE = 24
LOCALS = 4
"""Small crops of a scene, beside the two large ones."""

AREA = {SIDE: (0.5, 1.0), LOCAL_SIDE: (0.15, 0.5)}
"""Of a crop, as a share of the scene. The evaluation's centre has 0.76."""

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
"""ImageNet's."""

WIDTH, PATCH, PROTOTYPES = 64, 8, 256
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
APART = 0.1
"""Weight of what pushes states apart."""


def network() -> ViTModel:
    """The untrained ViT, 0.18 M parameters."""
    model = ViTModel(
        ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            initializer_range=0.05,
        ),
        add_pooling_layer=False,
    )
    with torch.no_grad():
        model.embeddings.position_embeddings[0, 1:] = waves(SIDE // PATCH, WIDTH)
    return model


class Distilled(nn.Module):
    """A ViT and the head that compares its CLS token with prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = network()
        self.head = nn.Sequential(
            nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, WIDTH)
        )
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, WIDTH))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """States (n, WIDTH) of square crops of any size, and cosines with the prototypes."""
        output = self.vit(pixels, interpolate_pos_encoding=pixels.shape[-1] != SIDE)
        states = output.last_hidden_state[:, 0]
        projected = F.normalize(self.head(states), dim=-1)
        return states, projected @ F.normalize(self.prototypes, dim=-1).T


def pictures(split: world.Split, count: int) -> NDArray[np.uint8]:
    """The first scenes of a split on two backgrounds: (2, count, 64, 64, 3).

    Every second scene holds one object alone.
    """
    pixels = np.empty((2, count, world.SIZE, world.SIZE, 3), np.uint8)
    for index in range(count):
        scene = world.scene(split, index, objects=1 if index % 2 else None)
        other = world.scene(split, count + index).background
        pixels[:, index] = scene.render(), replace(scene, background=other).render()
    return pixels


def crops(rng: np.random.Generator, pixels: NDArray[np.uint8], side: int) -> Tensor:
    """A random square of each scene, resampled to `side`, mirrored and recoloured at random."""
    cut = np.empty((len(pixels), side, side, 3), np.uint8)
    for row, scene in enumerate(pixels):
        length = world.SIZE * math.sqrt(rng.uniform(*AREA[side]))
        x, y = rng.uniform(0, world.SIZE - length, 2)
        box = (x, y, x + length, y + length)
        one = Image.fromarray(scene).resize((side, side), Image.Resampling.BICUBIC, box=box)
        cut[row] = np.asarray(one)[:, :: rng.choice([-1, 1])]
    return worn(recoloured(rng, normalise(cut, MEAN, STD)), rng)


def recoloured(rng: np.random.Generator, pixels: Tensor) -> Tensor:
    """Hue, saturation, contrast and brightness changed in each picture; one in six turns grey."""
    angle = torch.from_numpy(rng.uniform(-0.8, 0.8, len(pixels))).float().view(-1, 1, 1)
    saturation = rng.uniform(0.5, 1.5, len(pixels)) * (rng.random(len(pixels)) < 5 / 6)
    contrast = rng.uniform(0.6, 1.4, len(pixels))
    brightness = rng.uniform(-0.6, 0.6, len(pixels))
    saturation, contrast, brightness = (
        torch.from_numpy(x).float().view(-1, 1, 1) for x in (saturation, contrast, brightness)
    )
    # A hue is an angle around the axis of greys (Rodrigues' rotation formula).
    grey = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turned = angle.cos() * (torch.eye(3) - grey) + angle.sin() * across
    mixed = contrast * (saturation * turned + grey) @ pixels.flatten(2)
    return (mixed + brightness).view_as(pixels)


def loss(student: list[Tensor], teacher: list[Tensor], centre: Tensor) -> Tensor:
    """Mean cross-entropy of each student's view with the teacher's *other* large crops.

    Both hold cosines (n, PROTOTYPES) of one view each; the teacher's views are the student's first.
    """
    targets = [((view - centre) / TEACHER_TEMPERATURE).softmax(-1) for view in teacher]
    guesses = [(view / STUDENT_TEMPERATURE).log_softmax(-1) for view in student]
    terms = [
        -(target * guess).sum(-1).mean()
        for i, target in enumerate(targets)
        for j, guess in enumerate(guesses)
        if i != j
    ]
    return torch.stack(terms).mean()


def processor() -> CLIPImageProcessorPil:
    """What the evaluation does to pictures, and what is saved with the weights."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": round(SIDE * 256 / 224)},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=MEAN.tolist(),
        image_std=STD.tolist(),
    )


def nearness(states: Tensor) -> Tensor:
    """The KoLeo loss of states (n, width): minus the mean log distance to the nearest other."""
    unit = F.normalize(states, dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    return -(F.pairwise_distance(unit, unit[nearest]) + 1e-6).log().mean()


class Validation:
    """Scenes of the validation split with one object each, to look for their neighbours."""

    def __init__(self, scenes: int = 400) -> None:
        drawn = [world.scene("validation", index, objects=1) for index in range(scenes)]
        images = [Image.fromarray(scene.render()) for scene in drawn]
        self.pixels = processor()(images, return_tensors="pt").pixel_values
        self.names = np.array([scene.names[0] for scene in drawn])

    @torch.no_grad()
    def neighbours(self, vit: ViTModel) -> float:
        """The share of scenes whose nearest neighbour shows the same category. Chance is 0.03."""
        states = F.normalize(vit(self.pixels).last_hidden_state[:, 0], dim=-1)
        near = (states @ states.T).fill_diagonal_(-1).argmax(1)
        return float((self.names[near.numpy()] == self.names).mean())


def train(
    out: Path, steps: int, batch: int, resume: bool, scenes: int, rate: float = 1.5e-3
) -> None:
    """Train for `steps` and leave the checkpoint in `out`/checkpoint."""
    torch.manual_seed(0)
    student, centre = Distilled(), torch.zeros(PROTOTYPES)
    teacher = copy.deepcopy(student).requires_grad_(False)
    first = 0
    if resume:
        first = json.loads((out / "step.json").read_text())["step"]
        student.load_state_dict(load_file(out / "weights.safetensors"))
        average = load_file(out / "average.safetensors")
        centre = average.pop("centre")
        teacher.load_state_dict(average)
    adam = optimizer(student, rate, 0.04)
    pool = pictures("train", scenes)
    validation = Validation()
    started, shown = time.time(), math.log(PROTOTYPES)
    for step in range(first, steps):
        rng = np.random.default_rng([29, step])
        for group in adam.param_groups:
            warm = min(1.0, (step - first + 1) / 100)
            group["lr"] = rate * warm * (0.51 + 0.49 * np.cos(np.pi * step / steps))
        chosen = pool[:, rng.integers(scenes, size=batch)]
        large = torch.cat([crops(rng, chosen[i], SIDE) for i in range(2)])
        small = torch.cat([crops(rng, chosen[i % 2], LOCAL_SIDE) for i in range(LOCALS)])
        with torch.no_grad():
            _, taught = teacher(large)
        (states, seen), (_, glimpsed) = student(large), student(small)
        views = [*seen.split(batch), *glimpsed.split(batch)]
        value = loss(views, list(taught.split(batch)), centre)
        value = value + APART * sum(nearness(view) for view in states.split(batch))
        adam.zero_grad()
        value.backward()
        if step < 100:
            student.prototypes.grad = None  # or they run after a teacher who knows nothing
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
        follow(teacher, student, 1 - 0.01 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        centre.lerp_(taught.mean(0), 0.1)
        shown += 0.02 * (value.item() - shown)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            figures = {"loss": shown, "neighbours": validation.neighbours(teacher.vit)}
            figures["spread"] = taught.std(0).mean().item()
            figures = {name: round(figure, 3) for name, figure in figures.items()}
            print(step + 1, round(time.time() - started), json.dumps(figures), flush=True)
            out.mkdir(parents=True, exist_ok=True)
            save_file(student.state_dict(), out / "weights.safetensors")
            save_file(teacher.state_dict() | {"centre": centre}, out / "average.safetensors")
            (out / "step.json").write_text(json.dumps({"step": step + 1}))
            write(teacher.vit, out / "checkpoint")


def write(model: ViTModel, folder: Path) -> None:
    """Write the checkpoint, float16, with the evaluation's preprocessing."""
    copy.deepcopy(model).half().save_pretrained(folder)
    processor().save_pretrained(folder)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the mini DINO.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--batch", type=int, default=32, help="scenes a step")
    parser.add_argument("--scenes", type=int, default=4_000, help="scenes of the train split")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.steps, args.batch, args.resume, args.scenes)


if __name__ == "__main__":
    main()
