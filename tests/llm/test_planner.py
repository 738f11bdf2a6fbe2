"""Questions to an LLM, and what becomes of its answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from reasonpix.errors import ReasonpixError, RecipeError
from reasonpix.llm.ledger import Ledger, Settlement
from reasonpix.llm.planner import LLMPlanner, LLMPlannerOptions
from reasonpix.llm.requests import Request, request_key
from reasonpix.llm.tasks import REPLACE, InvalidAnswer
from reasonpix.llm.types import Completion, Conversation, Unavailable
from reasonpix.plugin import testing
from reasonpix.plugin.components import Options, PlannerTask
from reasonpix.plugin.types import (
    Choice,
    EditPlan,
    Problem,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

Reply = Completion | Problem | Unavailable


class Parrot(LLMPlanner[LLMPlannerOptions]):
    """Says what it was taught for a caption, one reply after the other."""

    name = "parrot"
    batch_size = 16

    def __init__(self, taught: Mapping[str, Sequence[str | Reply]], **options: Any) -> None:
        super().__init__(LLMPlannerOptions(**options))
        self.taught = {caption: list(replies) for caption, replies in taught.items()}
        self.asked: list[list[Conversation]] = []

    def complete(self, conversations: Sequence[Conversation]) -> list[Reply]:
        self.asked.append(list(conversations))
        return [self.say(conversation) for conversation in conversations]

    def say(self, conversation: Conversation) -> Reply:
        asked = conversation.messages[conversation.shared].content
        [caption] = [caption for caption in self.taught if f": {caption}\n" in asked]
        reply = self.taught[caption].pop(0)
        return Completion(text=reply) if isinstance(reply, str) else reply


Teach = Callable[..., Parrot]


@pytest.fixture
def parrot() -> Iterator[Teach]:
    made: list[Parrot] = []

    def teach(taught: Mapping[str, Sequence[str | Reply]], **options: Any) -> Parrot:
        made.append(Parrot(taught, **options))
        return made[-1]

    yield teach
    for planner in made:
        planner.close()


CATEGORIES = ("Christmas tree", "dog", "glass", "shelves")


def text(**changes: Any) -> str:
    fields = {
        "selected": "dog",
        "target": "snowman",
        "selected_synonyms": ["puppy"],
        "target_synonyms": ["snow figure"],
        "instruction": "Something with a carrot nose should stand there.",
    }
    return json.dumps(fields | changes)


def request(caption: str = "a winter night", seed: int = 5) -> ReplaceRequest:
    return ReplaceRequest(caption=caption, categories=CATEGORIES, seed=seed)


GOOD = EditPlan(
    selected="dog",
    target="snowman",
    instruction="Something with a carrot nose should stand there.",
    synonyms=("puppy", "snow figure"),
)


# -- the four verbs ------------------------------------------------------------------------------


def test_replace(parrot: Teach) -> None:
    planner = parrot({"a winter night": [text()]})
    assert planner.replace([request()]) == [GOOD]
    [[conversation]] = planner.asked
    assert "Christmas tree, dog, glass, shelves" in conversation.messages[-1].content
    assert conversation.answer_schema["title"] == "replacement"
    assert conversation.seed == 5


def test_rewrite(parrot: Teach) -> None:
    answer = {"revealing": ["snow"], "instruction": "Bring the sledge."}
    planner = parrot({"a park": [json.dumps(answer)]})
    asked = RewriteRequest(
        caption="a park", edited_caption="a park, snow", instruction="make it snow", seed=1
    )
    assert planner.rewrite([asked]) == [
        Rewriting(instruction="Bring the sledge.", revealing=("snow",))
    ]
    assert planner.asked[0][0].answer_schema["title"] == "indirect_instruction"


def test_select(parrot: Teach) -> None:
    planner = parrot({"a park": ['{"best": 3}', '{"best": 2}']})
    asked = SelectRequest(
        caption="a park",
        edited_caption="a park, snow",
        instruction="make it snow",
        candidates=("Snow.", "Bring the sledge."),
        seed=1,
    )
    assert planner.select([asked]) == [Choice(index=1)]
    assert "from 1 to 2, not 3" in planner.asked[1][0].messages[-1].content


def test_resolve(parrot: Teach) -> None:
    planner = parrot({"a park": ['{"best": 1}']})
    asked = ResolveRequest(
        caption="a park", instruction="It hoots.", options=("owl", "cow"), seed=1
    )
    assert planner.resolve([asked]) == [Choice(index=0)]


def test_samples_of_one_question_are_asked_for_each(parrot: Teach) -> None:
    answers = [
        json.dumps({"revealing": [], "instruction": f"Bring {number} sledges."})
        for number in range(3)
    ]
    planner = parrot({"a park": answers})
    asked = [
        RewriteRequest(caption="a park", edited_caption="ice", instruction="freeze it", seed=seed)
        for seed in range(3)
    ]
    found = planner.rewrite(asked)
    assert [one.instruction for one in found if isinstance(one, Rewriting)] == [
        f"Bring {number} sledges." for number in range(3)
    ]


def test_without_categories_nobody_is_asked(parrot: Teach) -> None:
    planner = parrot({"a winter night": [text()]})
    empty = ReplaceRequest(caption="fog", categories=(), seed=0)
    first, second, third = planner.replace([empty, request(), empty])
    assert second == GOOD
    assert isinstance(first, Problem)
    assert first == third
    assert first.status == "rejected"
    assert parrot({}).replace([]) == []


class Clever(Parrot):
    """Answers every question of the contract well, whatever the batch."""

    Options = LLMPlannerOptions
    __module__ = "reasonpix.llm.planner"  # what has to import lightly

    def __init__(self, options: Options) -> None:
        super().__init__({}, **options.model_dump())

    def say(self, conversation: Conversation) -> Reply:
        answers = {
            "replacement": text(selected="bee", target="owl", instruction="It hoots."),
            "indirect_instruction": json.dumps({"revealing": [], "instruction": "It is hot."}),
            "best_candidate": json.dumps({"best": 1}),
            "meant_thing": json.dumps({"best": 2}),
        }
        return Completion(text=answers[conversation.answer_schema["title"]])


class TestContract(testing.PlannerContract):
    component = Clever

    def test_all_questions_are_answered(self) -> None:
        subject = self.subject
        answers = [
            *subject.replace(self.replace_requests),
            *subject.rewrite(self.rewrite_requests),
            *subject.select(self.select_requests),
            *subject.resolve(self.resolve_requests),
        ]
        assert not any(isinstance(answer, Problem) for answer in answers)


# -- the prompt files ----------------------------------------------------------------------------


def built_in(verb: PlannerTask) -> bytes:
    return resources.files("reasonpix.llm").joinpath(f"templates/{verb}.yaml").read_bytes()


def test_another_prompt_changes_the_identity_of_its_verb_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(built_in("select") + b"# mine\n")
    verbs: tuple[PlannerTask, ...] = get_args(PlannerTask)
    plain, other = Parrot({}), Parrot({}, prompts={"select": path})
    differing = [v for v in verbs if plain.prompt_identity(v) != other.prompt_identity(v)]
    assert differing == ["select"]
    assert plain.fingerprint_facts() == other.fingerprint_facts()
    assert "prompts" in LLMPlannerOptions.fingerprint_exclude


def test_another_prompt_is_used(parrot: Teach, tmp_path: Path) -> None:
    prompt = yaml.safe_load(built_in("replace")) | {"system": "Be short."}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(prompt))
    planner = parrot({"a winter night": [text()]}, prompts={"replace": path})
    planner.check()
    path.unlink()  # what was checked is what is asked
    assert planner.replace([request()]) == [GOOD]
    assert planner.asked[0][0].messages[0].content == "Be short."


@pytest.mark.parametrize("verb", get_args(PlannerTask))
def test_a_bad_prompt_is_known_before_anything_is_asked(verb: PlannerTask, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("system: only")
    with pytest.raises(RecipeError, match=rf"prompts\.{verb}: .*bad\.yaml"):
        Parrot({}, prompts={verb: path}).check()


# -- repair --------------------------------------------------------------------------------------


def test_only_bad_answers_are_asked_again_and_order_holds(parrot: Teach) -> None:
    planner = parrot(
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


def test_a_repair_shows_the_answer_and_all_that_is_wrong(parrot: Teach) -> None:
    bad = text(selected="cow", target="dogs", instruction="")
    planner = parrot({"a winter night": [bad, text()]})
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


def test_an_answer_that_was_cut_off_is_told_so(parrot: Teach) -> None:
    cut = Completion(text=text()[:40], finish_reason="length")
    planner = parrot({"a winter night": [cut, cut]})
    [problem] = planner.replace([request()])
    assert isinstance(problem, Problem)
    assert "cut off, it is too long" in problem.reason


def test_an_answer_that_keeps_failing_to_come_is_a_failure(parrot: Teach) -> None:
    planner = parrot({"a winter night": [Unavailable(reason="boom")]}, max_retries=0)
    [problem] = planner.replace([request()])
    assert isinstance(problem, Problem)
    assert problem.status == "failed"
    assert "boom" in problem.reason


# -- what was answered is not asked again ---------------------------------------------------------


def test_a_ledger_answers_what_it_holds(parrot: Teach, tmp_path: Path) -> None:
    replies = {"a winter night": ["nonsense", text()]}
    for taught, calls in ((replies, 2), ({}, 0)):
        planner = parrot(taught)
        planner.ledger = Ledger(tmp_path / "answers.sqlite")
        assert planner.replace([request()]) == [GOOD]
        assert len(planner.asked) == calls
        planner.close()
        planner.ledger.close()


def test_answers_that_an_earlier_version_rejected_are_read_again(
    parrot: Teach, tmp_path: Path
) -> None:
    """It kept them, paid for a repair that was as unreadable to it, and rejected the record."""
    wrapped = f"It is {{dog}}.\n<think>{text(target='dog')}</think>\n{text()}"
    conversation = parrot({}).prompt(REPLACE).conversation(request())
    unreadable = InvalidAnswer("Invalid JSON: key must be a string at line 1 column 2")
    repair = parrot({}).prompt(REPLACE).repaired(conversation, wrapped, unreadable)
    planner = parrot({})
    planner.ledger = Ledger(tmp_path / "answers.sqlite")
    for asked in (conversation, repair):
        sent = planner.ledger.send(
            [Request("replace", request_key(planner.parameters, asked), asked)], planner.parameters
        )
        planner.ledger.settle([Settlement(sent[0], Completion(text=wrapped))])
    assert planner.replace([request()]) == [GOOD]
    assert planner.asked == []
    planner.ledger.close()


def test_a_repair_that_an_earlier_version_paid_for_is_found(parrot: Teach, tmp_path: Path) -> None:
    """Under the words with which it was asked for."""
    bad = "{so: it} is { said }"
    told = InvalidAnswer("Invalid JSON: key must be a string at line 1 column 2")
    planner = parrot({})
    conversation = planner.prompt(REPLACE).conversation(request())
    planner.ledger = Ledger(tmp_path / "answers.sqlite")
    repair = planner.prompt(REPLACE).repaired(conversation, bad, told)
    for asked, said in ((conversation, bad), (repair, text())):
        sent = planner.ledger.send(
            [Request("replace", request_key(planner.parameters, asked), asked)], planner.parameters
        )
        planner.ledger.settle([Settlement(sent[0], Completion(text=said))])
    assert planner.replace([request()]) == [GOOD]
    assert planner.asked == []
    planner.ledger.close()


class Broke(Parrot):
    def say(self, conversation: Conversation) -> Reply:
        raise ReasonpixError("the account is empty")


def test_what_concerns_all_stops_all() -> None:
    planner = Broke({})
    with pytest.raises(ReasonpixError, match="account is empty"):
        planner.replace([request()])
    planner.close()


def test_after_its_end_nothing_is_asked(parrot: Teach) -> None:
    """A thread of a run that comes late must not begin anew, nor take it for its record's fault."""
    planner = parrot({"a winter night": [text()]})
    planner.close()
    with pytest.raises(ReasonpixError, match="the run was stopped"):
        planner.replace([request()])
    assert planner.asked == []


