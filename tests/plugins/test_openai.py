"""The planner `openai` against a real server in a process of its own."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest
import reasonpix_openai
from pydantic import ValidationError
from reasonpix_openai import OpenAIOptions, OpenAIPlanner

from reasonpix import hookspecs
from reasonpix.engine import generate
from reasonpix.errors import ReasonpixError
from reasonpix.planning import Completion, Conversation, ReplaceAnswer
from reasonpix.recipe import load_recipe
from reasonpix.records import EditPlan, Problem, ReplaceRequest
from reasonpix.testing import PlannerContract

KEY = "sk-recognisable-0123456789"


class Server:
    """The test server as the tests see it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.url = f"{root}/v1"

    def script(self, replies: dict[str, list[Any]], refuses: tuple[str, ...] = ()) -> None:
        body = json.dumps({"replies": replies, "refuses": refuses}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{self.root}/script", body, headers)).close()

    def log(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.root}/requests") as response:
            return json.load(response)

    def bodies(self) -> list[dict[str, Any]]:
        return [request["body"] for request in self.log()["requests"]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    script = Path(__file__).parents[1] / "openai_server.py"
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        yield Server(process.stdout.readline().strip())
        process.stdin.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
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


def test_plugin_offers_the_planner() -> None:
    manager = pluggy.PluginManager("reasonpix")
    manager.add_hookspecs(hookspecs)
    manager.register(reasonpix_openai)
    manager.check_pending()
    assert manager.hook.planners() == [[OpenAIPlanner]]


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
    assert schema == ReplaceAnswer.model_json_schema()
    assert schema["additionalProperties"] is False
    assert sorted(schema["required"]) == sorted(schema["properties"])


def test_parameters_can_be_left_to_the_server(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]})
    ask(make(temperature=None, max_tokens=None, structured_output="none"), "MARK")
    assert server.bodies()[0].keys() == {"model", "messages", "seed"}


def test_completion_counts_tokens(server: Server, make: Make) -> None:
    server.script({"MARK": ["{}"]})
    planner = make()
    turns = planner.prompt.messages("MARK", ["kite"])
    [completion] = planner.complete(
        [Conversation(messages=turns, seed=1)], ReplaceAnswer.model_json_schema()
    )
    assert completion == Completion(text="{}", prompt_tokens=7, completion_tokens=5)


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
    server.script({"MARK": [{"status": 500}, {"status": 429}, answer()]})
    assert ask(make(max_retries=2), "MARK") == [PLAN]


def test_a_failure_is_the_failure_of_one_record(server: Server, make: Make) -> None:
    server.script({"GOOD": [answer()], "BAD": [{"status": 500, "message": "out of memory"}]})
    first, second, third = ask(make(), "GOOD", "BAD", "GOOD")
    assert first == third == PLAN
    assert isinstance(second, Problem)
    assert second.status == "failed"
    assert server.url in second.reason
    assert "out of memory" in second.reason


def test_no_connection_names_the_url(make: Make) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # Bound, but nobody listens.
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        told = reason(make(base_url=url), "failed")
    assert url in told
    assert "refused" in told


def test_a_silent_server_times_out(server: Server, make: Make) -> None:
    server.script({"MARK": [{"content": answer(), "delay": 3}]})
    assert "timeout_s" in reason(make(timeout_s=0.3), "failed")


@pytest.mark.parametrize(
    "raw",
    [
        {"raw": "<html></html>", "type": "text/html"},
        {"raw": "{broken"},
        {"raw": "[]"},
        {"raw": '{"choices": []}'},
        {"raw": '{"choices": [{"message": null}]}'},
    ],
)
def test_what_is_no_chat_answer_fails(server: Server, make: Make, raw: dict[str, str]) -> None:
    server.script({"MARK": [raw]})
    assert "base_url" in reason(make(), "failed")


def test_base_url_without_v1_is_explained(server: Server, make: Make) -> None:
    assert "/v1" in reason(make(base_url=server.root), "failed")


def formats(bodies: list[dict[str, Any]]) -> list[str | None]:
    return [body.get("response_format", {}).get("type") for body in bodies]


def test_auto_asks_for_less_where_the_server_refuses(server: Server, make: Make) -> None:
    server.script({"MARK": [answer()]}, refuses=("json_schema", "json_object"))
    planner = make()
    assert ask(planner, "MARK") == [PLAN]
    assert ask(planner, "MARK") == [PLAN]
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
        concurrency=2, timeout_s=1, max_retries=0, api_key_env="OTHER", prompt=Path("p.yaml")
    )
    neutral = set(OpenAIOptions.neutral)
    assert plain.model_dump(exclude=neutral) == changed.model_dump(exclude=neutral)
    assert not {"model", "base_url", "temperature", "structured_output"} & neutral


@pytest.mark.parametrize(
    "reply",
    [
        {"status": 401, "message": f"Incorrect API key provided: {KEY}."},
        {"status": 401, "message": "Incorrect API key provided: sk-recog******6789."},
        {"refusal": f"I will not tell {KEY}."},
        {"content": answer(selected=KEY)},
    ],
)
def test_the_key_never_shows(server: Server, make: Make, reply: dict[str, Any]) -> None:
    server.script({"MARK": [reply]})
    planner = make()
    [problem] = ask(planner, "MARK")
    shown = f"{problem!r} {planner!r} {planner.options!r} {planner.identity()!r}"
    assert isinstance(problem, Problem)
    assert "sk-recog" not in shown
    assert "6789" not in shown
    assert "[API key]" in problem.reason


def test_a_wrong_key_names_its_variable(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "other-recognisable")
    server.script({"MARK": [{"status": 401, "message": "who is other-recognisable?"}]})
    told = reason(make(api_key_env="OTHER_KEY"), "failed")
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
