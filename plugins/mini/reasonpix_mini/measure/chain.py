"""Where understanding is lost: what the connector passes on, and what the UNet makes of it.

    python -m reasonpix_mini.measure.chain mini/reasonpix2pix [--scenes 200]

`reasonpix_mini.measure.llava` says what the encoder knows, `reasonpix_mini.measure.instructed` what
is drawn in the end.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image

from reasonpix.editing import ReasonPix2Pix, load_checkpoint, read_parts
from reasonpix.plugin import MLLMEncoder, ModelOptions, Problem
from reasonpix_mini import world
from reasonpix_mini.measure.instructed import HINTS, Case, cases, judged

TEXT = "mini/instruct-pix2pix"
"""Whose text encoder the connector was aligned to."""


def measure(model: str, scenes: int = 200) -> dict[str, float]:
    """For each kind of instruction the share of test scenes in which the right meaning got through.

    `<kind>_source` and `<kind>_target`: of all 32 words in that place of the plain instruction,
    the connector's tokens are nearest to CLIP's states with the right one. `unet_plain`: the model
    that the connector was aligned to shows the target when it is told so in plain words.
    """
    tests = cases(scenes)
    checkpoint = load_checkpoint(ModelOptions(model=model))
    encoder = checkpoint.encoder.build()
    assert isinstance(encoder, MLLMEncoder)
    encoder.load()
    text = read_parts(ModelOptions(model=TEXT)).text
    assert text is not None
    inputs = [Image.fromarray(case.scene.render()) for case in tests]
    network = checkpoint.model.eval()
    figures: dict[str, float] = {}
    for kind in ("direct", *HINTS):
        texts = [case.instructions[kind] for case in tests]
        states = encoder.encode(inputs, texts)
        right: dict[str, list[bool]] = {"source": [], "target": []}
        for case, instruction, h in zip(tests, texts, states, strict=True):
            assert not isinstance(h, Problem)
            with torch.no_grad():
                said = network.condition([torch.from_numpy(h)], [instruction]).states
            for part, found in right.items():
                sentences = _with_every(case, part)
                length = int(text.text_mask(sentences[:1]).sum())
                distance = (text(sentences) - said)[:, :length].square().sum((1, 2))
                word = getattr(case, part)
                found.append(list(world.categories())[int(distance.argmin())] == word)
        figures |= {f"{kind}_{part}": float(np.mean(found)) for part, found in right.items()}
    encoder.close()
    editor = ReasonPix2Pix.from_pretrained(TEXT, device="cpu")
    plain = [case.instructions["plain"] for case in tests]
    edited = editor(inputs, plain, seed=list(range(scenes)))
    figures["unet_plain"] = float(np.mean(judged(tests, [np.asarray(one) for one in edited])))
    return figures


def _with_every(case: Case, part: str) -> list[str]:
    """The plain instruction with every category in one place of it."""
    pairs = [
        (name, case.target) if part == "source" else (case.source, name)
        for name in world.categories()
    ]
    return [f"Replace the {source} with {world.indefinite(target)}." for source, target in pairs]


def main() -> None:
    """Print one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder, or name such as mini/reasonpix2pix")
    parser.add_argument("--scenes", type=int, default=200)
    args = parser.parse_args()
    for name, value in measure(args.model, args.scenes).items():
        print(f"  {name:28} {value:8.3f}", flush=True)


if __name__ == "__main__":
    main()
