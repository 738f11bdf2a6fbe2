"""The word lists in `vocabulary.txt`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files


def word_list(name: str) -> frozenset[str]:
    """The words of a list."""
    return frozenset(_lists()[name].split())


def pairs(name: str) -> dict[str, str]:
    """A list of pairs, such as "mouse:mice"."""
    return dict(pair.split(":") for pair in _lists()[name].split())


@cache
def _lists() -> dict[str, str]:
    text = files(__package__).joinpath("vocabulary.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", text, re.MULTILINE))
