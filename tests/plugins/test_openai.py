"""The planner `openai` against a real server in a process of its own."""

from __future__ import annotations

import json
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pluggy
import pytest
import reasonpix_openai
from pydantic import ValidationError
from reasonpix_openai import GPT35TurboOptions, GPT35TurboPlanner, OpenAIOptions, OpenAIPlanner
from reasonpix_openai import batches as batch_limits

from reasonpix.errors import ReasonpixError, RecipeError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
from reasonpix.llm.budget import cost_bound
from reasonpix.llm.dispatch import make_dispatcher
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.tasks import REPLACE
from reasonpix.llm.types import Completion, Conversation, Price, Unavailable
from reasonpix.plugin import hookspecs, registry
from reasonpix.plugin.testing import PlannerContract
from reasonpix.plugin.types import EditPlan, Problem, ReplaceRequest
from tests.support.llm_server import Server, served
from tests.support.openai_server import FORMS

KEY = "sk-recognisable-0123456789"
PRICE = Price(prompt=1, completion=2)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served() as server:
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


Make = Callable[..., OpenAIPlanner]


@pytest.fixture
def make(server: Server) -> Iterator[Make]:
    made = []

    def planner(**options: Any) -> OpenAIPlanner:
        options = {"base_url": server.url, "max_retries": 0} | options
        made.append(OpenAIPlanner(OpenAIOptions(**options)))
        made[-1].load()
        return made[-1]

    yield planner
    for each in made:
        each.close()


def answer(**changes: Any) -> str:
    return json.dumps(
        {
            "selected": "kite",
            "target": "parrot",
            "instruction": "A creature that repeats words should fly there.",
            "selected_synonyms": [],
            "target_synonyms": ["macaw"],
        }
        | changes
    )


def ask(planner: OpenAIPlanner, *captions: str) -> list[EditPlan | Problem]:
    return planner.replace(
        [
            ReplaceRequest(caption=caption, categories=("kite", "beach"), seed=seed)
            for seed, caption in enumerate(captions)
        ]
    )


def attempt(planner: OpenAIPlanner, *captions: str) -> list[Completion | Problem | Unavailable]:
    """One attempt at each question, past the retries of the core."""
    return planner.complete([conversation(planner, caption) for caption in captions])


def conversation(planner: OpenAIPlanner, caption: str, seed: int = 0) -> Conversation:
    request = ReplaceRequest(caption=caption, categories=("kite", "beach"), seed=seed)
    return planner.prompt(REPLACE).conversation(request)


def unavailable(planner: OpenAIPlanner) -> Unavailable:
    [outcome] = attempt(planner, "MARK")
    assert isinstance(outcome, Unavailable), outcome
    return outcome


def stopped(planner: OpenAIPlanner) -> str:
    with pytest.raises(ReasonpixError) as error:
        attempt(planner, "MARK")
    return str(error.value)


def reason(planner: OpenAIPlanner, status: str) -> str:
    [problem] = ask(planner, "MARK")
    assert isinstance(problem, Problem), problem
    assert problem.status == status
    return problem.reason


PLAN = EditPlan(
    selected="kite",
    target="parrot",
    instruction="A creature that repeats words should fly there.",
    synonyms=("macaw",),
)


class TestContract(PlannerContract):
    component = OpenAIPlanner

    @pytest.fixture(autouse=True)
    def _served(self, server: Server) -> Iterator[None]:
        server.script({"a bee and a rabbit": [answer(selected="bee")]})
        self.options = {"base_url": server.url}
        yield
        if "subject" in vars(self):
            self.subject.close()


def test_plugin_offers_the_planners() -> None:
    manager = pluggy.PluginManager("reasonpix")
    manager.add_hookspecs(hookspecs)
    manager.register(reasonpix_openai)
    manager.check_pending()
    assert manager.hook.planners() == [[OpenAIPlanner, GPT35TurboPlanner]]
    assert {registry.find("planner", name).name for name in ("openai", "gpt-3.5-turbo")} == {
        "openai",
        "gpt-3.5-turbo",
    }


def test_the_paper_s_model_is_a_name_of_its_own_with_the_same_answers() -> None:
    by_name = GPT35TurboPlanner(GPT35TurboOptions(temperature=0.5))
    assert by_name.parameters == OpenAIPlanner(OpenAIOptions(temperature=0.5)).parameters
    assert by_name.parameters["model"] == "gpt-3.5-turbo"
    with pytest.raises(ValidationError):
        GPT35TurboOptions(model="gpt-4o")


def test_the_core_learns_the_limits_from_the_options() -> None:
    planner = OpenAIPlanner(OpenAIOptions(concurrency=33, max_tokens=77))
    assert (planner.concurrency, planner.max_answer_tokens, planner.jobs) == (33, 77, False)
    assert OpenAIPlanner(OpenAIOptions(max_tokens=None)).max_answer_tokens is None


def test_answers_become_plans(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]})
    assert ask(make(), "MARK") == [PLAN]


def test_request_carries_the_schema_seed_and_parameters(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]})
    planner = make(model="some-model", temperature=0.5, max_tokens=123)
    planner.replace([ReplaceRequest(caption="MARK", categories=("kite",), seed=2**63 + 11)])
    [request] = server.log()["requests"]
    assert request["authorization"] == f"Bearer {KEY}"
    body = request["body"]
    assert body["model"] == "some-model"
    assert body["temperature"] == 0.5
    assert body["max_tokens"] == 123
    assert body["seed"] == 11
    form = body["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    schema = form["json_schema"]["schema"]
    assert schema == planner.prompt(REPLACE).answer_schema
    assert schema["additionalProperties"] is False
    assert sorted(schema["required"]) == sorted(schema["properties"])


def test_parameters_can_be_left_to_the_server(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]})
    ask(make(temperature=None, max_tokens=None, structured_output="none"), "MARK")
    assert server.bodies()[0].keys() == {"model", "messages", "seed"}


