"""Train the UNet and the text encoder of the mini GLIGEN from scratch.

    python -m reasonpix_mini.training.gligen --vae runs/vae --out runs/gligen --steps 7000

The UNet gets what the sampler gives it: latents that are known outside the box, the mask, and a
grounding token. The prompt must not do the phrase's work, so it is emptied and shuffled
independently of the phrase.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from reasonpix_mini import world
from reasonpix_mini.training import text
from reasonpix_mini.training.diffusion import Training
from reasonpix_mini.training.pairs import Pair, Pool, pair, pool
from reasonpix_mini.training.vae import psnr, to_pixels

BATCH = 32
GROUNDING_TOKENS = 30
"""As in GLIGEN; tokens without a box carry the learned null features."""
OUTSIDE_WEIGHT = 0.1
"""Of the loss where the latents are known, relative to inside the boxes."""


class Network(nn.Module):
    """UNet and text encoder, trained together."""

    def __init__(self, words: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = text.encoder(words)
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=9,  # noisy latents, known latents, mask
            out_channels=4,
            attention_type="gated",
            cross_attention_dim=text.WIDTH,
            block_out_channels=(64, 96, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        for name, parameter in self.unet.named_parameters():
            if name.endswith(("alpha_attn", "alpha_dense")):
                nn.init.constant_(parameter, 0.5)  # tanh(0) would keep the gates shut for long


def holes(boxes: torch.Tensor, side: int) -> torch.Tensor:
    """The latent cells that the boxes touch: (n, boxes, 1, side, side), one inside.

    `boxes` (n, boxes, 4) are XYXY as shares of the side; a box without area touches nothing.
    """
    cell = torch.arange(side)
    x0, y0 = (boxes[..., i, None] * side for i in (0, 1))
    x1, y1 = (boxes[..., i, None] * side for i in (2, 3))
    across = (cell >= x0.floor()) & (cell < x1.ceil())
    down = (cell >= y0.floor()) & (cell < y1.ceil())
    return (down[..., :, None] & across[..., None, :])[:, :, None].float()


class Texts:
    """Everything a text may say in training, and its tokens."""

    def __init__(self, words: CLIPTokenizer) -> None:
        self.words = words
        self.categories = list(world.categories().values())
        self._ids: dict[str, list[int]] = {}

    def ids(self, texts: list[str]) -> torch.Tensor:
        """(texts, LENGTH) token ids."""
        for one in set(texts) - self._ids.keys():
            self._ids[one] = self.words(
                one, padding="max_length", max_length=text.LENGTH, truncation=True
            ).input_ids
        return torch.tensor([self._ids[one] for one in texts])

    def phrase(self, rng: np.random.Generator, number: int) -> str:
        """A way to name category `number`, mostly its name."""
        category = self.categories[number]
        r = rng.random()
        if r < 0.7:
            return category.name
        if r < 0.8 and category.synonyms:
            return str(rng.choice(category.synonyms)).lower()
        return f"{'an' if category.name[0] in 'aeiou' else 'a'} {category.name}"

    def prompt(self, rng: np.random.Generator, caption: str, phrase: str) -> str:
        """What the whole picture's prompt says: the truth, little, nothing, or something else."""
        r = rng.random()
        if r < 0.35:
            return ""
        if r < 0.45:
            return "a picture"
        if r < 0.55:
            names = rng.choice([c.name for c in self.categories], rng.integers(1, 4))
            return " and ".join(f"a {name}" for name in names)
        if r < 0.7:
            return phrase
        return caption


