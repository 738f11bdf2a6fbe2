"""What an answer of an LLM must be, task by task."""

from __future__ import annotations

import string
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reasonpix.core.text import content_words, mentions
from reasonpix.llm.tasks import (
    RESOLVE,
    SELECT,
    TASKS,
    InvalidAnswer,
    NumberAnswer,
    ReplaceAnswer,
    RewriteAnswer,
    read_plan,
    read_rewriting,
)
from reasonpix.plugin.components import PlannerTask
from reasonpix.plugin.types import (
    Choice,
    EditPlan,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

NOUN = st.text(string.ascii_lowercase, min_size=3, max_size=9)
# No noun is spelt with digits, so that these can hold none of them.
FILLER = st.lists(st.text(string.digits, min_size=1, max_size=5), max_size=6)


def plural(word: str) -> str:
    return word + "es" if word.endswith(("s", "x", "z", "ch", "sh")) else word + "s"


def test_there_is_a_task_for_each_verb() -> None:
    assert set(TASKS) == set(get_args(PlannerTask))
    for name, task in TASKS.items():
        assert task.name == name
        assert "seed" in task.request.model_fields


# -- P_gen ---------------------------------------------------------------------------------------


def rewriting(instruction: str, *revealing: str, direct: str = "make it winter") -> Rewriting:
    request = RewriteRequest(
        caption="a dog in a green park",
        edited_caption="a dog in a snowy park",
        instruction=direct,
        seed=0,
    )
    return read_rewriting(request, RewriteAnswer(instruction=instruction, revealing=revealing))


def test_a_rewriting_is_tidy() -> None:
    found = rewriting(" Bring\nthe sledge. ", "the snow", "snow", " ", "?", "it", "green")
    assert found == Rewriting(instruction="Bring the sledge.", revealing=("snow", "green"))


@pytest.mark.parametrize(
    ("instruction", "revealing", "told"),
    [
        ("", (), "instruction is empty"),
        ("…", (), "instruction is empty"),
        ("so " * 101, (), "302 characters, 300 are allowed"),
        ("Bring\x00 the sledge.", (), "control characters"),
        ("Make it WINTER!", (), "repeats the direct instruction"),
        ("It feels like winter.", ("winter",), "gives the edit away .* 'winter'"),
        ("Winters bring Snow.", ("snow", "frost", "winter"), "'snow', 'winter'"),
        ("Make it winter.", ("winter",), "repeats .*; .*'winter'"),
    ],
)
def test_a_rewriting_that_breaks_a_rule_is_explained(
    instruction: str, revealing: tuple[str, ...], told: str
) -> None:
    with pytest.raises(InvalidAnswer, match=told):
        rewriting(instruction, *revealing)


def test_what_stays_reveals_nothing() -> None:
    found = rewriting("The dog wants mittens in this park.", "dogs", "park", "snow")
    assert found.revealing == ("snow",)


@given(NOUN, FILLER)
def test_a_revealing_word_is_found_in_both_numbers(noun: str, others: list[str]) -> None:
    assume(content_words(noun) and not mentions("a dog in a park", noun))
    hint = " ".join(["0", *others])
    assert rewriting(hint, noun).revealing == (noun,)
    for form in (noun, plural(noun)):
        with pytest.raises(InvalidAnswer, match=f"'{noun}'"):
            rewriting(f"{hint} {form}", noun)


# -- P_select, resolve ---------------------------------------------------------------------------

SELECTION = SelectRequest(
    caption="", edited_caption="", instruction="", candidates=("one", "two", "three"), seed=0
)
RESOLUTION = ResolveRequest(caption="", instruction="", options=("one", "two", "three"), seed=0)


def choice(task: Any, request: Any, best: int) -> Choice:
    result: Choice = task.read(request, NumberAnswer(best=best))
    return result


@pytest.mark.parametrize(("task", "request_"), [(SELECT, SELECTION), (RESOLVE, RESOLUTION)])
def test_a_number_counts_from_1(task: Any, request_: Any) -> None:
    assert [choice(task, request_, best).index for best in (1, 2, 3)] == [0, 1, 2]
    for best in (0, 4, -1):
        with pytest.raises(InvalidAnswer, match=f"from 1 to 3, not {best}"):
            choice(task, request_, best)


# -- P_replace -----------------------------------------------------------------------------------

CATEGORIES = ("Christmas tree", "dog", "glass", "shelves")


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "selected": "dog",
        "target": "snowman",
        "instruction": "Something with a carrot nose should stand there.",
        "selected_synonyms": ["puppy"],
        "target_synonyms": ["snow figure"],
    } | changes


