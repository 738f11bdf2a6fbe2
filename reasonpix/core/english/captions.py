"""The caption of an edited image: the input's caption with another object in place of one.

    a tabby cat and a cat's toy -> a dog and a cat's toy
    The knives are on a table.  -> The forks are on a table.

Number, article, possessive and verb follow. Colour, size and the like stay, because the edited
caption is also the editor's prompt: asked for "a black dog", it paints one. Words that name a kind
of the old object ("tabby") go with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from reasonpix.core.english.agreement import gender_edits, number_edits, verb_edits
from reasonpix.core.english.caption_words import CaptionWords, Edit, apply_edits
from reasonpix.core.english.inflection import (
    indefinite_article,
    is_paired,
    is_plural,
    is_uncountable,
    plural,
    singular,
    with_article,
)
from reasonpix.core.english.noun_phrases import (
    ARTICLES,
    NUMERALS,
    NounPhrase,
    all_noun_phrases,
    contents_end,
    find_noun_phrase,
    group_of,
    is_counted,
    measure_of,
)
from reasonpix.core.english.vocabulary import word_list
from reasonpix.core.text import head_nouns, strip_article, words_of

EDITED_CAPTIONS = 3
"""Version of the rules, for the fingerprint of what uses edited captions."""

_GROUPS = word_list("groups")
"""Of many things: "a group of cats"."""

_PORTIONS = word_list("portions")
"""Of something uncountable: "a slice of pizza", but "a sandwich"."""

_CONTAINERS = word_list("containers")
_PORTIONABLE = word_list("portionable")
"""Countable things that come in slices: "a slice of cake"."""


def edited_caption(
    caption: str,
    selected: str,
    target: str,
    *,
    phrase: str = "",
    synonyms: Iterable[str] = (),
    one_of_several: bool = False,
) -> str:
    """The caption with `target` in place of what it says about `selected`.

    `phrase` is a part of the caption in which to look first, `synonyms` are other words for
    `selected`. With `one_of_several` a single thing is replaced: "two cats" become "a cat and a
    dog", not "two dogs", and "each cat" becomes "each cat and a dog". A caption that does not name
    `selected`, or that says there is none, says nothing that the edit makes wrong, so the target is
    appended.
    """
    name = _name(target)
    words = CaptionWords(caption)
    names = dict.fromkeys([selected, *synonyms, *head_nouns(selected)])
    found = find_noun_phrase(words, names, phrase)
    if found is None or _is_absent(words, found):
        return _without_mention(caption, selected, target)
    paired = _is_paired(words, found, selected)
    several = found.many or not _EACH.isdisjoint(found.determiners)
    if one_of_several and several and not found.possessive and not paired:
        edits = [_one_replaced(words, found, selected, name)]
    else:
        edits = [
            edit
            for phrase_found in (found, *_later_mentions(words, found, names))
            for edit in _all_replaced(words, phrase_found, selected, name)
        ]
        edits += gender_edits(words, found.end, selected, name)
    return apply_edits(caption, edits)


def target_phrase(target: str) -> str:
    """The target as a thing of its own: "an owl", "a pair of scissors", "the Eiffel Tower"."""
    name = _name(target)
    return name if name.startswith("the ") else with_article(name)


def _name(target: str) -> str:
    """The target without its article: "bee" for "The Bee", but "the Eiffel Tower"."""
    name = strip_article(target)
    if re.match(r"\W*(?:A|An|The)\s", target) and " " not in name and name[1:].islower():
        return name[0].lower() + name[1:]
    if re.match(r"\W*[Tt]he\s+[A-Z]\w*\b.* [A-Z]\w*\W*$", target):
        return f"the {name}"
    return name


def _without_mention(caption: str, selected: str, target: str) -> str:
    """For a caption that names the category within a word, as in Chinese, or not at all."""
    if selected and selected[0].lower() == selected[0].upper() and selected in caption:
        return caption.replace(selected, _name(target), 1)
    text = caption.rstrip()
    shown = target_phrase(target)
    end = re.search(r"[.!?…]*$", text)
    if not text or end is None:
        return shown
    return f"{text[: end.start()]}, with {shown}{end[0]}"


def _is_absent(words: CaptionWords, found: NounPhrase) -> bool:
    """Whether the caption says that there is none: "no dogs", "without a dog"."""
    return "no" in found.determiners or words[found.start - 1] in ("without", "neither")


def _is_paired(words: CaptionWords, found: NounPhrase, selected: str) -> bool:
    """Whether the phrase is a plural for one thing; "glasses" may also be several glasses."""
    return is_paired(selected) or (
        is_paired(words[found.end - 1]) and not re.search(r"(?:glass|trunk|boxer)$", selected)
    )


def _later_mentions(
    words: CaptionWords, found: NounPhrase, names: Iterable[str]
) -> Iterator[NounPhrase]:
    """Later phrases that mean the same thing: "a cat …, the cat"."""
    if found.many or found.possessive:
        return
    name = next((name for name in names if found in all_noun_phrases(words, name)), "")
    for later in all_noun_phrases(words, name):
        bare = later.determiners == ("the",) and later.head == later.start + 1 == later.end - 1
        if later.start >= found.end and bare and not later.many and later.rank == 0:
            yield later


def _all_replaced(words: CaptionWords, found: NounPhrase, selected: str, name: str) -> list[Edit]:
    """The edits of a phrase, all of which becomes the target, and of its verbs."""
    slot = _slot(words, found, selected, name)
    if found.possessive:
        return [_edit(words, slot.start, found, _possessive(slot, found, name))]
    text, many = _rendered(slot, found.attributes, name)
    holds = _CONTAINERS | _PORTIONS
    if singular(words[found.end - 1]) in holds and not holds & {*words_of(singular(name))}:
        found = replace(found, end=contents_end(words, found))
    edits = [_edit(words, slot.start, found, text)]
    if slot.was_many != many:
        edits += verb_edits(words, slot.start, found.end, many)
        edits += number_edits(words, found.end, many)
    return edits


class _Slot(NamedTuple):
    """Where to put a name: from word `start` on, after the determiners."""

    start: int
    determiners: tuple[str, ...]
    many: bool
    """Whether several things are replaced."""
    was_many: bool
    """Whether the caption has the plural."""


def _slot(words: CaptionWords, found: NounPhrase, selected: str, name: str) -> _Slot:
    measure = measure_of(words, found)
    unit = singular(measure.noun) if measure else ""
    slot = _Slot(found.start, found.determiners, found.many, found.many)
    outer = measure and _Slot(measure.start, measure.determiners, measure.many, measure.many)
    if _is_paired(words, found, selected):
        if is_paired(name) or is_counted(found.determiners):
            return slot
        if outer and unit == "pair":
            return outer
        single = {"these": "this", "those": "that", "some": "a"}
        determiners = tuple(single.get(it, it) for it in found.determiners)
        article = () if _is_owned(words, found.start) else ("a",)
        return slot._replace(determiners=determiners or article, many=False)
    if outer and found.many and unit in _GROUPS and is_uncountable(name):
        return outer._replace(determiners=())
    keeps_unit = is_uncountable(name) or (unit in ("slice", "piece") and _is_portionable(name))
    if outer and not found.many and unit in _PORTIONS and not keeps_unit:
        return outer
    if outer and not found.many and unit in _CONTAINERS | _PORTIONS:
        return slot._replace(many=not keeps_unit)
    if found.many or found.determiners not in ((), ("some",), ("any",)):
        return slot
    if _is_owned(words, found.start):
        return slot
    uncountable = is_uncountable(words[found.end - 1])
    if uncountable and is_uncountable(name):
        return slot
    listed = words[found.start - 1] in ("and", "or") or "," in words.gap(found.start)
    # "cat on sofa" has no articles, "a woman eating pizza" has them
    articles = any(words[index] in ARTICLES for index in range(found.start))
    if uncountable or (articles and not listed):
        return slot._replace(determiners=("a",))
    return slot


def _is_owned(words: CaptionWords, start: int) -> bool:
    """Whether a possessive stands where a determiner would: "a man's hat", "the dogs' bowls"."""
    before = words.caption[: words.words[start].start]
    is_short = words[start - 1] == "s" and words[start - 2] in _BEFORE_IS  # "there's"
    return not is_short and bool(re.search(r"\w['’]s\s+$|s['’]\s+$", before))


def _is_portionable(name: str) -> bool:
    return words_of(name)[-1:] != [] and words_of(name)[-1] in _PORTIONABLE


_EACH = frozenset({"each", "every"})
_BEFORE_IS = frozenset({"he", "here", "it", "she", "that", "there", "this", "what", "who"})
_SHARES = frozenset({"all", "both", "each", "either", "half", "neither", "none", "one"})
_ONE = frozenset({*ARTICLES, "one", "another", "each", "every", "this", "that", "either"})


def _rendered(slot: _Slot, attributes: tuple[str, ...], name: str) -> tuple[str, bool]:
    """The phrase that names the target, and whether it is in the plural."""
    determiners, many = slot.determiners, slot.many
    last = determiners[-1] if determiners else ""
    noun, measure = name, ""
    if name.startswith("the ") and determiners:
        determiners, noun = ("the",), name.removeprefix("the ")
    elif is_uncountable(name):
        change = {
            "another": "more",
            "each": "the",
            "every": "the",
            "these": "this",
            "those": "that",
        }
        determiners = tuple(
            change.get(it, it)
            for it in determiners
            if it not in ARTICLES and not is_counted((it,)) and it != "one"
        )
        many = False
    elif is_paired(name) and (last in _ONE or is_counted(determiners)):
        measure = "pairs of" if many else "pair of"
    elif is_paired(name):
        many = True
    elif many or is_plural(name):
        change = {
            "another": "more",
            "this": "these",
            "that": "those",
            "each": "the",
            "every": "the",
        }
        if not many:
            determiners = tuple(
                change.get(it, it) for it in determiners if it not in ARTICLES and it != "one"
            )
        noun, many = plural(name), True
    rest = " ".join([*filter(None, [measure]), *_kept(attributes, name), noun])
    if determiners and determiners[-1] in ARTICLES:
        determiners = (*determiners[:-1], indefinite_article(rest))
    return " ".join([*determiners, rest]), many


def _kept(attributes: tuple[str, ...], name: str) -> list[str]:
    """The attributes that the target has too: those of a kind that its name does not give."""
    given = {group_of(word) for word in name.split()[:-1]} - {""}
    kept = [it for it in attributes if it == "and" or group_of(it.rstrip(",")) not in given]
    while kept and kept[0] == "and":
        kept.pop(0)
    while kept and kept[-1] == "and":
        kept.pop()
    return [*kept[:-1], kept[-1].rstrip(",")] if kept else []


def _possessive(slot: _Slot, found: NounPhrase, name: str) -> str:
    text, _ = _rendered(slot, found.attributes, plural(name) if slot.many else name)
    text = re.sub(r"\bpairs? of ", "", text)
    return f"{text}'" if slot.many and text.endswith("s") else f"{text}'s"


def _edit(words: CaptionWords, start: int, found: NounPhrase, text: str) -> Edit:
    """The text in place of the words from `start` to the end of the phrase, in their case."""
    first, end = words.words[start].start, words.words[found.end - 1].end
    if found.possessive:
        ending = re.match(r"['’]s?", words.caption[end:])
        assert ending is not None
        text = text.replace("'", ending[0][0])
        end += ending.end()
    starts = start == 0 or bool(re.search(r"[.!?]", words.gap(start)))
    if words.caption[first].isupper() and (starts or found.determiners):
        text = text[0].upper() + text[1:]
    return Edit(first, end, text)


def _one_replaced(words: CaptionWords, found: NounPhrase, selected: str, name: str) -> Edit:
    """The edit of a plural phrase: one of its things becomes the target, the others stay."""
    measure = measure_of(words, found)
    start, determiners = found.start, [it for it in found.determiners if it != "all"]
    inner = words.text(found.start + len(found.determiners), found.end)
    counted = next((it for it in determiners if is_counted((it,))), "")
    number = NUMERALS.index(counted) + 1 if counted in NUMERALS else 0
    number = int(counted) if counted.isdecimal() else 2 if counted == "both" else number
    if measure and singular(measure.noun) in ("pair", "couple") and not measure.many:
        start, determiners, counted, number = measure.start, [], "", 2
    if (
        number == 2 and words[start - 1] == "of" and words[start - 2] in _SHARES
    ):  # "each of the two cats"
        rest = " ".join([*(it for it in determiners if it != counted), inner])
    elif number == 2:
        single = {"these": "this", "those": "that"}
        determiners = [single.get(it, it) for it in determiners if it != counted]
        one = singular(inner)
        article = [] if _is_owned(words, start) else [indefinite_article(one)]
        rest = " ".join([*(determiners or article), one])
    elif number > 2:
        fewer = str(number - 1) if counted.isdecimal() or number > 12 else NUMERALS[number - 2]
        rest = " ".join([fewer if it == counted else it for it in determiners] + [inner])
    else:
        rest = words.text(found.start, found.end)
    target, _ = _rendered(_Slot(0, ("a",), False, False), found.attributes, name)
    listed = words[found.end] in ("and", "or") and words.follows(found.end)
    joint = ", " if listed or words.gap(found.end).startswith(",") else " and "
    return _edit(words, start, found, f"{rest}{joint}{target}")
