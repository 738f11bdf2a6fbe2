"""Publish a finished run as a dataset: Hugging Face parquet with a card."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from reasonpix import __version__
from reasonpix.errors import RunError
from reasonpix.images import UndecodableImage, encode_png
from reasonpix.outcomes import Endings, Outcome, StageEntry, endings, outcomes, read_stages
from reasonpix.run import RunFolder
from reasonpix.summary import position_bias

ROWS_PER_FILE = 1000

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXT = {"dtype": "string", "_type": "Value"}

# The first three are what diffusers' InstructPix2Pix trainer reads. Parts I, II and III share the
# columns, so that they can be concatenated; what a part does not know is null.
_FIELDS: list[tuple[str, pa.DataType, dict[str, Any]]] = [
    ("input_image", _IMAGE, {"_type": "Image"}),
    ("edit_prompt", pa.string(), _TEXT),
    ("edited_image", _IMAGE, {"_type": "Image"}),
    ("direct_instruction", pa.string(), _TEXT),
    ("record_id", pa.string(), _TEXT),
    ("source_id", pa.string(), _TEXT),
    ("caption", pa.string(), _TEXT),
    ("edited_caption", pa.string(), _TEXT),
    ("candidates", pa.list_(pa.string()), {"feature": _TEXT, "_type": "List"}),
    ("chosen", pa.int32(), {"dtype": "int32", "_type": "Value"}),
    ("selected", pa.string(), _TEXT),
    ("target", pa.string(), _TEXT),
    (
        "box",
        pa.list_(pa.float32()),
        {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"},
    ),
    ("scores", pa.string(), _TEXT),
]
_SCHEMA = pa.schema(
    [(name, kind) for name, kind, _ in _FIELDS],
    metadata={
        "huggingface": json.dumps({"info": {"features": {n: f for n, _, f in _FIELDS}}}),
    },
)


def publish(run: RunFolder, out: Path) -> int:
    """Write the accepted samples of `run` to the new folder `out`; returns their number.

    `datasets.load_dataset(str(out))` loads it. Images are lossless PNG of the size that the
    pipeline saw. The folder appears complete or not at all. Raises `RunError` when the run is
    not finished, accepted nothing, or `out` exists.
    """
    if out.exists():
        raise RunError(f"{out} exists; publish to a new folder, or remove it first")
    accepted = (outcome for outcome in outcomes(run) if outcome.status == "ok")
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    (draft / "data").mkdir(parents=True)
    try:
        total = 0
        while chunk := list(islice(accepted, ROWS_PER_FILE)):
            table = pa.Table.from_pylist([_row(outcome) for outcome in chunk], schema=_SCHEMA)
            name = f"train-{total // ROWS_PER_FILE:05d}.parquet"
            pq.write_table(table, draft / "data" / name, compression="zstd", row_group_size=100)
            total += len(chunk)
        if total == 0:
            raise RunError(f"{run.root} accepted no sample; see `reasonpix gallery {run.root}`")
        (draft / "README.md").write_text(card(run, total), encoding="utf-8")
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return total


def _row(outcome: Outcome) -> dict[str, Any]:
    sample = outcome.sample
    plan, pair, given, chosen = sample.plan, sample.item.pair, sample.candidates, sample.selection
    try:
        image, edited = sample.image(), sample.edited_png()
    except (UndecodableImage, OSError) as error:
        raise RunError(f"{sample.item.native_id}: {error}") from error
    return {
        "input_image": {"bytes": encode_png(image), "path": None},
        "edit_prompt": sample.instruction,
        "edited_image": {"bytes": edited, "path": None},
        "direct_instruction": pair.instruction if pair else None,
        "record_id": sample.record_id,
        "source_id": sample.item.native_id,
        "caption": sample.caption.text if sample.caption else None,
        "edited_caption": pair.caption if pair else None,
        "candidates": [one.instruction for one in given.candidates] if given else None,
        "chosen": chosen.chosen if chosen else None,
        "selected": plan.selected if plan else None,
        "target": plan.target if plan else None,
        "box": list(sample.box.xyxy) if plan else None,
        "scores": json.dumps(dict(outcome.scores), sort_keys=True),
    }


def card(run: RunFolder, total: int) -> str:
    """The dataset's README.md: what made it, how many came through, and why the others did not.

    Nothing in it changes from one run of the same recipe to the next.
    """
    entries = read_stages(run)
    ended = endings(run)
    head = {
        "pretty_name": "Reasoning edits made with reasonpix",
        "task_categories": ["image-to-image"],
        "language": ["en"],
        "size_categories": [_size(total)],
        "tags": ["instruction-based-image-editing", "reasonpix"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        "# Reasoning edits made with reasonpix",
        "",
        f"{total} triples of input image, reasoning instruction and edited image, made by the "
        f"pipeline of ReasonPix2Pix (CVPRW 2024) as implemented in reasonpix {__version__}.",
        "Images keep their source's licence; what a model made, that of the model named below.",
        "",
        "## What made it",
        "",
        "| stage | component | options | weights |",
        "|---|---|---|---|",
        *(_component_line(entry) for entry in entries if entry.component["use"]),
        "",
        "## How many came through",
        "",
        "| stage | ok | rejected | failed |",
        "|---|---|---|---|",
        *(
            f"| {stage} | {counts['ok']} | {counts['rejected']} | {counts['failed']} |"
            for stage, counts in ended.stages
        ),
        "",
        *([f"{bias}.", ""] if (bias := position_bias(run)) else []),
        "## Why the others did not",
        "",
        *(_ends(ended) or ["Every record was accepted."]),
        "",
        "## Columns",
        "",
        "`input_image`, `edit_prompt`, `edited_image` are what diffusers' InstructPix2Pix trainer "
        "reads: `edit_prompt` is the reasoning instruction. `direct_instruction`, `edited_caption` "
        "and `candidates` (of which `chosen` is the index of the one taken) belong to rewritten "
        "pairs; `selected`, `target` and `box` (XYXY in pixels of the input image) to replaced "
        "objects. `scores` is JSON of what the filters measured; `source_id` names the image in "
        "its source.",
        "",
        "## Recipe",
        "",
        "```yaml",
        _recipe(run),
        "```",
        "",
    ]
    return "\n".join(lines)


def _recipe(run: RunFolder) -> str:
    """The resolved recipe, without what leaves no trace in the dataset."""
    lines = (run.root / "recipe.yaml").read_text(encoding="utf-8").strip().split("\n")
    return "\n".join(line for line in lines if not line.startswith("shard_size:"))


def _component_line(entry: StageEntry) -> str:
    component = entry.component
    options = ", ".join(f"{k}={v}" for k, v in entry.options.items() if v is not None)
    weights = component.get("weights", "")
    return f"| {entry.stage} | {component['use']} | {options} | {weights[:12]} |"


def _ends(ended: Endings) -> list[str]:
    counts = dict(ended.stages)
    return [
        f"- {stage}: {counts[stage][status]} {status}, such as: {' '.join(reason.split())}"
        for (stage, status), reason in sorted(ended.examples.items())
    ]


def _size(total: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if total < limit:
            return name
    return "100K<n<1M"
