"""How well editing models follow instructions in scenes of the test split.

    python -m reasonpix_mini.measure.instructed mini/reasonpix2pix [--scenes 200]

The pairs are those of `{use: stickers, split: test, pairs: true}`: one object replaced by another
of its group. Reasoning instructions are made of held-out hints, and of training hints beside them,
which tells reasoning from memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reasonpix.plugin import RewriteRequest, Rewriting
from reasonpix_mini import stickers, world
from reasonpix_mini.lexicon import Lexicon, LexiconOptions
from reasonpix_mini.plain_instructions import plain_instruction
from reasonpix_mini.training.judge import Judge
from reasonpix_mini.training.vae import psnr

HINTS = ("train", "held_out")


@dataclass(frozen=True)
class Case:
    """A pair of the test split."""

    scene: world.Scene
    after: world.Scene
    position: int
    instructions: dict[str, str]
    """By kind: plain, direct, train, held_out."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Of the object that goes, XYXY in pixels."""
        return self.scene.placements[self.position].box

    @property
    def source(self) -> str:
        """The category that goes."""
        return self.scene.placements[self.position].category

    @property
    def target(self) -> str:
        """The category that comes."""
        return self.after.placements[self.position].category


def cases(count: int, split: world.Split = "test", first: int = 0) -> list[Case]:
    """The first pairs of a split, each with its instructions."""
    found = []
    for index in range(first, first + count):
        scene = world.scene(split, index)
        edit = stickers.edit(scene)
        captions = scene.caption, edit.after.caption
        texts = {"plain": plain_instruction(*captions), "direct": edit.instruction}
        for hints in HINTS:
            planner = Lexicon(LexiconOptions(hints=hints))
            request = RewriteRequest(
                instruction=edit.instruction,
                caption=captions[0],
                edited_caption=captions[1],
                seed=index,
            )
            (rewriting,) = planner.rewrite([request])
            assert isinstance(rewriting, Rewriting)
            texts[hints] = rewriting.instruction
        found.append(Case(scene, edit.after, edit.position, texts))
    return found


def measure(
    model: str, scenes: int = 200, split: world.Split = "test", **sampling: Any
) -> dict[str, float]:
    """Edit `scenes` pictures by each kind of instruction, with the model's own settings.

    `<kind>_judged` is the share in which a classifier trained on renders alone sees the target in
    the old object's box; `<kind>_psnr_in_box` and `…_outside` compare with the rendered truth, in
    dB, means over pictures; `no_edit_…` is the input as it is.
    """
    from reasonpix.editing import ReasonPix2Pix

    tests = cases(scenes, split)
    editor = ReasonPix2Pix.from_pretrained(model, device="cpu")
    inputs = [Image.fromarray(case.scene.render()) for case in tests]
    figures = _figures("no_edit", tests, [np.asarray(image) for image in inputs])
    for kind in ("direct", *HINTS):
        texts = [case.instructions[kind] for case in tests]
        edited = editor(inputs, texts, seed=list(range(scenes)), **sampling)
        figures |= _figures(kind, tests, [np.asarray(image) for image in edited])
    return figures


def judged(tests: Sequence[Case], pictures: Sequence[NDArray[np.uint8]]) -> list[bool]:
    """Whether a classifier trained on renders alone sees each target in the old object's box."""
    folder = Path(str(resources.files("reasonpix_mini"))) / "checkpoints" / "judge"
    seen = Judge(folder).names_in(pictures, [case.box for case in tests])
    return [name == case.target for name, case in zip(seen, tests, strict=True)]


def _figures(
    kind: str, tests: Sequence[Case], pictures: Sequence[NDArray[np.uint8]]
) -> dict[str, float]:
    inside, outside = [], []
    for case, picture in zip(tests, pictures, strict=True):
        truth, (x0, y0, x1, y1) = case.after.render(), case.box
        inside.append(psnr(truth[y0:y1, x0:x1], picture[y0:y1, x0:x1]))
        rest = np.ones(truth.shape[:2], bool)
        rest[y0:y1, x0:x1] = False
        outside.append(psnr(truth[rest], picture[rest]))
    return {
        f"{kind}_judged": float(np.mean(judged(tests, pictures))),
        f"{kind}_psnr_in_box": float(np.mean(inside)),
        f"{kind}_psnr_outside": float(np.mean(outside)),
    }


def main() -> None:
    """Print one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder, or name such as mini/reasonpix2pix")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    for name in ("guidance_scale", "image_guidance_scale", "num_inference_steps"):
        kind = int if name == "num_inference_steps" else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    args = vars(parser.parse_args())
    for name, value in measure(**args).items():
        print(f"  {name:28} {value:8.3f}", flush=True)


if __name__ == "__main__":
    main()
