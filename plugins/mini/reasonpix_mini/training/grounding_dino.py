"""Train Grounding DINO mini: find one named sticker in a 64-pixel scene.

    python -m reasonpix_mini.training.grounding_dino --out DIR [--steps N] [--resume]

The network is transformers' `GroundingDinoForObjectDetection` (Liu et al., arXiv:2303.05499), about
a million parameters. The library's training loss is not used: it sends no gradient to the two-stage
head and offsets labels wrongly when the prompts of a batch differ. The loss here is the paper's
(Hungarian matching; focal loss on words, L1 and GIoU on boxes) on every decoder layer and on the
two-stage head, plus a dense term that makes each location of the backbone name its sticker.

`DIR/state.safetensors` and `DIR/optimizer.safetensors` resume a run; `DIR/checkpoint` ships.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    SwinConfig,
)

from reasonpix_mini.training.grounding_scenes import (
    CLS,
    DOT,
    MEAN,
    SEP,
    STD,
    Batch,
    Pool,
    draw,
    pixels,
    tokenizer,
    words,
)
from reasonpix_mini.world import SIZE

PRIOR_LOGIT = -4.0


def processor() -> GroundingDinoProcessor:
    """Scenes keep their 64 pixels; other images get a short side of 64."""
    images = GroundingDinoImageProcessorPil(
        size={"shortest_edge": SIZE, "longest_edge": 2 * SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return GroundingDinoProcessor(images, tokenizer())


def network() -> GroundingDinoForObjectDetection:
    """An untrained network whose scores start at the logit `PRIOR_LOGIT`."""
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=SIZE,
            patch_size=4,
            embed_dim=40,
            depths=[1, 2, 2],
            num_heads=[2, 4, 8],
            window_size=4,
            mlp_ratio=2.0,
            drop_path_rate=0.0,
            out_features=["stage2", "stage3"],
        ),
        text_config=BertConfig(
            vocab_size=len(tokenizer()),
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        d_model=64,
        num_queries=10,
        num_feature_levels=2,
        encoder_layers=2,
        encoder_ffn_dim=192,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=192,
        decoder_attention_heads=4,
        dropout=0.0,
        fusion_droppath=0.0,
        max_text_len=32,
        auxiliary_loss=False,
    )
    model = GroundingDinoForObjectDetection(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.std() > 0:
            nn.init.xavier_uniform_(module.weight)
    base = model.model
    for layer in base.encoder.layers:
        nn.init.constant_(layer.fusion_layer.vision_param, 0.1)
        nn.init.constant_(layer.fusion_layer.text_param, 0.1)
    # A score is the dot product of two normalised vectors and has no bias. Small scales keep it
    # near zero, and one dimension that starts constant on both sides holds the prior.
    text_norm = base.encoder.layers[-1].text_enhancer_layer.layer_norm_after
    for norm in (text_norm, base.enc_output_norm, base.decoder.layer_norm):
        nn.init.constant_(norm.weight, 0.4)
        norm.weight.data[0] = 0.0
    root = abs(PRIOR_LOGIT) ** 0.5
    text_norm.bias.data[0] = root
    base.enc_output_norm.bias.data[0] = -root
    base.decoder.layer_norm.bias.data[0] = -root
    # Proposals start at 5 % of the side; stickers are nearer to 40 %.
    base.encoder_output_bbox_embed.layers[-1].bias.data[2:] = 2.5
    return model


def corners(boxes: Tensor) -> Tensor:
    """Centre and size to x0, y0, x1, y1."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (Rezatofighi et al., 2019) of boxes given as corners, with broadcasting."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    shared, around = sides.clamp(min=0).prod(-1), hull.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    iou = shared / union.clamp(min=1e-6)
    return iou, iou - (around - union) / around.clamp(min=1e-6)