def test_completion_counts_tokens(server: Server, make: Make) -> None:
    server.script({"MARK": ["{}"]})
    outcome = attempt(make(), "MARK")
    [charged] = server.log("bill").values()
    used = {key: charged[key] for key in ("prompt_tokens", "completion_tokens")}
    assert outcome == [Completion(text="{}", **used)]
    assert used["prompt_tokens"] > 100
    assert used["completion_tokens"] == 1


REPORTED = {"usage-strings", "usage-floats", "usage-renamed", "usage-details"}


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_counts_in_every_form(server: Server, make: Make, form: str) -> None:
    server.script({"MARK": [{"content": answer(), "form": form}]})
    [outcome] = attempt(make(), "MARK")
    assert isinstance(outcome, Completion)
    assert outcome.text.removeprefix("Hm. ") in (answer(), json.dumps(json.loads(answer())))
    assert outcome.refusal is None
    [charged] = server.log("bill").values()
    tokens = (charged["prompt_tokens"], charged["completion_tokens"])
    reported = not form.startswith("usage-") or form in REPORTED
    if form != "stream-events":  # its last event ends with a line break only
        assert (outcome.prompt_tokens, outcome.completion_tokens) == (
            tokens if reported else (0, 0)
        )
    assert ask(make(), "MARK") == [PLAN]
    assert len(server.bodies()) == 2  # nothing was repaired


@pytest.mark.parametrize("form", ["parts", "stream", "old", "usage-words", "usage-absent"])
def test_an_answer_in_a_batch_counts_in_every_form(server: Server, make: Make, form: str) -> None:
    server.script({}, form=form)
    planner = make(batch=True)
    questions = asked(planner, 3)
    singly = dict(zip(questions, planner.complete(list(questions.values())), strict=True))
    outcomes = collected(planner, planner.submit(questions))
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert outcomes == singly


@pytest.mark.parametrize("form", ["usage-absent", "usage-negative", "stream-whole", "parts"])
def test_what_is_not_reported_costs_what_it_can_at_most_and_is_counted(
    server: Server, make: Make, form: str
) -> None:
    server.script({"MARK": [{"content": answer(), "form": form}]})
    planner = make(price=PRICE)
    with Ledger(None, max_cost=1.0) as ledger:
        planner.ledger = ledger
        assert ask(planner, "MARK") == [PLAN]
        spent = ledger.spent()
        [charged] = server.log("bill").values()
        least = PRICE.of(charged["prompt_tokens"], charged["completion_tokens"])
        if form.startswith("usage-"):
            assert (spent.answers, spent.estimated) == (1, 1)
            assert spent.cost == cost_bound(planner, conversation(planner, "MARK")) > least
        else:
            assert (spent.estimated, spent.cost) == (0, pytest.approx(least))


def test_fenced_json_is_read(server: Server, make: Make) -> None:
    server.script({"MARK": [f"Here you are:\n```json\n{answer()}\n```\n"]})
    assert ask(make(), "MARK") == [PLAN]
    assert len(server.bodies()) == 1


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("not json at all", "Invalid JSON"),
        (answer(instruction="Make the Kites greener."), "'kite'"),
    ],
)
def test_a_bad_answer_is_repaired(server: Server, make: Make, bad: str, told: str) -> None:
    server.script({"MARK": [bad, answer()]})
    assert ask(make(), "MARK") == [PLAN]
    first, second = server.bodies()
    *before, shown, complaint = second["messages"]
    assert before == first["messages"]
    assert shown == {"role": "assistant", "content": bad}
    assert complaint["role"] == "user"
    assert told in complaint["content"]
    assert second["seed"] == first["seed"]


def test_a_wrong_schema_twice_is_rejected(server: Server, make: Make) -> None:
    server.script({"MARK": ['{"selected": "kite"}']})
    told = reason(make(), "rejected")
    assert "target: Field required" in told
    assert len(server.bodies()) == 2


def test_a_leak_twice_is_rejected(server: Server, make: Make) -> None:
    server.script({"MARK": [answer(instruction="Let two MACAWS fly there.")]})
    assert "'macaw'" in reason(make(), "rejected")


@pytest.mark.parametrize(
    "reply",
    [
        {"refusal": "I cannot help with that."},
        {"content": None, "finish_reason": "content_filter"},
        {"status": 400, "code": "content_filter", "message": "filtered"},
        {"status": 403, "message": "your input was flagged by moderation"},
    ],
)
def test_a_refusal_is_rejected_without_repair(
    server: Server, make: Make, reply: dict[str, Any]
) -> None:
    server.script({"MARK": [reply]})
    expected = reply.get("refusal", "content filter")
    assert reason(make(), "rejected") == f"refused: {expected!r}"
    assert len(server.bodies()) == 1


def test_a_cut_off_answer_says_so(server: Server, make: Make) -> None:
    server.script({"MARK": [{"content": answer()[:40], "finish_reason": "length"}]})
    assert "cut off" in reason(make(), "rejected")


def test_server_errors_are_retried(server: Server, make: Make) -> None:
    quickly = {"Retry-After": "0.01"}
    server.script({"MARK": [{"status": 500}, {"status": 429, "headers": quickly}, answer()]})
    assert ask(make(max_retries=2), "MARK") == [PLAN]


def test_one_call_is_one_attempt(server: Server, make: Make) -> None:
    server.script({"MARK": [{"status": 500, "message": "out of memory"}, answer()]})
    told = unavailable(make(max_retries=5)).reason
    assert server.url in told
    assert "out of memory" in told
    assert len(server.bodies()) == 1


def test_a_failure_is_the_failure_of_one_record(server: Server, make: Make) -> None:
    server.script({"GOOD": [answer()], "BAD": [{"status": 413, "message": "too much"}]})
    first, second, third = ask(make(), "GOOD", "BAD", "GOOD")
    assert first == third == PLAN
    assert isinstance(second, Problem)
    assert second.status == "failed"
    assert server.url in second.reason
    assert "too much" in second.reason


