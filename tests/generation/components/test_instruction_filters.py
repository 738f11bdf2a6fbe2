"""Scores of reasoning instructions."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from reasonpix.core.text import FUNCTION_WORDS, content_words, mentions
from reasonpix.generation.components.instruction_filters import (
    CATEGORIES,
    EDITING_WORDS,
    Agreement,
    Diversity,
    Leak,
    Resolvable,
    ResolvableOptions,
    giveaways,
    leaks_of,
    options_of,
)
from reasonpix.plugin.components import Scorer
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.fakes import FakePlanner, FakePlannerOptions
from reasonpix.plugin.types import Choice, Problem, ResolveRequest


def scorer(cls: type[Scorer[Any]], **options: object) -> Scorer[Any]:
    return cls(cls.Options.model_validate(options))


def unread() -> Image.Image:
    raise AssertionError("a scorer of words reads no image")


def edit(seed: int = 0, **known: Any) -> Edit:
    return Edit(unread, unread, seed, **known)


def resolver(target: str = "rabbit") -> FakePlanner:
    return FakePlanner(FakePlannerOptions(target=target))


# -- leak, Parts II and III ----------------------------------------------------------------------


def swap(instruction: str, **known: Any) -> Edit:
    words = {"selected": "desk lamp", "target": "monarch butterfly", "synonyms": ("lantern",)}
    return edit(instruction=instruction, caption="a desk lamp", **(words | known))


@pytest.mark.parametrize(
    ("instruction", "leaks"),
    [
        ("What flies on painted wings should rest there.", []),
        ("Put a monarch butterfly there.", ["monarch butterfly"]),
        ("Butterflies, please!", ["butterfly"]),
        ("Both lamps are out.", ["lamp"]),
        ("Lanterns and LAMPS and butterflies.", ["lamp", "butterfly", "lantern"]),
        ("The desk-lamp is too bright for a lamp.", ["desk lamp"]),
        ("The desk is empty.", []),
        ("A monarch sits there.", []),
        ("", []),
    ],
)
def test_a_plan_leaks_its_categories(instruction: str, leaks: list[str]) -> None:
    assert leaks_of(swap(instruction)) == leaks
    assert scorer(Leak).score([swap(instruction)], {}) == [{"leaks": float(len(leaks))}]


def test_the_words_of_another_edit_are_no_leak() -> None:
    # Part II starts from a pair, whose own edit has nothing to do with the plan.
    other = {"edited_caption": "a desk lamp in snow", "direct_instruction": "let it snow"}
    assert leaks_of(swap("It would look well in snow.", **other)) == []


NOUN = st.text(string.ascii_lowercase, min_size=3, max_size=9)
SIBILANTS = ("s", "x", "z", "ch", "sh")
LONGER_THAN_ANY = "rhinoceroses"
FILLER = st.lists(st.text(string.digits, min_size=1, max_size=5), max_size=6)
FORM = st.sampled_from(["{}", "{}s", "{}es", "{}'s", "({})"])
CASE = st.sampled_from([str.lower, str.upper, str.title])


@given(NOUN, NOUN, FILLER, FORM, CASE)
def test_every_form_that_is_a_mention_is_a_leak(
    one: str, other: str, fill: list[str], form: str, case: Any
) -> None:
    sentence = " ".join([*fill, form.format(case(one)), *fill])
    for known in (
        {"selected": one, "target": other},
        {"selected": other, "target": one},
        {"selected": other, "target": LONGER_THAN_ANY, "synonyms": (one,)},
    ):
        leaks = leaks_of(edit(instruction=sentence, **known))
        assert bool(leaks) == (mentions(sentence, one) or mentions(sentence, other))


@given(st.text(), st.text(min_size=1), st.text(min_size=1), st.lists(st.text()))
def test_leaks_are_named_giveaways(
    instruction: str, selected: str, target: str, synonyms: list[str]
) -> None:
    subject = edit(
        instruction=instruction, selected=selected, target=target, synonyms=tuple(synonyms)
    )
    named = {word for word in giveaways(subject) if mentions(instruction, word)}
    leaks = leaks_of(subject)
    assert set(leaks) <= named
    assert bool(leaks) == bool(named)
    assert len(leaks) == len(set(leaks))


# -- leak, Part I --------------------------------------------------------------------------------


def rewritten(instruction: str, **known: Any) -> Edit:
    words = {
        "caption": "A photo of a red horse in the meadow",
        "edited_caption": "A photo of a zebra in the meadow at night",
        "direct_instruction": "Turn the horse in the photo into a nocturnal zebra",
    }
    return edit(instruction=instruction, **(words | known))


def test_what_only_some_of_the_texts_say_gives_the_edit_away() -> None:
    assert giveaways(rewritten("")) == ["red", "horse", "zebra", "night", "nocturnal"]
    assert giveaways(rewritten("", revealing=("stripe", "zebra"))) == [
        "stripe", "zebra", "red", "horse", "night", "nocturnal",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("instruction", "leaks"),
    [
        ("Its stripes should puzzle lions, and the owls should be up over the meadow.", []),
        ("Two horses in a photo.", ["horse"]),
        ("The NIGHT of the zebras.", ["zebra", "night"]),
        ("Make it turn into a photo of that, at last.", []),
    ],
)
def test_a_rewriting_leaks_what_changes(instruction: str, leaks: list[str]) -> None:
    assert leaks_of(rewritten(instruction)) == leaks


def test_a_word_that_stays_is_no_leak_in_either_number() -> None:
    subject = edit(
        caption="dogs in a park",
        edited_caption="a dog in two parks",
        direct_instruction="double the park",
        instruction="The dog runs in the parks.",
    )
    assert giveaways(subject) == ["two", "double"]
    assert leaks_of(subject) == []


TEXT = st.lists(NOUN | st.sampled_from(sorted(FUNCTION_WORDS)), max_size=6).map(" ".join)


@given(TEXT, TEXT, TEXT)
def test_function_words_and_what_stays_never_give_away(
    before: str, after: str, direct: str
) -> None:
    words = giveaways(edit(caption=before, edited_caption=after, direct_instruction=direct))
    assert FUNCTION_WORDS.isdisjoint(words)
    assert not any(mentions(before, word) and mentions(after, word) for word in words)
    # The way back gives the same away.
    back = giveaways(edit(caption=after, edited_caption=before, direct_instruction=direct))
    assert set(back) == set(words)


@given(NOUN)
def test_what_is_added_gives_away(noun: str) -> None:
    assume(content_words(noun) and not mentions("a road with add", noun))
    assume(not any(mentions(noun, word) for word in EDITING_WORDS))
    subject = edit(
        caption="a road",
        edited_caption=f"a road with a {noun}",
        direct_instruction=f"add a {noun}",
        instruction=f"The road needs {noun}{'es' if noun.endswith(SIBILANTS) else 's'}.",
    )
    assert leaks_of(subject) == [noun]


def test_leak_rejects_above_max_leaks() -> None:
    scores = [{"leaks": float(leaks)} for leaks in (0, 1, 2)]
    assert scorer(Leak).reject(scores) == [
        None,
        "names 1 of the words that give the edit away",
        "names 2 of the words that give the edit away",
    ]
    assert scorer(Leak, max_leaks=1).reject(scores)[:2] == [None, None]


# -- diversity -----------------------------------------------------------------------------------


def diversity(*candidates: str) -> dict[str, float]:
    (scores,) = scorer(Diversity).score([edit(candidates=candidates)], {})
    assert isinstance(scores, dict)
    return scores


@pytest.mark.parametrize(
    ("candidates", "distinct", "distance"),
    [
        (("Bring the sledge.",), 1.0, 0.0),
        (("Bring the sledge.", "bring  the sledge"), 0.5, 0.0),
        (("Bring the sledge.", "The sledge: bring it!"), 1.0, 0.0),
        (("Bring the sledge.", "Mittens are what they need."), 1.0, 1.0),
        (("Bring the sledge.", "Bring the mittens."), 1.0, 2 / 3),
        (("red sledge", "red sledge", "blue sledge"), 2 / 3, (0 + 2 / 3 + 2 / 3) / 3),
        (("It is what it is.", "So be it."), 1.0, 0.0),
    ],
)
def test_diversity_by_hand(candidates: Any, distinct: float, distance: float) -> None:
    assert diversity(*candidates) == {
        "distinct": pytest.approx(distinct),
        "distance": pytest.approx(distance),
    }


CANDIDATES = st.lists(TEXT, min_size=1, max_size=6)


@given(CANDIDATES, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(candidates: list[str], random: Any) -> None:
    shuffled = random.sample(candidates, len(candidates))
    assert diversity(*candidates) == diversity(*shuffled)


@given(CANDIDATES)
def test_diversity_is_a_share(candidates: list[str]) -> None:
    scores = diversity(*candidates)
    assert 1 / len(candidates) <= scores["distinct"] <= 1
    assert 0 <= scores["distance"] <= 1
    assert diversity(candidates[0], candidates[0]) == {"distinct": 0.5, "distance": 0.0}


@given(TEXT, TEXT, TEXT)
def test_distance_is_a_distance(one: str, two: str, three: str) -> None:
    def between(a: str, b: str) -> float:
        return diversity(a, b)["distance"]

    assert between(one, three) <= between(one, two) + between(two, three) + 1e-9
    assert (between(one, two) == 0) == (set(content_words(one)) == set(content_words(two)))


def test_diversity_rejects_below_min_distance() -> None:
    scores = [{"distinct": 1.0, "distance": distance} for distance in (0.0, 0.25, 0.5)]
    assert scorer(Diversity).reject(scores) == [None] * 3
    assert scorer(Diversity, min_distance=0.25).reject(scores) == [
        "the candidates differ by 0.00 only", None, None,
    ]  # fmt: skip


# -- agreement -----------------------------------------------------------------------------------


def test_agreement_is_handed_on_and_rejects_below_its_least() -> None:
    subject = scorer(Agreement, min_agreement=0.5)
    scores = subject.score([edit(agreement=share) for share in (0.25, 0.5, 1.0)], {})
    assert scores == [{"agreement": 0.25}, {"agreement": 0.5}, {"agreement": 1.0}]
    assert subject.reject(scores) == ["chosen in 25% of the orders only", None, None]  # type: ignore[arg-type]
    assert scorer(Agreement).reject([{"agreement": 0.0}]) == [None]


# -- resolvable ----------------------------------------------------------------------------------

NAMES = sorted(name for names in CATEGORIES.values() for name in names)


def test_the_built_in_things_are_many_and_differ() -> None:
    assert len(NAMES) >= 140
    assert len(NAMES) == len(set(NAMES))
    for names in CATEGORIES.values():
        assert len(names) >= 7  # enough of the own kind after what the caption names


SYNONYMS = st.lists(st.sampled_from(NAMES), max_size=4).map(tuple)


@given(
    st.integers(0, 2**32),
    st.sampled_from(NAMES),
    st.sampled_from([*NAMES, "boy", "desk lamp", "grizzly bears"]),
    SYNONYMS,
    SYNONYMS,
    st.integers(1, 8),
)
def test_options_hold_the_target_once_and_nothing_else_that_is_right(
    seed: int,
    selected: str,
    target: str,
    synonyms: tuple[str, ...],
    named: tuple[str, ...],
    distractors: int,
) -> None:
    assume(not mentions(selected, target) and not mentions(target, selected))
    caption = f"a {selected} and {', '.join(named)}"
    subject = edit(seed, caption=caption, selected=selected, target=target, synonyms=synonyms)
    options = options_of(subject, CATEGORIES, distractors)
    assert len(options) == len(set(options)) == distractors + 1
    assert options.count(target) == 1
    for option in set(options) - {target}:
        assert option in NAMES
        assert not mentions(caption, option)
        for word in (target, target.split()[-1], *synonyms):
            assert not mentions(option, word)
            assert not mentions(word, option)
    assert options_of(subject, CATEGORIES, distractors) == options


def test_a_part_or_a_whole_of_a_right_name_is_no_distractor() -> None:
    subject = edit(selected="tea cup", target="grizzly", synonyms=("polar bear", "cub"))
    categories = {"a": ("bear", "Cups", "bear cub", "grizzly bear", "owl"), "b": ("saw",)}
    assert sorted(options_of(subject, categories, 9)) == ["grizzly", "owl", "saw"]


def test_half_the_distractors_are_of_the_targets_kind() -> None:
    for seed in range(20):
        options = options_of(edit(seed, selected="cup", target="Owls"), CATEGORIES, 4)
        assert len(set(options) & set(CATEGORIES["birds"])) >= 2
        assert len(set(options) - set(CATEGORIES["birds"]) - {"Owls"}) >= 2


def test_the_target_stands_anywhere_and_distractors_vary() -> None:
    drawn = [options_of(edit(s, selected="cup", target="owl"), CATEGORIES, 3) for s in range(400)]
    for place in range(4):
        # 100 are expected; the standard deviation is 8.7.
        assert 65 < sum(options[place] == "owl" for options in drawn) < 135
    assert {name for options in drawn for name in options} >= set(CATEGORIES["birds"])
    assert len({name for options in drawn for name in options}) > 100


class Recording(FakePlanner):
    """A resolver that keeps what it was asked, and stumbles over what is sad."""

    asked: ClassVar[list[ResolveRequest]] = []

    def resolve(self, requests: Sequence[ResolveRequest]) -> list[Choice | Problem]:
        self.asked.extend(requests)
        sad = Problem(status="failed", reason="too sad")
        answers = zip(requests, super().resolve(requests), strict=True)
        return [sad if request.instruction == "sad" else answer for request, answer in answers]


def question(instruction: str, target: str, seed: int = 0, caption: str = "a cup") -> Edit:
    return edit(seed, caption=caption, instruction=instruction, selected="cup", target=target)


def test_the_reader_is_told_caption_and_instruction_alone() -> None:
    Recording.asked.clear()
    subject, edits = scorer(Resolvable, distractors=2), [question("It hops.", "rabbit", 7)]
    assert subject.score(edits, {"resolver": Recording(FakePlannerOptions())}) == [{"correct": 0.0}]
    [asked] = Recording.asked
    assert (asked.caption, asked.instruction, asked.seed) == ("a cup", "It hops.", 7)
    assert len(asked.options) == 3


def test_a_right_answer_is_correct_and_a_problem_is_the_records() -> None:
    edits = [
        question("It hops.", "rabbit"),
        question("sad", "rabbit", 1),
        question("It hoots.", "zebra crossing", 2),
    ]
    subject = scorer(Resolvable)
    planner = Recording(FakePlannerOptions(target="rabbit"))
    assert subject.score(edits, {"resolver": planner}) == [
        {"correct": 1.0},
        Problem(status="failed", reason="too sad"),
        {"correct": 0.0},
    ]
    assert subject.reject([{"correct": 1.0}, {"correct": 0.0}]) == [
        None, "the resolver takes the instruction to mean something else",
    ]  # fmt: skip


def test_ones_own_categories_may_be_too_few() -> None:
    own = {"tools": ["hammer", "saw"], "drinks": ["tea", "cups"]}  # and a cup is what goes
    subject = scorer(Resolvable, distractors=3, categories=own)
    edits = [question("It bangs.", "pistol"), question("It hops.", "rabbit", caption="a saw")]
    reason = "only 2 of 3 distractors are left: add categories"
    first, second = subject.score(edits, {"resolver": resolver("pistol")})
    assert first == {"correct": 1.0}
    assert second == Problem(status="failed", reason=reason)


def test_the_score_follows_from_all_options() -> None:
    # They change what is asked, so that a change of them asks again.
    assert ResolvableOptions.fingerprint_exclude == frozenset()


def test_nothing_to_ask_asks_nothing() -> None:
    assert scorer(Resolvable).score([], {"resolver": resolver()}) == []