def set_loss(logits: Tensor, boxes: Tensor, batch: Batch, repeats: int = 1) -> Tensor:
    """The detection loss of one layer (DETR's, with words in the place of classes).

    Each object is matched to `repeats` predictions. Several matches are right for the two-stage
    head, which only proposes: they teach it faster (Jia et al., arXiv:2207.13080).
    logits: (batch, predictions, tokens); boxes: (batch, predictions, 4), centre and size.
    """
    wanted = batch.positions >= 0
    place = batch.positions.clamp(min=0)
    with torch.no_grad():
        # (batch, predictions, objects)
        prob = logits.sigmoid().gather(2, place[:, None].expand(-1, logits.shape[1], -1))
        gain = 0.25 * (1 - prob) ** 2 * (prob + 1e-8).log()
        harm = 0.75 * prob**2 * (1 - prob + 1e-8).log()
        near = torch.cdist(boxes, batch.boxes, p=1)
        giou = overlaps(corners(boxes)[:, :, None], corners(batch.boxes)[:, None])[1]
        cost = (2 * (harm - gain) + 5 * near - 2 * giou).numpy()
    row, found, thing = [], [], []
    for i in range(len(logits)):
        asked = np.repeat(wanted[i].nonzero()[:, 0].numpy(), repeats)
        if len(asked):
            prediction, match = linear_sum_assignment(cost[i][:, asked])
            row += [i] * len(match)
            found += list(prediction)
            thing += list(asked[match])
    target = torch.zeros_like(logits)
    target[row, found, place[row, thing]] = 1
    prob = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    weight = target * 0.25 * (1 - prob) ** 2 + (1 - target) * 0.75 * prob**2
    count = max(1, len(row))
    words_loss = (weight * entropy).sum() / count
    if not row:
        return 2 * words_loss
    matched, truth = boxes[row, found], batch.boxes[row, thing]
    giou = overlaps(corners(matched), corners(truth))[1]
    return 2 * words_loss + 5 * (matched - truth).abs().sum() / count + 2 * (1 - giou).mean()


