"""The caption of an edited image says what the image shows, in English."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonpix.core.english.captions import edited_caption
from reasonpix.core.english.inflection import plural
from reasonpix.core.text import mentions

SETS = ("edited_captions", "edited_captions_held_out")


def rows(name: str) -> list[tuple[str, ...]]:
    """Caption, category, target, and what is expected."""
    text = (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" | ")) for line in lines]


@pytest.mark.parametrize(
    ("caption", "selected", "target", "expected"), [row for name in SETS for row in rows(name)]
)
def test_everything_that_is_named_is_replaced(
    caption: str, selected: str, target: str, expected: str
) -> None:
    assert edited_caption(caption, selected, target) == expected


@pytest.mark.parametrize(
    ("caption", "selected", "target", "expected"),
    [
        ("two cats on a sofa", "cat", "dog", "a cat and a dog on a sofa"),
        ("Two black cats are playing", "cat", "dog", "A black cat and a black dog are playing"),
        ("three mice", "mouse", "owl", "two mice and an owl"),
        ("The swans are swimming", "swan", "duck", "The swans and a duck are swimming"),
        ("his three knives", "knife", "fork", "his two knives and a fork"),
        ("cats, dogs and birds", "dog", "cat", "cats, dogs, a cat and birds"),
        ("a group of men in a field", "man", "robot", "a group of men and a robot in a field"),
        ("a couple of birds on a wire", "bird", "cat", "a bird and a cat on a wire"),
        ("12 sheep", "sheep", "goat", "11 sheep and a goat"),
        ("both children laugh", "child", "man", "a child and a man laugh"),
        ("TWO CATS", "cat", "owl", "A CAT AND AN OWL"),
        ("the dogs' bowls", "dog", "cat", "the cats' bowls"),
        ("jeans on a chair", "jeans", "skirt", "a skirt on a chair"),
        ("a dog", "dog", "cat", "a cat"),
        # an owner and a number
        ("The woman's two dogs run.", "dog", "turtle", "The woman's dog and a turtle run."),
        ("the boy's three kites", "kite", "owl", "the boy's two kites and an owl"),
        ("Anna's two cats", "cat", "dog", "Anna's cat and a dog"),
        ("The dogs' two bowls are red", "bowl", "cup", "The dogs' bowl and a cup are red"),
        ("the boy's pair of books", "book", "cup", "the boy's book and a cup"),
        ("There's two cats here", "cat", "dog", "There's a cat and a dog here"),
        ("these two dogs", "dog", "cat", "this dog and a cat"),
        # each of several, and none
        ("Each penguin holds an orange in its beak.", "penguin", "dog",
         "Each penguin and a dog holds an orange in its beak."),
        ("a hat on every table", "table", "chair", "a hat on every table and a chair"),
        ("each of the two dogs", "dog", "cat", "each of the dogs and a cat"),
        ("a photo of two cats", "cat", "dog", "a photo of a cat and a dog"),
        ("All dogs bark", "dog", "cat", "All dogs and a cat bark"),
        ("all three dogs bark", "dog", "cat", "two dogs and a cat bark"),
        ("Both the dogs bark", "dog", "cat", "The dog and a cat bark"),
        ("Most dogs bark", "dog", "cat", "Most dogs and a cat bark"),
        ("No dogs are here.", "dog", "cat", "No dogs are here, with a cat."),
        ("a beach without dogs", "dog", "cat", "a beach without dogs, with a cat"),
        ("neither dog barks", "dog", "cat", "neither dog barks, with a cat"),
    ],
)  # fmt: skip
def test_one_of_several_is_replaced(
    caption: str, selected: str, target: str, expected: str
) -> None:
    assert edited_caption(caption, selected, target, one_of_several=True) == expected


@pytest.mark.parametrize(
    ("caption", "selected", "target", "expected"),
    [
        ("a woman eating pizza", "pizza", "sandwich", "a woman eating a sandwich"),
        ("a man riding horses", "horse", "camel", "a man riding camels"),
        ("man riding horse", "horse", "camel", "man riding camel"),
        ("a cat lying down", "cat", "dog", "a dog lying down"),
        ("a man with two children", "child", "fox", "a man with two foxes"),
        ("a cup of hot coffee on a desk", "cup", "candle", "a candle on a desk"),
        ("a cup of coffee on a desk", "cup", "mug", "a mug of coffee on a desk"),
        ("a slice of pizza", "pizza", "pie", "a slice of pie"),
        ("a black and white cat", "cat", "dog", "a black and white dog"),
        ("a big, red ball", "ball", "apple", "a big, red apple"),
        ("a man's glasses on a book", "glasses", "hat", "a man's hat on a book"),
        ("this cat is cute", "cat", "jeans", "this pair of jeans is cute"),
        ("the grass is green", "grass", "carpet", "the carpet is green"),
        ("A cat watches its tail", "cat", "foxes", "Foxes watch their tail"),
        ("there's a cat on a bed", "cat", "owls", "there are owls on a bed"),
        ("a photo of a cat that is asleep", "cat", "owls", "a photo of owls that are asleep"),
        ("a fire hydrant", "fire", "bench", "a bench"),
        ("a cat bed on the floor", "cat", "dog", "a dog on the floor"),
        ("glasses on a table", "glass", "cup", "cups on a table"),
        ("the tower in fog", "tower", "The Eiffel Tower", "the Eiffel Tower in fog"),
        ("A Dalmatian on a sofa", "dalmatian", "cat", "A cat on a sofa"),
        ("der Hund auf dem Sofa", "Hund", "Fuchs", "der Fuchs auf dem Sofa"),
        ("🐝 on a flower", "🐝", "🦋", "🦋 on a flower"),
        ("a bee", "bee", r"\1 mug", r"a \1 mug"),
        ("an hour glass", "hourglass", "one-way sign", "a one-way sign"),
        ("It must be an apple", "bean", "owl", "It must be an apple, with an owl"),
        ("", "bee", "owl", "an owl"),
    ],
)
def test_phrases_of_all_kinds(caption: str, selected: str, target: str, expected: str) -> None:
    assert edited_caption(caption, selected, target) == expected


def test_the_phrase_tells_which_mention_is_meant() -> None:
    caption = "a black cat and a white cat"
    assert edited_caption(caption, "cat", "dog") == "a black dog and a white cat"
    edited = edited_caption(caption, "cat", "dog", phrase="a white cat")
    assert edited == "a black cat and a white dog"
    assert edited_caption("a bee", "bee", "owl", phrase="not there") == "an owl"


def test_synonyms_are_other_words_for_the_category() -> None:
    caption = "a bike by a wall"
    assert edited_caption(caption, "bicycle", "horse") == "a bike by a wall, with a horse"
    edited = edited_caption(caption, "bicycle", "horse", synonyms=["cycle", "bike"])
    assert edited == "a horse by a wall"
    assert edited_caption("a butterfly", "monarch butterfly", "owl") == "an owl"


NOUNS = "bee owl cat unicorn hourglass mouse knife fox sheep umbrella fire-truck woman".split()  # noqa: SIM905
TARGETS = [*NOUNS, "scissors", "water", "flowers", "An Igloo", "one-eyed dog", "X-ray", "SUV"]
FRAMES = [
    ("", ""), ("a tree and ", ""), ("a photo of ", " near a pond"), ("There is ", "."),
    ("on top of ", ", at night"), ("", " sleeping under a tree"),
]  # fmt: skip
VOWELS = ("owl", "umbrella", "hourglass")
DETERMINERS = ["a", "the", "my", "one", "two", "several", "this", "a small", "the red", ""]


@given(
    st.sampled_from(FRAMES),
    st.sampled_from(DETERMINERS),
    st.sampled_from(NOUNS),
    st.sampled_from(TARGETS),
    st.booleans(),
)
def test_results_are_english(
    frame: tuple[str, str], determiner: str, noun: str, target: str, one_of_several: bool
) -> None:
    many = determiner in ("two", "several")
    article = "an" if determiner == "a" and noun in VOWELS else determiner
    caption = f"{frame[0]}{article} {plural(noun) if many else noun}{frame[1]}".replace(
        "  ", " "
    ).strip()
    edited = edited_caption(caption, noun, target, one_of_several=one_of_several)
    assert mentions(edited, target.removeprefix("An "))
    spoken_with_consonant = r"unicorn|one-eyed"
    assert not re.search(rf"\b[Aa] (?!{spoken_with_consonant})(?:[aeiou]|hour|X-ray|SUV)", edited)
    assert not re.search(r"\b[Aa]n (?!hour|X-ray|SUV)[^aeiou]|\b[Aa]n (?:unicorn|one-)", edited)
    assert not re.search(r"\ba (?:water|flowers|scissors)\b", edited)
    assert "  " not in edited
    for around in frame:  # what stands around the phrase stays, up to verbs in another number
        assert around.replace(" is ", " ").strip() in edited.replace(" is ", " ").replace(
            " are ", " "
        )


@given(st.text(), st.text(min_size=1), st.text(), st.booleans())
def test_any_text_can_be_edited(
    caption: str, selected: str, target: str, one_of_several: bool
) -> None:
    assert edited_caption(caption, selected, target, one_of_several=one_of_several) is not None


@given(st.sampled_from(DETERMINERS[:3]), st.sampled_from(NOUNS), st.sampled_from(FRAMES))
def test_a_word_replaced_by_itself_stays(
    determiner: str, noun: str, frame: tuple[str, str]
) -> None:
    article = "an" if determiner == "a" and noun in VOWELS else determiner
    caption = f"{frame[0]}{article} {noun}{frame[1]}"
    assert edited_caption(caption, noun, noun) == caption
