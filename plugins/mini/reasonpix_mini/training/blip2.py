"""Train the mini BLIP-2: a captioner for the sticker world, of transformers' own classes.

    python -m reasonpix_mini.training.blip2 --out runs/blip2 [--steps 6000] [--resume]

Caption loss alone learns the template of a caption long before the objects, so the parts are taught
in the order in which they depend on each other:

1. *see*: the ViT alone. Every patch names the category it shows and that object's rank from the
   left; linear heads that are thrown away afterwards.
2. *say*: the ViT stays as it is. Q-Former and OPT learn the caption, and a throw-away head asks
   query k for the k-th object from the left, which binds queries to objects within minutes.
3. *both*: everything together, all losses, while the learning rate falls.

What is saved is an exponential moving average of the weights, in float16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    GPT2Tokenizer,
    OPTConfig,
)

from reasonpix_mini import world
from reasonpix_mini.measure.captions import mentioned
from reasonpix_mini.training.blip2_scenes import GRID, IGNORED, PATCH, QUERIES, Scenes, caption

_MEAN, _STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_PHASES = {"see": 0.15, "say": 0.15, "both": 0.7}
"""Share of all steps."""


def processor() -> Blip2Processor:
    """The image processor and a byte-level tokenizer with a token for each word of a caption."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    names = list(world.categories())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        [caption([name, name, name]) for name in names for _ in range(2)],
        trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    tokenizer = GPT2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token="<unk>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    # OPT begins every text with </s>; GPT-2's class does not do that by itself.
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.bos_token_id)]
    )
    images = BlipImageProcessorPil(
        size={"height": world.SIZE, "width": world.SIZE},
        image_mean=list(_MEAN),
        image_std=list(_STD),
    )
    return Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)


def network(tokens: int, image_token: int) -> Blip2ForConditionalGeneration:
    """A fresh network for a vocabulary of `tokens`; `image_token` is the id of "<image>"."""
    # The default initializer_range of the vision tower is 1e-10: nothing would ever be learnt.
    vision = Blip2VisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=PATCH,
        initializer_range=0.05,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=1,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=QUERIES,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )
    text = OPTConfig(
        vocab_size=tokens,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        init_std=0.05,
        bos_token_id=2,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=vision.to_dict(),
            qformer_config=qformer.to_dict(),
            text_config=text.to_dict(),
            num_query_tokens=QUERIES,
            image_token_index=image_token,
        )
    )
    with torch.no_grad():
        # Queries of zero would all stay alike.
        model.query_tokens.normal_(std=0.5)
        # Neighbours should know each other from the start: sines and cosines of row and column.
        angle = torch.arange(GRID)[:, None] * 2.0 ** -torch.arange(0, 4, 4 / 32)
        waves = torch.cat([angle.sin(), angle.cos()], 1)
        rows, columns = waves.repeat_interleave(GRID, 0), waves.repeat(GRID, 1)
        model.vision_model.embeddings.position_embedding[0, 1:] = 0.3 * torch.cat(
            [rows, columns], 1
        )
    return model


class Heads(nn.Module):
    """The throw-away classifiers: what a patch shows, its rank, and which object a query holds."""

    def __init__(self, width: int, categories: int) -> None:
        """Heads on states of `width` for `categories` and none."""
        super().__init__()
        self.category = nn.Linear(width, categories + 1)
        self.rank = nn.Linear(width, QUERIES + 1)
        self.query = nn.Linear(width, categories + 1)


