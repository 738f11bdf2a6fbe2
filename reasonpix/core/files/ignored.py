"""What a reader ignores, counted by reason, with the first names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_LOG = logging.getLogger(__name__)

_EXAMPLES = 3
_COLUMNS_SHOWN = 50
_REASONS_SHOWN = 12

_UNREAD_COLUMN = "a column that is not read"

_SYSTEM_FILES = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}
)
"""Files and folders that operating systems add, in lower case; most start with a dot instead."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """A file, folder, row, member or column that a reader does not read, and why.

    Files are counted by `reason`, so it is the same for all files of a kind.
    """

    name: str
    reason: str


def why_hidden(name: str) -> str | None:
    """Why a file name, or a part of a relative path, is ignored everywhere; None for others."""
    for part in name.split("/"):
        if part.lower() in _SYSTEM_FILES or part.startswith(("PaxHeader", "@PaxHeader")):
            return "a file of the operating system"
        if part.startswith("._"):
            return "metadata of macOS"
        if part.startswith(".") and part not in (".", ".."):
            return "hidden"
    return None


@dataclass
class IgnoredCounts:
    """How many were ignored for each reason, and the first names."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many were ignored."""
        return sum(self.counts.values())

    def add(self, *ignored: Ignored) -> None:
        """Count them."""
        for item in ignored:
            self.counts[item.reason] = self.counts.get(item.reason, 0) + 1
            examples = self.names.setdefault(item.reason, [])
            if len(examples) < (_COLUMNS_SHOWN if item.reason == _UNREAD_COLUMN else _EXAMPLES):
                # Names that are not UTF-8 cannot be printed.
                examples.append(item.name.encode(errors="backslashreplace").decode())

    def lines(self) -> Iterator[str]:
        """For people: a line for each reason, the most frequent first."""
        order = sorted(self.counts, key=lambda reason: -self.counts[reason])
        for reason in order[:_REASONS_SHOWN]:
            count, names = self.counts[reason], self.names[reason]
            more = " …" if count > len(names) else ""
            yield f"ignored {count}: {reason}: {', '.join(names)}{more}"
        if rest := order[_REASONS_SHOWN:]:
            count = sum(self.counts[reason] for reason in rest)
            yield f"ignored {count} for {len(rest)} more reasons, such as: {rest[0]}"

    def log(self, where: str) -> None:
        """Write the lines to the log, as warnings about the dataset `where`."""
        for line in self.lines():
            _LOG.warning("%s: %s", where, line)

    def as_json(self) -> dict[str, Any]:
        """For a file; see `from_json`."""
        return {
            reason: {"count": count, "names": self.names[reason]}
            for reason, count in self.counts.items()
        }

    @classmethod
    def from_json(cls, reasons: Mapping[str, Any]) -> IgnoredCounts:
        """Raises `KeyError` or `TypeError` for what `as_json` did not write."""
        counts = {reason: int(facts["count"]) for reason, facts in reasons.items()}
        return cls(counts, {reason: list(facts["names"]) for reason, facts in reasons.items()})


def unread_columns(columns: Iterable[str]) -> list[Ignored]:
    """Columns that a reader does not need."""
    return [Ignored(column, _UNREAD_COLUMN) for column in columns]


def unread_file(name: str, is_data: bool) -> Ignored:
    """A file of a dataset that is not read: its data belong to another split, or it has none."""
    return Ignored(name, "a file of another split" if is_data else "not a data file")
