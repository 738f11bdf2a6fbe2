"""How well the mini Grounding DINO finds the stickers of the test split."""

from __future__ import annotations

from importlib import resources

from reasonpix_mini import world

THRESHOLD = 0.35
"""Chosen on the validation split by `reasonpix_mini.training.grounding_dino`."""

ABSENT = 3
"""How many categories that a scene lacks are asked for."""


def measure(scenes: int = 200) -> dict[str, float]:
    """Ask the plugin `grounding-dino` for every category of test scenes and for three absent ones.

    `recall`: share of the present whose box was found at IoU 0.5 or more; `found`: share of the
    present with a box at all; `mean_iou`: of the boxes of present categories; `false_alarms`:
    share of the absent that got a box.
    """
    import numpy as np
    from PIL import Image
    from reasonpix.records import Box, Problem
    from reasonpix_grounding_dino import GroundingDino, GroundingDinoOptions

    shown = [world.scene("test", index) for index in range(scenes)]
    asked = []
    for index, scene in enumerate(shown):
        others = [name for name in world.categories() if name not in scene.names]
        picked = np.random.default_rng([11, index]).choice(others, ABSENT, replace=False)
        asked.append([p.category for p in scene.placements] + [str(name) for name in picked])
    folder = str(resources.files("reasonpix_mini") / "checkpoints" / "grounding-dino")
    grounder = GroundingDino(
        GroundingDinoOptions(model=folder, device="cpu", threshold=THRESHOLD, batch_size=32)
    )
    grounder.load()
    results = grounder.ground([Image.fromarray(scene.render()) for scene in shown], asked)
    grounder.close()
    overlaps, alarms = [], []
    present = 0
    for scene, groundings in zip(shown, results, strict=True):
        assert not isinstance(groundings, Problem)
        present += len(scene.placements)
        for placement, grounding in zip(scene.placements, groundings, strict=False):
            x0, y0, x1, y1 = placement.box
            truth = Box(x0=x0, y0=y0, x1=x1, y1=y1, width=world.SIZE, height=world.SIZE)
            if grounding.box:
                overlaps.append(truth.iou(grounding.box))
        alarms += [g.box is not None for g in groundings[len(scene.placements) :]]
    return {
        "recall": sum(iou >= 0.5 for iou in overlaps) / present,
        "found": len(overlaps) / present,
        "mean_iou": float(np.mean(overlaps)) if overlaps else 0.0,
        "false_alarms": sum(alarms) / len(alarms),
    }
