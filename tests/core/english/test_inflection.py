"""Plurals, singulars and articles of English nouns."""

from __future__ import annotations

import pytest

from reasonpix.core.english.inflection import (
    indefinite_article,
    is_plural,
    plural,
    singular,
    with_article,
)

PLURALS = """
    bee:bees butterfly:butterflies monkey:monkeys box:boxes bus:buses church:churches
    stomach:stomachs dish:dishes quiz:quizzes man:men fireman:firemen human:humans German:Germans
    child:children mouse:mice blouse:blouses foot:feet tooth:teeth goose:geese mongoose:mongooses
    ox:oxen fox:foxes knife:knives roof:roofs leaf:leaves shelf:shelves bookshelf:bookshelves
    tomato:tomatoes photo:photos piano:pianos hero:heroes cactus:cacti octopus:octopuses gas:gases
    lens:lenses iris:irises ski:skis taxi:taxis axe:axes glass:glasses dress:dresses person:people
    shoe:shoes horse:horses house:houses rose:roses TV:TVs SUV:SUVs passer-by:passers-by
    mother-in-law:mothers-in-law fire-truck:fire-trucks Owl:Owls café:cafés omen:omens
"""


@pytest.mark.parametrize(("one", "many"), [pair.split(":") for pair in PLURALS.split()])
def test_plurals_are_made_and_undone(one: str, many: str) -> None:
    assert plural(one) == many
    assert plural(many) == many
    assert singular(many) == one
    assert singular(one) == one
    assert is_plural(many)
    assert not is_plural(one)


@pytest.mark.parametrize("noun", ["sheep", "deer", "aircraft", "series", "swordfish", "猫", "🐝"])
def test_some_nouns_do_not_change(noun: str) -> None:
    assert plural(noun) == noun
    assert not is_plural(noun)


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("glass of water", "glasses of water"),
        ("fire truck", "fire trucks"),
        ("pair of scissors", "pairs of scissors"),
        ("computer mouse", "computer mice"),
    ],
)
def test_the_head_of_a_phrase_is_inflected(one: str, many: str) -> None:
    assert (plural(one), singular(many)) == (many, one)


@pytest.mark.parametrize(
    "shown",
    [
        "a bee", "an owl", "a unicorn", "an umbrella", "a ukulele", "an hourglass",
        "an honest man", "an heirloom", "a one-way sign", "a European badger", "a university",
        "a uniform", "an uninvited guest", "an unidentified object", "a utensil", "a urinal",
        "an urn", "an usher", "an ulcer", "a ewe", "an egg", "an eagle", "a yacht", "a hat",
        "an X-ray", "an x-ray", "a T-shirt", "an S-hook", "a U-turn", "an MRI machine",
        "an FBI agent", "an SUV", "an LED lamp", "a UFO", "a USB stick", "an HDMI cable",
        "a STOP sign", "a NASA badge", "an 8-ball", "an 11-inch tablet", "an 80-year-old",
        "a 10-inch tablet", "a 1100 box", "a 110 box", "an éclair", "a 猫", 'an "owl"',
        "a once-white shirt",
    ],
)  # fmt: skip
def test_the_article_follows_the_sound(shown: str) -> None:
    article, name = shown.split(" ", 1)
    assert indefinite_article(name) == article


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owl", "an owl"),
        ("scissors", "a pair of scissors"),
        ("jeans", "a pair of jeans"),
        ("sunglasses", "a pair of sunglasses"),
        ("water", "water"),
        ("green grass", "green grass"),
        ("flowers", "flowers"),
        ("people", "people"),
        ("glass", "a glass"),
        ("bus", "a bus"),
    ],
)
def test_only_what_can_be_counted_has_an_article(name: str, shown: str) -> None:
    assert with_article(name) == shown