class Slow(Parrot):
    """Writes until the run is stopping, and then gives back what it has."""

    def complete(self, conversations: Sequence[Conversation]) -> list[Reply]:
        self.asked.append(list(conversations))
        while not self.stopping:
            time.sleep(0.001)
        return [Completion(text=text()), Unavailable(reason="not finished")]


def test_a_close_while_it_is_asked_keeps_what_was_finished_and_fails_nothing() -> None:
    planner = Slow({}, max_retries=0)
    told: list[str] = []
    with Ledger(None) as ledger:
        planner.ledger = ledger

        def ask() -> None:
            try:
                planner.replace([request(seed=0), request(seed=1)])
            except ReasonpixError as error:
                told.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        while not planner.asked:
            time.sleep(0.001)
        closing = [threading.Thread(target=planner.close) for _ in range(3)]
        for thread in closing:
            thread.start()
        for thread in (*closing, asking):
            thread.join(5)
        assert told == ["the run was stopped; run the same command again to continue"]
        assert ledger.spent().answers == 1


# -- reading an answer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        "```json\n{}\n```",
        "```\n{}\n```",
        "Sure!\n\n```json\n{}\n```\nI hope this helps.",
        "  {}\n",
        "Here: {}",
        "[{}]",
    ],
)
def test_json_is_found_in_its_wrapping(parrot: Teach, wrapped: str) -> None:
    planner = parrot({"a winter night": [wrapped.replace("{}", text())]})
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
        text()[:-1],
        text(extra=1),
        text(target=3),
        text(target=None),
        text(selected_synonyms="puppy"),
        text().replace("nose", "\\ud800"),
    ],
)
def test_what_is_no_answer_is_rejected(parrot: Teach, bad: str) -> None:
    planner = parrot({"a winter night": [bad, bad]})
    [problem] = planner.replace([request()])
    assert isinstance(problem, Problem)
    assert problem.status == "rejected"
    assert len(problem.reason) < 500
