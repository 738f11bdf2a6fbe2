"""How counts, lists, durations, sizes and rates are written for people, the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """The number with its noun in singular or plural: "1 record", "2,000 records"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def duration(seconds: float) -> str:
    """A duration with about three significant digits: "4.21 ms", "38 s", "2 min 5 s", "3 h 20 min".

    Only a duration of zero is "0 s".
    """
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 59.95:
        size, unit = next((it for it in _UNITS if seconds >= 0.9995 * it[0]), _UNITS[-1])
        shown = f"{seconds / size:.3g}"
        return f"{shown if seconds else 0} {unit if seconds else 's'}"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def byte_size(count: int) -> str:
    """A size in bytes with three significant digits: "812 B", "3.4 kB", "1.25 GB"."""
    if count < 1000:
        return f"{count} B"
    for unit, power in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if count < 999.5 * power or unit == "TB":
            return f"{count / power:.3g} {unit}"
    raise AssertionError


def rate(count: float, seconds: float) -> str:
    """How many per second, with three significant digits: "0.0421/s"; empty without time."""
    return f"{count / seconds:.3g}/s" if seconds > 0 else ""


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names and the number of others: "a, b, c and 2 more"."""
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {others:,} more" if others > 0 else "")
