"""The results of a study: Table 4, the workers' agreement, and every answer.

Shares are means over samples, each of which counts once, however many workers judged it. Their 95 %
intervals are Wilson's (1927) for that number of samples; they are conservative if several workers
judged some.
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
"""Quantile of the normal distribution for two-sided 95 % intervals."""


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] with its 95 % interval; None without data."""

    share: float | None
    low: float | None
    high: float | None


def wilson(share: float | None, count: int) -> Share:
    """Wilson's interval of a share of `count` independent draws, which also holds near 0 and 1."""
    if share is None or not count:
        return Share(None, None, None)
    z = _Z**2 / count
    centre = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z**2 / 4) / (1 + z)
    # Rounding must not put a share of 0 or 1 outside of its interval.
    return Share(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


@dataclass(frozen=True)
class Agreement:
    """The workers' agreement on samples that several of them judged."""

    samples: int
    equal: float | None
    """Share of equal answers among all pairs of answers to one sample."""
    alpha: float | None
    """Krippendorff's alpha: 1 is full agreement, 0 is chance; None if it is undefined."""


def agreement(judged: Iterable[Sequence[Hashable]]) -> Agreement:
    """The agreement of `judged`, the choices for each sample; single choices are ignored.

    Krippendorff's alpha for nominal data and any number of workers per sample (2011): 1 minus the
    ratio of observed disagreement to that expected by chance. The pairs of a sample weigh
    1/(answers - 1), so that all answers have the same weight.
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
    """The results for one kind of instruction."""

    samples: int
    """Judged at least once."""
    answers: int
    best: dict[str, Share]
    """By method, the share of its edits that were chosen as the best."""
    agreement: Agreement


@dataclass(frozen=True)
class StudyReport:
    """The results of a study so far."""

    benchmark: str
    samples: int
    """Of each kind, judged or not."""
    kinds: dict[str, KindReport]
    positions: list[Share]
    """By position, the share of answers that chose the candidate there."""
    workers: int
    """Workers with at least one answer."""
    finished: int
    """Workers who answered everything."""
    median_seconds: float | None
    """Median time of an answer."""

    def print(self) -> None:
        """Print a table. Names are plain text, never markup."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        title = Text(f"User study · {self.benchmark}")
        table = Table("chosen as the best of all, %", title=title)
        for kind in self.kinds:
            table.add_column(Text(kind), justify="right")
        kinds = list(self.kinds.values())
        for method in kinds[0].best:
            table.add_row(Text(method), *(_percent(it.best[method]) for it in kinds))
        table.add_section()
        table.add_row("samples judged", *(f"{it.samples} of {self.samples}" for it in kinds))
        table.add_row("answers", *(str(it.answers) for it in kinds))
        several = [it.agreement for it in kinds]
        table.add_row("judged by several", *(str(it.samples) for it in several))
        table.add_row("equal answers", *(_number(it.equal, 100, " %") for it in several))
        table.add_row("Krippendorff's alpha", *(_number(it.alpha, digits=2) for it in several))
        console = Console()
        console.print(table)
        places = ", ".join(f"{n}: {_percent(it)}" for n, it in enumerate(self.positions, 1))
        console.print(f"chosen by position, %: {places}", highlight=False)
        console.print(
            f"{self.workers} workers answered, {self.finished} of them everything; "
            f"the median answer took {_number(self.median_seconds)} s",
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
    """The results so far; writes `answers.csv` and `report.json` into the folder.

    Neither contains invitation codes. Raises `StudyError` if the folder is not a study.
    """
    with Study(folder) as study:
        answers, invitations, design = study.answers(), study.invitations(), study.design
    total = len(answers)
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
            wilson(chosen[position] / total if total else None, total)
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
    """All answers; workers appear by number."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    head = ("worker", "sample", "kind", "instruction", "shown", "chosen", "position")
    rows.writerow((*head, "seconds", "time"))
    for it in answers:
        time = datetime.fromtimestamp(it.time, UTC).isoformat(timespec="seconds")
        row: tuple[Any, ...] = (it.worker, it.case, it.kind, it.instruction, "|".join(it.shown))
        rows.writerow((*row, it.chosen, it.position, it.seconds, time))
    return text.getvalue()