class Captions:
    """Token ids of captions, by the categories they name."""

    def __init__(self, names: list[str], processor: Blip2Processor) -> None:
        """Captions of `names` in the tokens of `processor`."""
        self.names, self.tokenizer = names, processor.tokenizer
        self.image_token = self.tokenizer.convert_tokens_to_ids("<image>")
        self.known: dict[tuple[int, ...], list[int]] = {}

    def batch(self, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input ids, attention mask and labels, each (batch, longest), of `order` (batch, 4)."""
        rows = []
        for row in order.tolist():
            key = tuple(k for k in row if k)
            if key not in self.known:
                text = caption([self.names[k - 1] for k in key])
                self.known[key] = [*self.tokenizer(text).input_ids, self.tokenizer.eos_token_id]
            rows.append(self.known[key])
        longest = QUERIES + max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORED)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            end = QUERIES + len(row)
            ids[i, :QUERIES] = self.image_token
            ids[i, QUERIES:end] = torch.tensor(row)
            # Neither the image's places nor the first </s> are to be predicted.
            labels[i, QUERIES + 1 : end] = torch.tensor(row[1:])
            mask[i, :end] = 1
        return ids, mask, labels


def losses(
    phase: str,
    model: Blip2ForConditionalGeneration,
    heads: Heads,
    captions: Captions,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
) -> dict[str, Tensor]:
    """The losses of a phase by name, and the shares of right answers as `*_right`."""
    pixels, category, rank, order = batch
    cross_entropy = nn.functional.cross_entropy
    out = {}
    with torch.set_grad_enabled(phase != "say"):
        states = model.vision_model(pixels).last_hidden_state
    if phase != "say":
        logits, ranks = heads.category(states[:, 1:]), heads.rank(states[:, 1:])
        out["category"] = cross_entropy(logits.transpose(1, 2), category)
        out["rank"] = 0.3 * cross_entropy(ranks.transpose(1, 2), rank)
        shown = category > 0
        out["category_right"] = (logits.argmax(-1) == category)[shown].float().mean()
        out["rank_right"] = (ranks.argmax(-1) == rank)[shown].float().mean()
    if phase != "see":
        queries = model.qformer(
            query_embeds=model.query_tokens.expand(len(pixels), -1, -1),
            encoder_hidden_states=states,
        ).last_hidden_state
        held = heads.query(queries)
        out["query"] = cross_entropy(held.transpose(1, 2), order)
        out["query_right"] = (held.argmax(-1) == order).all(-1).float().mean()
        ids, mask, labels = captions.batch(order)
        embeddings = model.get_input_embeddings()(ids)
        embeddings = torch.cat([model.language_projection(queries), embeddings[:, QUERIES:]], dim=1)
        logits = model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, use_cache=False
        ).logits
        out["caption"] = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return out


@torch.no_grad()
def validate(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, scenes: list[world.Scene]
) -> dict[str, float]:
    """Share of scenes whose caption names exactly their objects: all, and by number of objects."""
    from PIL import Image

    model.eval()
    images = [Image.fromarray(scene.render()) for scene in scenes]
    inputs = processor(images=images, text=[""] * len(images), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    texts = processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    model.train()
    counts = np.array([len(scene.placements) for scene in scenes])
    right = np.array(
        [set(mentioned(t)) == set(s.names) for t, s in zip(texts, scenes, strict=True)], dtype=float
    )
    same = np.mean([t.strip() == s.caption for t, s in zip(texts, scenes, strict=True)])
    out = {"set": right.mean(), "same": same}
    out |= {f"set_{n}": right[counts == n].mean() for n in (1, 2, 3)}
    return {key: round(float(value), 3) for key, value in out.items()}


def train(out: Path, steps: int, batch: int, resume: bool, rate: float = 1.5e-3) -> None:
    """Train for `steps` and leave the checkpoint in `out`/checkpoint."""
    torch.manual_seed(0)
    process = processor()
    names = list(world.categories())
    captions = Captions(names, process)
    model = network(len(process.tokenizer), captions.image_token)
    heads = Heads(128, len(names))
    every = nn.ModuleDict({"model": model, "heads": heads})
    decayed = [p for p in every.parameters() if p.ndim > 1]
    plain = [p for p in every.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        weight_decay=0.03,
    )
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    first = 0
    if resume:
        first = json.loads((out / "step.json").read_text())["step"]
        every.load_state_dict(load_file(out / "weights.safetensors"))
        average |= load_file(out / "average.safetensors")
    bounds = np.cumsum([steps * share for share in _PHASES.values()])
    rng = np.random.default_rng([7, first])
    scenes = Scenes(seed=first)
    held_out = [world.scene("validation", i) for i in range(120)]
    judge = network(len(process.tokenizer), captions.image_token)
    started = time.time()
    shown: dict[str, float] = {}
    model.train()
    for step in range(first, steps):
        index = int(np.searchsorted(bounds, step, side="right"))
        phase = list(_PHASES)[index]
        begin, end = (0.0, *bounds)[index], bounds[index]
        # Warm up at the start of a phase and after a resume; only the last phase cools to zero.
        factor = min(1.0, (step - max(begin, first) + 1) / 200)
        if phase == "both":
            factor *= 0.5 + 0.5 * np.cos(np.pi * (step - begin) / (end - begin))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        values = losses(phase, model, heads, captions, scenes.batch(rng, batch))
        loss = sum(value for key, value in values.items() if not key.endswith("_right"))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(every.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
        for key, value in values.items():
            shown[key] = 0.98 * shown.get(key, value.item()) + 0.02 * value.item()
        if (step + 1) % 100 == 0:
            figures = {key: round(value, 3) for key, value in shown.items()}
            print(step + 1, phase, round(time.time() - started), json.dumps(figures), flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(out, step + 1, every, average)
            if phase != "see":
                judge.load_state_dict(average)
                print("validation", json.dumps(validate(judge, process, held_out)), flush=True)
                write(judge, process, out / "checkpoint")


def save(out: Path, step: int, every: nn.ModuleDict, average: dict[str, Tensor]) -> None:
    """Write what `--resume` needs into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    # Copies: OPT ties its output to its embeddings, and safetensors refuses shared memory.
    tensors = {key: value.clone() for key, value in every.state_dict().items()}
    save_file(tensors, out / "weights.safetensors")
    save_file({key: value.clone() for key, value in average.items()}, out / "average.safetensors")
    (out / "step.json").write_text(json.dumps({"step": step}))


def write(model: Blip2ForConditionalGeneration, processor: Blip2Processor, folder: Path) -> None:
    """Write the checkpoint, float16, with all that `from_pretrained` reads."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the mini BLIP-2.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=64, help="scenes a step")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.steps, args.batch, args.resume)


if __name__ == "__main__":
    main()
