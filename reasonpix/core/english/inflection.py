"""The forms of English nouns: plural, singulars, and the indefinite article.

A noun may have several words: the head is inflected, as in "glasses of water" and "fire trucks".
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from reasonpix.core.english.vocabulary import pairs, word_list

_IRREGULAR = pairs("irregular plurals")
"""Also as the last part of a closed compound: firemen, bookshelves."""

_IRREGULAR_ALONE = pairs("irregular plurals of whole words")

_REGULAR = word_list("regular plurals")
"""Words that end like an irregular one: human, mongoose."""

_UNCHANGED = word_list("unchanged")

PAIRED = word_list("paired")
"""Nouns that are plural for a single thing: "the scissors are", "a pair of scissors"."""

_PLURAL_ONLY = PAIRED | word_list("plural only")

UNCOUNTABLE = word_list("uncountable")
"""Nouns that take no indefinite article: "snow on the ground"."""

_NOT_PLURAL = word_list("not plural")
"""Words that only look like a plural: lens, omen."""

_IN_E = word_list("singular in e")
"""Words that keep the "e" of their plural: axe, movie."""


@lru_cache(maxsize=1 << 12)
def plural(noun: str) -> str:
    """The plural of a singular noun, "mice" of "mouse"; a plural stays as it is."""
    if is_plural(noun):
        return noun
    start, head, end = _split(noun)
    return f"{start}{_plural_word(head)}{end}"


@lru_cache(maxsize=1 << 12)
def is_plural(noun: str) -> bool:
    """Whether a noun is in the plural: "mice" and "scissors", but not "bus"; "sheep" is not."""
    head = _split(noun)[1].lower()
    if head in _PLURAL_ONLY:
        return True
    if head in _UNCHANGED | _NOT_PLURAL | UNCOUNTABLE or re.search(r"(?:[su]s|sis)$", head):
        return False
    return any(one != head and _plural_word(one) == head for one in singulars(head))


@lru_cache(maxsize=1 << 12)
def singular(noun: str) -> str:
    """The singular of a plural noun; a singular, and what has none ("scissors"), stays."""
    start, head, end = _split(noun)
    lower = head.lower()
    if not is_plural(noun) or lower in _PLURAL_ONLY - {"glasses", "people"}:
        return noun
    return f"{start}{_spelled_like(head, _singular_word(lower))}{end}"


def _singular_word(lower: str) -> str:
    if lower[:-1] in _IN_E:
        return lower[:-1]
    irregular = [one for one in singulars(lower) if _irregular_plural(one) == lower]
    if irregular:
        return min(irregular, key=lambda one: (one not in _IRREGULAR_ALONE, len(one)))
    if lower.endswith("ies") and len(lower) > 4:
        return lower[:-3] + "y"
    stem = lower.removesuffix("es")
    if re.search(r"(?:ch|sh|x|ss|zz|[^aeiou]z|[^o]us)$", stem) or stem in _NOT_PLURAL:
        return stem
    return lower[:-1]


def is_unchanged(noun: str) -> bool:
    """Whether singular and plural are the same, as of "sheep"."""
    return _split(noun)[1].lower() in _UNCHANGED


def is_uncountable(noun: str) -> bool:
    """Whether a noun takes no indefinite article, as "snow"."""
    return _split(noun)[1].lower() in UNCOUNTABLE


def is_paired(noun: str) -> bool:
    """Whether a noun is a plural that names a single thing, as "scissors"."""
    return _split(noun)[1].lower() in PAIRED


def _split(noun: str) -> tuple[str, str, str]:
    """What stands before and after the word that is inflected, with that word between."""
    phrase = re.match(r"(.*?)(?=[ -](?:of|in|with|without|on|at|for|to|by)(?:[ -]|$))", noun, re.I)
    if phrase is None or not phrase[1].strip():
        front, end = noun, ""
    else:
        front, end = phrase[1], noun[phrase.end() :]
    head = re.search(r"[^\W_]+(?=[^\w]*$)", front)
    if head is None:
        return front, "", end
    return front[: head.start()], head[0], front[head.end() :] + end


def _plural_word(word: str) -> str:
    lower = word.lower()
    if lower in _UNCHANGED or "LATIN" not in unicodedata.name(word[-1:] or " ", ""):
        return word
    irregular = _irregular_plural(lower)
    if irregular is not None:
        return _spelled_like(word, irregular)
    if word.isupper() and len(word) > 1:
        return word + "s"  # TVs, SUVs
    if re.search(r"(?:[^aeiou]|qu)y$", lower):
        return word[:-1] + "ies"
    if re.search(r"(?:s|x|z|ch|sh)$", lower):
        return word + "es"
    return word + "s"


def _spelled_like(word: str, form: str) -> str:
    """A lower-case form of a word, in the word's case."""
    same = [a == b for a, b in zip(word.lower(), form, strict=False)]
    kept = [*same, False].index(False)
    ending = form[kept:].upper() if len(word) > 1 and word.isupper() else form[kept:]
    return word[:kept] + ending