@pytest.mark.parametrize(
    ("status", "overloaded", "may_be_charged"),
    [
        (429, True, False),
        (503, True, False),
        (529, True, False),
        (500, False, False),
        (408, False, False),
        (409, False, False),
        (502, False, True),
        (504, False, True),
    ],
)
def test_what_may_pass_is_told_from_overload(
    server: Server, make: Make, status: int, overloaded: bool, may_be_charged: bool
) -> None:
    server.script({"MARK": [{"status": status}]})
    outcome = unavailable(make())
    assert outcome.overloaded is overloaded
    assert outcome.may_be_charged is may_be_charged
    assert outcome.retry_after_s is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0.25"}, 0.25),
        ({"Retry-After": "86400"}, 86400),
        ({"Retry-After": "9", "Retry-After-Ms": "1500"}, 1.5),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After-Ms": "nan"}, None),
    ],
)
def test_retry_after_is_read(
    server: Server, make: Make, headers: dict[str, str], seconds: float | None
) -> None:
    server.script({"MARK": [{"status": 429, "headers": headers}]})
    assert unavailable(make()).retry_after_s == seconds


def test_retry_after_may_be_a_date(server: Server, make: Make) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server.script({"MARK": [{"status": 503, "headers": {"Retry-After": date}}]})
    seconds = unavailable(make()).retry_after_s
    assert seconds is not None
    assert 90 < seconds <= 100


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ({"status": 401, "message": "bad key"}, "OPENAI_API_KEY"),
        ({"status": 403, "message": "your country is not served"}, "your country is not served"),
        ({"status": 402, "message": "no credit"}, "no credit"),
        ({"status": 404, "message": "no such model", "code": "model_not_found"}, "check model"),
        ({"status": 429, "message": "no quota", "code": "insufficient_quota"}, "no quota"),
        ({"status": 429, "message": "no quota", "type": "insufficient_quota"}, "no quota"),
    ],
)
def test_what_concerns_all_stops_the_run(
    server: Server, make: Make, reply: dict[str, Any], told: str
) -> None:
    server.script({"MARK": [answer(), reply]})
    planner = make()
    attempt(planner, "MARK")
    assert told in stopped(planner)


