"""Which noun phrases of a caption name a thing that is in the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum, auto

from .phrases import Phrase, PhraseFinder
from .tags import Word, correct_tags
from .words import Dictionary, word_lists


class _Verdict(Enum):
    THING = auto()
    LIKENESS = auto()
    """A thing that shows others, which are not there: "a statue of a horse"."""
    NOTHING = auto()
    """Not a thing: an amount, a side, a time, the picture itself."""
    NOT_THERE = auto()
    """A thing that the caption says is not there: "without a hat"."""


def things(words: Sequence[Word], dictionary: Dictionary) -> Iterator[Phrase]:
    """The phrases that name a thing in the picture, in order. Corrects the tags of `words`."""
    correct_tags(words, dictionary)
    before: Phrase | None = None
    verdict = _Verdict.NOTHING
    any_thing = False
    for phrase in PhraseFinder(words, dictionary).phrases():
        owner = before if before and _is_of(words, before, phrase) else None
        continues = before is not None and (
            _is_joined(words, before, phrase) if owner is None else _only_measures(owner)
        )
        if owner and verdict is _Verdict.LIKENESS:
            verdict = _Verdict.NOT_THERE
        elif not (continues and verdict is _Verdict.NOT_THERE):
            verdict = _judge(words, phrase, owner, any_thing, dictionary)
        before = phrase
        if verdict in (_Verdict.THING, _Verdict.LIKENESS):
            any_thing = True
            yield phrase


def _judge(
    words: Sequence[Word],
    phrase: Phrase,
    owner: Phrase | None,
    any_thing: bool,
    dictionary: Dictionary,
) -> _Verdict:
    lists = word_lists()
    if _is_absent(words, phrase):
        return _Verdict.NOT_THERE
    if _is_attribute(words, phrase) or sum(map(str.isalpha, phrase.name)) < 2:
        return _Verdict.NOTHING
    if {phrase.name, phrase.head} & (lists.pictures | lists.views):
        return _judge_picture(words, phrase, any_thing)
    if phrase.name in lists.names:
        return _Verdict.THING
    if phrase.head in lists.abstract or _measures(words, phrase) or _only_measures(phrase):
        is_group = phrase.name in lists.groups and _word(words, phrase.last + 1) != "of"
        return _Verdict.THING if is_group else _Verdict.NOTHING
    last = words[phrase.last].lower
    if phrase.name == last and last in lists.descriptions | lists.played and not phrase.determiner:
        return _Verdict.NOTHING  # "in white", "playing football"
    if phrase.name == phrase.head and dictionary.is_gerund(phrase.head):
        return _Verdict.NOTHING
    if _is_place(words, phrase) and not _shows(owner):
        return _Verdict.NOTHING
    return _Verdict.LIKENESS if phrase.head in lists.likenesses else _Verdict.THING


def _judge_picture(words: Sequence[Word], phrase: Phrase, any_thing: bool) -> _Verdict:
    """A picture is a thing if it is in the picture."""
    lists = word_lists()
    before, after = _word(words, phrase.begin - 1), _word(words, phrase.last + 1)
    if phrase.name in lists.names:
        return _Verdict.THING
    if {phrase.name, phrase.head} & lists.views or before in lists.taking:
        return _Verdict.NOTHING
    is_whole = phrase.determiner in ("the", "this") and before in ("in", "of")
    is_thing = after in lists.mounted or (any_thing and not is_whole)
    return _Verdict.LIKENESS if is_thing else _Verdict.NOTHING


def _is_absent(words: Sequence[Word], phrase: Phrase) -> bool:
    """Whether it is not there, or only compared, or what a thing is made of."""
    if phrase.determiner in ("no", "neither"):
        return True
    match [word.lower for word in words[: phrase.begin]]:
        case [*_, "without" | "lacking"]:
            return True
        case [*before, "like"]:
            return "what" not in before
        case [*before, "as"]:
            return before[-1:] not in (["such"], ["well"])
        case [*_, made, "out", "of"] | [*_, made, "of" | "from" | "with"]:
            return made in word_lists().made
    return False


def _is_attribute(words: Sequence[Word], phrase: Phrase) -> bool:
    """Whether it only describes another thing: an owner, a label, "a horse drawn carriage"."""
    lists = word_lists()
    before = _word(words, phrase.begin - 1)
    if not phrase.determiner and before in lists.saying:
        return True
    if before == "by" and _word(words, phrase.begin - 2) in lists.pictures:
        return True  # "photo by"
    match words[phrase.last + 1 : phrase.last + 3]:
        case [Word(tag="POS"), *_]:
            return True
        case [Word(tag="VBN" | "VBD") as participle, noun]:
            described = noun.is_noun and participle.lower not in lists.saying
            return described and bool(phrase.determiner)
    return False


def _is_place(words: Sequence[Word], phrase: Phrase) -> bool:
    """Whether it says where the picture was taken: "in Paris"."""
    bare = phrase.is_proper and not phrase.determiner
    return bare and _word(words, phrase.begin - 1) in word_lists().where


def _measures(words: Sequence[Word], phrase: Phrase) -> bool:
    """Whether it is an amount or a side in this place: "the tail end of", "10 feet tall"."""
    lists = word_lists()
    after = words[phrase.last + 1] if phrase.last + 1 < len(words) else None
    if phrase.head in lists.units and phrase.is_counted and after and after.is_adjective:
        return True
    return phrase.head in lists.sides and after is not None and after.lower == "of"


def _only_measures(phrase: Phrase) -> bool:
    """Whether it is an amount, a group or a side, by the name alone."""
    lists = word_lists()
    return phrase.name in lists.groups | lists.quantities | lists.sides


def _shows(owner: Phrase | None) -> bool:
    """Whether it is a picture."""
    lists = word_lists()
    return owner is not None and owner.head in lists.pictures | lists.views


def _is_of(words: Sequence[Word], before: Phrase, phrase: Phrase) -> bool:
    """Whether the two are joined by "of"."""
    return phrase.begin == before.last + 2 and _word(words, phrase.begin - 1) == "of"


def _is_joined(words: Sequence[Word], before: Phrase, phrase: Phrase) -> bool:
    """Whether they share a determiner, as in "no cars or people"."""
    between = words[before.last + 1 : phrase.begin]
    return not phrase.determiner and bool(between) and all(w.tag in ("CC", ",") for w in between)


def _word(words: Sequence[Word], i: int) -> str:
    return words[i].lower if 0 <= i < len(words) else ""
