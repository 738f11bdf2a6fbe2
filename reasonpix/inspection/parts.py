"""How many samples runs and datasets have of each part, in the form of Table 2 of the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonpix.core.figures import counted
from reasonpix.core.files.encodings import read_front_matter
from reasonpix.datasets.card import SOURCE_KEY
from reasonpix.datasets.columns import part_of
from reasonpix.datasets.formats import open_reader
from reasonpix.errors import SourceError
from reasonpix.generation.outcomes import endings_of, read_stages, verdicts
from reasonpix.generation.run_folder import RunFolder

TABLE_2: Mapping[str, tuple[str, str, str, int]] = {
    "I": ("InstructPix2Pix", "InstructPix2Pix", "Generated", 8_013),
    "II": ("InstructPix2Pix", "Generated", "Generated", 4_141),
    "III": ("V3Det", "Generated", "Generated", 28_058),
}
"""By part: input image, edited image, instruction and number, as the paper prints them."""


@dataclass(frozen=True)
class PartRecords:
    """The samples of a run or dataset by part."""

    where: str
    records: Mapping[str, Sequence[str]]
    """Record ids by part; one that names the row, where a row has none."""
    detail: str
    """What else to know about these samples."""


def read_parts(where: str, split: str = "train") -> PartRecords:
    """The accepted records of a finished run, or the rows of a published dataset, by part.

    Raises `RunError` or `SourceError` if it is neither.
    """
    run = RunFolder(where)
    return _of_run(run) if run.is_planned else _of_dataset(where, split)


def _of_run(run: RunFolder) -> PartRecords:
    entries, total = read_stages(run), 0
    accepted: list[str] = []
    for ending in endings_of(run, entries, verdicts(run, entries)):
        total += 1
        if ending.status == "ok":
            accepted.append(ending.record_id)
    detail = f"of {counted(total, 'record')}; {_source(run.plan().source['use'])}"
    return PartRecords(str(run), {part_of(entries): accepted}, detail)


def _of_dataset(where: str, split: str) -> PartRecords:
    rows = open_reader(where, Path(), split, None)
    try:
        rows.require(["part"])
    except SourceError as error:
        raise SourceError(f"{error}; only datasets published by reasonpix name the part") from error
    columns = [name for name in ("part", "record_id") if name in ("part", *rows.columns)]
    records: dict[str, list[str]] = {}
    unknown = Counter[str]()
    for number, texts in enumerate(rows.texts(columns)):
        if isinstance(texts, OSError):
            unknown["cannot be read"] += 1
        elif texts["part"] in TABLE_2:
            record_id = texts.get("record_id") or rows.name(number)
            records.setdefault(str(texts["part"]), []).append(str(record_id))
        else:
            unknown["name no part"] += 1
    left_out = "".join(f"; {counted(n, 'row')} that {why}" for why, n in unknown.items())
    source = _source(read_front_matter(Path(where, "README.md")).get(SOURCE_KEY))
    return PartRecords(where, records, f"of {counted(len(rows), 'row')}{left_out}; {source}")


def _source(name: object) -> str:
    return f"source of the images: {name or 'not recorded'}"


def table_lines(places: Sequence[PartRecords]) -> Iterator[str]:
    """Table 2 with a column of these counts, and below it what each place has.

    A record of a part counts once, even if several places list it.
    """
    listed = {part: [it for p in places for it in p.records.get(part, ())] for part in TABLE_2}
    totals = {part: len(set(records)) for part, records in listed.items()}
    yield _line("", "Input Image", "Edited Image", "Instruction", "Paper", "Ours")
    for part, (before, after, instruction, number) in TABLE_2.items():
        numbers = f"{number:,}", f"{totals[part]:,}"
        yield _line(f"Part {part}", before, after, instruction, *numbers)
    paper = sum(number for *_, number in TABLE_2.values())
    yield _line("Total", "", "", "", f"{paper:,}", f"{sum(totals.values()):,}")
    yield ""
    for place in places:
        parts = ", ".join(f"Part {part} {len(place.records[part]):,}" for part in TABLE_2
                          if part in place.records)  # fmt: skip
        yield f"{place.where}: {parts or 'none'} {place.detail}"
    for part, records in listed.items():
        repeated = sum(n > 1 for n in Counter(records).values())
        if repeated:
            yield (
                f"Part {part}: {counted(repeated, 'record')} listed more than once, "
                "each counted once"
            )


def _line(part: str, before: str, after: str, instruction: str, paper: str, ours: str) -> str:
    return f"{part:<9} {before:<16} {after:<16} {instruction:<12} {paper:>8} {ours:>8}".rstrip()
