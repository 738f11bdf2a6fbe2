"""How well the mini GLIGEN replaces objects in scenes of the test split."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reasonpix.plugin import Box, EditRequest
from reasonpix_mini import world

Pictures = list[NDArray[np.uint8]]
"""RGB pixels (height, width, 3)."""

_CHECKPOINTS = Path(str(resources.files("reasonpix_mini"))) / "checkpoints"

SAMPLING = {"num_inference_steps": 4, "guidance_scale": 1.5}
"""What the mini checkpoint was tuned for, on the validation split."""


def replacement(split: world.Split, index: int) -> tuple[world.Scene, int, str]:
    """A scene, the number of one of its objects, and another category of that object's group."""
    scene = world.scene(split, index)
    rng = np.random.default_rng([19, index])
    number = int(rng.integers(len(scene.placements)))
    old = world.categories()[scene.placements[number].category]
    group = [c.name for c in world.categories().values() if c.group == old.group and c != old]
    return scene, number, str(rng.choice(group))


def measure(
    scenes: int = 200, split: world.Split = "test", options: dict[str, Any] | None = None
) -> dict[str, float]:
    """Replace one object in each scene with the plugin `gligen`, in the object's own box.

    Shares of scenes: `judged_target`, a classifier trained on renders alone sees the target in the
    box; `judged_target_empty_prompt`, the same when only phrase and box say what to draw;
    `judge_accuracy`, how often it is right on the rendered ground truth; `outside_equal`, every
    pixel outside the box is the input's. In dB, means over the boxes' insides against the rendered
    ground truth: `psnr_in_box` of the edit, `psnr_in_box_vae` of the truth through the VAE (the
    ceiling), `psnr_in_box_no_edit` of the input (the floor).
    """
    from reasonpix_gligen import Gligen, GligenOptions

    from reasonpix_mini.training.judge import Judge
    from reasonpix_mini.training.vae import psnr

    judge = Judge(_CHECKPOINTS / "judge")
    requests, truths = _replacements(scenes, split)
    boxes = [request.box.pixels() for request in requests]

    def edit(**other: Any) -> Pictures:
        fixed = {"model": str(_CHECKPOINTS / "gligen"), "device": "cpu", "batch_size": 8}
        editor = Gligen(GligenOptions(**fixed | SAMPLING | (options or {}) | other))
        editor.load()
        return [np.asarray(result) for result in editor.edit(requests)]

    def judged(pictures: Pictures) -> float:
        names = judge.names_in(pictures, boxes)
        pairs = zip(names, requests, strict=True)
        return sum(name == request.target for name, request in pairs) / scenes

    def inside(pictures: Pictures) -> float:
        values = [
            psnr(picture[y0:y1, x0:x1], truth[y0:y1, x0:x1])
            for picture, truth, (x0, y0, x1, y1) in zip(pictures, truths, boxes, strict=True)
        ]
        return float(np.mean(values))

    inputs = [np.asarray(request.image) for request in requests]
    edited = edit()
    unchanged = 0
    for before, after, (x0, y0, x1, y1) in zip(inputs, edited, boxes, strict=True):
        different = (before != after).any(-1)
        different[y0:y1, x0:x1] = False
        unchanged += not different.any()
    return {
        "judged_target": judged(edited),
        "judged_target_empty_prompt": judged(edit(prompt="")),
        "judge_accuracy": judged(truths),
        "psnr_in_box": inside(edited),
        "psnr_in_box_vae": inside(_through_vae(truths)),
        "psnr_in_box_no_edit": inside(inputs),
        "outside_equal": unchanged / scenes,
    }


def _replacements(scenes: int, split: world.Split) -> tuple[list[EditRequest], Pictures]:
    """A replacement in each scene, and the rendered ground truths."""
    requests, truths = [], []
    for index in range(scenes):
        scene, number, target = replacement(split, index)
        old = scene.placements[number]
        corners = dict(zip(("x0", "y0", "x1", "y1"), old.box, strict=True))
        box = Box(**corners, width=world.SIZE, height=world.SIZE)
        image = Image.fromarray(scene.render())
        after = scene.replaced(number, target)
        requests.append(
            EditRequest(image, box, old.category, target, scene.caption, after.caption, index)
        )
        truths.append(after.render())
    return requests, truths


def _through_vae(pictures: Pictures) -> Pictures:
    """The pictures, encoded and decoded again."""
    import torch
    from diffusers import AutoencoderKL

    from reasonpix_mini.training.vae import to_pixels, to_tensor

    vae = AutoencoderKL.from_pretrained(_CHECKPOINTS / "gligen", subfolder="vae")
    with torch.inference_mode():
        return [
            to_pixels(vae.decode(vae.encode(to_tensor(picture[None])).latent_dist.mode()).sample)[0]
            for picture in pictures
        ]
