"""Pairs a second by the five metrics: `reasonpix.evaluation.metrics` against MagicBrush's loop.

    python benchmarks/evaluation.py [--pairs 1000] [--side 512] [--threads 2] [--mini]

On the same PNG files, models, precision (float32) and torch threads, in one process:

- `loop`: what MagicBrush's `image_eval.py` does, written anew: a pass over all pairs for each
  metric, one pair at a time, every image read again in each pass, captions padded to 77 tokens.
- `ours`: `Metrics.measure`, which sees the pairs for the first time.
- `ours, next`: the same once more, as for the next method on the same benchmark.

The pairs are measured in rounds of 16, and in each of them all three take their turn, so that what
else the machine does hits them alike; CPU seconds hardly depend on it. The models are a CLIP
ViT-B/32 and a ViT-S/16 with random weights, which take the time of the real ones, or with `--mini`
those of the mini world.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from reasonpix.core.images import decode
from reasonpix.evaluation.cases import Case
from reasonpix.evaluation.metrics import Metrics, MetricsOptions
from reasonpix.plugin import registry

METRICS = ("l1", "l2", "clip_i", "dino", "clip_t")
ROUND = 16
"""Pairs that all ways measure before the next."""
WORDS = ("a", "an", "the", "photo", "of", "on", "with", "red", "small", "bee", "ant", "cat", "leaf")


class Pair(NamedTuple):
    edited: Path
    truth: Path
    caption: str


# -- what is measured ----------------------------------------------------------------------------


def write_pairs(folder: Path, count: int, side: int) -> list[Pair]:
    """Random blots with some grain; the edit changes a square of the ground truth."""
    random = np.random.default_rng(0)

    def blots(cells: int, size: int) -> Image.Image:
        few = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = np.asarray(few.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        grain = random.integers(-4, 5, (size, size, 3))
        return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))

    pairs = []
    for number in range(count):
        pair = Pair(
            folder / f"{number}-edited.png",
            folder / f"{number}-truth.png",
            " ".join(random.choice(WORDS, 10)),
        )
        truth = blots(12, side)
        truth.save(pair.truth)
        x, y = random.integers(0, side // 2, 2)
        truth.paste(blots(4, side // 2), (int(x), int(y)))
        truth.save(pair.edited)
        pairs.append(pair)
    return pairs


def write_models(folder: Path) -> tuple[Path, Path]:
    """CLIP ViT-B/32 and ViT-S/16 of the real sizes, random, with a tokenizer of a few words."""
    torch.manual_seed(0)
    clip, dino = folder / "clip", folder / "dino"
    vocabulary = {word: number for number, word in enumerate(["<end>", "<start>", "?", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(clip)
    CLIPModel(CLIPConfig(text_config={"bos_token_id": 1, "eos_token_id": 0})).save_pretrained(clip)
    CLIPImageProcessorPil().save_pretrained(clip)
    small = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    ViTModel(small, add_pooling_layer=False).save_pretrained(dino)
    return clip, dino


# -- MagicBrush's loop ---------------------------------------------------------------------------


class Loop:
    def __init__(self, clip: Path, dino: Path) -> None:
        self.clip = CLIPModel.from_pretrained(clip, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(clip)
        self.dino = ViTModel.from_pretrained(dino, dtype=torch.float32, add_pooling_layer=False)
        self.dino.eval()
        by_clip = CLIPImageProcessorPil.from_pretrained(clip)
        side = self.dino.config.image_size
        self.for_clip = self.transform(
            by_clip.size["shortest_edge"],
            by_clip.crop_size["height"],
            by_clip.image_mean,
            by_clip.image_std,
        )
        self.for_dino = self.transform(
            round(side * 256 / 224), side, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        )

    @staticmethod
    def tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    @classmethod
    def transform(
        cls, resize: int, crop: int, mean: Sequence[float], std: Sequence[float]
    ) -> Callable[[Image.Image], Tensor]:
        middle, spread = (torch.tensor(it).view(3, 1, 1) for it in (mean, std))

        def transformed(image: Image.Image) -> Tensor:
            scale = resize / min(image.size)
            w, h = (max(resize, int(side * scale)) for side in image.size)
            image = image.resize((w, h), Image.Resampling.BICUBIC)
            x, y = round((w - crop) / 2), round((h - crop) / 2)
            return ((cls.tensor(image.crop((x, y, x + crop, y + crop))) - middle) / spread)[None]

        return transformed

    @staticmethod
    def opened(path: Path) -> Image.Image:
        return Image.open(path).convert("RGB")

    def distance(self, pair: Pair, criterion: nn.Module) -> float:
        edited, truth = self.opened(pair.edited), self.opened(pair.truth)
        edited = edited.resize(truth.size, Image.Resampling.BICUBIC)
        return criterion(self.tensor(edited), self.tensor(truth)).item()

    def of_clip(self, path: Path) -> Tensor:
        return self.clip.get_image_features(self.for_clip(self.opened(path))).pooler_output

    def of_dino(self, path: Path) -> Tensor:
        return self.dino(self.for_dino(self.opened(path))).last_hidden_state[:, 0]

    def of_text(self, text: str) -> Tensor:
        longest = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            text, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).input_ids
        return self.clip.get_text_features(ids).pooler_output

    def clip_t(self, pair: Pair) -> tuple[float, float]:
        edited, truth, text = (
            self.of_clip(pair.edited), self.of_clip(pair.truth), self.of_text(pair.caption)
        )  # fmt: skip
        return (F.cosine_similarity(edited, text).item(), F.cosine_similarity(truth, text).item())

    @torch.no_grad()
    def measure(self, pairs: Sequence[Pair]) -> list[dict[str, float]]:
        def similarity(embed: Callable[[Path], Tensor], pair: Pair) -> float:
            return F.cosine_similarity(embed(pair.edited), embed(pair.truth)).item()

        passes: dict[str, Callable[[Pair], float]] = {
            "l1": lambda pair: self.distance(pair, nn.L1Loss()),
            "l2": lambda pair: self.distance(pair, nn.MSELoss()),
            "clip_i": lambda pair: similarity(self.of_clip, pair),
            "dino": lambda pair: similarity(self.of_dino, pair),
            "clip_t": lambda pair: self.clip_t(pair)[0],
        }
        values: list[dict[str, float]] = [{} for _ in pairs]
        for name, measured in passes.items():
            for pair, its in zip(pairs, values, strict=True):
                its[name] = measured(pair)
        return values


# -- ours ----------------------------------------------------------------------------------------


def reader(path: Path) -> Callable[[], Image.Image]:
    return lambda: decode(path.read_bytes())


def case(pair: Pair) -> Case:
    return Case(
        id=pair.edited.stem,
        row=str(pair.edited),
        read_input=reader(pair.truth),
        instructions={},
        read_truth=reader(pair.truth),
        edited_caption=pair.caption,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mini", action="store_true", help="the models of the mini world")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as scratch:
        pairs = write_pairs(Path(scratch), args.pairs, args.side)
        if args.mini:
            clip, dino = (Path(registry.checkpoint(f"mini/{it}") or it) for it in ("clip", "dino"))
        else:
            clip, dino = write_models(Path(scratch))
        compare(pairs, Loop(clip, dino), metrics_of(clip, dino))


def metrics_of(clip: Path, dino: Path) -> Metrics:
    metrics = Metrics(MetricsOptions.model_validate({"clip": str(clip), "dino": str(dino)}))
    metrics.load()
    return metrics


def compare(pairs: Sequence[Pair], loop: Loop, metrics: Metrics) -> None:
    def ours(some: Sequence[Pair]) -> list[Any]:
        return metrics.measure([case(pair) for pair in some], [reader(it.edited) for it in some])

    ways: dict[str, Callable[[Sequence[Pair]], list[Any]]] = {
        "loop": loop.measure,
        "ours": ours,
        "ours, next": ours,
    }
    seconds, work = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    largest = dict.fromkeys(METRICS, 0.0)
    for first in range(0, len(pairs), ROUND):
        some = pairs[first : first + ROUND]
        found = {}
        for name, measure in ways.items():
            start, begun = time.perf_counter(), time.process_time()
            found[name] = measure(some)
            seconds[name] += time.perf_counter() - start
            work[name] += time.process_time() - begun
        for key in METRICS:
            for loops, its in zip(found["loop"], found["ours"], strict=True):
                largest[key] = max(largest[key], abs(loops[key] - its[key]))
    for name in ways:
        print(
            f"{name:12} {len(pairs) / seconds[name]:8.2f} pairs/s, "
            f"{seconds['loop'] / seconds[name]:.2f} times the loop; "
            f"{work[name] / len(pairs):.3f} CPU seconds a pair, "
            f"{work['loop'] / work[name]:.2f} times less"
        )
    for name, spent in (("wall clock", seconds), ("CPU seconds", work)):
        two = 2 * spent["loop"] / (spent["ours"] + spent["ours, next"])
        print(f"two methods, as copy of the input and one more: {two:.2f} times by {name}")
    print("largest difference", *(f"{key} {value:.1e}" for key, value in largest.items()))


if __name__ == "__main__":
    main()
