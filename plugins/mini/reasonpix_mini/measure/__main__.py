"""Print the figures of all mini checkpoints: `python -m reasonpix_mini.measure [--scenes 200]`."""

from __future__ import annotations

import argparse

from reasonpix_mini.measure import captions, editing, embeddings, grounding, llava, text_to_image


def main() -> None:
    """Measure on the first scenes of the test split and print one line a figure."""
    parser = argparse.ArgumentParser(description="Figures of the mini checkpoints")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes to measure on")
    scenes = parser.parse_args().scenes
    for title, measure in (
        ("mini/blip2", captions.measure),
        ("mini/grounding-dino", grounding.measure),
        ("mini/gligen", editing.measure),
        ("mini/llava", llava.measure),
        ("mini/stable-diffusion", text_to_image.measure),
        ("mini/clip and mini/dino", embeddings.measure),
    ):
        print(f"\n{title}, {scenes} test scenes")
        for name, value in measure(scenes).items():
            print(f"  {name:52} {value:8.3f}", flush=True)


if __name__ == "__main__":
    main()
