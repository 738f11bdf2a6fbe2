"""What of a caption is English: without links, file names, emoji and a captioner's stammering."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_NOT_WORDS = re.compile(
    r"(?:\w+://|www\.)\S*"
    r"|\S*\w\.(?:jpe?g|png|gif|webp|bmp|tiff?|avif|hei[cf]|svg|mp4|mov|pdf|zip|com|org|net)\b\S*"
    r"|[#@]\w+"
    r"|\S*\w_\w\S*"
    r"|\b[A-Z]{2,}\d{2,}\b"
    r"|\bar+af+\w*",
    re.IGNORECASE,
)
"""Links, files, hashtags, handles, names of cameras; and "arafed", which BLIP-2 makes up."""

_REPEATED = re.compile(r"\b(\w+) and (?=\1\b)", re.IGNORECASE)
_ENDS = " .,;:…"
_JOINED = str.maketrans("()[]{}<>|/", "        ,,")
_TOKEN = re.compile(r"\S+")


@dataclass(frozen=True)
class Cleaned:
    """Text to parse; character i of it is character `origins[i]` of the caption."""

    text: str
    origins: tuple[int, ...]


def clean(caption: str) -> Cleaned:
    """The caption without what is not English and without a full stop at the end.

    It is in lower case where its case says nothing.
    """
    caption = caption.rstrip(_ENDS)
    kept = list(caption)
    for match in _NOT_WORDS.finditer(caption):
        kept[match.start() : match.end()] = " " * len(match[0])
    for i, letter in enumerate(kept):
        if not _is_latin(letter):
            kept[i] = "," if kept[i - 1] == " " else " "
    text = "".join(kept).translate(_JOINED)
    text = _REPEATED.sub(lambda match: " " * len(match[0]), text)
    letters: list[str] = []
    origins: list[int] = []
    previous = ""
    for token in _TOKEN.finditer(text):
        word = token[0].lower()
        if word == previous and word.isalpha():
            continue
        previous = word
        if letters:
            letters.append(" ")
            origins.append(token.start() - 1)
        letters += token[0]
        origins += range(token.start(), token.end())
    words = _without_capitals("".join(letters)).rstrip(_ENDS)
    return Cleaned(words, tuple(origins[: len(words)]))


def _is_latin(letter: str) -> bool:
    if letter.isascii():
        return True
    if letter.isalpha():
        return unicodedata.name(letter, "").startswith("LATIN")
    return letter in "’‘“”–—‐" or unicodedata.category(letter) == "Mn"


def _without_capitals(text: str) -> str:
    """In lower case, if all or most words start with a capital; else only the first word."""
    words = [word for word in text.split() if word[0].isalpha()]
    capitals = sum(word[0].isupper() for word in words)
    if not capitals:
        return text
    if text.isupper() or (len(words) > 2 and capitals > 0.6 * len(words)):
        return _lower(text)
    if len(words) == 1 or not words[1][0].isupper():
        return _lower(text[: len(words[0])]) + text[len(words[0]) :] if text[0].isalpha() else text
    return text


def _lower(text: str) -> str:
    """In lower case, with as many characters."""
    return "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in text)