@pytest.fixture
def unreachable() -> Iterator[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # Bound, but nobody listens.
        yield f"http://127.0.0.1:{unused.getsockname()[1]}/v1"


def test_a_server_that_never_was_there_stops_the_run(make: Make, unreachable: str) -> None:
    told = stopped(make(base_url=unreachable))
    assert unreachable in told
    assert "refused" in told
    assert told.endswith("run the same command again to continue")


def test_a_server_that_went_away_may_come_back(make: Make, tmp_path: Path) -> None:
    with served() as server:
        planner = make(base_url=server.url)
        assert isinstance(attempt(planner, "a kite")[0], Completion)
    lost = unavailable(planner)
    # The first may still try the old connection.
    refused = unavailable(planner) if lost.may_be_charged else lost
    assert "refused" in refused.reason
    assert not refused.may_be_charged


def test_a_silent_server_may_charge(server: Server, make: Make) -> None:
    server.script({"MARK": [{"content": answer(), "delay": 3}]})
    outcome = unavailable(make(timeout_s=0.3))
    assert "timeout_s" in outcome.reason
    assert outcome.may_be_charged


@pytest.mark.parametrize("cut", ["before", "middle"])
def test_a_cut_connection_may_be_charged(server: Server, make: Make, cut: str) -> None:
    server.script({"MARK": [{"content": answer(), "cut": cut}]})
    outcome = unavailable(make())
    assert "connection lost" in outcome.reason
    assert outcome.may_be_charged


NO_CHAT = [
    {"raw": "<html></html>", "content_type": "text/html"},
    {"raw": "[]"},
    {"raw": '{"choices": [{"message": null}]}'},
    {"raw": '{"hello": "world"}'},
]


@pytest.mark.parametrize("raw", NO_CHAT)
def test_what_is_no_chat_api_stops_the_run(server: Server, make: Make, raw: dict[str, str]) -> None:
    server.script({"MARK": [raw]})
    assert "base_url" in stopped(make())


@pytest.mark.parametrize(
    "raw", [*NO_CHAT, {"raw": "{broken"}, {"raw": '{"choices": []}'}, {"empty": True}]
)
def test_a_broken_answer_among_good_ones_is_asked_for_again(
    server: Server, make: Make, raw: dict[str, Any]
) -> None:
    server.script({"MARK": [answer(), raw, answer()]})
    planner = make()
    first, second, third = attempt(planner, "MARK", "MARK", "MARK")
    assert isinstance(second, Unavailable)
    assert second.may_be_charged
    assert first == third


@pytest.mark.parametrize(
    ("body", "overloaded"),
    [
        ({"error": {"code": 429, "message": "busy"}}, True),
        ({"error": {"code": "429", "message": "busy"}}, True),
        ({"error": {"code": "rate_limit_exceeded", "message": "busy"}}, True),
        ({"error": {"type": "overloaded_error", "message": "busy"}, "choices": []}, True),
        ({"error": {"status": 503, "message": "busy"}, "choices": None}, True),
        ({"error": "busy"}, False),
        ({"error": {"message": "busy", "code": None}}, False),
        ({"errors": [{"message": "busy", "code": 7009}], "success": False}, False),
        ({"object": "error", "message": "busy", "code": 50001}, False),
        ({"message": "busy", "status_code": 529}, True),
        ({"detail": "busy"}, False),
        ({"choices": [{"error": {"code": 503, "message": "busy"}, "message": None}]}, True),
    ],
)
def test_an_error_in_a_successful_response_is_an_error(
    server: Server, make: Make, body: Any, overloaded: bool
) -> None:
    event = f"data: {json.dumps(body)}\n\n"
    for raw in (json.dumps(body), event):
        server.script({"MARK": [{"raw": raw}]})
        outcome = unavailable(make())
        assert outcome.overloaded is overloaded
        assert outcome.may_be_charged
        assert "busy" in outcome.reason


@pytest.mark.parametrize(
    "error",
    [
        {"code": 401, "message": "who are you?"},
        {"code": "invalid_api_key", "message": "who are you?"},
        {"type": "authentication_error", "message": "who are you?"},
        {"code": "insufficient_quota", "message": "who are you?"},
        {"status": "404", "message": "who are you?"},
    ],
)
def test_an_error_of_all_requests_in_a_successful_response_stops_the_run(
    server: Server, make: Make, error: dict[str, Any]
) -> None:
    server.script({"MARK": [{"raw": json.dumps({"error": error})}]})
    assert "who are you?" in stopped(make())


@pytest.mark.parametrize(
    "error",
    [
        {"code": 400, "message": "too long"},
        {"type": "invalid_request_error", "message": "too long"},
        {"code": "context_length_exceeded", "message": "too long", "type": None},
    ],
)
def test_an_error_of_one_request_in_a_successful_response_fails_it(
    server: Server, make: Make, error: dict[str, Any]
) -> None:
    server.script({"MARK": [{"raw": json.dumps({"error": error})}]})
    assert "too long" in reason(make(), "failed")
    assert len(server.bodies()) == 1


@pytest.mark.parametrize(
    "raw",
    [
        'data: {"choices": [{"delta": {"content": "{}"}}]}\n\n',
        'data: {"choices": [{"delta": {"content": "{}"}}]}\n\ndata: {"choi',
        ": PROCESSING\n\n",
        'data: []\n\ndata: {"x": 1}\n\n',
    ],
)
def test_a_stream_that_breaks_off_is_asked_for_again(server: Server, make: Make, raw: str) -> None:
    server.script({"MARK": [answer(), {"raw": raw, "content_type": "text/event-stream"}]})
    planner = make()
    attempt(planner, "MARK")
    assert unavailable(planner).may_be_charged


SEPARATORS = "\u2028\u2029\x85"


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r", "\n"])
def test_only_line_breaks_separate_the_lines_of_a_stream(
    server: Server, make: Make, separator: str, end: str
) -> None:
    text = f"one{separator}two {separator}"
    event = {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
    said = json.dumps(event, ensure_ascii=False)
    server.script({"MARK": [{"raw": f"data: {said}{end}data: [DONE]{end}"}]})
    assert attempt(make(), "MARK") == [Completion(text=text)]


@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"])
def test_the_data_of_an_event_may_have_several_lines(server: Server, make: Make, line: str) -> None:
    deltas = [{"delta": {"content": "on"}}, {"delta": {"content": "e"}, "finish_reason": "stop"}]
    events = [json.dumps({"choices": [delta]}, indent=1).split("\n") for delta in deltas]
    raw = line.join(
        part for event in events for part in ("event: chunk", *(f"data:{it}" for it in event), "")
    )
    server.script({"MARK": [{"raw": raw}, {"raw": raw + line}]})
    assert attempt(make(), "MARK", "MARK") == [Completion(text="one")] * 2


@pytest.mark.parametrize(
    ("encoding", "content_type"),
    [
        ("latin-1", "application/json; charset=latin-1"),
        ("cp1252", "application/json; charset=windows-1252"),
        ("shift_jis", 'application/json; charset="Shift_JIS"'),
        ("utf-8", "application/json; charset=latin-1"),
        ("utf-8", "application/json; charset=none-such"),
        ("utf-16", "application/json"),
    ],
)
def test_a_declared_charset_is_honoured_unless_the_body_is_utf_8(
    server: Server, make: Make, encoding: str, content_type: str
) -> None:
    text = "日本" if encoding == "shift_jis" else "Grün für"
    body = json.dumps({"choices": [{"message": {"content": text}}]}, ensure_ascii=False)
    server.script({"MARK": [{"raw": body, "encoding": encoding, "content_type": content_type}]})
    assert attempt(make(), "MARK") == [Completion(text=text)]


@pytest.mark.parametrize(
    ("instruction", "encoding"),
    [
        ("A creature for the gr\xfcn sky should fly.", "latin-1"),
        ("A creature \ud83d should fly there.", "utf-8"),
        ("A creature of \ufffd should fly there.", "utf-8"),
    ],
)
def test_an_answer_with_damaged_characters_is_repaired(
    server: Server, make: Make, instruction: str, encoding: str
) -> None:
    content = json.dumps(json.loads(answer(instruction=instruction)), ensure_ascii=False)
    body = json.dumps({"choices": [{"message": {"content": content}}]}, ensure_ascii=False)
    raw = body.replace("\ud83d", "\\ud83d")  # escaped once: half a pair in the content
    server.script({"MARK": [{"raw": raw, "encoding": encoding}, answer()]})
    assert ask(make(), "MARK") == [PLAN]
    assert "instruction holds damaged" in server.bodies()[1]["messages"][-1]["content"]


def test_a_pair_of_surrogates_that_a_stream_splits_is_one_character(
    server: Server, make: Make
) -> None:
    instruction = "A creature \U0001f600 that repeats words."
    halves = json.dumps(json.loads(answer(instruction=instruction)), ensure_ascii=False)
    before, after = halves.split("\U0001f600")
    parts = [{"content": f"{before}\ud83d"}, {"content": f"\ude00{after}"}]
    events = [{"choices": [{"delta": part, "finish_reason": "stop"}]} for part in parts]
    server.script({"MARK": [{"raw": "".join(f"data: {json.dumps(it)}\n\n" for it in events)}]})
    [plan] = ask(make(), "MARK")
    assert isinstance(plan, EditPlan)
    assert plan.instruction == instruction


USAGE = {"prompt_tokens": 100, "completion_tokens": 7}


@pytest.mark.parametrize("kind", ["content_filter", "SAFETY", "length"])
@pytest.mark.parametrize("message", [{"message": None}, {}, {"message": {}}, {"delta": None}])
def test_a_choice_without_a_message_is_an_answer_that_is_paid_for(
    server: Server, make: Make, tmp_path: Path, kind: str, message: dict[str, Any]
) -> None:
    body = {"choices": [{"finish_reason": kind, **message}], "usage": USAGE}
    asked_twice = kind == "length"  # once more, with what is wrong
    server.script({"MARK": [{"raw": json.dumps(body)}]})
    for _ in range(2):  # the second run finds what the first one stored
        with Ledger(tmp_path / "llm.sqlite", max_cost=1.0) as ledger:
            planner = make(price=PRICE)
            planner.ledger = ledger
            told = reason(planner, "rejected")
            assert ("cut off" if asked_twice else "refused: 'content filter'") in told
            assert ledger.spent().cost == pytest.approx(PRICE.of(100, 7) * (1 + asked_twice))
            assert ledger.spent().estimated == 0
    assert len(server.bodies()) == 1 + asked_twice


@pytest.mark.parametrize("choices", [None, [], [None]])
def test_an_answer_without_choices_is_asked_for_again(
    server: Server, make: Make, choices: list[None] | None
) -> None:
    server.script({"MARK": [{"raw": json.dumps({"choices": choices, "usage": USAGE})}]})
    assert unavailable(make()).may_be_charged


@pytest.mark.parametrize("reason_", ["length", "max_tokens", "MAX_TOKENS"])
@pytest.mark.parametrize("form", ["reasoning", "stream", "parts"])
def test_an_answer_that_was_cut_off_is_told_with_the_limit(
    server: Server, make: Make, reason_: str, form: str
) -> None:
    reply = {"content": answer()[:60], "finish_reason": reason_, "form": form}
    server.script({"MARK": [reply]})
    told = reason(make(max_tokens=33), "rejected")
    assert "the answer was cut off, it is too long" in told
    assert told.endswith("(max_tokens is 33)")


@pytest.mark.parametrize(
    "message",
    [
        {"refusal": True},
        {"content": [{"type": "refusal", "refusal": "no"}]},
        {"content": None, "refusal": {"reason": "no"}},
    ],
)
def test_a_refusal_counts_in_every_form(
    server: Server, make: Make, message: dict[str, Any]
) -> None:
    server.script({"MARK": [{"raw": json.dumps({"choices": [{"message": message}]})}]})
    assert reason(make(), "rejected").startswith("refused: ")


def test_base_url_without_v1_is_explained(server: Server, make: Make) -> None:
    assert "/v1" in stopped(make(base_url=server.root))


def formats(bodies: list[dict[str, Any]]) -> list[str | None]:
    return [body.get("response_format", {}).get("type") for body in bodies]


def test_auto_asks_for_less_where_the_server_refuses(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]}, refuses=("json_schema", "json_object"))
    planner = make()
    assert ask(planner, "MARK") == [PLAN]
    assert ask(planner, "another MARK") == [PLAN]
    # The second question knows what the first has learnt.
    assert formats(server.bodies()) == ["json_schema", "json_object", None, None]


