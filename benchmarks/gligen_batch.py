"""Edits per second: our GLIGEN sampler against diffusers' `StableDiffusionGLIGENPipeline`.

    python benchmarks/gligen_batch.py [--model FOLDER] [--threads 1]

Both run the same weights, steps, guidance and boxes on the same images on a CPU, in this process
and in turns; each line is the median of the rounds. The pipeline takes one image a call. Ours
computes four edits at a time, padded where there are fewer, so that a result never depends on its
batch: a lone edit costs as much as four.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from reasonpix_gligen import Gligen, GligenOptions
from reasonpix_mini import checkpoints, world

from reasonpix.plugin.edits import EditRequest
from reasonpix.plugin.types import Box


def requests(count: int) -> list[EditRequest]:
    """The first object of each test scene is to become another of its group."""
    made = []
    for index in range(count):
        scene = world.scene("test", index)
        old = scene.placements[0]
        group = world.categories()[old.category].group
        names = [c.name for c in world.categories().values() if c.group == group]
        target = next(name for name in names if name != old.category)
        corners = dict(zip(("x0", "y0", "x1", "y1"), old.box, strict=True))
        box = Box(**corners, width=world.SIZE, height=world.SIZE)
        image = Image.fromarray(scene.render())
        edited = scene.replaced(0, target).caption
        made.append(EditRequest(image, box, old.category, target, scene.caption, edited, index))
    return made


def pipeline(model: str) -> Any:
    """diffusers' own pipeline on the same weights."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    made = diffusers.StableDiffusionGLIGENPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(model, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(
            model, subfolder="text_encoder", dtype=torch.float32
        ),
        tokenizer=CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet"),
        scheduler=diffusers.DDIMScheduler.from_pretrained(model, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(checkpoints()["mini/gligen"]))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    edits, theirs = requests(8), pipeline(args.model)
    ours = Gligen(
        GligenOptions(
            model=args.model,
            device="cpu",
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            prompt="{target}",
        )
    )
    ours.load()

    def one_by_one() -> None:
        for edit in edits:
            theirs(
                prompt=edit.target,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance_scale,
                gligen_scheduled_sampling_beta=1.0,
                gligen_phrases=[edit.target],
                gligen_boxes=[[corner / world.SIZE for corner in edit.box.xyxy]],
                gligen_inpaint_image=edit.image,
            )

    works: dict[str, Callable[[], object]] = {
        "diffusers, 1 a call": one_by_one,
        "reasonpix, 1 a call": lambda: [ours.edit([edit]) for edit in edits],
        "reasonpix, 8 a call": lambda: ours.edit(edits),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(args.rounds + 1):
        for name, work in works.items():
            duration = seconds(work)
            if round_number:  # the first round warms up
                times[name].append(duration)
    base = statistics.median(times["diffusers, 1 a call"])
    print(
        f"{args.steps} steps, guidance {args.guidance_scale:g}, {args.threads} thread(s), "
        f"{len(edits)} edits a round"
    )
    print(f"{'':20} {'edits/s':>8} {'ratio':>6}")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:20} {len(edits) / middle:8.2f} {base / middle:6.2f}")


if __name__ == "__main__":
    main()