def read(**changes: Any) -> EditPlan:
    request = ReplaceRequest(caption="a winter night", categories=CATEGORIES, seed=5)
    return read_plan(request, ReplaceAnswer(**fields(**changes)))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("dog", "dog"),
        ("Dogs", "dog"),
        (" DOG ", "dog"),
        ("christmas-trees", "Christmas tree"),
        ("christmastree", "Christmas tree"),
        ("glasses", "glass"),
        ("Shelf", "shelves"),
        ("The Dog", "dog"),
        ("a dog", "dog"),
        ("'dog'.", "dog"),
        ("two dogs", "dog"),
        ("the Christmas trees", "Christmas tree"),
        ("tree", "Christmas tree"),
        ("the old brown dog", "dog"),
        ("a pair of glasses", "glass"),
    ],
)
def test_selected_becomes_the_category_it_means(said: str, meant: str) -> None:
    assert read(selected=said, selected_synonyms=[]).selected == meant


def test_an_exact_category_goes_before_a_similar_one() -> None:
    answer = ReplaceAnswer(**fields(selected="Dogs"))
    request = ReplaceRequest(caption="", categories=("dog", "Dogs"), seed=0)
    assert read_plan(request, answer).selected == "Dogs"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"selected": "cat"}, "selected must be one of Christmas tree, dog, glass, shelves"),
        ({"selected": ""}, "selected must be one of"),
        ({"target": ""}, "target must be a name"),
        ({"target": "?!"}, "target must be a name"),
        ({"target": "bun, insect"}, "target must be a name"),
        ({"target": "a very big and round snowman"}, "target must be a name"),
        ({"target": "dog"}, "not be in the picture"),
        ({"target": "Dogs"}, "not be in the picture"),
        ({"target": "glasses"}, "not be in the picture"),
        ({"target": "some glasses"}, "not be in the picture"),
        ({"target": "shelf"}, "not be in the picture"),
        ({"target": "puppies"}, "another word for dog"),
        ({"target_synonyms": ["Dog"]}, "another word for dog"),
        ({"instruction": " \n"}, "instruction is empty"),
        ({"instruction": "…"}, "instruction is empty"),
        ({"instruction": "so " * 101}, "characters"),
        ({"instruction": "a carrot\x00 nose"}, "control characters"),
        ({"instruction": "It wants a dog's life no more."}, "selected category away"),
        ({"instruction": "No puppies here."}, "selected category away"),
        ({"instruction": "Build Snowmen!"}, "target category away"),
        ({"instruction": "A snow-man it is."}, "target category away"),
        ({"instruction": "A big snow figure."}, "target category away"),
        ({"target": "monarch butterfly", "instruction": "Butterflies!"}, "target category away"),
    ],
)
def test_what_breaks_a_rule_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidAnswer, match=told):
        read(**changes)


def test_other_categories_may_be_named() -> None:
    assert read(instruction="It melts next to the glass and the Christmas tree.")


def test_a_plan_is_tidy() -> None:
    plan = read(
        target="  A snow \n man, ",
        instruction=" One with\na carrot nose. ",
        selected_synonyms=["a puppy", "dog", "", "it", "puppy"],
    )
    assert plan.target == "snow man"
    assert plan.instruction == "One with a carrot nose."
    assert plan.synonyms == ("puppy", "snow figure")


@given(NOUN, FILLER)
def test_a_synonym_in_the_instruction_is_a_leak(noun: str, others: list[str]) -> None:
    hint = " ".join(["0", *others])
    assume(content_words(noun) and not mentions("dog snowman", noun))
    assert noun in read(instruction=hint, target_synonyms=[noun]).synonyms
    with pytest.raises(InvalidAnswer, match=f"target category away by the word '{noun}'"):
        read(instruction=f"{hint} {plural(noun)}", target_synonyms=[noun])
