"""Which words mean the same, and which mean anything at all."""

from __future__ import annotations

import string
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonpix.core.text import (
    FUNCTION_WORDS,
    canonical,
    closest,
    content_words,
    head_nouns,
    mentions,
    one_line,
    strip_article,
    words_of,
)


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("child", "children"),
        ("woman", "women"),
        ("fireman", "firemen"),
        ("person", "people"),
        ("mouse", "mice"),
        ("goose", "geese"),
        ("tooth", "teeth"),
        ("foot", "feet"),
        ("ox", "oxen"),
        ("wolf", "wolves"),
        ("knife", "knives"),
        ("glove", "gloves"),
        ("cactus", "cacti"),
        ("larva", "larvae"),
        ("tomato", "tomatoes"),
        ("photo", "photos"),
        ("shoe", "shoes"),
        ("horse", "horses"),
        ("pie", "pies"),
        ("axe", "axes"),
        ("bus", "buses"),
        ("quiz", "quizzes"),
        ("sheep", "sheep"),
        ("piñata", "pinatas"),
    ],
)
def test_plurals_are_known_both_ways(one: str, many: str) -> None:
    assert mentions(f"Two {many}.", one)
    assert mentions(f"Two {one}.", many)


@given(st.text(), st.text())
def test_any_text_can_be_compared(sentence: str, name: str) -> None:
    assert mentions(sentence, name) in (True, False)
    assert mentions(name, name) == bool(words_of(name))


@given(st.text("aeibg", max_size=3), st.sampled_from(["ing", "ed", "ings"]))
def test_any_stem_can_be_compared(stem: str, ending: str) -> None:
    assert mentions(stem + ending, stem + ending)


@pytest.mark.parametrize(
    ("verb", "forms"),
    [
        ("snow", "snows snowed snowing"),
        ("paint", "paints painted painting paintings"),
        ("run", "running"),
        ("fall", "falling"),
        ("bake", "baked baking"),
        ("hate", "hating hated"),
        ("carry", "carries carried carrying"),
        ("tie", "tied"),
        ("wear", "wearing"),
        ("fix", "fixed fixing"),
        ("garden", "gardening"),
        ("ski", "skiing"),
    ],
)
def test_verbs_are_known_in_their_regular_forms(verb: str, forms: str) -> None:
    for form in forms.split():
        assert mentions(f"It is {form}!", verb)
        assert mentions(f"It will {verb}.", form)


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("A caring hand.", "car"),
        ("They were hating it, staring.", "hat"),
        ("They were hating it, staring.", "star"),
        ("A rating.", "rat"),
        ("It is being eaten.", "bee"),
        ("She needs a seed.", "see"),
        ("The king's ring.", "k"),
        ("a red bed", "r"),
        ("The beekeeper smiles.", "bee"),
        ("She cares for it.", "car"),
        ("It would be an honour.", "bean"),
        ("Glass breaks.", "glas"),
        ("A hot day with my dog.", "hot dog"),
        ("Dog, hot.", "hot dog"),
        ("The class went home.", "clas"),
        ("", "bee"),
        ("Bees!", ""),
        ("Bees!", "?"),
    ],
)
def test_what_only_looks_alike_is_no_mention(sentence: str, name: str) -> None:
    assert not mentions(sentence, name)


