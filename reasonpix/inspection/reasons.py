"""Where and why the records of a run ended: counts, kinds of reasons, and examples to show."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from reasonpix.generation.outcomes import Ending, StageEntry
from reasonpix.generation.run_folder import Status

_MAX_KINDS = 200
"""Kinds of reasons that are kept for each stage; further ones count as "other reasons"."""
_MAX_LISTED = 12
"""Kinds of reasons that the page lists for each stage."""
_PREFIX_WORDS = 4
"""Reasons that share this many first words are of one kind."""


@dataclass
class Reason:
    """Records that ended at one stage for one kind of reason."""

    stage: str
    status: Status
    words: list[str]
    """What all of them share; "…" replaces what differs."""
    count: int = 0
    examples: list[Ending] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The reason without the parts that differ between records."""
        return " ".join(self.words)[:120]

    @property
    def label(self) -> str:
        """The stage and the kind."""
        return f"{self.stage}: {self.kind}"


class Tally:
    """Counts where and why records ended, and picks the ones to show."""

    def __init__(self, entries: Sequence[StageEntry], limit: int) -> None:
        self.accepted: list[Ending] = []
        self.stages = ["source", *(entry.stage for entry in entries)]
        self._limit = limit
        self._counts = {stage: Counter[Status]() for stage in self.stages}
        self._reasons: dict[tuple[str, Status], dict[str, Reason]] = {}

    def add(self, ending: Ending) -> None:
        """Count one record. Each comes once."""
        self._counts[ending.stage][ending.status] += 1
        if ending.status == "ok":
            shown = self.accepted
        else:
            kinds = self._reasons.setdefault((ending.stage, ending.status), {})
            words = _words(ending)
            prefix = " ".join(map(_mask, words[:_PREFIX_WORDS]))
            if prefix not in kinds and len(kinds) >= _MAX_KINDS:
                prefix, words = "", ["other", "reasons"]
            reason = kinds.setdefault(prefix, Reason(ending.stage, ending.status, words))
            reason.words = _merge_words(reason.words, words)
            reason.count += 1
            shown = reason.examples
        if len(shown) < self._limit:
            shown.append(ending)

    def funnel(self) -> list[dict[str, Any]]:
        """For each stage, how many records passed it, and how many ended there."""
        passed = self.total
        stages: list[dict[str, Any]] = []
        for stage in self.stages:
            rejected, failed = self._counts[stage]["rejected"], self._counts[stage]["failed"]
            passed -= rejected + failed
            stages.append({"stage": stage, "ok": passed, "rejected": rejected, "failed": failed})
        return stages

    @property
    def total(self) -> int:
        """All records."""
        return sum(counts.total() for counts in self._counts.values())

    def reasons(self) -> list[Reason]:
        """By stage, the most frequent first; if a stage has too many, similar ones are merged."""
        reasons = []
        for stage in self.stages:
            for status in ("rejected", "failed"):
                kinds = _merge_similar(list(self._reasons.get((stage, status), {}).values()))
                reasons += sorted(kinds, key=lambda reason: -reason.count)
        return reasons

    def shown(self) -> dict[str, Ending]:
        """The records to show, by id: accepted ones, and equally many of each kind of reason."""
        picked: list[tuple[int, Ending]] = []
        reasons = self.reasons()
        for turn in range(self._limit):
            picked += [
                (kind, reason.examples[turn])
                for kind, reason in enumerate(reasons)
                if len(reason.examples) > turn
            ]
            if len(picked) >= self._limit:
                break
        others = sorted(picked[: self._limit], key=lambda it: it[0])
        return {ending.record_id: ending for ending in (*self.accepted, *(it for _, it in others))}


_QUOTED = r"'[^']*'|\"[^\"]*\""


def _words(ending: Ending) -> list[str]:
    """The words of a reason, without a file's name; a quotation is one word."""
    reason = ending.reason
    if ending.stage in ("source", "read"):
        reason = reason.partition(": ")[2] or reason
    return re.findall(rf"(?:{_QUOTED})\S*|\S+", reason)


def _mask(word: str) -> str:
    return re.sub(rf"{_QUOTED}|\d[\d.]*", "…", word)


def _merge_words(kind: list[str], reason: list[str]) -> list[str]:
    """The words that two reasons share. A measured value becomes "…"; an equal one stays."""
    if kind == reason:
        return kind
    words = [
        word if word == other else _mask(word) if _mask(word) == _mask(other) else "…"
        for word, other in zip(kind, reason, strict=False)
    ]
    if len(kind) != len(reason):  # such as lists: only the words before them agree
        words = [*takewhile(lambda word: word != "…", words), "…"]
    return [word for i, word in enumerate(words) if word != "…" or words[i - 1 : i] != ["…"]]


def _merge_similar(reasons: Sequence[Reason]) -> list[Reason]:
    """Reasons; if there are too many, those with the same first words are merged."""
    if len(reasons) <= _MAX_LISTED:
        return list(reasons)
    merged: dict[str, Reason] = {}
    for reason in reasons:
        words = reason.words[:3] + ["…"] * (len(reason.words) > 3)
        kind = merged.setdefault(" ".join(words), Reason(reason.stage, reason.status, words))
        kind.count += reason.count
        kind.examples += reason.examples
    return list(merged.values())
