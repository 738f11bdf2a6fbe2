"""Does the mini Stable Diffusion draw what it is asked for?

python -m reasonpix_mini.measure.text_to_image
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reasonpix_grounding_dino import GroundingDino, GroundingDinoOptions

from reasonpix.plugin import ModelOptions, Problem
from reasonpix_mini import world

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
STEPS, GUIDANCE = 20, 3.0


def measure(scenes: int = 200) -> dict[str, float]:
    """Drawings of one object: how often mini/grounding-dino finds it there, and how often another.

    The other is what it is not: what the grounder finds in anything.
    """
    names = list(world.categories())
    asked = [names[number % len(names)] for number in range(scenes)]
    others = [names[(number + 7) % len(names)] for number in range(scenes)]
    grounder = GroundingDino(
        GroundingDinoOptions(model=str(CHECKPOINTS / "grounding-dino"), device="cpu")
    )
    grounder.load()
    found = grounder.ground(_drawn(asked), list(zip(asked, others, strict=True)))
    return {
        name: sum(not isinstance(one, Problem) and one[place].box is not None for one in found)
        / scenes
        for place, name in enumerate(("asked_found", "other_found"))
    }


def _drawn(asked: list[str]) -> list[Any]:
    import torch
    from diffusers import StableDiffusionPipeline

    from reasonpix.plugin.weights import pretrained

    pipeline = pretrained(
        StableDiffusionPipeline,
        ModelOptions(model=str(CHECKPOINTS / "stable-diffusion")),
        dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    drawings = []
    for first in range(0, len(asked), 8):
        some = range(first, min(first + 8, len(asked)))
        drawings += pipeline(
            [world.indefinite(asked[number]) for number in some],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(number) for number in some],
        ).images
    return drawings


if __name__ == "__main__":
    print(json.dumps(measure()))
