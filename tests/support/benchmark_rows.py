"""A small benchmark in the form that `reasonpix benchmark` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from reasonpix.datasets.columns import FEATURES, schema_of
from tests.support.pair_files import png


def scene(number: int, edited: bool = False, size: int = 64) -> Image.Image:
    """A square on a coloured ground; it is another one after the edit."""
    image = Image.new("RGB", (size, size), (40 * number % 256, 140, 90))
    fill = (230, 20 * number % 256, 30) if edited else (20, 30, 200)
    ImageDraw.Draw(image).rectangle((16, 16, 40, 40), fill=fill)
    return image


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A row of Part III with a direct instruction."""
    return {
        "input_image": {"bytes": png(scene(number)), "path": None},
        "edited_image": {"bytes": png(scene(number, edited=True)), "path": None},
        "edit_prompt": f"Something with ears, number {number}.",
        "direct_instruction": f"Turn the bee to a rabbit, number {number}.",
        "record_id": f"record-{number}",
        "source_id": f"scene/{number}",
        "caption": "a bee and an apple",
        "edited_caption": "a rabbit and an apple",
        "selected": "bee",
        "target": "rabbit",
        "box": [16.0, 16.0, 41.0, 41.0],
        "part": "III",
    } | changes


def benchmark(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """The folder, with data/test-00000.parquet of the rows."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema=schema_of(FEATURES))
    pq.write_table(table, folder / "data" / "test-00000.parquet")
    return folder
