"""Scorers of reasoning instructions: what the paper trusts the language model with, measured.

An instruction that needs reasoning names neither what changes nor what it becomes (`leak`), and
still lets a reader find out (`resolvable`). The candidates of Part I differ (`diversity`), and the
choice among them does not hang on their order (`agreement`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

from pydantic import Field

from reasonpix.core.text import canonical, content_words, head_nouns, mentions, words_of
from reasonpix.plugin.components import Component, Edit, Options, Planner, Scorer
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem, ResolveRequest

# -- leak ----------------------------------------------------------------------------------------

EDITING_WORDS = frozenset(
    words_of(
        """
        add become change convert delete edit exchange get give go have image insert let look make
        photo photograph picture place put remove replace set show style swap switch take transform
        turn use
        """
    )
)
"""Words of any direct instruction: they tell that something changes, not what."""


class LeakOptions(Options):
    """Options of `leak`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"max_leaks"})

    max_leaks: int = Field(0, ge=0, description="Most give-away words that are accepted")


class Leak(Scorer[LeakOptions]):
    """Counts the give-away words that a reasoning instruction names.

    Where an object is replaced (Parts II and III) they are the selected category, the target
    category, the last word of each ("lamp" for "desk lamp") and their synonyms, as the planner
    gave them. In Part I they are the `revealing` words, as the planner gave them, and all content
    words of the two captions and the direct instruction but those that both captions have, and
    that stay, and those of editing as such ("make", "photo"). So no planner's word need be taken
    for it that nothing leaks.

    A word is named in any case, number or regular form: see `reasonpix.core.text.mentions`. Several
    give-aways in one place, such as "lamp" in "desk lamp", count once.
    """

    name: ClassVar[str] = "leak"
    Options: ClassVar[type[Options]] = LeakOptions
    requires: ClassVar[frozenset[str]] = frozenset({"instruction"})

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`leaks`: number of different give-away words in the instruction."""
        return [{"leaks": float(len(leaks_of(edit)))} for edit in edits]

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """More leaks than `max_leaks`."""
        return [
            f"names {score['leaks']:.0f} of the words that give the edit away"
            if score["leaks"] > self.options.max_leaks
            else None
            for score in scores
        ]


def leaks_of(edit: Edit) -> list[str]:
    """The give-away words that the instruction names, without those that are part of another."""
    named = [word for word in giveaways(edit) if mentions(edit.instruction, word)]
    leaks: list[str] = []
    for word in sorted(named, key=lambda word: -len(words_of(word))):
        if not any(mentions(longer, word) for longer in leaks):
            leaks.append(word)
    return leaks


def giveaways(edit: Edit) -> list[str]:
    """The words that the instruction of an edit must not name; see `Leak`."""
    if edit.selected is not None and edit.target is not None:
        categories = (edit.selected, edit.target)
        words = [word for category in categories for word in head_nouns(category)]
        return list(dict.fromkeys([*words, *edit.synonyms]))
    before, after = edit.caption, edit.edited_caption or ""
    changed = [
        word
        for word in content_words(f"{before} {after} {edit.direct_instruction or ''}")
        if word not in EDITING_WORDS and not (mentions(before, word) and mentions(after, word))
    ]
    return list(dict.fromkeys([*edit.revealing, *changed]))


# -- diversity -----------------------------------------------------------------------------------


class DiversityOptions(Options):
    """Options of `diversity`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"min_distance"})

    min_distance: float = Field(
        0.0, ge=0, le=1, description="Smallest mean distance of two candidates"
    )


