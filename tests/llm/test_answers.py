"""The answer is found in whatever a model writes around it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonpix.llm.answers import read_answer
from reasonpix.llm.tasks import REPLACE, REWRITE, SELECT, InvalidAnswer
from reasonpix.llm.types import Completion
from reasonpix.plugin.types import EditPlan, ReplaceRequest, RewriteRequest, SelectRequest

REQUEST = ReplaceRequest(caption="a bee on a flower", categories=("bee", "flower"), seed=0)
CHOICE = SelectRequest(
    caption="", edited_caption="", instruction="", candidates=("a", "b", "c", "d"), seed=0
)
PLAN = EditPlan(
    selected="bee",
    target="butterfly",
    instruction='It carries {no} sting, "thanks".',
    synonyms=("moth",),
)


def answer(**changes: Any) -> str:
    fields = {
        "selected": "bee",
        "target": "butterfly",
        "selected_synonyms": [],
        "target_synonyms": ["moth"],
        "instruction": PLAN.instruction,
    }
    return json.dumps(fields | changes)


ANSWER = answer()
DRAFT = answer(target="wasp")
OTHER = '{"thought": "the bee is small"}'


def read(text: str, finish_reason: str = "stop") -> EditPlan:
    return read_answer(REPLACE, REQUEST, Completion(text=text, finish_reason=finish_reason))


def chosen(text: str) -> int:
    return read_answer(SELECT, CHOICE, Completion(text=text)).index + 1


def problem(text: str, finish_reason: str = "stop") -> str:
    with pytest.raises(InvalidAnswer) as error:
        read(text, finish_reason)
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        ANSWER,
        f"\ufeff{ANSWER}",
        f"“{ANSWER}”",
        f"[{ANSWER}]",
        f"```json\n{ANSWER}\n```\nThe {{target}} is not in the picture {{yet}}.",
        f"\\`\\`\\`json\n{ANSWER}\n\\`\\`\\`",
        f"The form is {{selected, target}}, so:\n{ANSWER}",
        f'The form is {{"selected": "…", "target": "…"}}, so:\n{ANSWER}',
        f"{OTHER}\n{ANSWER}",
        f"{ANSWER}\n{OTHER}",
        f"{ANSWER}\n{{",
        f"}} {ANSWER} }}",
        f'{{"answer": {ANSWER}}}',
        f'{{"result": [{{"answer": {ANSWER}}}], "confidence": 0.9}}',
        f"<answer>{ANSWER}</answer>",
        json.dumps(json.loads(ANSWER), indent=4),
        json.dumps(json.loads(ANSWER), ensure_ascii=True).replace("y", "\\u0079"),
        ANSWER.replace("sting, ", "sting,\n"),
        json.dumps(ANSWER),
        json.dumps({"answer": ANSWER}),
        json.dumps({"answer": json.dumps(json.loads(ANSWER), indent=2)}),
    ],
)
def test_an_answer_is_found_in_its_wrapping(text: str) -> None:
    assert read(text) == PLAN


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{DRAFT}</think>{ANSWER}",
        f"<think>\nnot {{this}}\n</think>\n\n{ANSWER}",
        f"{DRAFT} and so on</think>\n{ANSWER}",
        f"{ANSWER}<think>or {DRAFT}?</think>",
        f"<think>a</think>{OTHER}<think>{DRAFT}</think>{ANSWER}",
        f"<thinking>{DRAFT}</thinking>\n{ANSWER}",
        f"<Thought>{DRAFT}</Thought >\n{ANSWER}",
        f'<reasoning effort="low">{DRAFT}</reasoning>{ANSWER}',
        f"[THINK]{DRAFT}[/THINK]{ANSWER}",
        f"◁think▷{DRAFT}◁/think▷{ANSWER}",
        f"<seed:think>{DRAFT}</seed:think>{ANSWER}",
        f"<|begin_of_thought|>{DRAFT}<|end_of_thought|>{ANSWER}",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{ANSWER}<|return|>",
        f"{ANSWER}<think>Was that right? {DRAFT}",
    ],
)
def test_a_draft_within_the_reasoning_is_no_answer(text: str) -> None:
    assert read(text) == PLAN


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{ANSWER}",
        f"<think>{ANSWER}</think>",
        f"<|channel|>analysis<|message|>{ANSWER}",
        f"{ANSWER} </thinking> I am done.",
    ],
)
def test_reasoning_alone_is_no_answer(text: str) -> None:
    assert problem(text) == "there is no answer after the reasoning"
    assert problem(text, "length").startswith("the answer was cut off, it is too long; ")


def mentioned(tag: str) -> EditPlan:
    return PLAN.model_copy(update={"instruction": f"Say {tag} to it."})


@pytest.mark.parametrize(
    "text",
    [
        f"I chose <reason> here.\n{ANSWER}",
        f"As an <analysis> of the picture shows, {ANSWER} is best.",
        f"I did not use `<think>` or `</think>`:\n{ANSWER}",
        f'{ANSWER}\nI left the "</reasoning>" out.',
        f"{ANSWER}\n(</think>) is not needed.",
    ],
)
def test_a_tag_that_is_mentioned_begins_and_ends_no_reasoning(text: str) -> None:
    assert read(text) == PLAN


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<reason>so</reason>", "[THINK]"])
@pytest.mark.parametrize("text", ["{0}", "Sure:\n{0}\nDone.", "<think>{1}</think>{0}"])
def test_a_tag_within_an_answer_is_a_part_of_it(text: str, tag: str) -> None:
    expected = mentioned(tag)
    assert read(text.format(answer(instruction=expected.instruction), DRAFT)) == expected
    indented = json.dumps(json.loads(answer(instruction=expected.instruction)), indent=2)
    assert read(text.format(indented, DRAFT)) == expected


@pytest.mark.parametrize(
    "text",
    [
        f"Sure. <think>{DRAFT}",
        f"Let me think.\n<think>\n{DRAFT}\nHm,",
        f"<think>The tag <think> is odd. {DRAFT}",
        f'{DRAFT}, "as said",</think> and no more',
    ],
)
def test_a_draft_in_reasoning_without_an_end_is_no_answer(text: str) -> None:
    assert problem(text) == "there is no answer after the reasoning"
    assert "cut off" in problem(f"I am in a <think> phase: {DRAFT}", "length")


@pytest.mark.parametrize("damaged", ["gr\ufffdn", "\ufffd", "half \ud83d of", "\udc80"])
def test_an_answer_with_damaged_characters_is_invalid(damaged: str) -> None:
    assert "instruction holds damaged characters" in problem(answer(instruction=f"Be {damaged} x."))
    assert "target holds damaged characters" in problem(answer(target=f"wasp{damaged}"))
    assert "synonyms holds damaged" in problem(answer(target_synonyms=["moth", f"m{damaged}"]))
    rewriting = Completion(text=json.dumps({"revealing": [], "instruction": f"Be {damaged} x."}))
    request = RewriteRequest(caption="a", edited_caption="b", instruction="c", seed=0)
    with pytest.raises(InvalidAnswer, match="instruction holds damaged characters"):
        read_answer(REWRITE, request, rewriting)
    assert read(answer(instruction="Grün 🦋 für Ð.")).instruction == "Grün 🦋 für Ð."


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('{"best": 1} Wait. {"best": 2}', 2),
        ('[{"best": 1}, {"best": 3}]', 3),
        ('{"best": 4}\n\nFor example, {"worst": 2} is another form.', 4),
        ('{"best": 2}\nuser: and of seven?\n{"best": 7}', 2),  # it went on, with another question
        ('{"best": "3"}', 3),
        ('{"best": 2.0}', 2),
    ],
)
def test_of_several_answers_the_last_valid_one_is_meant(text: str, number: int) -> None:
    assert chosen(text) == number


def test_a_rule_that_the_last_answer_breaks_is_told() -> None:
    assert "from 1 to 4, not 9" in problem_of_choice('{"best": 8} or {"best": 9}')


def problem_of_choice(text: str) -> str:
    with pytest.raises(InvalidAnswer) as error:
        chosen(text)
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        ANSWER[:-1] + ",}",
        ANSWER.replace('["moth"]', '["moth",]'),
        ANSWER.replace("{no} ", "no ").replace(', \\"thanks\\"', "").replace('"', "'"),
        ANSWER.replace(', \\"thanks\\"', "").replace('"', "“", 1).replace('"', "”"),
        ANSWER.replace('"selected":', "selected:").replace('"target":', "target:"),
        "{\n  # the bee it is\n  " + ANSWER[1:].replace(", ", ",\n  "),
        f"Sure: ```{ANSWER[:-1]},}}``` {{done}}",
    ],
)
def test_what_is_nearly_json_costs_no_repair(text: str) -> None:
    plan = read(text)
    assert (plan.selected, plan.target, plan.synonyms) == ("bee", "butterfly", ("moth",))
    assert plan.instruction.startswith("It carries")


def test_json_goes_before_what_is_nearly_json() -> None:
    assert chosen('{"best": 1} rather than {best: 2}') == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Invalid JSON: EOF while parsing"),
        ("none of them", "Invalid JSON: expected ident"),
        ("{'selected': 'the bee's knees'}", "Invalid JSON: key must be a string"),
        ('{"selected": "bee"}', "target: Field required"),
        (answer(more=1), "more: Extra inputs are not permitted"),
        (answer(target=None), "target: Input should be a valid string"),
        (answer(target_synonyms={"moth": 1}), "target_synonyms: Input should be a valid"),
        (answer(selected="frog"), "selected must be one of bee, flower, not 'frog'"),
        (ANSWER[:-9], "Invalid JSON: EOF while parsing"),
        ("{!!binary x: y}", "Invalid JSON: key must be a string"),
        ("{a: 2024-13-45, ? [x] : y}", "Invalid JSON: key must be a string"),
    ],
)
def test_what_is_wrong_is_told(text: str, told: str) -> None:
    assert told in problem(text)
    assert problem(text, "length").startswith("the answer was cut off, it is too long; ") or (
        "frog" in text
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 100_000,
        "{" * 100_000,
        '{"best": 1} ' * 50_000 + "{",
        "{'a': " * 20_000 + "}" * 20_000,
        "<think>{" * 20_000,
        "{" + "9" * 10_000 + "}" + '{"best": ' + "9" * 10_000 + "}",
        '{"a":' * 1000 + "[" + "1," * 200_000 + "1]" + "}" * 1000,
        '{"a":' * 900 + "[" + '"x",' * 100_000 + "1]" + "}" * 900,
        "<think>" + '{"a":[1,' * 400 + "1," * 200_000 + "1" + "]}" * 400,
        '{"' * 500 + "so " * 300_000,
        "<think>" + "{" * 400_000,
        "{ so " + "it is a bee and not a wasp, " * 25_000 + " }",
        ("{ so " + "it is: a bee - " * 2_000 + " }") * 4,
    ],
)
def test_a_text_of_any_size_is_read_quickly(text: str) -> None:
    begun = time.process_time()
    assert problem(text)
    assert time.process_time() - begun < 5


def test_an_answer_is_found_after_a_text_of_any_size() -> None:
    assert read('{"a": [' * 5_000 + ANSWER) == PLAN
    assert read("so { " * 200_000 + ANSWER) == PLAN
    assert read(f"<think>{'{ so ' * 200_000}</think>{ANSWER}") == PLAN


@settings(max_examples=40)
@given(st.text())
def test_any_text_is_read_or_explained(text: str) -> None:
    assert problem(text)
    assert problem(f"{{{text}}}")
    assert read(f"{text.replace('<', '').replace('[', '')}\n{ANSWER}") == PLAN