def test_a_named_structured_output_is_kept(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]}, refuses=("json_schema",))
    assert "structured_output" in reason(make(structured_output="json_schema"), "failed")
    assert formats(server.bodies()) == ["json_schema"]


def test_json_object_can_be_asked_for(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]})
    assert ask(make(structured_output="json_object"), "MARK") == [PLAN]
    assert formats(server.bodies()) == ["json_object"]


def test_parameters_a_server_does_not_know_are_left_out(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]}, refuses=("seed", "max_tokens", "response_format"))
    assert ask(make(max_tokens=77), "MARK") == [PLAN]
    last = server.bodies()[-1]
    assert last["max_completion_tokens"] == 77
    assert not {"seed", "max_tokens", "response_format"} & last.keys()


UNSUPPORTED = [
    ("temperature", {"message": "Only the default (1) value is supported", "param": "temperature"}),
    ("temperature", {"message": "'temperature' is deprecated for this model"}),
    ("seed", {"message": "Extra inputs are not permitted: seed"}),
    ("seed", {"message": "no such thing", "param": "seed", "code": "unsupported_parameter"}),
    ("response_format", {"message": "Grammar error: Unimplemented keys", "code": 400}),
    ("response_format", {"status": 500, "message": "failed to parse grammar"}),
    ("response_format", {"status": 422, "message": "guided decoding is disabled"}),
]


@pytest.mark.parametrize(("parameter", "error"), UNSUPPORTED)
@pytest.mark.parametrize("status", [400, 200])
def test_a_parameter_that_the_server_refuses_is_left_out_and_told(
    server: Server,
    make: Make,
    caplog: pytest.LogCaptureFixture,
    parameter: str,
    error: dict[str, Any],
    status: int,
) -> None:
    if status == 200:
        reply = {"raw": json.dumps({"error": {"code": 400, **error}})}
    else:
        reply = {"status": status, **error}
    server.script({"MARK": [reply, answer()], "next": [answer()]})
    planner = make()
    with caplog.at_level("WARNING"):
        [first, second] = attempt(planner, "MARK", "next")
    name = "json_schema" if parameter == "response_format" else parameter
    assert isinstance(first, Completion) and isinstance(second, Completion)
    assert first.left_out == second.left_out == (name,)
    bodies = server.bodies()
    assert parameter in bodies[0]
    for body in bodies[1:]:
        assert body.get(parameter) == (
            {"type": "json_object"} if parameter == "response_format" else None
        )
    [told] = [record.getMessage() for record in caplog.records]  # once
    assert f"{server.url} does not accept {name}, which is left out" in told


def test_what_was_left_out_is_stored_with_the_answer(
    server: Server, make: Make, tmp_path: Path
) -> None:
    server.script({}, refuses=("seed", "temperature"))
    for _ in range(2):
        planner = make()
        with Ledger(tmp_path / "llm.sqlite") as ledger:
            planner.ledger = ledger
            ask(planner, "one", "two")
            assert ledger.left_out() == {"seed": 2, "temperature": 2}
            assert {it.completion.left_out for it in ledger.answers()} == {("seed", "temperature")}
            planner.close()


