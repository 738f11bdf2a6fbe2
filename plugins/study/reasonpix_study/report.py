"""What the workers of a study found: Table 4, how far they agree, and every answer.

Shares are means over samples, each of which counts once however many workers judged it. Their 95 %
intervals are Wilson's (1927) for as many samples: where some are judged by several workers they
are, if anything, too wide.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

from reasonpix.core import write_atomically
from reasonpix_study.store import Study, StudyAnswer

_Z = 1.959963984540054
"""The normal distribution holds 95 % within so many standard deviations."""


@dataclass(frozen=True)
class Share:
    """A share of 1 with its 95 % interval; None where nothing was counted."""

    share: float | None
    low: float | None
    high: float | None


def wilson(share: float | None, count: int) -> Share:
    """The interval of a share of `count` independent draws, sound also near 0 and 1."""
    if share is None or not count:
        return Share(None, None, None)
    z = _Z**2 / count
    centre = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z**2 / 4) / (1 + z)
    # Rounding must not put a share of 0 or 1 outside of its interval.
    return Share(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


@dataclass(frozen=True)
class Agreement:
    """How far workers agree on the samples that several of them judged."""

    samples: int
    equal: float | None
    """Share of equal answers among all pairs of answers to one sample."""
    alpha: float | None
    """Krippendorff's: 1 if all agree, 0 if no more than by chance; None if it is not defined."""


def agreement(judged: Iterable[Sequence[Hashable]]) -> Agreement:
    """Of the choices of each sample. Those of a single worker are left aside.

    Alpha is that for nominal data, with any number of workers to a sample (Krippendorff, 2011):
    one less the observed disagreement over that of answers dealt out at random. A sample's pairs
    weigh 1/(answers - 1), so that an answer has the same weight wherever it was given.
    """
    counts = [Counter(choices) for choices in judged if len(choices) > 1]
    if not counts:
        return Agreement(0, None, None)
    values = Counter(chain.from_iterable(it.elements() for it in counts))
    total = values.total()
    observed = sum(_unequal(it) / (it.total() - 1) for it in counts) / total
    expected = _unequal(values) / (total * (total - 1))
    return Agreement(len(counts), 1 - observed, 1 - observed / expected if expected else None)


def _unequal(counts: Counter[Hashable]) -> int:
    """Ordered pairs of answers that differ."""
    return counts.total() ** 2 - sum(count**2 for count in counts.values())


@dataclass(frozen=True)
class KindReport:
    """What was found by one kind of instruction."""

    samples: int
    """That somebody judged."""
    answers: int
    best: dict[str, Share]
    """By method, how often its edit was chosen as the best."""
    agreement: Agreement


@dataclass(frozen=True)
class StudyReport:
    """What a study has found so far."""

    benchmark: str
    samples: int
    """Of each kind, judged or not."""
    kinds: dict[str, KindReport]
    positions: list[Share]
    """How often the candidate in each position was chosen, of all answers."""
    workers: int
    """Who answered."""
    finished: int
    """Who answered all."""
    median_seconds: float | None
    """For an answer."""

    def print(self) -> None:
        """As a table on the console. Names are no markup."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        title = Text(f"User study · {self.benchmark}")
        table = Table("chosen as the best of all, %", title=title)
        for kind in self.kinds:
            table.add_column(Text(kind), justify="right")
        found = list(self.kinds.values())
        for method in found[0].best:
            table.add_row(Text(method), *(_percent(it.best[method]) for it in found))
        table.add_section()
        table.add_row("samples judged", *(f"{it.samples} of {self.samples}" for it in found))
        table.add_row("answers", *(str(it.answers) for it in found))
        several = [it.agreement for it in found]
        table.add_row("judged by several", *(str(it.samples) for it in several))
        table.add_row("equal answers", *(_number(it.equal, 100, " %") for it in several))
        table.add_row("Krippendorff's alpha", *(_number(it.alpha, digits=2) for it in several))
        console = Console()
        console.print(table)
        places = ", ".join(f"{n}: {_percent(it)}" for n, it in enumerate(self.positions, 1))
        console.print(f"chosen by position, %: {places}", highlight=False)
        console.print(
            f"{self.workers} workers answered, {self.finished} of them all; the median answer "
            f"took {_number(self.median_seconds)} s",
            highlight=False,
        )
        console.print(
            "In brackets: 95 % intervals (Wilson; every sample counts once, for positions every "
            "answer).",
            highlight=False,
        )


def _percent(share: Share) -> str:
    if share.share is None or share.low is None or share.high is None:
        return "–"
    return f"{100 * share.share:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f})"


def _number(value: float | None, scale: float = 1, unit: str = "", digits: int = 1) -> str:
    return "–" if value is None else f"{scale * value:.{digits}f}{unit}"


def write_report(folder: Path) -> StudyReport:
    """What was answered so far; `answers.csv` and `report.json` are written into the folder.

    Neither holds an invitation code. Raises `StudyError` for a folder that is no study.
    """
    with Study(folder) as study:
        answers, invitations, design = study.answers(), study.invitations(), study.design
    given = len(answers)
    chosen = Counter(answer.position for answer in answers)
    seconds = [answer.seconds for answer in answers if answer.seconds is not None]
    report = StudyReport(
        benchmark=design.benchmark,
        samples=design.cases,
        kinds={
            kind: _kind_report(design.methods, [it for it in answers if it.kind == kind])
            for kind in design.kinds
        },
        positions=[
            wilson(chosen[position] / given if given else None, given)
            for position in range(1, len(design.methods) + 1)
        ],
        workers=sum(it.answered > 0 for it in invitations),
        finished=sum(it.answered == it.total for it in invitations),
        median_seconds=median(seconds) if seconds else None,
    )
    write_atomically(folder / "answers.csv", _csv(answers).encode())
    content = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    write_atomically(folder / "report.json", content.encode())
    return report


def _kind_report(methods: Sequence[str], answers: Sequence[StudyAnswer]) -> KindReport:
    judged: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        judged[answer.case].append(answer.chosen)
    best = {}
    for method in methods:
        shares = [choices.count(method) / len(choices) for choices in judged.values()]
        best[method] = wilson(fmean(shares) if shares else None, len(shares))
    return KindReport(len(judged), len(answers), best, agreement(judged.values()))


def _csv(answers: Iterable[StudyAnswer]) -> str:
    """All answers as they were given; workers by number."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    head = ("worker", "sample", "kind", "instruction", "shown", "chosen", "position")
    rows.writerow((*head, "seconds", "time"))
    for it in answers:
        time = datetime.fromtimestamp(it.time, UTC).isoformat(timespec="seconds")
        row: tuple[Any, ...] = (it.worker, it.case, it.kind, it.instruction, "|".join(it.shown))
        rows.writerow((*row, it.chosen, it.position, it.seconds, time))
    return text.getvalue()