class Diversity(Scorer[DiversityOptions]):
    """Measures how much the candidates of Part I differ: P_gen is asked n times to have a choice.

    The distance of two candidates is the Jaccard distance of their content words, one minus the
    share of all their words that they have in common: 0 for the same words in any order, 1 when
    they share none. It is symmetric and obeys the triangle inequality, unlike BLEU or chrF of one
    candidate against another, and leaves out function words, which any two sentences share.
    """

    name: ClassVar[str] = "diversity"
    Options: ClassVar[type[Options]] = DiversityOptions
    requires: ClassVar[frozenset[str]] = frozenset({"candidates"})

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`distinct` and `distance`, both in [0, 1].

        `distinct` is the number of candidates that differ in more than case, punctuation and
        spaces, as a share of all; `distance` the mean over all pairs, 0 for a single candidate.
        """
        return [_diversity(edit.candidates) for edit in edits]

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """A mean distance below `min_distance`."""
        limit = self.options.min_distance
        return [
            f"the candidates differ by {score['distance']:.2f} only"
            if score["distance"] < limit
            else None
            for score in scores
        ]


def _diversity(candidates: Sequence[str]) -> dict[str, float]:
    distinct = {tuple(words_of(candidate)) for candidate in candidates}
    words = [frozenset(content_words(candidate)) for candidate in candidates]
    # Sorted, so that the sum is the same to the last bit in whatever order the candidates came.
    distances = sorted(_distance(one, other) for one, other in combinations(words, 2))
    return {
        "distinct": len(distinct) / len(candidates),
        "distance": sum(distances) / len(distances) if distances else 0.0,
    }


def _distance(one: frozenset[str], other: frozenset[str]) -> float:
    return 1 - len(one & other) / len(one | other) if one | other else 0.0


# -- agreement -----------------------------------------------------------------------------------


class AgreementOptions(Options):
    """Options of `agreement`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"min_agreement"})

    min_agreement: float = Field(
        0.0, ge=0, le=1, description="Smallest share of orders with the same choice"
    )