def plural(word: str) -> str:
    """The regular English plural, as school grammar has it."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word + "s"


NOUN = st.text(string.ascii_lowercase, min_size=3, max_size=9)
# No noun is spelt with digits, so that these can hold none of them.
FILLER = st.lists(st.text(string.digits, min_size=1, max_size=5), max_size=6)
CASE = st.sampled_from([str.lower, str.upper, str.title, str.capitalize])
AROUND = st.sampled_from(
    ["{}", "{},", '"{}"', "({})", "{}'s", "{}’s", "{}!", "¿{}?", "-{}-", "_{}_"]
)


@given(NOUN, FILLER, FILLER, CASE, AROUND)
def test_a_word_is_found_wherever_it_stands(
    noun: str, before: list[str], after: list[str], case: Callable[[str], str], around: str
) -> None:
    for form in (noun, plural(noun)):
        sentence = " ".join([*before, around.format(case(form)), *after])
        assert mentions(sentence, noun)
        assert mentions(sentence, plural(noun))


@given(st.lists(NOUN, min_size=2, max_size=3), FILLER, FILLER, st.sampled_from([" ", "-", ""]))
def test_a_compound_is_found_open_hyphenated_and_closed(
    nouns: list[str], before: list[str], after: list[str], joint: str
) -> None:
    written = joint.join([*nouns[:-1], plural(nouns[-1])])
    assert mentions(" ".join([*before, written, *after]), " ".join(nouns))


@given(NOUN, FILLER, st.sampled_from(["q{}q", "7{}", "{}7", "{}q"]))
def test_a_part_of_a_word_is_no_mention(noun: str, others: list[str], within: str) -> None:
    assert not mentions(" ".join([*others, within.format(noun)]), noun)


# -- content words, names, lines -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "content"),
    [
        ("It's what they weren't, isn't it?", []),
        ("Make it a watercolor.", ["make", "watercolor"]),
        ("The red car, and a RED bus!", ["red", "car", "bus"]),
        ("two dogs", ["two", "dogs"]),
        ("an x", []),
        ("", []),
    ],
)
def test_content_words_are_what_is_left(sentence: str, content: list[str]) -> None:
    assert content_words(sentence) == content


@given(st.text())
def test_content_words_are_words_without_repeats(sentence: str) -> None:
    content = content_words(sentence)
    assert len(content) == len(set(content))
    assert set(content) <= set(words_of(sentence)) - FUNCTION_WORDS


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("a puppy", "puppy"),
        (" The\nold  dog ", "old dog"),
        ("an", "an"),
        ("antelope", "antelope"),
        ("'The dog,'", "dog"),
        ("“a dog”", "dog"),
        ("**dog**", "dog"),
        ("`Dog`.", "Dog"),
        ("a.", "a"),
        ("theatre", "theatre"),
        ("a-frame", "a-frame"),
        ("", ""),
    ],
)
def test_a_bare_name_has_no_article(name: str, without: str) -> None:
    assert strip_article(name) == without


def test_the_last_word_of_a_compound_tells() -> None:
    assert head_nouns("Monarch-Butterfly") == ["Monarch-Butterfly", "butterfly"]
    assert head_nouns("bee") == ["bee"]
    assert head_nouns("?") == ["?"]


@given(st.text())
def test_one_line_is_one_and_keeps_the_words(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert line.split() == text.split()


@pytest.mark.parametrize(
    ("name", "names", "found"),
    [
        ("Dogs", ["dog", "Dogs"], "Dogs"),
        ("dogs", ["cat", "dog"], "dog"),
        ("hot-dogs", ["dog", "hotdog"], "hotdog"),
        ("fox", ["dog"], None),
        ("painting", ["paint"], None),
        ("?", ["!"], None),
        ("", [], None),
        ("The Bee", ["flower", "bee"], "bee"),
        ("a bee", ["bee"], "bee"),
        ("BEE.", ["bee"], "bee"),
        ('"bees"', ["bee"], "bee"),
        ("both of the bees", ["bee"], None),
        ("the two bees", ["bee"], "bee"),
        ("2 bees", ["bee"], "bee"),
        ("its wings", ["wing"], "wing"),
        ("honey bee", ["bee"], None),
        ("bee", ["the bee", "The Bee"], "the bee"),
        ("the who", ["who", "The Who"], "The Who"),
        ("this", ["that"], None),
    ],
)
def test_canonical_is_the_name_as_it_is_written_there(
    name: str, names: list[str], found: str | None
) -> None:
    assert canonical(name, names) == found


@pytest.mark.parametrize(
    ("name", "names", "found"),
    [
        ("hydrant", ["fire hydrant", "street"], "fire hydrant"),
        ("Fire Hydrants", ["fire hydrant", "street"], "fire hydrant"),
        ("the red fire hydrant", ["fire hydrant", "fire", "street"], "fire hydrant"),
        ("the red fire hydrant", ["fire hydrant", "street"], "fire hydrant"),
        ("dogs", ["hot dog", "dog"], "dog"),
        ("dog", ["hot dog", "table"], "hot dog"),
        ("a pair of scissors", ["scissors", "paper"], "scissors"),
        ("shirt", ["t-shirt", "jeans"], "t-shirt"),
        ("bus", ["school bus", "city bus"], None),
        ("bowl of soup", ["bowl", "soup"], None),
        ("dog collar", ["dog", "cat"], None),
        ("fire", ["fire hydrant"], None),
        ("ant", ["elephant"], None),
        ("", ["dog"], None),
        ("?", ["?!"], None),
    ],
)
def test_closest_is_the_entry_that_was_meant(
    name: str, names: list[str], found: str | None
) -> None:
    assert closest(name, names) == found
