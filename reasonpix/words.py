"""English words that mean the same: the matching behind the check that nothing is given away."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def mentions(text: str, name: str) -> bool:
    """Whether a text holds a name as whole words, in any case, singular or plural.

    "Bee" is in "Two bees!" and not in "beekeeper"; "desk lamp" is in "desk-lamps" and
    "desklamp"; "honeybee" is in "honey-bees", but not in "honey bee", or "bean" would be in
    "it must be an apple".
    """
    wanted, found = words_of(name), words_of(text)
    if not wanted:
        return False
    closed = [re.sub(r"\W", "", compound) for compound in _COMPOUND.findall(_plain(text))]
    if any(_same_word(word, "".join(wanted)) for word in (*found, *closed)):
        return True
    size = len(wanted)
    return any(
        all(map(_same_word, found[start : start + size], wanted))
        for start in range(len(found) - size + 1)
    )


_WORD = re.compile(r"[^\W_]+")
_COMPOUND = re.compile(r"[^\W_]+(?:[-\u2010][^\W_]+)+")

_PLURALS = (
    ("people", "person"), ("children", "child"), ("men", "man"), ("mice", "mouse"),
    ("lice", "louse"), ("feet", "foot"), ("teeth", "tooth"), ("geese", "goose"), ("oxen", "ox"),
    ("dice", "die"), ("i", "us"), ("ae", "a"), ("ves", "f"), ("ves", "fe"), ("ies", "y"),
    ("zzes", "z"), ("sses", "s"), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"),
    ("shes", "sh"), ("oes", "o"),
)  # fmt: skip
"""Endings of English plurals and their singulars; a final s is seen to apart."""


def _plain(text: str) -> str:
    """Without case, accents and typographic variants."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def words_of(text: str) -> list[str]:
    """The words of a text, without case, accents and punctuation."""
    return _WORD.findall(_plain(text))


def _singulars(word: str) -> set[str]:
    """The word, and what it may be the plural of. Forms that are no words do no harm."""
    forms = {word}
    for plural, singular in _PLURALS:
        if word.endswith(plural):
            forms.add(word.removesuffix(plural) + singular)
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        forms.add(word[:-1])
    return forms


def _same_word(one: str, other: str) -> bool:
    return not _singulars(one).isdisjoint(_singulars(other))


def canonical(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` is, exactly or but for case, plural, hyphens and spaces."""
    candidates = list(names)
    if name in candidates:
        return name
    closed = "".join(words_of(name))
    for candidate in candidates:
        if closed and _same_word(closed, "".join(words_of(candidate))):
            return candidate
    return None
