"""Questions to an LLM, and what becomes of its answers."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reasonpix.errors import RecipeError
from reasonpix.planning import (
    Completion,
    Conversation,
    InvalidAnswer,
    LLMPlanner,
    LLMPlannerOptions,
    ReplaceAnswer,
    mentions,
    read_plan,
)
from reasonpix.records import EditPlan, Problem, ReplaceRequest

Reply = Completion | Problem


class Parrot(LLMPlanner[LLMPlannerOptions]):
    """Says what it was taught for a caption, one reply after the other."""

    name = "parrot"

    def __init__(self, taught: Mapping[str, Sequence[str | Reply]], **options: Any) -> None:
        super().__init__(LLMPlannerOptions(**options))
        self.taught = {caption: list(replies) for caption, replies in taught.items()}
        self.asked: list[list[Conversation]] = []
        self.schema: Mapping[str, Any] = {}

    def complete(
        self, conversations: Sequence[Conversation], schema: Mapping[str, Any]
    ) -> list[Reply]:
        self.asked.append(list(conversations))
        self.schema = schema
        return [self.say(conversation) for conversation in conversations]

    def say(self, conversation: Conversation) -> Reply:
        asked = "".join(turn.content for turn in conversation.messages)
        [caption] = [caption for caption in self.taught if f"Caption: {caption}\n" in asked]
        reply = self.taught[caption].pop(0)
        return Completion(text=reply) if isinstance(reply, str) else reply


CATEGORIES = ("Christmas tree", "dog", "glass", "shelves")


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "selected": "dog",
        "target": "snowman",
        "instruction": "Something with a carrot nose should stand there.",
        "selected_synonyms": ["puppy"],
        "target_synonyms": ["snow figure"],
    } | changes


def text(**changes: Any) -> str:
    return json.dumps(fields(**changes))


def read(**changes: Any) -> EditPlan:
    return read_plan(CATEGORIES, ReplaceAnswer(**fields(**changes)))


def request(caption: str = "a winter night", seed: int = 5) -> ReplaceRequest:
    return ReplaceRequest(caption=caption, categories=CATEGORIES, seed=seed)


GOOD = EditPlan(
    selected="dog",
    target="snowman",
    instruction="Something with a carrot nose should stand there.",
    synonyms=("puppy", "snow figure"),
)


# The question


def test_question_holds_caption_categories_examples_and_seed() -> None:
    planner = Parrot({"a winter night": [text()]})
    assert planner.replace([request()]) == [GOOD]
    [[conversation]] = planner.asked
    roles = [turn.role for turn in conversation.messages]
    examples = planner.prompt.examples
    assert roles == ["system", *["user", "assistant"] * len(examples), "user"]
    assert "a winter night" in conversation.messages[-1].content
    assert "Christmas tree, dog, glass, shelves" in conversation.messages[-1].content
    assert ReplaceAnswer.model_validate_json(conversation.messages[2].content) == examples[0].answer
    assert conversation.seed == 5


def test_a_caption_is_only_text() -> None:
    caption = "$categories {0} ${caption} $$"
    planner = Parrot({caption: [text()]})
    planner.replace([request(caption)])
    assert f"Caption: {caption}\n" in planner.asked[0][0].messages[-1].content


def test_the_schema_is_strict_and_plain() -> None:
    planner = Parrot({"a winter night": [text()]})
    planner.replace([request()])
    schema = planner.schema
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == set(schema["properties"]) == set(fields())
    # What strict servers do not compile: references and defaults.
    assert "$ref" not in str(schema)
    assert "default" not in str(schema)


def test_without_categories_nobody_is_asked() -> None:
    planner = Parrot({"a winter night": [text()]})
    empty = ReplaceRequest(caption="fog", categories=(), seed=0)
    first, second, third = planner.replace([empty, request(), empty])
    assert second == GOOD
    assert isinstance(first, Problem)
    assert first == third
    assert first.status == "rejected"
    assert Parrot({}).replace([]) == []


# The prompt file


def built_in() -> str:
    path = resources.files("reasonpix").joinpath("prompts/replace.yaml")
    return path.read_text(encoding="utf-8")


def test_identity_follows_the_content_not_the_path(tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.yaml", tmp_path / "other.yaml"
    copy.write_bytes(built_in().encode())
    other.write_bytes(built_in().encode() + b"\n")
    plain = Parrot({}).identity()
    assert plain["prompt"] == hashlib.sha256(built_in().encode()).hexdigest()
    assert Parrot({}, prompt=copy).identity() == plain
    assert Parrot({}, prompt=other).identity() != plain
    assert "prompt" in LLMPlannerOptions.neutral


def test_another_prompt_is_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("system: Be short.\nuser: 'Caption: $caption\n\n$categories'\nrepair: $problem")
    planner = Parrot({"a winter night": ["nonsense", text()]}, prompt=path)
    planner.check()
    assert planner.replace([request()]) == [GOOD]
    first, second = planner.asked
    assert [turn.role for turn in first[0].messages] == ["system", "user"]
    assert first[0].messages[0].content == "Be short."
    assert second[0].messages[-1].content.startswith("Invalid JSON")


def bad_example(prompt: dict[str, Any]) -> None:
    prompt["examples"][1]["answer"]["target"] = prompt["examples"][1]["answer"]["selected"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda prompt: prompt.pop("system"), "system: Field required"),
        (lambda prompt: prompt.update(extra="x"), "extra: Extra inputs"),
        (lambda prompt: prompt.update(user="Caption: $caption"), "user: use $caption and $categor"),
        (lambda prompt: prompt.update(repair="Cost: 5$ $problem"), "repair: use $problem"),
        (bad_example, "example 2"),
    ],
)
def test_a_bad_prompt_is_explained(
    spoil: Callable[[dict[str, Any]], Any], told: str, tmp_path: Path
) -> None:
    prompt = yaml.safe_load(built_in())
    spoil(prompt)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(prompt))
    with pytest.raises(RecipeError) as error:
        Parrot({}, prompt=path).check()
    assert told in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"just words"])
def test_a_file_that_is_no_prompt_is_explained(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        Parrot({}, prompt=path).check()


def test_a_missing_prompt_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        Parrot({}, prompt=tmp_path / "none.yaml").identity()


# Repair


def test_only_bad_answers_are_asked_again_and_order_holds() -> None:
    planner = Parrot(
        {
            "one": [text(target="cat")],
            "two": ["nonsense", text(target="fox")],
            "three": [Problem(status="failed", reason="line cut")],
            "four": [text(selected="cow"), text(selected="pig")],
            "five": [Completion(text="", refusal="No, I\nwill not.")],
            "six": ["", Problem(status="failed", reason="line cut later")],
            "seven": ["{}", Completion(text="", refusal="No.")],
        }
    )
    requests = [request(caption, seed) for seed, caption in enumerate(planner.taught)]
    one, two, three, four, five, six, seven = planner.replace(requests)
    assert isinstance(one, EditPlan)
    assert isinstance(two, EditPlan)
    assert (one.target, two.target) == ("cat", "fox")
    assert three == Problem(status="failed", reason="line cut")
    assert isinstance(four, Problem)
    assert four.status == "rejected"
    assert "'pig'" in four.reason
    assert five == Problem(status="rejected", reason="refused: 'No, I\\nwill not.'")
    assert six == Problem(status="failed", reason="line cut later")
    assert seven == Problem(status="rejected", reason="refused: 'No.'")
    first, second = planner.asked
    assert [len(first), len(second)] == [7, 4]
    assert [conversation.seed for conversation in second] == [1, 3, 5, 6]


def test_a_repair_shows_the_answer_and_all_that_is_wrong() -> None:
    bad = text(selected="cow", target="dogs", instruction="")
    planner = Parrot({"a winter night": [bad, text()]})
    assert planner.replace([request()]) == [GOOD]
    first, second = (conversations[0] for conversations in planner.asked)
    assert second.messages[:-2] == first.messages
    shown, complaint = second.messages[-2:]
    assert (shown.role, shown.content, complaint.role) == ("assistant", bad, "user")
    for problem in (
        "selected must be one of Christmas tree, dog",
        "is dog",
        "instruction is empty",
    ):
        assert problem in complaint.content


# Reading an answer


@pytest.mark.parametrize(
    "wrapped",
    [
        "```json\n{}\n```",
        "```\n{}\n```",
        "Sure!\n\n```json\n{}\n```\nI hope this helps.",
        "  {}\n",
        "Here: {}",
    ],
)
def test_json_is_found_in_its_wrapping(wrapped: str) -> None:
    planner = Parrot({"a winter night": [wrapped.replace("{}", text())]})
    assert planner.replace([request()]) == [GOOD]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "no",
        "{",
        "}{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "null",
        f"[{text()}]",
        text()[:-1],
        text(extra=1),
        text(target=3),
        text(target=None),
        text(selected_synonyms="puppy"),
        text().replace("nose", "\\ud800"),
    ],
)
def test_what_is_no_answer_is_rejected(bad: str) -> None:
    planner = Parrot({"a winter night": [bad, bad]})
    [problem] = planner.replace([request()])
    assert isinstance(problem, Problem)
    assert problem.status == "rejected"
    assert len(problem.reason) < 500


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
    ],
)
def test_selected_becomes_the_category_it_means(said: str, meant: str) -> None:
    assert read(selected=said, selected_synonyms=[]).selected == meant


def test_an_exact_category_goes_before_a_similar_one() -> None:
    answer = ReplaceAnswer(**fields(selected="Dogs"))
    assert read_plan(("dog", "Dogs"), answer).selected == "Dogs"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"selected": "cat"}, "selected must be one of Christmas tree, dog, glass, shelves"),
        ({"selected": ""}, "selected must be one of"),
        ({"target": ""}, "target must be a name"),
        ({"target": "?!"}, "target must be a name"),
        ({"target": "a very big and round snowman"}, "target must be a name"),
        ({"target": "dog"}, "not be in the picture"),
        ({"target": "Dogs"}, "not be in the picture"),
        ({"target": "glasses"}, "not be in the picture"),
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
        target="  snow \n man ",
        instruction=" One with\na carrot nose. ",
        selected_synonyms=["puppy", "dog", "", "puppy"],
    )
    assert plan.target == "snow man"
    assert plan.instruction == "One with a carrot nose."
    assert plan.synonyms == ("puppy", "snow figure")


# Words


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


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
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


laws = settings(deadline=None, derandomize=True, database=None)

NOUN = st.text(string.ascii_lowercase, min_size=3, max_size=9)
# No noun is spelt with digits, so that these can hold none of them.
FILLER = st.lists(st.text(string.digits, min_size=1, max_size=5), max_size=6)
CASE = st.sampled_from([str.lower, str.upper, str.title, str.capitalize])
AROUND = st.sampled_from(
    ["{}", "{},", '"{}"', "({})", "{}'s", "{}’s", "{}!", "¿{}?", "-{}-", "_{}_"]
)


@laws
@given(NOUN, FILLER, FILLER, CASE, AROUND)
def test_a_word_is_found_wherever_it_stands(
    noun: str, before: list[str], after: list[str], case: Callable[[str], str], around: str
) -> None:
    for form in (noun, plural(noun)):
        sentence = " ".join([*before, around.format(case(form)), *after])
        assert mentions(sentence, noun)
        assert mentions(sentence, plural(noun))


@laws
@given(st.lists(NOUN, min_size=2, max_size=3), FILLER, FILLER, st.sampled_from([" ", "-", ""]))
def test_a_compound_is_found_open_hyphenated_and_closed(
    nouns: list[str], before: list[str], after: list[str], joint: str
) -> None:
    written = joint.join([*nouns[:-1], plural(nouns[-1])])
    assert mentions(" ".join([*before, written, *after]), " ".join(nouns))


@laws
@given(NOUN, FILLER, st.sampled_from(["q{}q", "7{}", "{}7", "{}q"]))
def test_a_part_of_a_word_is_no_mention(noun: str, others: list[str], within: str) -> None:
    assert not mentions(" ".join([*others, within.format(noun)]), noun)


@laws
@given(NOUN, FILLER)
def test_a_synonym_in_the_instruction_is_a_leak(noun: str, others: list[str]) -> None:
    hint = " ".join(["0", *others])
    assume(not mentions("dog snowman", noun))
    assert noun in read(instruction=hint, target_synonyms=[noun]).synonyms
    with pytest.raises(InvalidAnswer, match=f"target category away by the word '{noun}'"):
        read(instruction=f"{hint} {plural(noun)}", target_synonyms=[noun])
