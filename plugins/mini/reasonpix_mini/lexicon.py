"""A planner that needs no language model: it knows the sticker world's words.

From `lexicon.yaml` it plans replacements (Eq. 6: one of the asked categories, and a target of the
same group) and words instructions that hint at the target by what it is used for, where it lives or
who tells of it (Eqs. 2 and 6). Which candidate is best (Eq. 3) it reads off the texts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field

from reasonpix.plugin import (
    Choice,
    EditPlan,
    Options,
    Planner,
    Problem,
    ReplaceRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

from . import world


@lru_cache(maxsize=1)
def _text() -> str:
    return resources.files(__package__).joinpath("lexicon.yaml").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _lexicon() -> dict[str, Any]:
    lexicon: dict[str, Any] = yaml.safe_load(_text())
    return lexicon


def names(category: world.Category) -> list[str]:
    """The words that mean the category: name, plural and synonyms."""
    return list(dict.fromkeys([category.name, category.plural, *category.synonyms]))


def telling(category: world.Category) -> list[str]:
    """The words that an instruction about the category avoids: `names`, kinds and give-aways."""
    give_aways: list[str] = _lexicon()["give_aways"].get(category.name, [])
    return names(category) + give_aways


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Any of the words, whole, in any case, singular or with a regular plural."""
    forms = "|".join(re.sub("y$", "(?:y|ie)", re.escape(word)) for word in words)
    return re.compile(rf"\b(?:{forms})(?:e?s)?\b", re.IGNORECASE)


@lru_cache(maxsize=1)
def _patterns() -> dict[str, re.Pattern[str]]:
    return {name: _pattern(names(category)) for name, category in world.categories().items()}


def mentioned(text: str) -> set[str]:
    """The categories that a text names, by whatever word."""
    return {name for name, pattern in _patterns().items() if pattern.search(text)}


def canonical(word: str) -> str | None:
    """The category that a word means: "bunnies" is a rabbit. None for words of other worlds."""
    word = " ".join(word.split())
    return next((name for name, p in _patterns().items() if p.fullmatch(word)), None)


def direct(rng: np.random.Generator, source: world.Category, target: world.Category) -> str:
    """An instruction that says what it wants, by one of the templates: "Turn the bee into …"."""
    return str(_pick(rng, direct_instructions(source.name, target.name)))


def direct_instructions(source: str, target: str) -> list[str]:
    """All that `direct` draws from, for two categories by their names."""
    names = {"source": source, "a_source": world.indefinite(source)}
    names["a_target"] = world.indefinite(target)
    return [template.format(**names) for template in _lexicon()["direct"]]


def templates() -> list[str]:
    """All that instructions are made from, beside hints, references and names."""
    framed = [text for frame in _lexicon()["frames"] for text in frame.values()]
    return [re.sub(r"\{\w+\}", "", text) for text in [*framed, *_lexicon()["direct"]]]


class LexiconOptions(Options):
    """Options of `lexicon`."""

    hints: Literal["train", "held_out"] = Field(
        "train",
        description="Hints to draw from; held_out ones test whether a model trained on the others "
        "reasons or remembers",
    )


