"""The files of a published dataset of edits: Hugging Face parquet, InstructPix2Pix, WebDataset.

Each writer takes the accepted outcomes one by one, so only a few are in memory at a time. The same
outcomes give the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from reasonpix.core.images import UndecodableImage, decode, encode_png
from reasonpix.core.parallel import Size, prefetch
from reasonpix.datasets.columns import (
    IMAGE,
    IMAGES,
    TEXT,
    Feature,
    Row,
    RunColumns,
    schema_of,
)
from reasonpix.errors import RunError
from reasonpix.generation.outcomes import Outcome
from reasonpix.plugin.samples import Sample

FILE = Size(rows=1000, bytes=500_000_000)
"""Limit of a parquet file or tar of images: files are read in parallel, and there are few."""

GROUP = Size(rows=100, bytes=32_000_000)
"""Limit of a row group of images, which must fit into memory."""


@dataclass(frozen=True)
class Written:
    """The result of a writer."""

    rows: int
    features: Mapping[str, Feature] | None
    """Features of the columns, for the head of the card; None if `datasets` reads them off."""
    notes: tuple[str, ...] = ()
    """Sentences for the card that depend on the data."""


# -- Hugging Face ---------------------------------------------------------------------------------


def write_parquet(
    accepted: Iterator[Outcome], folder: Path, columns: RunColumns, size: Size = FILE
) -> Written:
    """`data/train-00000.parquet` …: images as lossless PNG."""
    rows = prefetch(partial(parquet_row, columns), accepted)
    schema = schema_of(columns.features)
    total = write_rows(rows, schema, folder, size, GROUP, image_bytes)
    return Written(total, columns.features)


def parquet_row(columns: RunColumns, outcome: Outcome) -> Row:
    """A row of `columns`."""
    before, after = _images(outcome.sample)
    return columns.facts(outcome) | {
        "input_image": {"bytes": encode_png(before), "path": None},
        "edited_image": {"bytes": after, "path": None},
    }


def image_bytes(row: Row) -> int:
    """The size of the two images of a row, in bytes."""
    return len(row["input_image"]["bytes"]) + len(row["edited_image"]["bytes"])


def write_rows(
    rows: Iterator[Row],
    schema: pa.Schema,
    folder: Path,
    size: Size,
    group: Size,
    weigh: Callable[[Row], int],
    split: str = "train",
) -> int:
    """Write rows to `data/<split>-00000.parquet` …, in row groups; return the number of rows.

    `weigh` gives the size of a row in bytes.
    """
    (folder / "data").mkdir()
    total = files = 0
    batches = _batches(rows, group, weigh)
    batch = next(batches, None)
    while batch is not None:
        path = folder / "data" / f"{split}-{files:05d}.parquet"
        with path.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            held = weight = 0
            while batch is not None and held < size.rows and weight < size.bytes:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                held, weight = held + len(batch), weight + sum(map(weigh, batch))
                batch = next(batches, None)
        total, files = total + held, files + 1
    return total


def _batches(rows: Iterator[Row], bound: Size, weigh: Callable[[Row], int]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    weight = 0
    for row in rows:
        batch.append(row)
        weight += weigh(row)
        if len(batch) >= bound.rows or weight >= bound.bytes:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch


def _images(sample: Sample) -> tuple[Image.Image, bytes]:
    """The input image as RGB, and the edited image as PNG."""
    try:
        return sample.image(), sample.edited_png()
    except (UndecodableImage, OSError) as error:
        raise RunError(f"{sample.item.native_id}: {error}") from error


# -- WebDataset -----------------------------------------------------------------------------------


def write_webdataset(
    accepted: Iterator[Outcome], folder: Path, columns: RunColumns, size: Size = FILE
) -> Written:
    """`data/train-00000.tar` …: `<record id>.input.png`, `.edited.png` and `.json` of each sample.

    Time, owner and mode are fixed, so that equal samples give equal bytes.
    """

    def members(outcome: Outcome) -> list[tuple[str, bytes]]:
        before, after = _images(outcome.sample)
        facts = json.dumps(columns.facts(outcome), ensure_ascii=False, sort_keys=True)
        contents = {"edited.png": after, "input.png": encode_png(before), "json": facts.encode()}
        key = outcome.sample.record_id
        return [(f"{key}.{kind}", data) for kind, data in contents.items()]

    (folder / "data").mkdir()
    total = files = 0
    samples = prefetch(members, accepted)
    sample = next(samples, None)
    while sample is not None:
        path = folder / "data" / f"train-{files:05d}.tar"
        with path.open("wb") as file, tarfile.open(None, "w", file, format=tarfile.GNU_FORMAT) as t:
            held = weight = 0
            while sample is not None and held < size.rows and weight < size.bytes:
                for name, data in sample:
                    t.addfile(_member(name, data), io.BytesIO(data))
                held, weight = held + 1, weight + sum(len(data) for _, data in sample)
                sample = next(samples, None)
        total, files = total + held, files + 1
    facts = {name: kind for name, kind in sorted(columns.features.items()) if name not in IMAGES}
    members_of = {"edited.png": IMAGE, "input.png": IMAGE, "json": facts}
    return Written(total, {**members_of, "__key__": TEXT, "__url__": TEXT})


def _member(name: str, data: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644  # the other fields default to 0 and ""
    return member


# -- InstructPix2Pix ------------------------------------------------------------------------------

_SEED = "0"
"""Each folder holds one edit."""


def write_instruct_pix2pix(
    accepted: Iterator[Outcome], folder: Path, columns: RunColumns
) -> Written:
    """The layout of timothybrooks/instruct-pix2pix: a folder for each sample.

    ```
    seeds.json                [[dir, [seed]], …]
    0000000/prompt.json       {"input": caption, "edit": instruction, "output": edited caption}
    0000000/0_0.jpg, 0_1.jpg  before, after
    metadata.jsonl            a row for each sample, as `datasets` reads image folders
    ```
    """
    total = compared = difference = largest = 0
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for sample in prefetch(partial(_jpegs, columns), accepted):
            at = folder / f"{total:07d}"
            at.mkdir()
            names = [f"{_SEED}_{n}.jpg" for n in (0, 1)]
            for name, data in zip(names, (sample.before, sample.after), strict=True):
                (at / name).write_bytes(data)
            _write_json(at / "prompt.json", sample.prompt)
            # In the order of `FEATURES`: some trainers take columns by their place.
            row = {"input_image_file_name": f"{at.name}/{names[0]}"}
            row |= {"edit_prompt": sample.facts["edit_prompt"]}
            row |= {"edited_image_file_name": f"{at.name}/{names[1]}", **sample.facts}
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
            total += 1
            compared += sample.compared
            difference += sample.difference
            largest = max(largest, sample.largest)
    with (folder / "seeds.json").open("w", encoding="utf-8") as seeds:
        for number in range(total):
            entry = json.dumps([f"{number:07d}", [_SEED]])
            seeds.write(f"{',' if number else '['}\n{entry}")
        seeds.write("\n]\n")
    loss = difference / max(compared, 1)
    return Written(
        total,
        None,
        (
            "JPEG is lossy, also outside the box of an edit: the values of the images differ from "
            f"the lossless ones by {loss:.3f} of 255 on average, and by at most {largest}.",
        ),
    )


class _Jpegs(NamedTuple):
    before: bytes
    after: bytes
    prompt: Row
    facts: Row
    compared: int
    difference: int
    largest: int


def _jpegs(columns: RunColumns, outcome: Outcome) -> _Jpegs:
    before, png = _images(outcome.sample)
    after = decode(png)
    facts = columns.facts(outcome)
    prompt = {
        "input": facts["caption"],
        "edit": facts["edit_prompt"],
        "output": facts["edited_caption"],
    }
    if max(before.size) > 65500:
        raise RunError(
            f"{outcome.sample.item.native_id}: {before.width}x{before.height} pixels exceed "
            "JPEG's limit of 65500 per side; publish to another format"
        )
    encoded = [_jpeg(image) for image in (before, after)]
    losses = [_loss(*pair) for pair in zip((before, after), encoded, strict=True)]
    compared, difference = (sum(values) for values in list(zip(*losses, strict=True))[:2])
    largest = max(loss[2] for loss in losses)
    return _Jpegs(encoded[0], encoded[1], prompt, facts, compared, difference, largest)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def _loss(image: Image.Image, encoded: bytes) -> tuple[int, int, int]:
    """The number of values, the sum of their absolute differences, and the largest one."""
    lossy = np.asarray(decode(encoded), np.int16)
    difference = np.abs(np.asarray(image, np.int16) - lossy)
    return difference.size, int(difference.sum(dtype=np.int64)), int(difference.max())


def _write_json(path: Path, content: Row) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