def test_a_limit_that_is_too_large_is_not_left_out(server: Server, make: Make) -> None:
    """Costs would have no bound."""
    error = {"status": 400, "message": "max_tokens must be at most 256", "param": "max_tokens"}
    server.script({"MARK": [error]})
    assert "max_tokens must be at most 256" in reason(make(), "failed")
    assert len(server.bodies()) == 1


def test_one_records_error_does_not_change_the_others(server: Server, make: Make) -> None:
    trap = {"status": 400, "message": "bad caption: a seed, a json_schema"}
    server.script({"TRAP": [trap], "GOOD": [answer()]})
    planner = make()
    [problem] = ask(planner, "TRAP")
    assert isinstance(problem, Problem)
    assert ask(planner, "GOOD") == [PLAN]
    last = server.bodies()[-1]
    assert last["response_format"]["type"] == "json_schema"
    assert "seed" in last


def test_order_holds_whatever_the_latencies(server: Server, make: Make) -> None:
    rng = random.Random(0)
    captions = [f"<{number}>" for number in range(24)]
    replies = {
        caption: [{"content": answer(target=f"parrot {i}"), "delay": rng.random() * 0.15}]
        for i, caption in enumerate(captions)
    }
    server.script(replies)
    plans = ask(make(concurrency=6), *captions)
    assert [plan.target for plan in plans if isinstance(plan, EditPlan)] == [
        f"parrot {number}" for number in range(24)
    ]
    assert 1 < server.log()["peak"] <= 6
    server.script(replies)
    assert ask(make(concurrency=1), *captions) == plans
    assert server.log()["peak"] == 1


def test_options_that_change_no_result_are_neutral() -> None:
    plain = OpenAIOptions()
    changed = OpenAIOptions(
        concurrency=2,
        timeout_s=1,
        max_retries=0,
        api_key_env="OTHER",
        batch=True,
        prompts={"replace": Path("p.yaml")},
        price=PRICE,
    )
    fingerprint_exclude = set(OpenAIOptions.fingerprint_exclude)
    assert plain.model_dump(exclude=fingerprint_exclude) == changed.model_dump(
        exclude=fingerprint_exclude
    )
    assert not {"model", "base_url", "temperature", "structured_output"} & fingerprint_exclude


@pytest.mark.parametrize(
    "reply",
    [
        {"status": 401, "message": f"Incorrect API key provided: {KEY}."},
        {"status": 401, "message": "Incorrect API key provided: sk-recog******6789."},
        {"status": 413, "message": f"Not with {KEY}."},
        {"status": 500, "message": f"Bearer {KEY} broke it"},
        {"raw": json.dumps({"error": f"what is {KEY}?"})},
        {"refusal": f"I will not tell {KEY}."},
        {"content": answer(selected=KEY)},
    ],
)
def test_the_key_never_shows(server: Server, make: Make, reply: dict[str, Any]) -> None:
    server.script({"MARK": [reply]})
    planner = make()
    try:
        shown = repr(attempt(planner, "MARK"))
    except ReasonpixError as error:
        shown = "".join(traceback.format_exception(error))
    shown += f"{planner!r} {planner.options!r} {planner.fingerprint_facts()!r} {vars(planner)}"
    assert "sk-recog" not in shown
    assert "6789" not in shown
    assert "[API key]" in shown


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("base_url", f"https://me:{KEY}@localhost/v1"),
        ("base_url", f"https://localhost/v1?key={KEY}"),
        ("api_key_env", KEY),
        ("max_tokens", KEY),
        ("api_key", KEY),
    ],
)
def test_a_key_in_a_recipe_is_not_repeated(tmp_path: Path, option: str, value: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'pipeline: {{planner: {{use: openai, {option}: "{value}"}}}}')
    with pytest.raises(RecipeError, match=rf"pipeline\.planner\.{option}: ") as error:
        load_recipe(recipe)
    assert KEY not in str(error.value)


def test_a_word_for_a_key_is_left_in_answers(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "parrot")  # What one gives a server that needs none.
    server.script({"MARK": [answer()]})
    assert ask(make(), "MARK") == [PLAN]