def encode_text(network: Network, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (n, LENGTH) to states (n, LENGTH, WIDTH) and pooled (n, WIDTH)."""
    encoded = network.text_encoder(input_ids=ids)
    return encoded.last_hidden_state, encoded.pooler_output


def predict(
    network: Network,
    noisy: torch.Tensor,
    known: torch.Tensor,
    hole: torch.Tensor,
    timesteps: torch.Tensor,
    prompts: torch.Tensor,
    boxes: torch.Tensor,
    phrases: torch.Tensor,
    masks: torch.Tensor,
) -> torch.Tensor:
    """v (n, 4, side, side). `phrases` (n, boxes, WIDTH) and `masks` (n, boxes) go with `boxes`."""
    n, count = masks.shape
    spare = GROUNDING_TOKENS - count
    grounding = {
        "boxes": torch.cat([boxes * masks[..., None], torch.zeros(n, spare, 4)], 1),
        "positive_embeddings": torch.cat([phrases, torch.zeros(n, spare, text.WIDTH)], 1),
        "masks": torch.cat([masks, torch.zeros(n, spare)], 1),
    }
    seen = torch.cat([noisy, known * (1 - hole), 1 - hole], 1)
    return network.unet(
        seen,
        timesteps,
        encoder_hidden_states=prompts,
        cross_attention_kwargs={"gligen": grounding},
    ).sample


def _timesteps(count: int) -> torch.Tensor:
    """(count,) timesteps, most of them where the phrase decides what is drawn.

    The first sampling step, from nothing but noise, draws the whole object; below 300 the object
    is there already and only its noise is left.
    """
    r = torch.rand(count)
    middle, low = torch.randint(300, 1000, (count,)), torch.randint(0, 300, (count,))
    return torch.where(r < 0.5, 999, torch.where(r < 0.9, middle, low))


class Trainer(Training):
    """UNet and text encoder of a GLIGEN."""

    seed, warmup, decay = 13, 150, 0.998

    def __init__(self, pairs: Pool, learning_rate: float) -> None:
        words = text.tokenizer(text.names())
        super().__init__(words, Network(words), learning_rate)
        self.texts = Texts(words)
        self.pairs = pairs

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Of v, mostly inside the box."""
        rows = torch.from_numpy(rng.integers(len(self.pairs.captions), size=BATCH))
        boxes, categories = self.pairs.boxes[rows], self.pairs.categories[rows]
        present = categories >= 0
        # One box a picture, as in an edit: nothing in the UNet says where a cell is, so with
        # several boxes it cannot tell which phrase belongs to which and learns far slower.
        chosen = torch.rand(present.shape).masked_fill(~present, -1).argmax(1, keepdim=True)
        chosen = torch.zeros_like(present).scatter(1, chosen, True)
        cells = holes(boxes, self.pairs.source.shape[-1])
        hole = (cells * chosen[..., None, None, None]).amax(1)
        # Some of the others have been replaced before: more contexts from one pair.
        others = present & ~chosen & (torch.rand(present.shape) < 0.5)
        replaced = (cells * others[..., None, None, None]).amax(1) * (1 - hole)
        source, target = self.pairs.source[rows].float(), self.pairs.target[rows].float()
        known = torch.lerp(source, target, replaced)
        clean = torch.lerp(known, target, hole)

        timesteps = _timesteps(BATCH)
        share = self.cumulated[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        velocity = share.sqrt() * noise - (1 - share).sqrt() * clean

        phrases = [self.texts.phrase(rng, number) for number in categories[chosen].tolist()]
        prompts = [
            self.texts.prompt(rng, self.pairs.captions[row], phrase)
            for row, phrase in zip(rows.tolist(), phrases, strict=True)
        ]
        every = list(dict.fromkeys([*prompts, *phrases]))
        place = {one: number for number, one in enumerate(every)}
        grounded = torch.rand(BATCH, 1) > 0.1
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            # The flash kernel's backward is several times slower than MATH in bfloat16 on a CPU.
            states, pooled = encode_text(self.network, self.texts.ids(every))
            predicted = predict(
                self.network,
                noisy,
                known,
                hole,
                timesteps,
                states[[place[one] for one in prompts]],
                boxes[chosen][:, None],
                pooled[[place[one] for one in phrases], None].float(),
                grounded.float(),
            )
        weight = hole + OUTSIDE_WEIGHT * (1 - hole)
        error = (predicted.float() - velocity).square().mean(1, keepdim=True)
        return (weight * error).sum() / weight.sum()


@torch.no_grad()
def validate(trainer: Trainer, vae: AutoencoderKL, held_out: Pool, pairs: list[Pair]) -> float:
    """Mean PSNR in dB inside the first box when the averaged network draws it in a single step.

    A lower bound for the sampler, and cheap: one forward from pure noise, empty prompt.
    """
    network, n = trainer.ema, len(pairs)
    first = held_out.boxes[:, :1]
    hole = holes(first, held_out.source.shape[-1]).amax(1)
    known = held_out.source.float()
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(0))
    names = [trainer.texts.categories[number].name for number in held_out.categories[:, 0]]
    states, pooled = encode_text(network, trainer.texts.ids(["", *names]))
    predicted = predict(
        network,
        noise,
        known,
        hole,
        torch.full((n,), 999),
        states[:1].expand(n, -1, -1),
        first,
        pooled[1:, None],
        torch.ones(n, 1),
    )
    clean = torch.lerp(known, -predicted, hole)  # at zero SNR v is minus the clean latents
    drawn = to_pixels(vae.decode(clean / vae.config.scaling_factor).sample)
    return float(
        np.mean(
            [
                psnr(one.target[y0:y1, x0:x1], picture[y0:y1, x0:x1])
                for one, picture in zip(pairs, drawn, strict=True)
                for x0, y0, x1, y1 in one.boxes[:1]
            ]
        )
    )


def export(run: Path, folder: Path) -> None:
    """Write the averaged weights of a run and its VAE to `folder` in half precision."""
    shutil.copytree(run / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(run / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    parts = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
    for name, kind in parts.items():
        kind.from_pretrained(run / name).half().save_pretrained(folder / name)
        config = folder / name / "config.json"
        facts = json.loads(config.read_text())
        facts.pop("_name_or_path", None)  # the path of this machine's run
        config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Train until `--steps` or `--minutes`, saving as it goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, help="folder that training.vae wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=14_000)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier than --steps")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export", type=Path, help="write what --out holds in half, and end")
    args = parser.parse_args()
    if args.export:
        return export(args.out, args.export)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.vae)
    vae.save_pretrained(args.out / "vae")
    trainer = Trainer(pool(vae, [pair("train", i) for i in range(args.pairs)]), args.learning_rate)
    if args.resume:
        trainer.resume(args.out)
    pairs = [pair("validation", i) for i in range(96)]
    held_out = pool(vae, pairs)
    limit, losses, before = args.minutes * 60, [], time.time()
    while trainer.done < args.steps and trainer.seconds < limit:
        losses.append(trainer.step(max(trainer.done / args.steps, trainer.seconds / limit)))
        trainer.seconds += time.time() - before
        before = time.time()
        if trainer.done % 250 == 0:
            report = {"step": trainer.done, "minutes": trainer.seconds / 60}
            report["gradient_norm"] = trainer.usual_norm
            figures = {
                "loss": np.mean(losses),
                "psnr_one_step": validate(trainer, vae, held_out, pairs),
            }
            print(json.dumps(report | figures), flush=True)
            losses.clear()
            trainer.save(args.out)
    trainer.save(args.out)


if __name__ == "__main__":
    main()
