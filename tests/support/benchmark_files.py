"""Small folders in the layouts of other people's benchmarks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.support.pair_files import IMAGE, picture, png

SIZE = (32, 24)
HOLE = (4, 6, 20, 18)
"""XYXY of what the masks mark in images of `SIZE`."""


def marked(scale: int = 1) -> np.ndarray[Any, Any]:
    """(height, width): what the masks mark."""
    mask = np.zeros((SIZE[1] * scale, SIZE[0] * scale), bool)
    x0, y0, x1, y1 = (scale * at for at in HOLE)
    mask[y0:y1, x0:x1] = True
    return mask


def transparent(number: int, scale: int = 1) -> bytes:
    """As MagicBrush's masks: the picture with a transparent hole."""
    image = picture(number, (SIZE[0] * scale, SIZE[1] * scale)).convert("RGBA")
    image.putalpha(Image.fromarray(~marked(scale)).convert("L"))
    return png(image)


def black_and_white(scale: int = 1) -> bytes:
    """As Reason-Edit's masks: white where the edit may change the image, a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(marked(scale)).convert("L").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def magicbrush_parquet(folder: Path, turns: int = 2) -> Path:
    """The columns of osunlp/MagicBrush, split dev: one image, edited in turns."""
    rows = [
        {
            "img_id": "139",
            "turn_index": turn,
            "source_img": {"bytes": png(picture(turn, SIZE)), "path": None},
            "mask_img": {"bytes": transparent(turn), "path": None},
            "instruction": f"Do number {turn}",
            "target_img": {"bytes": png(picture(turn + 1, SIZE)), "path": None},
        }
        for turn in range(1, turns + 1)
    ]
    kinds = {"img_id": pa.string(), "turn_index": pa.int32(), "instruction": pa.string()}
    schema = pa.schema([(name, kinds.get(name, IMAGE)) for name in rows[0]])
    (folder / "data").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, folder / "data" / "dev-00000-of-00001.parquet", row_group_size=1)
    return folder


def descriptions(turns: int = 2) -> dict[str, dict[str, str]]:
    outputs = {f"139-output{turn}.png": f"what turn {turn} shows" for turn in range(1, turns + 1)}
    return {"139": {"139-input.png": "what was there", **outputs}}


def magicbrush_folder(folder: Path, scale: int = 1) -> Path:
    """MagicBrush's released test folder: one image, edited in two turns."""
    images = folder / "images" / "139"
    images.mkdir(parents=True)
    names = ["139-input.png", "139-output1.png", "139-output2.png"]
    for number, name in enumerate(names, 1):
        (images / name).write_bytes(png(picture(number, SIZE)))
    turns = []
    for turn in (1, 2):
        (images / f"139-mask{turn}.png").write_bytes(transparent(turn, scale))
        turns.append(
            {
                "input": names[turn - 1],
                "mask": f"139-mask{turn}.png",
                "output": names[turn],
                "instruction": f"Do number {turn}",
            }
        )
    (folder / "edit_sessions.json").write_text(json.dumps({"139": turns}))
    (folder / "global_descriptions.json").write_text(json.dumps(descriptions()))
    return folder


def reason_edit(folder: Path) -> Path:
    """Reason-Edit of SmartEdit: two of its scenarios, two images each."""
    texts = {"1-Left-Right": "Left_Right_text.txt", "6-Reasoning": "Reason_test.txt"}
    for start, (scenario, text) in enumerate(texts.items()):
        inside = folder / scenario
        inside.mkdir(parents=True)
        for number in (1, 2):
            image = picture(10 * start + number, SIZE)
            (inside / f"{number:03d}.png").write_bytes(png(image))
            (inside / f"{number:03d}_mask.jpg").write_bytes(black_and_white())
        (inside / text).write_text(
            f"Please replace what keeps us dry CLIP: cat {start}\nMake it a dog CLIP: dog\n"
        )
    return folder
