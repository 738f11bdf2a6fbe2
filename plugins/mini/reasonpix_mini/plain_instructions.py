"""Add to a published dataset of the mini world what each edit is in plain words.

    python -m reasonpix_mini.plain_instructions runs/part1-dataset --out runs/part1-plain

The column `plain_instruction` always reads "Replace the bee with a rabbit.", whatever template the
direct instruction of the row came from. The connector is aligned to CLIP's states of it: a text
that follows from the edit alone can be learnt, a template drawn by chance cannot.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reasonpix_mini import lexicon, world


def plain_instruction(caption: str, edited_caption: str) -> str:
    """The instruction that turns one captioned scene into the other. One object differs."""
    before, after = lexicon.mentioned(caption), lexicon.mentioned(edited_caption)
    (source,), (target,) = before - after, after - before
    return replaced(source, target)


def replaced(source: str, target: str) -> str:
    """The plain words for an edit of two categories."""
    return f"Replace the {source} with {world.indefinite(target)}."


def main() -> None:
    """Copy the dataset's parquet files with the column added."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="what `reasonpix publish` wrote")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    files = sorted(args.dataset.glob("data/*.parquet"))
    if not files:
        parser.error(f"{args.dataset} holds no data/*.parquet; publish a run")
    if args.out.exists():
        parser.error(f"{args.out} exists; name a new folder")
    (args.out / "data").mkdir(parents=True)
    for file in files:
        table = pq.read_table(file)
        # Parts II and III know the categories, Part I both captions.
        rows = table.select(["selected", "target", "caption", "edited_caption"]).to_pylist()
        texts = [
            replaced(row["selected"], row["target"])
            if row["selected"]
            else plain_instruction(row["caption"], row["edited_caption"])
            for row in rows
        ]
        # Without the metadata that lists the columns there were.
        table = table.append_column("plain_instruction", pa.array(texts)).replace_schema_metadata()
        pq.write_table(table, args.out / "data" / file.name, row_group_size=100)


if __name__ == "__main__":
    main()
