"""Filters of reasoning instructions: they verify what the paper leaves to the language model.

A reasoning instruction names neither what changes nor what it becomes (`leak`), yet a reader can
find out (`resolvable`). The candidates of Part I differ (`diversity`), and the choice among them
does not depend on their order (`agreement`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, ClassVar

from pydantic import Field

from reasonpix.core.text import canonical, content_words, head_nouns, mentions, words_of
from reasonpix.plugin.components import Component, Options, Planner, Scorer
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.filters import RejectIf, ThresholdFilter, ThresholdOptions
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
"""Words common to all direct instructions: they say that something changes, not what."""


class LeakOptions(ThresholdOptions):
    """Options of `leak`."""

    max_leaks: Annotated[
        int, RejectIf("leaks", ">", "names {:.0f} of the words that give the edit away")
    ] = Field(0, ge=0, description="Most give-away words that are accepted")


class Leak(ThresholdFilter[LeakOptions]):
    """Counts the give-away words that a reasoning instruction names.

    Where an object is replaced (Parts II and III) these are the selected category, the target
    category, the last word of each ("lamp" for "desk lamp") and the planner's synonyms for them.
    In Part I they are the planner's `revealing` words and all content words of the two captions
    and the direct instruction, except those that both captions share and those of editing as such
    ("make", "photo"). So the check does not rely on the planner alone.

    A word counts in any case, number or regular form: see `reasonpix.core.text.mentions`. Several
    give-aways in one place, such as "lamp" in "desk lamp", count once.
    """

    name: ClassVar[str] = "leak"
    Options: ClassVar[type[Options]] = LeakOptions
    requires: ClassVar[frozenset[str]] = frozenset({"instruction"})

    def score_edit(self, edit: Edit) -> dict[str, float]:
        """`leaks`: number of different give-away words in the instruction."""
        return {"leaks": float(len(leaks_of(edit)))}


def leaks_of(edit: Edit) -> list[str]:
    """The give-away words that the instruction names, without those that are part of another."""
    named_words = [word for word in giveaways(edit) if mentions(edit.instruction, word)]
    leaks: list[str] = []
    for word in sorted(named_words, key=lambda word: -len(words_of(word))):
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


class DiversityOptions(ThresholdOptions):
    """Options of `diversity`."""

    min_distance: Annotated[
        float, RejectIf("distance", "<", "the candidates differ by {:.2f} only")
    ] = Field(0.0, ge=0, le=1, description="Smallest mean distance of two candidates")


class Diversity(ThresholdFilter[DiversityOptions]):
    """Measures how much the candidates of Part I differ: P_gen runs n times to give a choice.

    The distance of two candidates is the Jaccard distance of their content words, one minus the
    share of all their words that they have in common: 0 for the same words in any order, 1 when
    they share none. It is symmetric and obeys the triangle inequality, unlike BLEU or chrF of one
    candidate against another, and ignores function words, which any two sentences share.
    """

    name: ClassVar[str] = "diversity"
    Options: ClassVar[type[Options]] = DiversityOptions
    requires: ClassVar[frozenset[str]] = frozenset({"candidates"})

    def score_edit(self, edit: Edit) -> dict[str, float]:
        """`distinct` and `distance`, both in [0, 1].

        `distinct` is the number of candidates that differ in more than case, punctuation and
        spaces, as a share of all; `distance` the mean over all pairs, 0 for a single candidate.
        """
        distinct = {tuple(words_of(candidate)) for candidate in edit.candidates}
        words = [frozenset(content_words(candidate)) for candidate in edit.candidates]
        # Sorted, so that the sum does not depend on the order of the candidates, to the last bit.
        distances = sorted(_jaccard_distance(a, b) for a, b in combinations(words, 2))
        return {
            "distinct": len(distinct) / len(edit.candidates),
            "distance": sum(distances) / len(distances) if distances else 0.0,
        }


def _jaccard_distance(a: frozenset[str], b: frozenset[str]) -> float:
    return 1 - len(a & b) / len(a | b) if a | b else 0.0


# -- agreement -----------------------------------------------------------------------------------


class AgreementOptions(ThresholdOptions):
    """Options of `agreement`."""

    min_agreement: Annotated[
        float, RejectIf("agreement", "<", "chosen in {:.0%} of the orders only")
    ] = Field(0.0, ge=0, le=1, description="Smallest share of orders with the same choice")


class Agreement(ThresholdFilter[AgreementOptions]):
    """Rejects choices of P_select that depend on the order in which the candidates were shown."""

    name: ClassVar[str] = "agreement"
    Options: ClassVar[type[Options]] = AgreementOptions
    requires: ClassVar[frozenset[str]] = frozenset({"agreement"})

    def score_edit(self, edit: Edit) -> dict[str, float]:
        """`agreement`: share of the orders shown in which the selected candidate was chosen."""
        assert edit.agreement is not None  # recipes that cannot give it are refused: `requires`
        return {"agreement": edit.agreement}


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
    """Asks the resolver which thing the instruction means, and rejects wrong answers.

    The resolver, the planner in the recipe's slot `resolver`, gets the caption, the instruction,
    and the target among distractors. Distractors are drawn from a list of things with the record's
    seed. Up to half of them are of the target's kind, if the list contains it; otherwise the kind
    alone would give the target away. Things that the caption names, the selected category and names
    that would also be right, such as synonyms, are never drawn. Guessing succeeds with
    probability 1 / (`distractors` + 1).

    Part I cannot use it: what changes is often a style or a season rather than a thing, and a
    list of things would reveal the edit before the instruction is read.
    """

    name: ClassVar[str] = "resolvable"
    Options: ClassVar[type[Options]] = ResolvableOptions
    needs_slots: ClassVar[frozenset[str]] = frozenset({"resolver"})
    requires: ClassVar[frozenset[str]] = frozenset({"selected", "target", "instruction"})

    @property
    def concurrency(self) -> int:
        """Unlimited: the resolver itself limits how many requests are in flight."""
        return 1_000_000

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`correct`: 1.0 when the resolver chose the target, else 0.0, or its problem."""
        resolver = pipeline["resolver"]
        assert isinstance(resolver, Planner)
        requests = [self._request(edit) for edit in edits]
        valid = [request for request in requests if isinstance(request, ResolveRequest)]
        answers = iter(resolver.resolve(valid))
        scores: list[dict[str, float] | Problem] = []
        for edit, request in zip(edits, requests, strict=True):
            if isinstance(request, Problem):
                scores.append(request)
            elif isinstance(answer := next(answers), Problem):
                scores.append(answer)
            else:
                choice = request.options[answer.index : answer.index + 1]
                scores.append({"correct": float(choice == (edit.target,))})
        return scores

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """Reject instructions for which the resolver did not choose the target."""
        return [
            None
            if score["correct"]
            else "the resolver takes the instruction to mean something else"
            for score in scores
        ]

    def _request(self, edit: Edit) -> ResolveRequest | Problem:
        count = self.options.distractors
        options = options_of(edit, self.options.categories or CATEGORIES, count)
        if len(options) <= count:
            reason = f"only {len(options) - 1} of {count} distractors are left: add categories"
            return Problem(status="failed", reason=reason)
        return ResolveRequest(
            caption=edit.caption, instruction=edit.instruction, options=options, seed=edit.seed
        )


def options_of(
    edit: Edit, categories: Mapping[str, Sequence[str]], distractors: int
) -> tuple[str, ...]:
    """The target and its distractors, in an order that depends on the edit's seed alone.

    There are fewer distractors when the categories hold too few wrong names.
    """
    assert edit.target is not None and edit.selected is not None  # see `Scorer.requires`
    right_names = [*head_nouns(edit.target), *head_nouns(edit.selected), *edit.synonyms]

    def is_wrong(name: str) -> bool:
        return not mentions(edit.caption, name) and not any(
            mentions(word, name) or mentions(name, word) for word in right_names
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
    """Shuffled by `key`, in the same order in any version of Python."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())


@hookimpl
def scorers() -> list[type[Scorer[Any]]]:
    """The filters of this module."""
    return [Leak, Diversity, Agreement, Resolvable]
