"""Small datasets of pairs, written as others write them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise, so that no two pictures, views or shifts of one are alike."""
    w, h = size
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, size: tuple[int, int] = (32, 32)) -> tuple[bytes, bytes]:
    return png(picture(2 * number, size)), png(picture(2 * number + 1, size))


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def rows(
    count: int,
    columns: Sequence[str] = ("input_image", "edit_prompt", "edited_image"),
    size: tuple[int, int] = (32, 32),
    **more: Any,
) -> list[dict[str, Any]]:
    """`count` rows; `more` are columns of the same text in all of them."""
    source, instruction, edited = columns
    made = []
    for number in range(count):
        before, after = pair(number, size)
        row = {
            source: {"bytes": before, "path": None},
            instruction: f"make it number {number}",
            edited: {"bytes": after, "path": None},
        }
        made.append(row | more)
    return made


def parquet(path: Path, content: Sequence[Mapping[str, Any]], group: int = 3) -> Path:
    """A parquet file with struct columns of images, in row groups of `group`."""
    names = list(content[0])
    kinds = {
        name: IMAGE if any(isinstance(row[name], dict) for row in content) else pa.string()
        for name in names
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(list(kinds.items()))
    pq.write_table(pa.Table.from_pylist(list(content), schema), path, row_group_size=group)
    return path


def instruct_pix2pix(folder: Path, prompts: Sequence[Mapping[str, str]], seeds: int = 1) -> Path:
    """The layout of timothybrooks/instruct-pix2pix, with images as JPEG."""
    listed = []
    for number, prompt in enumerate(prompts):
        own = folder / f"{number:07d}"
        own.mkdir(parents=True)
        (own / "prompt.json").write_text(json.dumps(prompt))
        listed.append([own.name, [str(100 + seed) for seed in range(seeds)]])
        for seed in range(seeds):
            for which in (0, 1):
                image = picture(1000 * number + 2 * seed + which)
                image.save(own / f"{100 + seed}_{which}.jpg", quality=95)
    (folder / "seeds.json").write_text(json.dumps(listed))
    return folder