class Agreement(Scorer[AgreementOptions]):
    """Rejects choices of P_select that hang on the order in which the candidates were shown."""

    name: ClassVar[str] = "agreement"
    Options: ClassVar[type[Options]] = AgreementOptions
    requires: ClassVar[frozenset[str]] = frozenset({"agreement"})

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`agreement`: share of the orders shown in which the selected candidate was chosen."""
        scores: list[dict[str, float] | Problem] = []
        for edit in edits:
            assert edit.agreement is not None  # a recipe that cannot give it is refused: `requires`
            scores.append({"agreement": edit.agreement})
        return scores

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """A share below `min_agreement`."""
        limit = self.options.min_agreement
        return [
            f"chosen in {score['agreement']:.0%} of the orders only"
            if score["agreement"] < limit
            else None
            for score in scores
        ]


# -- resolvable ----------------------------------------------------------------------------------

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    group: tuple(names.split(", "))
    for group, names in {
        "mammals": "cat, dog, horse, cow, sheep, goat, pig, rabbit, elephant, giraffe, lion, bear, "
        "monkey, fox, deer, squirrel",
        "birds": "duck, owl, parrot, eagle, penguin, swan, chicken, flamingo",
        "small animals": "butterfly, bee, ladybug, dragonfly, spider, snail, frog, lizard",
        "sea animals": "goldfish, whale, dolphin, shark, turtle, octopus, crab, starfish",
        "fruit": "apple, banana, orange, lemon, strawberry, grape, pineapple, watermelon, pear",
        "vegetables": "carrot, tomato, potato, broccoli, onion, pumpkin, mushroom",
        "dishes": "pizza, hamburger, salad, cake, doughnut, ice cream, bread, cheese, egg, soup",
        "tableware": "cup, bottle, bowl, plate, teapot, kettle, frying pan, knife, fork",
        "furniture": "chair, sofa, bed, table, bookshelf, wardrobe, lamp, mirror, clock, stool",
        "vehicles": "car, bus, truck, train, bicycle, motorcycle, sailboat, canoe, airplane, "
        "helicopter, tractor, skateboard",
        "clothes": "hat, dress, shoe, glove, scarf, necktie, umbrella, backpack, suitcase, crown",
        "instruments": "guitar, piano, violin, drum, trumpet, flute, saxophone, harp",
        "toys": "soccer ball, tennis racket, kite, balloon, teddy bear, chessboard, surfboard",
        "tools": "hammer, saw, ladder, bucket, broom, shovel, axe, screwdriver",
        "devices": "laptop, telephone, television, camera, radio, headphones, robot, microphone",
        "plants": "rose, sunflower, tulip, daisy, cactus, palm tree, pine tree, fern",
        "buildings": "house, castle, church, lighthouse, windmill, skyscraper, tent, bridge",
        "stationery": "book, newspaper, pencil, envelope, globe, candle, typewriter",
    }.items()
}
"""Everyday things that can be photographed, by kind."""


class ResolvableOptions(Options):
    """Options of `resolvable`."""

    distractors: int = Field(4, ge=1, le=98, description="Wrong options beside the target")
    categories: dict[str, tuple[str, ...]] = Field(
        {},
        description="Names of things by kind, to draw distractors from; when empty, a built-in "
        "list of everyday things",
    )


class Resolvable(Scorer[ResolvableOptions]):
    """Asks a reader which thing the instruction is after; rejects where it takes the wrong one.

    The reader, the planner in the recipe's slot `reader`, gets the caption, the instruction, and
    the target among distractors. They are drawn by the record's seed from a list of things; up to
    half of them are of the target's own kind, where the list knows it, or else the kind alone
    would tell. Nothing is drawn that the caption names, that is the selected category, or that a
    synonym or a part of a name would make right as well. Guessing finds one in `distractors` + 1.

    For Part I there is no such question: what changes is often no thing but a style or a season,
    and a list of things would tell which edit is meant before the instruction is read.
    """

    name: ClassVar[str] = "resolvable"
    Options: ClassVar[type[Options]] = ResolvableOptions
    needs_slots: ClassVar[frozenset[str]] = frozenset({"reader"})
    requires: ClassVar[frozenset[str]] = frozenset({"selected", "target", "instruction"})

    @property
    def concurrency(self) -> int:
        """More than any reader's: how many are under way is for that to say."""
        return 1_000_000

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`correct`: 1.0 when the reader chose the target, else 0.0. Its problems are handed on."""
        reader = pipeline["reader"]
        assert isinstance(reader, Planner)
        questions = [self._question(edit) for edit in edits]
        asked = [question for question in questions if isinstance(question, ResolveRequest)]
        answers = iter(zip(asked, reader.resolve(asked), strict=True))
        scores: list[dict[str, float] | Problem] = []
        for edit, question in zip(edits, questions, strict=True):
            if isinstance(question, Problem):
                scores.append(question)
                continue
            request, answer = next(answers)
            if isinstance(answer, Problem):
                scores.append(answer)
            else:
                taken = request.options[answer.index : answer.index + 1]
                scores.append({"correct": float(taken == (edit.target,))})
        return scores

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """The reader took something else."""
        return [
            None if score["correct"] else "the reader takes the instruction to mean something else"
            for score in scores
        ]

    def _question(self, edit: Edit) -> ResolveRequest | Problem:
        categories, wanted = self.options.categories or CATEGORIES, self.options.distractors
        options = options_of(edit, categories, wanted)
        if len(options) <= wanted:
            left = len(options) - 1
            reason = f"only {left} of {wanted} distractors are left: give more categories"
            return Problem(status="failed", reason=reason)
        return ResolveRequest(
            caption=edit.caption, instruction=edit.instruction, options=options, seed=edit.seed
        )


def options_of(
    edit: Edit, categories: Mapping[str, Sequence[str]], distractors: int
) -> tuple[str, ...]:
    """The target and its distractors, in an order that depends on the edit's seed alone.

    There are fewer distractors when the categories hold no more that are wrong.
    """
    assert edit.target is not None and edit.selected is not None  # see `Scorer.requires`
    right = [*head_nouns(edit.target), *head_nouns(edit.selected), *edit.synonyms]

    def is_wrong(name: str) -> bool:
        return not mentions(edit.caption, name) and not any(
            mentions(word, name) or mentions(name, word) for word in right
        )

    own: list[str] = []
    others: list[str] = []
    for names in categories.values():
        is_own = any(canonical(word, names) for word in head_nouns(edit.target))
        (own if is_own else others).extend(name for name in names if is_wrong(name))
    own, others = (_shuffled(names, f"draw {edit.seed}") for names in (own, others))
    near = own[: distractors // 2]
    drawn = list(dict.fromkeys([*near, *others, *own]))[:distractors]
    return tuple(_shuffled([edit.target, *drawn], f"order {edit.seed}"))


def _shuffled(names: Sequence[str], key: str) -> list[str]:
    """In an order of its own for each key, the same in any version of Python."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())


@hookimpl
def scorers() -> list[type[Scorer[Any]]]:
    """The scorers of this module."""
    return [Leak, Diversity, Agreement, Resolvable]
