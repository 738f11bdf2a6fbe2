"""How well the mini Grounding DINO finds the stickers of the test split."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from reasonpix_mini import world

THRESHOLD = 0.69
"""Chosen on the validation split by `reasonpix_mini.training.grounding_dino`."""

ABSENT = 3
"""How many categories that a scene lacks are asked for."""


def measure(scenes: int = 200) -> dict[str, float]:
    """Ask the plugin `grounding-dino` for what is in test scenes and for what is not.

    Every category of a scene and three absent ones are asked for. `recall`: share of the present
    found at IoU 0.5 or more; `found`: share of the present with a box at all; `mean_iou`: of those
    boxes; `false_alarms`: share of the absent with a box. The same of the scenes' ground-truth
    edits, where the new category and the one it replaced are asked for, has names that start with
    `edited_`.
    """
    import numpy as np

    shown, absent, edited, replaced = [], [], [], []
    for index in range(scenes):
        scene = world.scene("test", index)
        others = [name for name in world.categories() if name not in scene.names]
        rng = np.random.default_rng([11, index])
        target, *rest = (str(name) for name in rng.choice(others, 1 + ABSENT, replace=False))
        which = int(rng.integers(len(scene.placements)))
        shown.append((scene, scene.placements))
        absent.append(rest)
        after = scene.replaced(which, target)
        edited.append((after, (after.placements[which],)))
        replaced.append([scene.placements[which].category])
    after_edits = _compare(edited, replaced)
    return _compare(shown, absent) | {f"edited_{k}": v for k, v in after_edits.items()}


def _compare(
    shown: Sequence[tuple[world.Scene, Sequence[world.Placement]]], absent: list[list[str]]
) -> dict[str, float]:
    """Ground the given placements of each scene, and categories that it lacks."""
    from PIL import Image
    from reasonpix_grounding_dino import GroundingDino, GroundingDinoOptions

    from reasonpix.plugin import Box, Problem

    folder = str(resources.files("reasonpix_mini") / "checkpoints" / "grounding-dino")
    grounder = GroundingDino(GroundingDinoOptions(model=folder, device="cpu", threshold=THRESHOLD))
    grounder.load()
    results = grounder.ground(
        [Image.fromarray(scene.render()) for scene, _ in shown],
        [
            [placement.category for placement in placements] + others
            for (_, placements), others in zip(shown, absent, strict=True)
        ],
    )
    grounder.close()
    overlaps, alarms = [], []
    present = 0
    for (_, placements), result in zip(shown, results, strict=True):
        assert not isinstance(result, Problem)
        present += len(placements)
        for placement, grounding in zip(placements, result, strict=False):
            x0, y0, x1, y1 = placement.box
            truth = Box(x0=x0, y0=y0, x1=x1, y1=y1, width=world.SIZE, height=world.SIZE)
            if grounding.box:
                overlaps.append(truth.iou(grounding.box))
        alarms += [grounding.box is not None for grounding in result[len(placements) :]]
    return {
        "recall": sum(iou >= 0.5 for iou in overlaps) / present,
        "found": len(overlaps) / present,
        "mean_iou": sum(overlaps) / max(1, len(overlaps)),
        "false_alarms": sum(alarms) / len(alarms),
    }
