"""The words of a caption with their parts of speech, corrected where captions mislead a tagger.

Taggers are trained on sentences with verbs. In "a fire hydrant on the street" they see an
adjective, in "a polar bear swimming in a pool" a noun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .words import Dictionary, word_lists


@dataclass
class Word:
    """A word at characters `start` to `end` of a text, with its tag of the Penn Treebank."""

    text: str
    tag: str
    start: int
    end: int

    @property
    def lower(self) -> str:
        """The word in lower case, with typewriter hyphens and apostrophes."""
        return self.text.lower().replace("‐", "-").replace("’", "'")

    @property
    def is_noun(self) -> bool:
        """Whether it is a noun, common or proper."""
        return self.tag.startswith("NN")

    @property
    def is_adjective(self) -> bool:
        """Whether it is an adjective."""
        return self.tag.startswith("JJ")

    @property
    def is_proper(self) -> bool:
        """Whether it is a proper noun."""
        return self.tag.startswith("NNP")


_UNKNOWN = ("UH", "FW", "XX", "ADD", "LS", "$")
_DETERMINERS = ("DT", "PRP$", "POS", "CD")


def correct_tags(words: Sequence[Word], dictionary: Dictionary) -> None:
    """Correct the tags in place, with what the dictionary knows."""
    lists = word_lists()
    for i, word in enumerate(words):
        is_known = dictionary.is_noun(word.lower)
        if word.lower in lists.hyphenated or word.lower.replace("-", " ") in lists.names:
            word.tag = "NN"
        elif not word.is_noun:
            if is_known and _stands_as_noun(words, i, dictionary):
                word.tag = "NNS" if dictionary.is_irregular_plural(word.lower) else "NN"
        elif "-" in word.lower and not is_known and _describes(words, i):
            word.tag = "JJ"
        elif dictionary.is_gerund(word.lower) and i and words[i - 1].is_noun:
            if not (i + 1 < len(words) and words[i + 1].is_noun):
                word.tag = "VBG"
        elif word.tag == "NNS" and _is_predicate(words, i, dictionary):
            word.tag = "VBZ"
        elif word.tag == "NN" and _is_plural_predicate(words, i, dictionary):
            word.tag = "VBP"
        elif word.text[0].isupper() and not is_known:
            word.tag = "NNP"
        elif word.is_proper and word.text[0].islower() and is_known:
            word.tag = "NN"


def _is_predicate(words: Sequence[Word], i: int, dictionary: Dictionary) -> bool:
    """Whether the plural noun `i` is the verb of "a boat sails" or "a flock of geese flies"."""
    singular, first = dictionary.singular(words[i].lower), i
    if singular == words[i].lower or not dictionary.is_verb(singular):
        return False
    if _tag(words, i + 1).startswith("NN"):
        return False
    if _follows_group(words, i, dictionary):
        return True
    while first and words[first - 1].tag in ("NN", "NNP"):
        first -= 1
    counts = {word.lower for word in words[max(first - 1, 0) : i]} & (
        word_lists().quantities | {"few", "couple"}
    )
    # "a" allows for no plural
    return first < i and not counts and _article(words, first) in ("a", "an")


def _follows_group(words: Sequence[Word], i: int, dictionary: Dictionary) -> bool:
    """Whether a group of several things stands before word `i`: "a flock of white geese"."""
    lists, first, several = word_lists(), i - 1, words[i - 1].lower if i else ""
    while first > 0 and words[first - 1].tag.startswith(("JJ", "NN")):
        first -= 1
    if first < 2 or words[first - 1].lower != "of":
        return False
    group = words[first - 2].lower
    if dictionary.is_irregular_plural(several):
        return group in lists.groups
    # not "a group of sports fans"
    return group in lists.herds and (words[i - 1].tag == "NNS" or several in lists.same_plural)


def _is_plural_predicate(words: Sequence[Word], i: int, dictionary: Dictionary) -> bool:
    """Whether noun `i` is the verb of "two geese fly": such a plural describes no noun."""
    if not i or not dictionary.is_irregular_plural(words[i - 1].lower):
        return False
    return dictionary.is_verb(words[i].lower) and not _tag(words, i + 1).startswith("NN")


def _describes(words: Sequence[Word], i: int) -> bool:
    """Whether word `i` stands before what it describes, as "half-eaten" does."""
    return _tag(words, i + 1).startswith(("NN", "JJ", "VBN", "VBG"))


def _stands_as_noun(words: Sequence[Word], i: int, dictionary: Dictionary) -> bool:
    """Whether word `i`, tagged as another part of speech, is a noun here."""
    word, before, after = words[i], _tag(words, i - 1), _tag(words, i + 1)
    ends_phrase = not after.startswith(("NN", "JJ"))
    article = _article(words, i)
    determined = before in _DETERMINERS or (before.startswith("JJ") and article in ("a", "an"))
    if word.tag in _UNKNOWN or dictionary.contradicts(word.tag, word.lower):
        return True
    if word.is_adjective:
        if word.lower in word_lists().descriptions:
            return False
        if not dictionary.is_adjective(word.lower):
            return True
        return ends_phrase and after != "CC" and determined and article in ("a", "an")
    if word.tag == "VBG":
        return ends_phrase and determined
    if word.tag == "MD":
        if i + 1 < len(words) and dictionary.contradicts(after, words[i + 1].lower):
            return True  # "a can opener"
        return i > 0 and not after.startswith(("VB", "RB", "PRP"))  # "a soda can on a table"
    return word.tag.startswith("VB") and _is_no_verb(words, i, ends_phrase and determined)


def _is_no_verb(words: Sequence[Word], i: int, is_head: bool) -> bool:
    """Whether word `i`, tagged as a verb, cannot be one where it stands."""
    word, before, after = words[i], _tag(words, i - 1), _tag(words, i + 1)
    if word.tag in ("VB", "VBP") and after in ("IN", "CC", ",", ".", "VBG"):
        if before == "CC" and i > 1 and words[i - 2].is_noun:
            return True  # "a knife and fork beside a plate"
        if before == "NN" and after != "." and word.lower not in ("are", "have", "do"):
            return not _is_joined(words, i - 1)  # "a bathroom sink with a mirror"
    if after.startswith("NN") and word.tag not in ("VBN", "VBD"):
        return before in ("DT", "IN", "PRP$", "POS", "JJ")  # "a team of sled dogs"
    return is_head or (word.tag == "VBZ" and before in ("IN", "JJ", "VBZ"))


def _is_joined(words: Sequence[Word], i: int) -> bool:
    """Whether the phrase that ends in noun `i` follows "and", so that a plural verb follows it."""
    while i >= 0 and words[i].tag.startswith(("NN", "JJ", "DT", "PRP$", "CD")):
        i -= 1
    return _tag(words, i) == "CC"


def _tag(words: Sequence[Word], i: int) -> str:
    return words[i].tag if 0 <= i < len(words) else ""


def _article(words: Sequence[Word], i: int) -> str:
    """The word in front of the adjectives in front of word `i`."""
    while i and words[i - 1].tag.startswith(("JJ", "RB")):
        i -= 1
    return words[i - 1].lower if i else ""
