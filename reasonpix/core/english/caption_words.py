"""A caption as words and what stands between them, and edits of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from reasonpix.core.english.vocabulary import word_list
from reasonpix.core.text import words_of

_ENGLISH = word_list("english")
_FOREIGN = word_list("foreign")


@dataclass(frozen=True)
class Word:
    """A word of a caption; `text` without case and accents, `start` and `end` in characters."""

    text: str
    start: int
    end: int


class CaptionWords:
    """A caption and its words."""

    def __init__(self, caption: str) -> None:
        self.caption = caption
        self.words = [
            Word("".join(words_of(found[0])) or found[0].casefold(), *found.span())
            for found in re.finditer(r"[^\W_]+(?:[\u0300-\u036f]+[^\W_]*)*", caption)
        ]

        texts = {word.text for word in self.words}
        latin = any(text.isascii() and text.isalpha() for text in texts)
        self.is_english = bool(texts & _ENGLISH) or (latin and not texts & _FOREIGN)
        """Guessed from frequent words."""

    def __getitem__(self, index: int) -> str:
        """A word without case and accents; empty outside of the caption."""
        return self.words[index].text if 0 <= index < len(self.words) else ""

    def __len__(self) -> int:
        """How many words."""
        return len(self.words)

    def gap(self, index: int) -> str:
        """What stands before a word, after the one before it."""
        if not 0 < index < len(self.words):
            return "."
        return self.caption[self.words[index - 1].end : self.words[index].start]

    def follows(self, index: int) -> bool:
        """Whether only space stands between a word and the one before it."""
        return self.gap(index).isspace()

    def is_hyphenated(self, index: int) -> bool:
        """Whether a hyphen joins a word to the one before it."""
        return self.gap(index) in ("-", "\u2010", "\u2011")

    def text(self, start: int, end: int) -> str:
        """Words `start` up to `end` as they are written."""
        if start >= end:
            return ""
        return self.caption[self.words[start].start : self.words[end - 1].end]


class Edit(NamedTuple):
    """Characters `start` up to `end` of a caption become the text."""

    start: int
    end: int
    text: str


def apply_edits(caption: str, edits: Iterable[Edit]) -> str:
    """The caption after edits that do not overlap, in the case that it is written in."""
    case = _case(caption)
    for start, end, text in sorted(edits, reverse=True):
        caption = caption[:start] + case(text) + caption[end:]
    return caption


def _case(caption: str) -> Callable[[str], str]:
    """A function that gives a text the caption's case: ALL CAPS, Title Case, or neither."""
    if caption.isupper() and sum(map(str.isalpha, caption)) > 3:
        return str.upper
    long_words = re.findall(r"[^\W\d_]{3,}", caption)
    if len(long_words) > 1 and all(word[0].isupper() for word in long_words):
        return _title
    return str


def _title(text: str) -> str:
    return re.sub(r"(?<![\w'’])[^\W\d_]", lambda letter: letter[0].upper(), text)
