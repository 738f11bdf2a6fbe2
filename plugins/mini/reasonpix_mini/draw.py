"""Write a scene of the sticker world as a PNG: `python -m reasonpix_mini.draw test/7 a.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from reasonpix_mini import world


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description="Write a scene of the sticker world as a PNG file")
    parser.add_argument("scene", help="split and index, such as test/7")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    split, _, index = args.scene.partition("/")
    Image.fromarray(world.scene(split, int(index)).render()).save(args.file)


if __name__ == "__main__":
    main()