def _irregular_plural(lower: str) -> str | None:
    if lower in _IRREGULAR_ALONE:
        return _IRREGULAR_ALONE[lower]
    if lower in _REGULAR:
        return None
    for singular, many in _IRREGULAR.items():
        if lower.endswith(singular):
            return lower.removesuffix(singular) + many
    return None


_ENDINGS = (
    ("i", "us"), ("ae", "a"), ("ves", "f"), ("ves", "fe"), ("ies", "y"), ("zzes", "z"),
    ("sses", "s"), ("ses", "s"), ("ses", "sis"), ("xes", "x"), ("xes", "xis"), ("zes", "z"),
    ("ches", "ch"), ("shes", "sh"), ("oes", "o"),
)  # fmt: skip
"""Endings of plurals and their singulars; `singulars` handles a plain final -s."""


@lru_cache(maxsize=1 << 16)
def singulars(word: str) -> frozenset[str]:
    """A lower-case word and its possible singulars. Forms that are not words do no harm."""
    forms = {word}
    for singular, many in _IRREGULAR_ALONE.items():
        if word == many:
            forms.add(singular)
    for singular, many in _IRREGULAR.items():
        if word.endswith(many):
            forms.add(word.removesuffix(many) + singular)
    for ending, singular in _ENDINGS:
        if word.endswith(ending):
            forms.add(word.removesuffix(ending) + singular)
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        forms.add(word[:-1])
    return frozenset(forms)


def share_singular(a: str, b: str) -> bool:
    """Whether two lower-case words may be forms of one noun."""
    return not singulars(a).isdisjoint(singulars(b))


def without_accents(text: str) -> str:
    """The text with plain letters: "cafe" of "café"."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


# -- The article ----------------------------------------------------------------------------------

_SPELLED = word_list("spelled")
_UNPRONOUNCEABLE = re.compile(r"[^AEIOUY]+$|[HLMNX][^AEIOUY]|F[^AEIOULRY]|R[^AEIOUHY]")
_VOWEL_SOUND = re.compile(
    r"(?!eu|ewe|one\b|once\b|onesie|ouija|u[bfkst][aeiou]|uk[aeiour]|ur[aiou][^c]|unanim|uni(?!d|l|m|n))"
    r"[aeiou]|heir|honest|honou?r|hour"
)


def indefinite_article(phrase: str) -> str:
    """ "a" or "an", by the sound of the phrase: an hour, an X-ray, an 8-ball; a unicorn, a UFO."""
    found = re.match(r"\W*([^\W_]+)", phrase)
    if found is None:
        return "a"
    word = found[1]
    if word[0].isdigit():
        return "an" if re.match(r"8|1[18](?!\d)|1[18]\d{3}(?!\d)", word) else "a"
    spelled = len(word) == 1 or (
        word.isupper() and (word in _SPELLED or _UNPRONOUNCEABLE.match(word) is not None)
    )
    if spelled:
        return "an" if word[0].upper() in "AEFHILMNORSX" else "a"
    return "an" if _VOWEL_SOUND.match(without_accents(word.lower())) else "a"


def with_article(name: str) -> str:
    """The name as one thing: "an owl", "a pair of scissors", "water", "flowers"."""
    if is_paired(name):
        name = f"pair of {name}"
    elif is_uncountable(name) or is_plural(name):
        return name
    return f"{indefinite_article(name)} {name}"
