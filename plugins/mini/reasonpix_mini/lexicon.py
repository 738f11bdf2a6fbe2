"""A planner that needs no language model: it knows the sticker world's words.

It answers Eq. 6 from `lexicon.yaml`: one of the asked categories, a target of the same group, and
an instruction that hints at the target by what it is used for, where it lives or who tells of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field

from reasonpix.records import EditPlan, Problem, ReplaceRequest
from reasonpix.slots import Options, Planner

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


class LexiconOptions(Options):
    """Options of `lexicon`."""

    hints: Literal["train", "held_out"] = Field(
        "train",
        description="Hints to draw from; held_out ones test whether a model trained on the others "
        "reasons or remembers",
    )


class Lexicon(Planner[LexiconOptions]):
    """Replaces by a category of the same group and hints at it. Knows the sticker world alone.

    An instruction names neither the source nor the target. When the picture holds several objects
    it describes the one that changes as the sticker is drawn.
    """

    name = "lexicon"
    Options = LexiconOptions

    def identity(self) -> Mapping[str, Any]:
        """The hash of the lexicon: other words, other plans."""
        return {"lexicon": hashlib.sha256(_text().encode()).hexdigest()}

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
        hints = target.hints if self.options.hints == "train" else target.held_out_hints
        others = [word for word in request.categories if word not in known]
        frame = _pick(rng, _lexicon()["frames"])[
            "among" if len(present) + len(others) > 1 else "alone"
        ]
        instruction = frame.format(hint=_pick(rng, hints), reference=_pick(rng, source.references))
        return EditPlan(
            selected=selected,
            target=target.name,
            instruction=instruction[0].upper() + instruction[1:],
            synonyms=tuple(
                word
                for word in dict.fromkeys(telling(source) + telling(target))
                if word not in (selected, target.name)
            ),
        )


def _pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]
