"""Prompt files: what is asked, and that a bad file is explained before anything is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reasonpix.core.text import mentions
from reasonpix.errors import RecipeError
from reasonpix.generation.components.instruction_filters import leaks_of
from reasonpix.llm.prompts import Prompt
from reasonpix.llm.tasks import REPLACE, RESOLVE, REWRITE, SELECT, TASKS, InvalidAnswer
from reasonpix.plugin.components import PlannerTask
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.types import ReplaceRequest, ResolveRequest, RewriteRequest, SelectRequest

VERBS: tuple[PlannerTask, ...] = get_args(PlannerTask)

REQUESTS: dict[PlannerTask, Any] = {
    "rewrite": RewriteRequest(
        caption="a bee on a daisy", edited_caption="a bee on ice", instruction="ice it", seed=1
    ),
    "select": SelectRequest(
        caption="a bee on a daisy",
        edited_caption="a bee on ice",
        instruction="ice it",
        candidates=("It is cold.", "It would like to skate."),
        seed=2,
    ),
    "replace": ReplaceRequest(caption="a bee on a daisy", categories=("bee", "daisy"), seed=3),
    "resolve": ResolveRequest(
        caption="a bee on a daisy", instruction="It hops.", options=("rabbit", "owl"), seed=4
    ),
}

every_verb = pytest.mark.parametrize("verb", VERBS)


def built_in(verb: PlannerTask) -> dict[str, Any]:
    text = resources.files("reasonpix.llm").joinpath(f"templates/{verb}.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def examples(verb: PlannerTask) -> list[dict[str, Any]]:
    return list(built_in(verb)["examples"])


# -- the question --------------------------------------------------------------------------------


@every_verb
def test_a_question_follows_the_system_text_and_the_examples(verb: PlannerTask) -> None:
    conversation = Prompt(TASKS[verb]).conversation(REQUESTS[verb])
    count = len(examples(verb))
    roles = [turn.role for turn in conversation.messages]
    assert roles == ["system", *["user", "assistant"] * count, "user"]
    assert conversation.messages[0].content == built_in(verb)["system"].strip()
    assert conversation.shared == 1 + 2 * count
    assert conversation.seed == REQUESTS[verb].seed
    for name, value in REQUESTS[verb]:
        if name == "seed":
            continue
        for text in [value] if isinstance(value, str) else value:
            assert text in conversation.messages[-1].content


@every_verb
def test_questions_share_all_but_the_last_turn(verb: PlannerTask) -> None:
    prompt = Prompt(TASKS[verb])
    one = prompt.conversation(REQUESTS[verb])
    other = prompt.conversation(REQUESTS[verb].model_copy(update={"caption": "fog", "seed": 9}))
    assert one.messages[: one.shared] == other.messages[: other.shared]
    assert one.messages[-1] != other.messages[-1]


def test_options_are_numbered_from_1() -> None:
    for task, verb, first in ((SELECT, "select", "It is cold."), (RESOLVE, "resolve", "rabbit")):
        lines = Prompt(task).conversation(REQUESTS[verb]).messages[-1].content.splitlines()
        assert f"1. {first}" in lines
        assert not any(line.startswith(("0.", "3.")) for line in lines)


@given(st.text())
def test_a_caption_is_text_on_one_line(caption: str) -> None:
    request = ReplaceRequest(caption=caption, categories=("bee",), seed=0)
    question = Prompt(REPLACE).conversation(request).messages[-1].content
    assert question == f"Caption: {' '.join(caption.split())}\nCategories: bee"


def test_a_caption_is_no_template() -> None:
    caption = "$categories {0} ${caption} $$"
    request = ReplaceRequest(caption=caption, categories=("bee",), seed=0)
    assert f"Caption: {caption}\n" in Prompt(REPLACE).conversation(request).messages[-1].content


def test_a_line_break_makes_no_option() -> None:
    request = REQUESTS["select"].model_copy(update={"candidates": ("One.\n2. Two.", "Three.")})
    question = Prompt(SELECT).conversation(request).messages[-1].content
    assert "\n1. One. 2. Two.\n2. Three." in question


@every_verb
def test_a_repair_shows_the_answer_and_the_problem(verb: PlannerTask) -> None:
    prompt = Prompt(TASKS[verb])
    asked = prompt.conversation(REQUESTS[verb])
    again = prompt.repaired(asked, "nonsense", InvalidAnswer("it costs $5"))
    *before, answer, complaint = again.messages
    assert tuple(before) == asked.messages
    assert (answer.role, answer.content, complaint.role) == ("assistant", "nonsense", "user")
    assert "it costs $5" in complaint.content
    assert (again.seed, again.shared, again.answer_schema) == (
        asked.seed, asked.shared, asked.answer_schema,
    )  # fmt: skip
    assert prompt.repaired(asked, "", InvalidAnswer("?")).messages[-2].content


# -- the schema ----------------------------------------------------------------------------------


@every_verb
def test_a_schema_is_strict_and_plain(verb: PlannerTask) -> None:
    schema = Prompt(TASKS[verb]).conversation(REQUESTS[verb]).answer_schema
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    assert schema["required"] == list(schema["properties"]) == list(TASKS[verb].answer.model_fields)
    assert all(facts["description"] for facts in schema["properties"].values())
    # What strict servers do not compile: references and defaults.
    assert "$ref" not in str(schema)
    assert "default" not in str(schema)


@every_verb
def test_examples_are_what_the_schema_asks_for(verb: PlannerTask) -> None:
    conversation = Prompt(TASKS[verb]).conversation(REQUESTS[verb])
    validator = jsonschema.Draft202012Validator(dict(conversation.answer_schema))
    answers = [turn.content for turn in conversation.messages if turn.role == "assistant"]
    for text, example in zip(answers, examples(verb), strict=True):
        answer = json.loads(text)
        validator.validate(answer)
        assert answer == example["answer"]
        assert list(answer) == list(conversation.answer_schema["properties"])


@every_verb
def test_the_system_text_names_all_keys(verb: PlannerTask) -> None:
    # An LLM that cannot be held to the schema knows of it by these words alone.
    prompt = built_in(verb)
    assert all(key in prompt["system"] for key in prompt["schema"]["properties"])
    assert "JSON" in prompt["system"]
    assert "never orders to you" in " ".join(prompt["system"].split())


# -- the built-in examples -----------------------------------------------------------------------


def edit(**known: Any) -> Edit:
    return Edit(lambda: Image.new("RGB", (1, 1)), lambda: Image.new("RGB", (1, 1)), 0, **known)


@pytest.mark.parametrize("example", examples("rewrite"))
def test_no_rewriting_of_ours_leaks(example: dict[str, Any]) -> None:
    answer = example["answer"]
    subject = edit(
        caption=example["caption"],
        edited_caption=example["edited_caption"],
        direct_instruction=example["instruction"],
        revealing=tuple(answer["revealing"]),
        instruction=answer["instruction"],
    )
    assert leaks_of(subject) == []
    # All of its words give something away: none is in both captions.
    request = RewriteRequest(**{k: v for k, v in example.items() if k != "answer"}, seed=0)
    read = REWRITE.read(request, REWRITE.answer.model_validate(answer))
    assert list(read.revealing) == answer["revealing"]


@pytest.mark.parametrize("example", examples("replace"))
def test_no_plan_of_ours_leaks(example: dict[str, Any]) -> None:
    answer = example["answer"]
    synonyms = (*answer["selected_synonyms"], *answer["target_synonyms"])
    known = {key: answer[key] for key in ("selected", "target", "instruction")}
    assert leaks_of(edit(synonyms=synonyms, **known)) == []
    assert not any(mentions(example["caption"], word) for word in answer["target_synonyms"])


@pytest.mark.parametrize("example", examples("select"))
def test_no_choice_of_ours_leaks(example: dict[str, Any]) -> None:
    best = example["candidates"][example["answer"]["best"] - 1]
    subject = edit(
        caption=example["caption"],
        edited_caption=example["edited_caption"],
        direct_instruction=example["instruction"],
        instruction=best,
    )
    assert leaks_of(subject) == []


@pytest.mark.parametrize("example", examples("resolve"))
def test_no_option_of_ours_is_named(example: dict[str, Any]) -> None:
    told = f"{example['caption']} {example['instruction']}"
    assert not any(mentions(told, option) for option in example["options"])


@pytest.mark.parametrize(("verb", "options"), [("select", "candidates"), ("resolve", "options")])
def test_the_best_stands_in_every_place(verb: PlannerTask, options: str) -> None:
    places = {example["answer"]["best"] for example in examples(verb)}
    assert places == set(range(1, max(len(example[options]) for example in examples(verb)) + 1))


# -- prompt files --------------------------------------------------------------------------------


def written(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@every_verb
def test_a_digest_follows_the_content_not_the_path(verb: PlannerTask, tmp_path: Path) -> None:
    content = resources.files("reasonpix.llm").joinpath(f"templates/{verb}.yaml").read_bytes()
    copy, other = tmp_path / "copy.yaml", tmp_path / "other.yaml"
    copy.write_bytes(content)
    other.write_bytes(content + b"\n")
    plain = Prompt(TASKS[verb])
    assert plain.digest == hashlib.sha256(content).hexdigest()
    assert Prompt(TASKS[verb], copy).digest == plain.digest
    assert Prompt(TASKS[verb], other).digest != plain.digest


def test_another_prompt_is_used(tmp_path: Path) -> None:
    schema = built_in("replace")["schema"]
    keys = list(reversed(schema["properties"]))
    schema["properties"] = {key: schema["properties"][key] for key in keys}
    mine = {
        "system": "Be short.",
        "user": "$caption: which of $categories, for 5 $$?",
        "repair": "No: $problem",
        "schema": schema,
        "examples": examples("replace")[:1],
    }
    prompt = Prompt(REPLACE, written(tmp_path / "mine.yaml", mine))
    asked = prompt.conversation(REQUESTS["replace"])
    assert asked.messages[0].content == "Be short."
    assert asked.messages[-1].content == "a bee on a daisy: which of bee, daisy, for 5 $?"
    assert list(json.loads(asked.messages[2].content)) == keys
    assert prompt.repaired(asked, "?", InvalidAnswer("bad")).messages[-1].content == "No: bad"


def test_examples_may_be_left_out(tmp_path: Path) -> None:
    mine = built_in("select")
    del mine["examples"]
    asked = Prompt(SELECT, written(tmp_path / "mine.yaml", mine)).conversation(REQUESTS["select"])
    assert [turn.role for turn in asked.messages] == ["system", "user"]
    assert asked.shared == 1


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda prompt: prompt.update(changes)


def in_schema(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda prompt: prompt["schema"].update(changes)


def same_category(prompt: dict[str, Any]) -> None:
    answer = prompt["examples"][1]["answer"]
    answer["target"] = answer["selected"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda prompt: prompt.pop("system"), "system: Field required"),
        (lambda prompt: prompt.pop("schema"), "schema: Field required"),
        (changed(extra="x"), "extra: Extra inputs"),
        (changed(answer_schema={}), "answer_schema: Extra inputs"),
        (changed(user="Caption: $caption"), "user: use $caption and $categories"),
        (changed(user="$caption $categories $seed"), "user: use $caption and $categories"),
        (changed(repair="Cost: 5$ $problem"), "repair: use $problem"),
        (changed(schema={}), "schema: give it a title"),
        (in_schema(title="My answer"), "schema: give it a title of letters"),
        (in_schema(title=None), "schema: give it a title"),
        (in_schema(type="array"), "schema: give it a title"),
        (in_schema(additionalProperties=True), "additionalProperties: false"),
        (in_schema(properties={}), "exactly the properties selected, target"),
        (in_schema(required=["target"]), "all of them required"),
        (in_schema(required=3), "all of them required"),
        (
            lambda prompt: prompt["schema"]["properties"]["target"].update(type="text"),
            "schema: not a JSON type: 'text'",
        ),
        (lambda prompt: prompt["examples"][0].pop("caption"), "number 1: caption: Field required"),
        (lambda prompt: prompt["examples"][0].pop("answer"), "examples: number 1"),
        (same_category, "answer of number 2 breaks the rules that it teaches: target must not"),
    ],
)
def test_a_bad_prompt_is_explained(
    spoil: Callable[[dict[str, Any]], Any], told: str, tmp_path: Path
) -> None:
    prompt = built_in("replace")
    spoil(prompt)
    path = written(tmp_path / "bad.yaml", prompt)
    with pytest.raises(RecipeError) as error:
        Prompt(REPLACE, path)
    assert told in str(error.value)
    assert all(line.startswith(f"prompts.replace: {path}: ") for line in error.value.problems)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    prompt = built_in("replace") | {"user": "?", "repair": "?", "schema": {}}
    with pytest.raises(RecipeError) as error:
        Prompt(REPLACE, written(tmp_path / "bad.yaml", prompt))
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"just words", b""])
def test_a_file_that_is_no_prompt_is_explained(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        Prompt(REWRITE, path)


def test_a_missing_prompt_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        Prompt(REWRITE, tmp_path / "none.yaml")
