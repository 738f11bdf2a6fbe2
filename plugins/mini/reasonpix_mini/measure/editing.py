"""How well the mini GLIGEN replaces objects in scenes of the test split."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from reasonpix_mini import world

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
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image
    from reasonpix_gligen import Gligen, GligenOptions

    from reasonpix.plugin import Box, EditRequest
    from reasonpix_mini.training.judge import Judge
    from reasonpix_mini.training.vae import psnr, to_pixels, to_tensor

    folder = Path(str(resources.files("reasonpix_mini"))) / "checkpoints"
    judge = Judge(folder / "judge")
    requests, truths, targets = [], [], []
    for index in range(scenes):
        scene, number, target = replacement(split, index)
        old = scene.placements[number]
        corners = dict(zip(("x0", "y0", "x1", "y1"), old.box, strict=True))
        box = Box(**corners, width=world.SIZE, height=world.SIZE)
        image = Image.fromarray(scene.render())
        requests.append(EditRequest(image, box, old.category, target, scene.caption, index))
        truths.append(scene.replaced(number, target).render())
        targets.append(target)
    boxes = [request.box.pixels() for request in requests]

    def edit(**other: Any) -> list[np.ndarray]:
        fixed = {"model": str(folder / "gligen"), "device": "cpu", "batch_size": 8}
        editor = Gligen(GligenOptions(**fixed | SAMPLING | (options or {}) | other))
        editor.load()
        return [np.asarray(result) for result in editor.edit(requests)]

    def judged(pictures: list[np.ndarray]) -> float:
        seen = judge.names_in(pictures, boxes)
        return sum(a == b for a, b in zip(seen, targets, strict=True)) / scenes

    def inside(pictures: list[np.ndarray]) -> float:
        values = [
            psnr(a[y0:y1, x0:x1], b[y0:y1, x0:x1])
            for a, b, (x0, y0, x1, y1) in zip(pictures, truths, boxes, strict=True)
        ]
        return float(np.mean(values))

    inputs = [np.asarray(request.image) for request in requests]
    edited = edit()
    unchanged = 0
    for before, after, (x0, y0, x1, y1) in zip(inputs, edited, boxes, strict=True):
        different = (before != after).any(-1)
        different[y0:y1, x0:x1] = False
        unchanged += not different.any()
    vae = AutoencoderKL.from_pretrained(folder / "gligen", subfolder="vae")
    with torch.inference_mode():
        decoded = [
            to_pixels(vae.decode(vae.encode(to_tensor(truth[None])).latent_dist.mode()).sample)[0]
            for truth in truths
        ]
    return {
        "judged_target": judged(edited),
        "judged_target_empty_prompt": judged(edit(prompt="")),
        "judge_accuracy": judged(truths),
        "psnr_in_box": inside(edited),
        "psnr_in_box_vae": inside(decoded),
        "psnr_in_box_no_edit": inside(inputs),
        "outside_equal": unchanged / scenes,
    }
