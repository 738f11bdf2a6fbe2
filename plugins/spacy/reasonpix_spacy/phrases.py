"""The noun phrases of a caption, each with the name of what it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tags import Word
from .words import Dictionary, word_lists


@dataclass(frozen=True)
class Phrase:
    """Words `begin` to `last`, both included: "two black cats"."""

    begin: int
    last: int
    name: str
    """The head and the nouns that say what kind it is, the last word in the singular."""
    head: str
    """The last word, in the singular."""
    determiner: str
    """The article, number, possessive pronoun or owner's 's; or nothing."""
    is_counted: bool
    """Whether a number stands before it."""
    is_proper: bool


class PhraseFinder:
    """Finds the noun phrases of one caption."""

    def __init__(self, words: Sequence[Word], dictionary: Dictionary) -> None:
        self._words = words
        self._dictionary = dictionary
        self._listed = self._listed_names()

    def phrases(self) -> list[Phrase]:
        """The phrases, in order."""
        phrases = []
        first = 0
        for i in range(len(self._words) + 1):
            in_run = i < len(self._words) and (self._words[i].is_noun or i in self._listed)
            starts_name = self._listed.get(i) == i and i > first and not self._words[i].is_noun
            if first < i and (not in_run or starts_name):
                phrases.append(self._phrase(first, i - 1))
                first = i
            if not in_run:
                first = i + 1
        return phrases

    def _listed_names(self) -> dict[int, int]:
        """For each word of a name in `words.yaml`, the word at which that name starts."""
        lower = [word.lower for word in self._words]
        starts: dict[int, int] = {}
        for first in range(len(lower)):
            for end in range(min(first + 4, len(lower)), first + 1, -1):
                singular = [*lower[first : end - 1], self._dictionary.singular(lower[end - 1])]
                names = {" ".join(lower[first:end]), " ".join(singular)}
                if first not in starts and names & word_lists().names:
                    starts |= dict.fromkeys(range(first, end), first)
        return starts

    def _phrase(self, run: int, last: int) -> Phrase:
        """The phrase of the nouns `run` to `last`."""
        first = self._listed.get(last, last)
        while first > run and self._says_what_kind(first - 1, run, self._words[last]):
            first = self._listed.get(first - 1, first - 1)
        begin, determiner = self._modifiers(run)
        counted = any(word.tag == "CD" for word in self._words[begin:first])
        head = self._singular_head(first, last, counted)
        name = " ".join([*(word.lower for word in self._words[first:last]), head])
        return Phrase(begin, last, name, head, determiner, counted, self._words[last].is_proper)

    def _says_what_kind(self, i: int, run: int, head: Word) -> bool:
        """Whether noun `i` belongs to the name of the head, as "fire" to that of a hydrant."""
        word, lists = self._words[i], word_lists()
        if i in self._listed:
            return True
        if word.is_proper or head.is_proper:
            return word.is_proper and head.is_proper
        if "-" in word.lower:
            return word.lower in lists.hyphenated or word.lower.replace("-", " ") in lists.names
        singular = self._dictionary.singular(word.lower)
        if i == run and singular in lists.quantities | lists.sides | lists.units:
            return False
        return word.lower not in lists.descriptions | lists.brands

    def _modifiers(self, run: int) -> tuple[int, str]:
        """Where the phrase of the nouns from `run` on begins, and its determiner."""
        begin = run
        while begin and self._modifies(begin - 1):
            begin -= 1
        before = self._words[begin - 1] if begin else None
        if before and before.tag in ("DT", "PRP$", "PDT", "WP$"):
            return begin - 1, before.lower
        if before and before.tag == "POS":
            return begin, before.lower
        return begin, self._words[begin].lower if self._words[begin].tag == "CD" else ""

    def _modifies(self, i: int) -> bool:
        """Whether word `i` describes or counts the noun after it."""
        tags = [word.tag for word in self._words[max(i - 1, 0) : i + 2]]
        match tags:
            case [*_, "JJ" | "JJR" | "JJS" | "CD" | "RB" | "RBS", _]:
                return True
            case ["DT" | "PRP$" | "POS" | "CD" | "JJ" | "RB", "VBN" | "VBG", _]:
                return True
            case ["JJ", "CC" | ",", "JJ"]:
                return True
        return False

    def _singular_head(self, first: int, last: int, counted: bool) -> str:
        lower = [word.lower for word in self._words[first : last + 1]]
        if self._words[last].is_proper or " ".join(lower) in word_lists().names:
            return lower[-1]
        if lower[-1] == "glasses":  # to drink from, or to see through
            holds = last + 1 < len(self._words) and self._words[last + 1].lower == "of"
            return "glass" if holds or counted or len(lower) > 1 else "glasses"
        is_known = self._dictionary.is_noun(lower[-1])
        return (
            self._dictionary.singular(lower[-1])
            if is_known or self._words[last].tag == "NNS"
            else lower[-1]
        )