class Lexicon(Planner[LexiconOptions]):
    """Replaces by a category of the same group and hints at it. Knows only the sticker world.

    An instruction names neither the source nor the target. When the picture holds several objects
    it describes the one that changes as the sticker is drawn. It does not `resolve`: a reader that
    knows the hints by heart would measure nothing.
    """

    name = "lexicon"
    Options = LexiconOptions

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """The hash of the lexicon: other words, other plans."""
        return {"lexicon": hashlib.sha256(_text().encode()).hexdigest()}

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[Rewriting | Problem]:
        """A hint at what came, for captions that tell one replacement; drawn by the seed alone."""
        return [self._rewriting(request) for request in requests]

    def _rewriting(self, request: RewriteRequest) -> Rewriting | Problem:
        before, after = mentioned(request.caption), mentioned(request.edited_caption)
        gone, come = sorted(before - after), sorted(after - before)
        if len(gone) != 1 or len(come) != 1:
            reason = (
                f"the captions do not tell one replacement: {', '.join(gone) or 'nothing'} goes, "
                f"{', '.join(come) or 'nothing'} comes"
            )
            return Problem(status="rejected", reason=reason)
        source, target = (world.categories()[name] for (name,) in (gone, come))
        rng = np.random.default_rng(request.seed)
        return Rewriting(
            instruction=self._worded(rng, source, target, among=len(before) > 1),
            revealing=tuple(dict.fromkeys(telling(source) + telling(target))),
        )

    def select(self, requests: Sequence[SelectRequest]) -> list[Choice | Problem]:
        """The candidate that hints most without giving the edit away.

        First come those that use no telling word of a category that goes or comes; among these the
        one that shares most words with the hints of the categories that come (of five letters or
        more, each counted once, none that a frame uses); then the shorter; then the first in the
        alphabet. The order of the candidates counts for nothing, nor does the seed.
        """
        return [_choice(request) for request in requests]

    def replace(self, requests: Sequence[ReplaceRequest]) -> list[EditPlan | Problem]:
        """One plan each, from the request and its seed alone."""
        return [self._plan(request) for request in requests]

    def _plan(self, request: ReplaceRequest) -> EditPlan | Problem:
        known = {word: name for word in request.categories if (name := canonical(word))}
        if not known:
            asked = ", ".join(request.categories) or "(there are none)"
            return Problem(status="rejected", reason=f"knows none of the categories {asked}")
        world_of = world.categories()
        present = mentioned(request.caption) | set(known.values())
        targets = {
            word: [
                name
                for name, category in world_of.items()
                if category.group == world_of[source].group and name not in present
            ]
            for word, source in known.items()
        }
        choices = [word for word in known if targets[word]]
        if not choices:
            groups = ", ".join(dict.fromkeys(world_of[name].group for name in known.values()))
            return Problem(status="rejected", reason=f"the caption already names all {groups}")

        rng = np.random.default_rng(request.seed)
        selected = _pick(rng, choices)
        source, target = world_of[known[selected]], world_of[_pick(rng, targets[selected])]
        others = [word for word in request.categories if word not in known]
        return EditPlan(
            selected=selected,
            target=target.name,
            instruction=self._worded(rng, source, target, among=len(present) + len(others) > 1),
            synonyms=tuple(
                word
                for word in dict.fromkeys(telling(source) + telling(target))
                if word not in (selected, target.name)
            ),
        )

    def _worded(
        self,
        rng: np.random.Generator,
        source: world.Category,
        target: world.Category,
        *,
        among: bool,
    ) -> str:
        """A frame around a hint at the target; `among` others it also tells which object goes."""
        hints = target.hints if self.options.hints == "train" else target.held_out_hints
        frame = _pick(rng, _lexicon()["frames"])["among" if among else "alone"]
        text: str = frame.format(hint=_pick(rng, hints), reference=_pick(rng, source.references))
        return text[0].upper() + text[1:]


def _choice(request: SelectRequest) -> Choice:
    before, after = mentioned(request.caption), mentioned(request.edited_caption)
    secrets = [_telling_pattern(name) for name in before ^ after]
    hints = frozenset[str]().union(*map(_hint_words, after - before))

    def rank(index: int) -> tuple[bool, int, int, str]:
        text = request.candidates[index]
        gives_away = any(secret.search(text) for secret in secrets)
        return gives_away, -len(hints & _long_words(text)), len(text), text

    return Choice(index=min(range(len(request.candidates)), key=rank))


@cache
def _telling_pattern(name: str) -> re.Pattern[str]:
    return _pattern(telling(world.categories()[name]))


@cache
def _hint_words(name: str) -> frozenset[str]:
    """The long words of a category's hints, without those that come from the frames."""
    category = world.categories()[name]
    frames = [text for frame in _lexicon()["frames"] for text in frame.values()]
    return _long_words(*category.hints, *category.held_out_hints) - _long_words(*frames)


def _long_words(*texts: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W\d_]{5,}", " ".join(texts).casefold()))


def _pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]
