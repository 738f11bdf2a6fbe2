"""How many samples runs and datasets have of each part, in the form of Table 2 of the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonpix.core.figures import counted
from reasonpix.datasets.columns import part_of
from reasonpix.datasets.formats import open_reader
from reasonpix.errors import SourceError
from reasonpix.generation.outcomes import outcome_counts, read_stages
from reasonpix.generation.run_folder import RunFolder

TABLE_2: Mapping[str, tuple[str, str, str, int]] = {
    "I": ("InstructPix2Pix", "InstructPix2Pix", "Generated", 8_013),
    "II": ("InstructPix2Pix", "Generated", "Generated", 4_141),
    "III": ("V3Det", "Generated", "Generated", 28_058),
}
"""By part: input image, edited image, instruction and number, as the paper prints them."""


@dataclass(frozen=True)
class PartCounts:
    """The samples of a run or dataset by part."""

    where: str
    samples: Mapping[str, int]
    detail: str
    """What else to know about these samples."""


def count_parts(where: str, split: str = "train") -> PartCounts:
    """Count the accepted records of a finished run, or the rows of a published dataset.

    Raises `RunError` or `SourceError` if it is neither.
    """
    run = RunFolder(where)
    if run.is_planned:
        counts, plan = outcome_counts(run), run.plan()
        part = part_of(read_stages(run))
        detail = f"of {counted(counts.total, 'record')}; the images are of {plan.source['use']}"
        return PartCounts(str(run), {part: counts.accepted}, detail)
    rows = open_reader(where, Path(), split, None)
    try:
        rows.require(["part"])
    except SourceError as error:
        raise SourceError(f"{error}; only datasets published by reasonpix name the part") from error
    samples: Counter[str] = Counter()
    unknown = Counter[str]()
    for texts in rows.texts(["part"]):
        if isinstance(texts, OSError):
            unknown["cannot be read"] += 1
        elif texts["part"] in TABLE_2:
            samples[str(texts["part"])] += 1
        else:
            unknown["name no part"] += 1
    left_out = "".join(f"; {counted(n, 'row')} that {why}" for why, n in unknown.items())
    return PartCounts(where, samples, f"of {counted(len(rows), 'row')}{left_out}")


def table_lines(counts: Sequence[PartCounts]) -> Iterator[str]:
    """Table 2 with a column of these counts, and below it what each place has."""
    totals = sum((Counter(place.samples) for place in counts), Counter[str]())
    yield _line("", "Input Image", "Edited Image", "Instruction", "Paper", "Ours")
    for part, (before, after, instruction, number) in TABLE_2.items():
        numbers = f"{number:,}", f"{totals[part]:,}"
        yield _line(f"Part {part}", before, after, instruction, *numbers)
    paper = sum(number for *_, number in TABLE_2.values())
    yield _line("Total", "", "", "", f"{paper:,}", f"{totals.total():,}")
    yield ""
    for place in counts:
        parts = ", ".join(f"Part {part} {place.samples.get(part, 0):,}" for part in TABLE_2
                          if part in place.samples)  # fmt: skip
        yield f"{place.where}: {parts or 'none'} {place.detail}"


def _line(part: str, before: str, after: str, instruction: str, paper: str, ours: str) -> str:
    return f"{part:<9} {before:<16} {after:<16} {instruction:<12} {paper:>8} {ours:>8}".rstrip()