class Dense(nn.Module):
    """The warm-up: each location of the backbone names the sticker that covers it, or nothing."""

    def __init__(self, model: GroundingDinoForObjectDetection, ids: list[list[int]]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.nothing = nn.Parameter(torch.tensor(0.0))
        names = [[CLS, names[0], DOT, SEP] for names in ids]
        self.prompts = nn.Buffer(torch.tensor(names), persistent=False)
        self.maps: dict[int, Tensor] = {}
        for level, projection in enumerate(model.model.input_proj_vision):
            projection.register_forward_hook(
                lambda _, __, output, level=level: self.maps.__setitem__(level, output)
            )

    def forward(self, model: GroundingDinoForObjectDetection, batch: Batch) -> Tensor:
        """Cross-entropy over categories and "nothing", mean over the locations of both levels."""
        base = model.model
        mask = torch.ones(len(self.prompts), 1, 4, 4, dtype=torch.bool)
        states = base.text_backbone(self.prompts, mask).last_hidden_state[:, 1]
        names = F.normalize(base.text_projection(states), dim=-1)
        total = torch.zeros(())
        for features in self.maps.values():
            side = features.shape[-1]
            at = (torch.arange(side) + 0.5) / side
            box = corners(batch.boxes)[..., None]
            inside_x = (at >= box[..., 0, :]) & (at < box[..., 2, :])
            inside_y = (at >= box[..., 1, :]) & (at < box[..., 3, :])
            inside = inside_y[..., :, None] & inside_x[..., None, :]
            inside &= (batch.labels >= 0)[..., None, None]
            label = torch.where(inside, batch.labels[..., None, None], -1).amax(1)
            label = torch.where(label < 0, len(names), label).flatten()
            flat = features.permute(0, 2, 3, 1).flatten(0, 2)
            logits = self.scale * F.normalize(flat, dim=-1) @ names.T * 4
            logits = torch.cat([logits, self.nothing.expand(len(flat), 1)], 1)
            total = total + F.cross_entropy(logits, label)
        return total


def detection_loss(model: GroundingDinoForObjectDetection, batch: Batch) -> Tensor:
    """The sum of the layers' losses and of the two-stage head's."""
    length = batch.input_ids.shape[1]
    base = model.model(pixel_values=batch.pixels, input_ids=batch.input_ids)
    states, text = base.intermediate_hidden_states, base.encoder_last_hidden_state_text
    references = [base.init_reference_points, *base.intermediate_reference_points.unbind(1)]
    loss = set_loss(
        base.enc_outputs_class[..., :length],
        base.enc_outputs_coord_logits.sigmoid(),
        batch,
        repeats=4,
    )
    for layer in range(states.shape[1]):
        hidden = states[:, layer]
        logits = hidden @ text.transpose(1, 2)
        start = torch.special.logit(references[layer], eps=1e-5)
        loss = loss + set_loss(logits, (model.bbox_embed[layer](hidden) + start).sigmoid(), batch)
    return loss


@torch.no_grad()
def predict(
    model: GroundingDinoForObjectDetection,
    images: NDArray[np.uint8],
    word_ids: list[int],
) -> tuple[Tensor, Tensor]:
    """The best score (n,) and its box (n, 4; centre and size) for one word per image."""
    scores, boxes = [], []
    for start in range(0, len(images), 64):
        part = slice(start, start + 64)
        prompts = torch.tensor([[CLS, word, DOT, SEP] for word in word_ids[part]])
        output = model(pixel_values=pixels(images[part]), input_ids=prompts)
        best, which = output.logits.sigmoid().amax(-1).max(-1)
        scores.append(best)
        boxes.append(output.pred_boxes[torch.arange(len(which)), which])
    return torch.cat(scores), torch.cat(boxes)


def validate(
    model: GroundingDinoForObjectDetection, pool: Pool, ids: list[list[int]]
) -> dict[str, float]:
    """Recall at IoU 0.5, mean IoU and false alarms at the best threshold of this split.

    The threshold is the lowest whose (recall - false alarms) is within half a percent of the best:
    what an editor draws scores lower than the world's own stickers.
    """
    rng = np.random.default_rng(0)
    rows, labels, boxes = [], [], []
    for i in range(len(pool.images)):
        present = pool.labels[i][pool.labels[i] >= 0]
        absent = [c for c in rng.permutation(len(ids)) if c not in present][:3]
        for slot, category in enumerate([*present, *absent]):
            rows.append(i)
            labels.append(int(category))
            boxes.append(pool.boxes[i, slot] if slot < len(present) else np.zeros(4, np.float32))
    truth = torch.from_numpy(np.stack(boxes))
    there = truth[:, 2] > 0
    score, box = predict(model, pool.images[rows], [ids[label][0] for label in labels])
    iou = overlaps(corners(box), corners(truth))[0]
    grid = torch.arange(0.05, 0.96, 0.01)
    recall = torch.stack([((score > t) & (iou >= 0.5))[there].float().mean() for t in grid])
    alarms = torch.stack([(score > t)[~there].float().mean() for t in grid])
    gain = recall - alarms
    chosen = int((gain >= gain.max() - 0.005).nonzero()[0, 0])
    return {
        "threshold": round(float(grid[chosen]), 2),
        "recall": round(float(recall[chosen]), 4),
        "false_alarms": round(float(alarms[chosen]), 4),
        "mean_iou": round(float(iou[there].mean()), 4),
        "recall_any_score": round(float((iou >= 0.5)[there].float().mean()), 4),
    }


def ship(model: GroundingDinoForObjectDetection, folder: Path) -> None:
    """Save the network in fp16 with its processor's files."""
    copy.deepcopy(model).half().save_pretrained(folder)
    processor().save_pretrained(folder)


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: a short warm-up, constant, then linear to zero over the last third."""
    return peak * min(1.0, (step + 1) / 200, (steps - step) / (steps / 3))


def asked(rng: np.random.Generator) -> int:
    """How many categories the prompts of a batch ask for: mostly one, as at inference."""
    return int(rng.choice([1, 2, 4, 8], p=[0.55, 0.15, 0.15, 0.15]))


def main() -> None:
    """Train, validate now and then, and keep what is needed to resume."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--warm-up", type=int, default=600, help="steps of dense words alone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=500, help="steps between validations")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    vocabulary = tokenizer()
    ids = [vocabulary.convert_tokens_to_ids(names) for names in words()]
    model = network().train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    dense = Dense(model, ids)
    everything = nn.ModuleDict({"model": model, "dense": dense, "average": average})
    parameters = [p for p in everything.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=1e-2)
    first = 0
    if options.resume:
        first = int(json.loads((options.out / "step.json").read_text())["step"])
        everything.load_state_dict(load_file(options.out / "state.safetensors"))
        for key, value in load_file(options.out / "optimizer.safetensors").items():
            index, moment = key.split(".")
            optimizer.state[parameters[int(index)]][moment] = value
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    pool = Pool.render("train", options.scenes, replaced=0.5)
    held_out = Pool.render("validation", 400)
    began, losses = time.monotonic(), []
    for step in range(first, options.steps):
        rng = np.random.default_rng([7, step])
        batch = draw(pool, rng, options.batch, asked(rng), ids)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps, options.rate)
        if step < options.warm_up:
            mask = torch.ones_like(batch.pixels[:, 0])
            features = model.model.backbone(batch.pixels, mask)
            for projection, (feature, _) in zip(
                model.model.input_proj_vision, features[0], strict=True
            ):
                projection(feature)
            loss = dense(model, batch)
        else:
            loss = detection_loss(model, batch) + dense(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - began) / (step + 1 - first)
            print(f"{step + 1} loss {np.mean(losses[-50:]):.3f} {pace:.3f} s/step", flush=True)
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            if step >= options.warm_up:
                print(step + 1, json.dumps(validate(average, held_out, ids)), flush=True)
            state = {key: value.clone() for key, value in everything.state_dict().items()}
            save_file(state, options.out / "state.safetensors")
            moments = {
                f"{i}.{key}": value
                for i, parameter in enumerate(parameters)
                for key, value in optimizer.state[parameter].items()
            }
            save_file(moments, options.out / "optimizer.safetensors")
            (options.out / "step.json").write_text(json.dumps({"step": step + 1}))
            ship(average, options.out / "checkpoint")


if __name__ == "__main__":
    main()
