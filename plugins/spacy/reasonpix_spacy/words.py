"""What is known about English words: the lists of `words.yaml`, and the pipeline's dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

WORDS = Path(__file__).with_name("words.yaml")


@dataclass(frozen=True)
class WordLists:
    """The lists of `words.yaml`, where each is explained."""

    names: frozenset[str]
    hyphenated: frozenset[str]
    groups: frozenset[str]
    herds: frozenset[str]
    same_plural: frozenset[str]
    quantities: frozenset[str]
    units: frozenset[str]
    sides: frozenset[str]
    pictures: frozenset[str]
    views: frozenset[str]
    likenesses: frozenset[str]
    abstract: frozenset[str]
    plural_only: frozenset[str]
    descriptions: frozenset[str]
    things_in_ing: frozenset[str]
    made: frozenset[str]
    taking: frozenset[str]
    where: frozenset[str]
    played: frozenset[str]
    brands: frozenset[str]
    saying: frozenset[str]
    mounted: frozenset[str]
    irregular: dict[str, str]


@lru_cache(maxsize=1)
def word_lists() -> WordLists:
    """The lists, read once."""
    lists: dict[str, Any] = yaml.safe_load(WORDS.read_bytes())
    irregular = lists.pop("irregular")
    return WordLists(
        irregular=irregular, **{name: _entries(value) for name, value in lists.items()}
    )


def _entries(value: str | dict[str, str]) -> frozenset[str]:
    texts = value.values() if isinstance(value, dict) else [value]
    return frozenset(entry.strip() for text in texts for entry in text.split(","))


_SINGULAR_ENDINGS = ("ss", "us", "is")


class Dictionary:
    """The parts of speech in the tables of an English pipeline's lemmatizer."""

    def __init__(self, lookups: Any) -> None:
        def table(name: str, part_of_speech: str) -> Any:
            return lookups.get_table(name, {}).get(part_of_speech, ())

        self._nouns = frozenset(table("lemma_index", "noun"))
        self._adjectives = frozenset(table("lemma_index", "adj"))
        self._verbs = frozenset(table("lemma_index", "verb"))
        self._adverbs = frozenset(table("lemma_index", "adv"))
        self._exceptions: dict[str, list[str]] = dict(table("lemma_exc", "noun"))
        self._endings: list[tuple[str, str]] = [
            (plural, singular) for plural, singular in table("lemma_rules", "noun")
        ]

    @property
    def is_empty(self) -> bool:
        """Whether the pipeline has no such tables."""
        return not self._nouns

    def singular(self, word: str) -> str:
        """The singular of a noun in lower case; the word itself if it has none, as "scissors"."""
        lists = word_lists()
        if word in lists.plural_only | lists.brands:
            return word
        if word in lists.irregular:
            return lists.irregular[word]
        if "-" in word:
            first, _, last = word.rpartition("-")
            return f"{first}-{self.singular(last)}"
        forms = list(self._exceptions.get(word, ()))
        if word not in self._nouns or not word.endswith(_SINGULAR_ENDINGS):
            forms += [
                word.removesuffix(plural) + singular
                for plural, singular in self._endings
                if word.endswith(plural)
            ]
        for form in forms:
            if form in self._nouns and len(form) > 2:
                return form
        if word in self._nouns or not word.endswith("s") or word.endswith(_SINGULAR_ENDINGS):
            return word
        return word.removesuffix("s")  # a noun that is not in the dictionary

    def is_noun(self, word: str) -> bool:
        """Whether the word is a noun, in the singular or plural."""
        lists = word_lists()
        return self.singular(word) in self._nouns or word in lists.plural_only | lists.brands

    def is_irregular_plural(self, word: str) -> bool:
        """Whether the word is a plural without an "s", as "geese" is."""
        return not word.endswith("s") and self.singular(word) != word

    def contradicts(self, tag: str, word: str) -> bool:
        """Whether the word is a noun and cannot be the infinitive or adverb that the tag says."""
        if tag == "VB":
            return word not in self._verbs and self.is_noun(word)
        is_adverb = word in self._adverbs or word in self._adjectives
        return tag == "RB" and not is_adverb and self.is_noun(word)

    def is_verb(self, word: str) -> bool:
        """Whether the word is the base form of a verb."""
        return word in self._verbs

    def is_adjective(self, word: str) -> bool:
        """Whether the word is an adjective."""
        return word in self._adjectives

    def is_gerund(self, word: str) -> bool:
        """Whether the word tells what somebody does, as "swimming" does and "building" does not."""
        if not word.endswith("ing") or word in word_lists().things_in_ing:
            return False
        stem = word.removesuffix("ing")
        stems = {stem, stem + "e", stem[:-1] if stem[-1:] == stem[-2:-1] else stem}
        return not self._verbs.isdisjoint(stems)
