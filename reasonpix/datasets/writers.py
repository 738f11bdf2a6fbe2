"""The files of a published dataset of edits: Hugging Face parquet, InstructPix2Pix, WebDataset.

Each writer takes the accepted outcomes one by one, so only a few are in memory at a time. The same
outcomes give the same bytes.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from reasonpix.core.images import UndecodableImage, decode, encode_png
from reasonpix.core.parallel import Size, prefetch
from reasonpix.core.text import strip_article
from reasonpix.errors import RunError
from reasonpix.generation.outcomes import Outcome
from reasonpix.plugin.samples import Sample

Row = dict[str, Any]
FILE = Size(rows=1000, bytes=500_000_000)
"""Limit of a parquet file or tar of images: files are read in parallel, and there are few."""

GROUP = Size(rows=100, bytes=32_000_000)
"""Limit of a row group of images, which must fit into memory."""


@dataclass(frozen=True)
class Written:
    """The result of a writer."""

    rows: int
    notes: tuple[str, ...] = ()
    """Sentences for the card that depend on the data."""


# -- Features: the types of columns, as `datasets` calls them -------------------------------------

Feature = Mapping[str, Any]

IMAGE: Feature = {"_type": "Image"}


def value(dtype: str) -> Feature:
    """A plain value, such as `string` or `float32`."""
    return {"dtype": dtype, "_type": "Value"}


def many(feature: Feature) -> Feature:
    """A list of values or of structs (a mapping of names to features)."""
    return {"feature": feature, "_type": "List"}


TEXT = value("string")


def schema_of(features: Mapping[str, Feature]) -> pa.Schema:
    """The parquet schema of columns, with the metadata from which `datasets` reads features."""
    info = json.dumps({"info": {"features": features}})
    fields = [(name, _arrow(feature)) for name, feature in features.items()]
    return pa.schema(fields, metadata={"huggingface": info})


def _arrow(feature: Feature) -> pa.DataType:
    match feature.get("_type"):
        case "Image":
            return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        case "Value":
            return pa.type_for_alias(feature["dtype"])
        case "List":
            return pa.list_(_arrow(feature["feature"]))
        case _:
            return pa.struct([(name, _arrow(part)) for name, part in feature.items()])


# diffusers' InstructPix2Pix trainer reads the first three. All parts share the columns, so their
# datasets can be concatenated; columns that a part does not fill are null.
FEATURES: Mapping[str, Feature] = {
    "input_image": IMAGE,
    "edit_prompt": TEXT,
    "edited_image": IMAGE,
    "direct_instruction": TEXT,
    "record_id": TEXT,
    "source_id": TEXT,
    "caption": TEXT,
    "edited_caption": TEXT,
    "candidates": many(TEXT),
    "chosen": value("int32"),
    "selected": TEXT,
    "target": TEXT,
    "box": many(value("float32")),
    "scores": TEXT,
}


# -- Hugging Face ---------------------------------------------------------------------------------


def write_parquet(accepted: Iterator[Outcome], folder: Path, size: Size = FILE) -> Written:
    """`data/train-00000.parquet` …: images as lossless PNG, `scores` as JSON."""
    rows = prefetch(parquet_row, accepted)
    return Written(write_rows(rows, schema_of(FEATURES), folder, size, GROUP, image_bytes))


def parquet_row(outcome: Outcome) -> Row:
    """A row of the columns `FEATURES`."""
    before, after = _images(outcome.sample)
    facts = facts_of(outcome)
    return facts | {
        "input_image": {"bytes": encode_png(before), "path": None},
        "edited_image": {"bytes": after, "path": None},
        "scores": json.dumps(facts["scores"], sort_keys=True),
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


def facts_of(outcome: Outcome) -> Row:
    """All facts about an edit except its images. None where the part of the paper has no value."""
    sample = outcome.sample
    plan, pair, selection = sample.plan, sample.item.pair, sample.selection
    candidates = sample.candidates.candidates if sample.candidates else None
    return {
        "edit_prompt": sample.instruction,
        "direct_instruction": pair.instruction if pair else None,
        "record_id": sample.record_id,
        "source_id": sample.item.native_id,
        "caption": sample.caption.text if sample.caption else None,
        "edited_caption": pair.caption if pair else None,
        "candidates": [c.instruction for c in candidates] if candidates is not None else None,
        "chosen": selection.chosen if selection else None,
        "selected": plan.selected if plan else None,
        "target": plan.target if plan else None,
        "box": list(sample.box.xyxy) if plan else None,
        "scores": dict(outcome.scores),
    }


def _images(sample: Sample) -> tuple[Image.Image, bytes]:
    """The input image as RGB, and the edited image as PNG."""
    try:
        return sample.image(), sample.edited_png()
    except (UndecodableImage, OSError) as error:
        raise RunError(f"{sample.item.native_id}: {error}") from error


def _without_nulls(facts: Row) -> Row:
    return {name: fact for name, fact in facts.items() if fact not in (None, {})}


# -- WebDataset -----------------------------------------------------------------------------------


def write_webdataset(accepted: Iterator[Outcome], folder: Path, size: Size = FILE) -> Written:
    """`data/train-00000.tar` …: `<record id>.input.png`, `.edited.png` and `.json` of each sample.

    Time, owner and mode are fixed, so that equal samples give equal bytes.
    """

    def members(outcome: Outcome) -> list[tuple[str, bytes]]:
        before, after = _images(outcome.sample)
        facts = json.dumps(_without_nulls(facts_of(outcome)), ensure_ascii=False, sort_keys=True)
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
    return Written(total)


def _member(name: str, data: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644  # the other fields default to 0 and ""
    return member


# -- InstructPix2Pix ------------------------------------------------------------------------------

_SEED = "0"
"""Each folder holds one edit."""


def write_instruct_pix2pix(accepted: Iterator[Outcome], folder: Path) -> Written:
    """The layout of timothybrooks/instruct-pix2pix: a folder for each sample.

    ```
    seeds.json                [[dir, [seed]], …]
    0000000/prompt.json       {"input": caption, "edit": instruction, "output": edited caption}
    0000000/facts.jsonl       all other facts
    0000000/0_0.jpg, 0_1.jpg  before, after
    ```
    """
    total = compared = difference = largest = 0
    for sample in prefetch(_jpegs, accepted):
        at = folder / f"{total:07d}"
        at.mkdir()
        (at / f"{_SEED}_0.jpg").write_bytes(sample.before)
        (at / f"{_SEED}_1.jpg").write_bytes(sample.after)
        _write_json(at / "prompt.json", sample.prompt)
        _write_json(at / "facts.jsonl", sample.facts)
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


def _jpegs(outcome: Outcome) -> _Jpegs:
    before, png = _images(outcome.sample)
    after = decode(png)
    facts = facts_of(outcome)
    prompt = {
        "input": facts.pop("caption"),
        "edit": facts.pop("edit_prompt"),
        "output": facts.pop("edited_caption") or derived_caption(outcome.sample),
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
    facts = {"seed": int(_SEED), **_without_nulls(facts)}
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


def derived_caption(sample: Sample) -> str:
    """The input's caption, with the target in place of the selected category.

    "a bee and a rabbit" becomes "an owl and a rabbit". If the caption does not name the category,
    the replacement is appended.
    """
    assert sample.plan is not None and sample.caption is not None
    caption, plan = sample.caption.text, sample.plan
    spellings = [
        strip_article(entity.text) for entity in sample.entities if entity.category == plan.selected
    ]
    for words in (*spellings, plan.selected):
        match = re.search(rf"(?:\b(an?)\s+)?(?<!\w){re.escape(words)}(?!\w)", caption, re.I)
        if match:
            target = with_article(match[1], plan.target)
            return caption[: match.start()] + target + caption[match.end() :]
    return f"{caption}, with {with_article('a', plan.target)} in the place of the {plan.selected}"


_VOWEL_SOUND = re.compile(
    r"(?!eu|one\b|u[bfkst][aeiou]|uni(?!n))[aeiou]|(?:heir|honest|hour)", re.I
)
"""Words that start with a vowel sound: an hour and an umbrella, but a unicorn and a European."""


def with_article(article: str | None, name: str) -> str:
    """The name with the right indefinite article ("an owl") if `article` is one."""
    if not article:
        return name
    right = "an" if _VOWEL_SOUND.match(name) else "a"
    return f"{right.capitalize() if article[0].isupper() else right} {name}"
