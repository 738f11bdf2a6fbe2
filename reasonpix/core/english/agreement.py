"""Verbs and pronouns of a caption that agree with a noun phrase in number and gender."""

from __future__ import annotations

import re
from collections.abc import Iterator

from reasonpix.core.english.caption_words import CaptionWords, Edit
from reasonpix.core.english.inflection import plural, singulars
from reasonpix.core.english.noun_phrases import is_determiner
from reasonpix.core.english.vocabulary import word_list
from reasonpix.core.text import FUNCTION_WORDS, words_of

_VERBS = {"is": "are", "was": "were", "has": "have", "does": "do"}
_SINGULAR_VERBS = {many: one for one, many in _VERBS.items()}
_RELATIVES = frozenset({"that", "which", "who"})
_NO_VERBS = word_list("no verbs")
_MALE = word_list("male")
_FEMALE = word_list("female")


def verb_edits(words: CaptionWords, start: int, end: int, many: bool) -> Iterator[Edit]:
    """Edits that put the verbs of the phrase of words `start` to `end` in another number."""
    if words[start - 1] in ("is", "are", "was", "were", "s") and words[start - 2] == "there":
        yield _there(words, start - 1, many)
        return
    relative = words[end] in _RELATIVES and words.follows(end)
    if relative:
        yield from _conjugated(words, end + 1, many)
        end += 2
    if not (start == 0 or re.search(r"[.!?;:,]", words.gap(start))):
        return
    for index in range(end, len(words)):
        if not words.follows(index) and not words.is_hyphenated(index):
            return
        if words[index] in ("and", "or", *_RELATIVES):
            return
        edits = list(_conjugated(words, index, many, index == end and not relative))
        yield from edits
        if edits:
            return


def _there(words: CaptionWords, index: int, many: bool) -> Edit:
    word = words.words[index]
    if word.text == "s":  # there's
        return Edit(word.start - 1, word.end, " are") if many else Edit(word.end, word.end, "")
    table = _VERBS if many else _SINGULAR_VERBS
    return Edit(word.start, word.end, table.get(word.text, word.text))


def _conjugated(
    words: CaptionWords, index: int, many: bool, any_verb: bool = True
) -> Iterator[Edit]:
    """The edit of a word if it is a finite verb in the present, or of "to be"."""
    if index >= len(words):
        return
    word = words.words[index]
    table = _VERBS if many else _SINGULAR_VERBS
    if word.text in table:
        yield Edit(word.start, word.end, table[word.text])
    elif any_verb and word.text.isalpha() and not _is_not_a_verb(word.text):
        if many and word.text.endswith("s") and not word.text.endswith("ss"):
            yield Edit(word.start, word.end, _base(word.text))
        elif not many and not word.text.endswith("s"):
            yield Edit(word.start, word.end, plural(word.text))


def _is_not_a_verb(word: str) -> bool:
    return word in FUNCTION_WORDS or word in _NO_VERBS or bool(re.search(r"(?:ing|ed|ly|n)$", word))


def _base(verb: str) -> str:
    """ "sit" of "sits", "watch" of "watches", "carry" of "carries"."""
    if verb.endswith("ies") and len(verb) > 4:
        return verb[:-3] + "y"
    return verb[:-2] if re.search(r"(?:ss|x|zz|ch|sh|o)es$", verb) else verb[:-1]


def number_edits(words: CaptionWords, end: int, many: bool) -> Iterator[Edit]:
    """Edits of "its" after word `end`, up to the next noun phrase that it could mean."""
    table = {"its": "their", "itself": "themselves"}
    if not many:
        table = {plural_form: one for one, plural_form in table.items()}
    for index in range(end, len(words)):
        word = words.words[index]
        if is_determiner(word.text) and word.text not in table:
            return
        if word.text in table:
            yield Edit(word.start, word.end, table[word.text])


def gender_edits(words: CaptionWords, end: int, selected: str, target: str) -> Iterator[Edit]:
    """Edits of "his" and "her" after word `end`, if a man becomes a woman or the reverse."""
    before, after = _gender(selected), _gender(target)
    if not before or not after or before == after:
        return
    same = _MALE if before == "male" else _FEMALE
    others = [word.text for word in words.words if not singulars(word.text).isdisjoint(same)]
    if len(others) != 1:
        return
    for index in range(end, len(words)):
        word, following = words.words[index], words[index + 1]
        possesses = words.follows(index + 1) and following not in FUNCTION_WORDS
        male = {"his": "her", "he": "she", "him": "her", "himself": "herself"}
        female = {"her": "his" if possesses else "him", "hers": "his", "she": "he",
                  "herself": "himself"}  # fmt: skip
        changed = (male if before == "male" else female).get(word.text)
        if changed:
            capital = words.caption[word.start].isupper()
            yield Edit(word.start, word.end, changed.capitalize() if capital else changed)


def _gender(name: str) -> str:
    head = words_of(name)[-1:]
    forms = singulars(head[0]) if head else frozenset()
    if not forms.isdisjoint(_MALE):
        return "male"
    return "" if forms.isdisjoint(_FEMALE) else "female"
