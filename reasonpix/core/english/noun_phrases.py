"""Find the noun phrase of a caption that names a category, without a parser.

"three large tabby cats" has the determiner "three", the attribute "large", and the head "cats";
"tabby" names a kind of cat, so it belongs to the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from reasonpix.core.english.caption_words import CaptionWords
from reasonpix.core.english.inflection import is_plural, is_unchanged, share_singular, singular
from reasonpix.core.english.vocabulary import word_list
from reasonpix.core.text import FUNCTION_WORDS, words_of

ARTICLES = frozenset({"a", "an"})
NUMERALS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
_OF_ONE = word_list("determiners of one")
_OF_MANY = word_list("determiners of many") | frozenset(NUMERALS[1:])
_DETERMINERS = ARTICLES | {*NUMERALS} | _OF_ONE | _OF_MANY | word_list("determiners of any number")

_COLOURS = word_list("colours")
_SIZES = word_list("sizes")
_OTHER_ATTRIBUTES = word_list("other attributes")
_KINDS_IN_ING = word_list("kinds in ing")
_NOUNS_IN_Y = word_list("nouns in y")
_COMPOUNDS = word_list("compounds of another kind")
"""Compounds that do not name a kind of their last word: a hot dog."""

_AFTER_A_NOUN = word_list("after a noun")

VERBAL = re.compile(r".*[aeiouy].*(?:ing|(?<!e)ed)")
"""Participles: "lying" and "striped", but not "ring", "bed" or "seed"."""


@dataclass(frozen=True)
class NounPhrase:
    """Words `start` up to `end` of a caption, split into their parts."""

    start: int
    end: int
    head: int
    """Where the noun begins, with the words that name its kind."""
    determiners: tuple[str, ...]
    attributes: tuple[str, ...]
    """What the replacement keeps: colour and size, not the kind."""
    many: bool
    rank: int
    """0 for a phrase of its own, 1 for a possessive, 2 for a part of a compound."""

    @property
    def possessive(self) -> bool:
        """Whether "'s" follows."""
        return self.rank == 1


def find_noun_phrase(
    words: CaptionWords, names: Iterable[str], near: str = ""
) -> NounPhrase | None:
    """The phrase that names a category, by the first of its names that occurs.

    A phrase of its own is preferred to a possessive ("the cat's toy") and to a part of a compound
    ("cat bed"); among equals the one in the text `near`, then the first. A compound is taken whole.
    """
    position = words.caption.find(near) if near else -1

    def order(found: NounPhrase) -> tuple[int, bool, int]:
        end = words.words[found.end - 1].end
        return found.rank, not (0 <= position < end <= position + len(near)), found.start

    for name in names:
        if found := list(all_noun_phrases(words, name)):
            return min(found, key=order)
    return None


def all_noun_phrases(words: CaptionWords, name: str) -> Iterator[NounPhrase]:
    """Every phrase that names a category, in the order of the caption."""
    for first, last in _mentions(words, name):
        if f"{words[first - 1]}-{singular(words[last])}" not in _COMPOUNDS:
            rank = 1 if _is_possessive(words, last) else 2 if _is_modifier(words, last) else 0
            yield _phrase(words, first, last, rank)


def is_determiner(word: str) -> bool:
    """Whether a word begins a noun phrase: "a", "two", "his"."""
    return word in _DETERMINERS or word.isdecimal()


def is_counted(determiners: Iterable[str]) -> bool:
    """Whether one of the determiners asks for the plural: "two", "several"."""
    return any(it in _OF_MANY - {"these", "those"} or it.isdecimal() for it in determiners)


def group_of(attribute: str) -> str:
    """The group of an attribute: "colour", "size" or "other"; "" for another word."""
    parts = re.split(r"[-\u2010\u2011 ]", attribute.casefold())
    last = parts[-1]
    if last in _COLOURS:
        return "colour"
    if last in _SIZES:
        return "size"
    if last in _OTHER_ATTRIBUTES or attribute.casefold() in _OTHER_ATTRIBUTES:
        return "other"
    if VERBAL.fullmatch(last) and last not in _KINDS_IN_ING:
        return "other"
    if re.search(r"(?:..ful|less|..ous|...ish|..ive|..ern|like)$", last):
        return "other"
    if re.search(r"..[^aeiou]y$", last) and not _names_a_kind(last):
        return "other"
    return ""


def _names_a_kind(word: str) -> bool:
    return word in _NOUNS_IN_Y or bool(re.search("(?:berry|ery|ity|ory|logy|graphy|fly)$", word))


def _mentions(words: CaptionWords, name: str) -> Iterator[tuple[int, int]]:
    """First and last word of each place where a name stands, in any number."""
    parts = words_of(name)
    if re.search(r"[^\w\s-]", name):  # "c++ book"
        for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", words.caption, re.IGNORECASE):
            within = [i for i, word in enumerate(words.words) if word.start in range(*found.span())]
            if within:
                yield within[0], within[-1]
    for first in range(len(words)):
        for last in range(first, min(first + max(len(parts), 4), len(words))):
            inner = range(first + 1, last + 1)
            if not all(words.follows(i) or words.is_hyphenated(i) for i in inner):
                break
            if _is_written(words, first, last, parts):
                yield first, last
                break


def _is_written(words: CaptionWords, first: int, last: int, parts: list[str]) -> bool:
    """Whether words are those of a name, which may be written open, hyphenated, or closed."""
    written = [words[i] for i in range(first, last + 1)]
    if len(written) == len(parts):
        return all(map(share_singular, written, parts))
    # "hour glass" for "hourglass", but not "be an" for "bean"
    joined = min(map(len, written)) > 2
    joined = joined or all(words.is_hyphenated(i) for i in range(first + 1, last + 1))
    return joined and share_singular("".join(written), "".join(parts))


def _is_possessive(words: CaptionWords, last: int) -> bool:
    word = words.words[last]
    quoted = words.caption[: words.words[last].start].endswith(("'", "‘"))
    after = words.caption[word.end : word.end + 3]
    return bool(re.match(r"['’]s(?!\w)", after)) or (
        word.text.endswith("s") and not quoted and bool(re.match(r"['’]\s", after))
    )


def _is_modifier(words: CaptionWords, last: int) -> bool:
    """Whether a noun seems to follow: "cat bed", but not "cat sleeping" or "cats sit"."""
    after = words[last + 1]
    if words.is_hyphenated(last + 1):
        return True
    noun = words.is_english and after.isascii() and after.isalpha()
    if not (noun and words.follows(last + 1)) or is_plural(words[last]):
        return False
    return not (
        after in FUNCTION_WORDS
        or after in _DETERMINERS
        or after in _AFTER_A_NOUN
        or VERBAL.fullmatch(after)
        or re.search(r"(?:ly|[^s]s|wards?)$", after)
    )


def _phrase(words: CaptionWords, first: int, last: int, rank: int) -> NounPhrase:
    while rank == 2 and _is_modifier(words, last):
        last += 1
    start = _modifiers(words, first) if words.is_english else first
    determiner = start
    while words.is_english and _is_adjacent_determiner(words, determiner - 1, determiner):
        determiner -= 1
    if words.gap(determiner) in ("'", "’") and words[determiner] == "s":
        determiner += 1
    head, attributes = _attributes(words, start, first)
    determiners = tuple(words[i] for i in range(determiner, start))
    many = is_plural(words[last])
    if is_unchanged(words[last]):
        many = not determiners or any(it in _OF_MANY or it.isdigit() for it in determiners)
    return NounPhrase(determiner, last + 1, head, determiners, attributes, many, rank)


def _is_adjacent_determiner(words: CaptionWords, index: int, before: int) -> bool:
    if index < 0 or not words.follows(before):
        return False
    return is_determiner(words[index])


def _modifiers(words: CaptionWords, first: int) -> int:
    """Where the words begin that stand between the determiner and the noun."""
    start = first
    while start > 0 and first - start < 7:
        word = words[start - 1]
        if not words.is_hyphenated(start):
            joined = word == "and" and group_of(words[start]) and group_of(words[start - 2])
            comma = words.gap(start) == ", " and group_of(word) and group_of(words[start])
            if not (words.follows(start) or comma) or word.isdigit():
                break
            known = bool(group_of(word)) and word not in _DETERMINERS
            if word in ("s", "t") or not (known or joined or _may_modify(word)):
                break
        start -= 1
    for index in range(start, first):
        if not words.is_hyphenated(index) and _is_verb(words, start, index):
            start = index + 1
    return start


def _may_modify(word: str) -> bool:
    return not (word in _DETERMINERS or word in FUNCTION_WORDS or word in _AFTER_A_NOUN)


def _is_verb(words: CaptionWords, start: int, index: int) -> bool:
    """Whether a word before the noun is a verb: "riding" in "a man riding horses"."""
    word = words[index]
    verbal = VERBAL.fullmatch(word) or re.search(r"..[^s]s$", word)
    if index == start:
        bare = not _is_adjacent_determiner(words, index - 1, index)
        return bool(bare and verbal and index > 0 and not is_sentence_start(words, index))
    before = words[index - 1]
    if group_of(before) or group_of(word) in ("colour", "size"):
        return False
    return bool(verbal) or (is_plural(before) and not group_of(word))


def is_sentence_start(words: CaptionWords, index: int) -> bool:
    """Whether a word begins the caption or one of its clauses."""
    return index == 0 or bool(re.search(r"[.!?;:,]", words.gap(index)))


def _attributes(words: CaptionWords, start: int, first: int) -> tuple[int, tuple[str, ...]]:
    """Where the noun begins, and the attributes before it, as they are written."""
    units: list[tuple[int, int]] = []
    for index in range(start, first):
        if units and words.is_hyphenated(index):
            units[-1] = (units[-1][0], index + 1)
        else:
            units.append((index, index + 1))
    head = first
    if units and units[-1][1] == first and words.is_hyphenated(first):
        head = units.pop()[0]  # "t-shirt"
    kept: list[str] = []
    for number, (begin, end) in enumerate(units):
        text = words.text(begin, end)
        if text == "and" and not (kept and number + 1 < len(units)):
            continue
        if group_of(text) or (text == "and" and group_of(words.text(*units[number + 1]))):
            kept.append(text + ("," if words.gap(end).startswith(",") else ""))
    return head, tuple(kept)


@dataclass(frozen=True)
class Measure:
    """What a phrase is measured by: "two slices" in "two slices of pizza"."""

    start: int
    noun: str
    determiners: tuple[str, ...]
    many: bool


def contents_end(words: CaptionWords, phrase: NounPhrase) -> int:
    """The word after the contents of a container: after "cup of hot coffee"."""
    end = phrase.end
    if words[end] != "of" or not words.follows(end):
        return end
    end += 1
    while words.follows(end) and _may_modify(words[end]) and not VERBAL.fullmatch(words[end]):
        end += 1
    return end


def measure_of(words: CaptionWords, phrase: NounPhrase) -> Measure | None:
    """What stands before "of" and a phrase without determiners."""
    if phrase.determiners or words[phrase.start - 1] != "of" or not words.follows(phrase.start):
        return None
    noun = phrase.start - 2
    if noun < 0:
        return None
    found = _phrase(words, noun, noun, 0)
    return Measure(found.start, words[noun], found.determiners, found.many)
