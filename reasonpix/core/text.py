"""Match English words in any inflected form, and tell content words from function words.

The `leak` filter uses it to check that an instruction does not give the edit away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from reasonpix.core.english.inflection import share_singular, singulars, without_accents


def mentions(text: str, name: str) -> bool:
    """Whether a text contains a name as whole words, in any case, number or regular verb form.

    "Bee" is in "Two bees!" and not in "beekeeper"; "snow" is in "it snowed" and "snowing"; "desk
    lamp" is in "desk-lamps" and "desklamp"; "honeybee" is in "honey-bees", but not in "honey bee",
    or "bean" would be in "it must be an apple".
    """
    name_words, text_words = words_of(name), words_of(text)
    if not name_words:
        return False
    closed = [re.sub(r"\W", "", compound) for compound in _COMPOUND.findall(_plain(text))]
    if any(_share_lemma(word, "".join(name_words)) for word in (*text_words, *closed)):
        return True
    size = len(name_words)
    return any(
        all(map(_share_lemma, text_words[start : start + size], name_words))
        for start in range(len(text_words) - size + 1)
    )


_WORD = re.compile(r"[^\W_]+")
_COMPOUND = re.compile(r"[^\W_]+(?:[-\u2010][^\W_]+)+")


def _plain(text: str) -> str:
    """Without case, accents and typographic variants."""
    return without_accents(text.casefold())


def words_of(text: str) -> list[str]:
    """The words of a text, without case, accents and punctuation."""
    return _WORD.findall(_plain(text))


@lru_cache(maxsize=1 << 16)
def _lemmas(word: str) -> frozenset[str]:
    """The possible lemmas of a word: a noun of its plural, or a verb of its -ing or -ed form.

    "hating" comes from "hate", not from "hat": a short word doubles its last letter.
    """
    forms = set(singulars(word))
    for form in singulars(word):
        ending = _VERB_ENDING.fullmatch(form)
        if ending is None:
            continue
        stem = ending[1]
        if stem[-1] == stem[-2:-1]:
            forms |= {stem, stem[:-1]}  # "falling", "running"
        elif _SHORT.fullmatch(stem):
            forms.add(stem + "e")
        elif stem.endswith("i"):
            forms |= {stem, stem + "e", stem[:-1] + "y"}  # "skiing", "tied", "carried"
        elif stem.endswith("e"):
            forms.add(stem)  # "being" has nothing to do with bees
        else:
            forms |= {stem, stem + "e"}  # "painting", "dancing"
    return frozenset(forms)


_VERB_ENDING = re.compile(r"(?!.*eed$)(.*[aeiouy].*)(?:ing|ed)")
_SHORT = re.compile(r"[^aeiouy]*[aeiouy][^aeiouywx]")
"""One syllable with a short vowel, such as "hat" and "run"."""


def _share_lemma(a: str, b: str) -> bool:
    return not _lemmas(a).isdisjoint(_lemmas(b))


def canonical(name: str, names: Iterable[str]) -> str | None:
    """The entry of `names` that `name` means, or None.

    Case, number, punctuation, hyphens, spaces and a determiner make no difference ("The Bees" is
    "bee"), but a more similar entry goes first.
    """
    candidates = list(names)
    if name in candidates:
        return name
    for wording in (words_of, _undetermined):
        closed = "".join(wording(name))
        for candidate in candidates:
            if closed and share_singular(closed, "".join(wording(candidate))):
                return candidate
    return None


def closest(name: str, names: Iterable[str]) -> str | None:
    """The entry of `names` that `name` refers to, if it must be one of them, or None.

    It is `canonical`, or the only entry that ends like `name`: "hydrant" and "the red fire hydrant"
    are "fire hydrant". A name that mentions other entries too ("bowl of soup") matches none.
    """
    candidates = list(dict.fromkeys(names))
    if (same := canonical(name, candidates)) is not None:
        return same
    alike = [candidate for candidate in candidates if _end_alike(name, candidate)]
    mentioned = [candidate for candidate in candidates if mentions(name, candidate)]
    if len(alike) == 1 and all(mentions(alike[0], other) for other in mentioned):
        return alike[0]
    return None


def _end_alike(name: str, other: str) -> bool:
    """Whether one name consists of the last words of the other."""
    pairs = list(zip(reversed(words_of(name)), reversed(words_of(other)), strict=False))
    return bool(pairs) and all(share_singular(a, b) for a, b in pairs)


_DETERMINERS = frozenset(
    words_of(
        """
        a an any both each every few her his its many my one our several some that the their these
        this those your two three four five six seven eight nine ten
        """
    )
)


def _undetermined(name: str) -> list[str]:
    """The words of a name without the determiners in front of it: "the two bees" is "bees"."""
    words = words_of(name)
    while len(words) > 1 and (words[0] in _DETERMINERS or words[0].isdecimal()):
        del words[0]
    return words


FUNCTION_WORDS = frozenset(
    words_of(
        """
        a about above across after again against all along also although always am among an and
        another any anyone anything are aren around as at away be because been before behind
        being below beside between beyond both but by can could couldn did didn do does doesn
        doing don done down during each either else enough even ever every everybody everyone
        everything few for from had hadn has hasn have haven having he her here hers herself him
        himself his how however i if in instead into is isn it its itself just less let like ll
        many may maybe me might mine more most much must my myself near neither never no nobody
        nor not nothing now of off often on once one only onto or other others our ours out over
        own perhaps quite rather re same shall she should shouldn since so some somebody someone
        something sometimes somewhere soon still such than that the their theirs them themselves
        then there these they this those though through till to together too toward towards
        under until up upon us ve very was wasn we were weren what whatever when where whether
        which while who whoever whole whom whose why will with within without won would wouldn
        yet you your yours
        """
    )
)
"""English words that carry grammar rather than content, and fragments of "don't"."""


def content_words(text: str) -> list[str]:
    """The words of a text except function words, in order, without repeats."""
    words = dict.fromkeys(words_of(text))
    return [word for word in words if word not in FUNCTION_WORDS and len(word) > 1]


def one_line(text: str) -> str:
    """The text with every run of white space replaced by a single space."""
    return " ".join(text.split())


def is_text(value: object) -> bool:
    """Whether `value` is a string, not blank, and without lone surrogates, which JSON allows."""
    return (
        isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)
    )


def strip_article(name: str) -> str:
    """A name without its article and surrounding punctuation."""
    bare = one_line(name).strip(" .,;:!?\"'`*“”„‘’«»")
    return re.sub(r"^(an?|the) (?=\w)", "", bare, flags=re.IGNORECASE)


def head_nouns(name: str) -> list[str]:
    """The name of a thing and its last word: "monarch butterfly" and "butterfly"."""
    return list(dict.fromkeys([name, *words_of(name)[-1:]]))