def test_a_wrong_key_names_its_variable(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "other-recognisable")
    server.script({"MARK": [{"status": 401, "message": "who is other-recognisable?"}]})
    told = stopped(make(api_key_env="OTHER_KEY"))
    assert "OTHER_KEY" in told
    assert "other-recognisable" not in told
    assert server.log()["requests"][0]["authorization"] == "Bearer other-recognisable"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "OPENAI_API_KEY"),
        ({"base_url": "https://eu.api.openai.com/v1"}, "OPENAI_API_KEY"),
        ({"api_key_env": "OTHER_KEY"}, "OTHER_KEY"),
        ({"api_key_env": "OTHER_KEY", "base_url": "http://127.0.0.1:1/v1"}, "OTHER_KEY"),
    ],
)
def test_a_missing_key_is_named_at_load(
    options: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    planner = OpenAIPlanner(OpenAIOptions(**options))
    with pytest.raises(ReasonpixError, match=name):
        planner.load()
    planner.close()  # What was not opened is closed without complaint.


def test_a_server_of_ones_own_needs_no_key(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server.script({"MARK": [answer()]})
    assert ask(make(), "MARK") == [PLAN]


@pytest.mark.parametrize("value", ["sk-recognisable 1", "sk-recognisable\n1", "sk-recogniſable"])
def test_a_malformed_key_is_refused_unseen(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(ReasonpixError, match="OPENAI_API_KEY") as error:
        OpenAIPlanner(OpenAIOptions()).load()
    assert "recogn" not in str(error.value)


def test_a_key_file_may_end_in_a_newline(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    server.script({"MARK": [answer()]})
    assert ask(make(), "MARK") == [PLAN]
    assert server.log()["requests"][0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": KEY},
        {"base_url": f"https://user:{KEY}@example.org/v1"},
        {"base_url": f"https://example.org/v1?key={KEY}"},
        {"base_url": "example.org/v1"},
    ],
)
def test_options_hold_no_key(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        OpenAIOptions(**options)
    assert KEY not in str(error.value)


# -- proxies --------------------------------------------------------------------------------------

ELSEWHERE = "http://llm.example:8000/v1"


@pytest.mark.parametrize(
    ("variable", "proxy"),
    [
        ("HTTP_PROXY", "http://127.0.0.1:9"),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("http_proxy", "not a proxy at all"),
    ],
)
def test_a_server_on_this_machine_is_reached_past_proxies(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str
) -> None:
    monkeypatch.setenv(variable, proxy)
    server.script({"MARK": [answer()]})
    planner = make()
    planner.check()
    assert ask(planner, "MARK") == [PLAN]


def test_a_server_elsewhere_is_reached_through_its_proxy(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.root.replace("//", "//me:recognisable@"))
    server.script({"MARK": [answer(), {"status": 500, "message": "boom"}, {"status": 407}]})
    planner = make(base_url=ELSEWHERE)
    assert ask(planner, "MARK") == [PLAN]
    failed = unavailable(planner)
    assert f"{ELSEWHERE} (through the proxy of HTTP_PROXY): 500: boom" in failed.reason
    told = stopped(planner)
    assert "check the user and password of the proxy in HTTP_PROXY" in told
    assert "recognisable" not in f"{planner!r} {vars(planner)} {failed} {told}"


@pytest.mark.parametrize(
    ("variable", "proxy", "told"),
    [
        ("ALL_PROXY", "socks5://me:recognisable@127.0.0.1:9", "ALL_PROXY names a SOCKS proxy"),
        ("http_proxy", "http://me:recognisable@:x", "http_proxy is not the URL of a proxy"),
        ("HTTP_PROXY", "smtp://me:recognisable@mail", "HTTP_PROXY names a proxy of the protocol"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_told_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str, told: str
) -> None:
    monkeypatch.setenv(variable, proxy)
    planner = OpenAIPlanner(OpenAIOptions(base_url=ELSEWHERE))
    with pytest.raises(ReasonpixError, match=told) as error:
        planner.check()
    assert "recognisable" not in "".join(traceback.format_exception(error.value))
    monkeypatch.setenv("NO_PROXY", "llm.example")
    planner.check()


def test_a_proxy_that_cannot_be_reached_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, unreachable: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", unreachable.removesuffix("/v1"))
    told = stopped(make(base_url=ELSEWHERE))
    assert f"{ELSEWHERE} (through the proxy of HTTP_PROXY): cannot be reached" in told
    assert "check base_url, the proxy in HTTP_PROXY and that the server is running" in told


# -- the batch endpoint ---------------------------------------------------------------------------


def asked(planner: OpenAIPlanner, count: int) -> dict[str, Conversation]:
    return {f"key-{i}": conversation(planner, f"a kite, number {i}", i) for i in range(count)}


def collected(planner: OpenAIPlanner, job: str) -> Mapping[str, Completion | Problem | Unavailable]:
    outcomes = planner.collect(job)
    assert outcomes is not None
    return outcomes


def test_a_batch_gives_what_single_calls_give(server: Server, make: Make) -> None:
    server.script({})
    planner = make(batch=True)
    questions = asked(planner, 5)
    singly = dict(zip(questions, planner.complete(list(questions.values())), strict=True))
    assert all(isinstance(answered, Completion) for answered in singly.values())
    job = planner.submit(questions)
    server.tell("batches", {"become": "in_progress"})
    assert planner.collect(job) is None
    server.tell("batches", {"become": "completed"})
    assert collected(planner, job) == singly


def test_batches_are_jobs_of_any_size(server: Server, make: Make) -> None:
    server.script({})
    planner = make(batch=True)
    assert planner.jobs
    assert planner.concurrency > 10_000
    assert planner.parameters == make().parameters


def test_a_batch_is_found_again(server: Server, make: Make) -> None:
    server.script({}, batches="in_progress")
    first, second = make(batch=True), make(batch=True)
    job = first.submit(asked(first, 3))
    # Another process, which does not know the id; the order of the questions may be another.
    again = dict(reversed(asked(second, 3).items()))
    assert second.submit(again) == job
    assert second.submit(asked(second, 4)) != job
    server.tell("batches", {"become": "completed"})
    assert len(collected(first, job)) == 3
    assert second.submit(again) == job
    assert len(server.log()["batches"]) == 2


@pytest.mark.parametrize("become", ["failed", "expired", "cancelled"])
def test_a_batch_of_no_use_is_not_taken_for_the_same(
    server: Server, make: Make, become: str
) -> None:
    server.script({}, batches=become)
    planner = make(batch=True)
    job = planner.submit(asked(planner, 4))
    planner.collect(job)
    other = make(batch=True)  # as in another process, which knows nothing
    assert other.submit(asked(other, 4)) != job


def test_an_expired_batch_keeps_what_it_has(server: Server, make: Make) -> None:
    server.script({}, batches="expired")
    planner = make(batch=True)
    outcomes = collected(planner, planner.submit(asked(planner, 6)))
    assert len(outcomes) == 3
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())


def test_a_batch_that_is_not_accepted_ends_and_tells(server: Server, make: Make) -> None:
    server.script({}, batches="failed")
    planner = make(batch=True)
    assert collected(planner, planner.submit(asked(planner, 2))) == {}
    with pytest.raises(ReasonpixError, match="no such model") as error:
        planner.submit(asked(planner, 2))
    assert "line 1" in str(error.value)


def test_an_unknown_batch_came_to_nothing(server: Server, make: Make) -> None:
    server.script({})
    assert collected(make(batch=True), "batch_99") == {}


def test_errors_in_a_batch_are_of_one_request(server: Server, make: Make) -> None:
    server.script(
        {
            "number 0": [{"status": 413, "message": "too long"}],
            "number 1": [{"status": 500}],
            "number 2": [{"status": 429, "code": "insufficient_quota", "message": f"pay, {KEY}"}],
            "number 3": [{"refusal": "no"}],
            "number 4": [f"never tell {KEY}"],
        }
    )
    planner = make(batch=True)
    outcomes = collected(planner, planner.submit(asked(planner, 5)))
    assert KEY not in repr(outcomes)
    results = [outcomes[f"key-{number}"] for number in range(5)]
    assert isinstance(results[0], Problem)
    assert isinstance(results[1], Unavailable)
    assert isinstance(results[2], Unavailable)
    assert isinstance(results[3], Completion)
    assert results[3].refusal == "no"
    assert isinstance(results[4], Completion)
    assert results[4].text == "never tell [API key]"


def test_rows_of_a_batch_may_be_odd(
    server: Server, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    busy = {"code": "rate_limit_exceeded", "message": "busy"}
    body = json.dumps({"choices": [{"message": {"content": "text"}}]})
    server.script(
        {
            "number 0": [{"row": {"response": None, "error": busy}}],
            "number 1": [{"row": {"response": {"status_code": "200", "body": body}}}],
            "number 2": [{"row": {"response": {"body": json.loads(body)}}}],
            "number 3": [{"row": {"custom_id": None, "response": "what?"}}],
            "number 4": [{"row": {"response": {"status_code": "OK", "body": {}}}}],
        }
    )
    planner = make(batch=True)
    with caplog.at_level("WARNING"):
        outcomes = collected(planner, planner.submit(asked(planner, 6)))
    assert outcomes.keys() == {"key-0", "key-1", "key-2", "key-5"}
    assert isinstance(outcomes["key-0"], Unavailable)
    assert "429: busy" in outcomes["key-0"].reason
    assert outcomes["key-1"] == outcomes["key-2"] == Completion(text="text")
    assert isinstance(outcomes["key-5"], Completion)
    assert "2 of 6 lines in the results of batch" in caplog.text


def test_a_batch_in_which_nothing_was_answered_is_handed_in_anew(
    server: Server, make: Make
) -> None:
    server.script({"kite": [{"status": 500}]})
    planner = make(batch=True)
    job = planner.submit(asked(planner, 2))
    collected(planner, job)
    assert planner.submit(asked(planner, 2)) != job
    assert make(batch=True).submit(asked(planner, 2)) != job


def test_a_batch_learns_what_the_model_understands(server: Server, make: Make) -> None:
    server.script({}, refuses=("json_schema", "max_tokens"))
    planner = make(batch=True)
    for kind in (Unavailable, Unavailable, Completion):
        outcomes = collected(planner, planner.submit(asked(planner, 2)))
        assert {type(outcome) for outcome in outcomes.values()} == {kind}
    assert set(formats(server.bodies()[-2:])) == {"json_object"}


def test_a_large_job_is_several_batches(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script({})
    planner = make(batch=True)
    one = len(json.dumps(planner._request(asked(planner, 1)["key-0"], planner._dialect)))
    monkeypatch.setattr(batch_limits, "MAX_FILE_BYTES", 3 * one + 3 * 200)
    monkeypatch.setattr(batch_limits, "MAX_REQUESTS", 2)
    job = planner.submit(asked(planner, 5))
    assert len(server.log()["batches"]) == 3
    assert planner.submit(asked(planner, 5)) == job
    monkeypatch.setattr(batch_limits, "MAX_REQUESTS", 100)
    assert planner.submit(asked(planner, 5)) != job
    assert len(server.log()["batches"]) == 5
    assert len(collected(planner, job)) == 5


def test_a_stopped_run_waits_for_the_batch_it_handed_in(
    server: Server, make: Make, tmp_path: Path
) -> None:
    server.script({}, batches="in_progress")
    questions = list(asked(make(), 5).values())

    def wait(until: Callable[[], bool]) -> list[Completion | Problem]:
        """Ask, until something is so or all is answered."""
        with Ledger(tmp_path / "llm.sqlite", max_cost=1.0) as kept:
            planner = make(batch=True, price=PRICE, max_retries=3)
            caller = make_dispatcher(planner, kept, poll_interval_s=0.2)
            with ThreadPoolExecutor(1) as thread:
                answers = thread.submit(caller.answers, "replace", questions)
                while not until() and not answers.done():
                    time.sleep(0.02)
                if until():
                    caller.close()
                return answers.result()

    with pytest.raises(ReasonpixError, match="again to continue"):
        wait(lambda: bool(server.log()["batches"]))
    server.tell("batches", {"become": "expired"})  # Half of them: the others are handed in anew.
    with pytest.raises(ReasonpixError, match="again to continue"):
        wait(lambda: len(server.log()["batches"]) == 2)
    server.tell("batches", {"become": "completed"})
    answers = wait(lambda: False)
    assert all(isinstance(answered, Completion) for answered in answers)
    assert len(server.log()["batches"]) == 2
    assert [entry["charged"] for entry in server.log("bill").values()] == [1] * 5


def test_a_server_without_the_batch_endpoint_is_explained(server: Server, make: Make) -> None:
    server.script({})
    planner = make(batch=True, base_url=f"{server.root}/other")
    with pytest.raises(ReasonpixError, match="batch endpoint"):
        planner.submit(asked(planner, 1))


def test_a_trouble_with_the_network_does_not_end_a_batch(make: Make) -> None:
    with served() as server:
        planner = make(batch=True, base_url=server.url)
        job = planner.submit(asked(planner, 1))
    assert planner.collect(job) is None
    with pytest.raises(ReasonpixError, match="run the same command again"):
        planner.submit(asked(planner, 1))


def test_a_missing_key_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "source: fake-source\npipeline: {captioner: fake-captioner, extractor: fake-extractor, "
        "grounder: fake-grounder, planner: openai, editor: fake-editor}\n"
    )
    with pytest.raises(ReasonpixError, match="OPENAI_API_KEY"):
        generate(load_recipe(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()
