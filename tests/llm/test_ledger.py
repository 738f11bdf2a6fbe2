"""The ledger: keys, answers, spending, the limit, jobs, and what a killed process leaves."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonpix.errors import RunError
from reasonpix.llm.budget import Budget, Spending
from reasonpix.llm.ledger import Ledger, Settlement
from reasonpix.llm.requests import Request, request_key
from reasonpix.llm.types import Completion, Conversation, Message

SCHEMA = {"title": "Answer", "type": "object", "properties": {}, "additionalProperties": False}
PARAMETERS = {"model": "test", "temperature": 1.0}


def conversation(text: str = "hello", seed: int = 0, system: str = "be kind") -> Conversation:
    turns = (Message(role="system", content=system), Message(role="user", content=text))
    return Conversation(messages=turns, answer_schema=SCHEMA, seed=seed, shared=1)


def call(text: str = "hello", cost_bound: float = 0.0, task: str = "rewrite") -> Request:
    asked = conversation(text)
    return Request(task, request_key(PARAMETERS, asked), asked, cost_bound)


def answer(
    ledger: Ledger, asked: Request, completion: Completion, cost: float | None = None
) -> None:
    assert ledger.budget.reserve(asked.cost_bound)
    [sent] = ledger.send([asked], PARAMETERS)
    ledger.settle([Settlement(sent, completion, cost, seconds=0.25, attempts=3)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(max_size=3), JSON, max_size=3)
CONVERSATIONS = st.builds(
    Conversation,
    messages=st.lists(
        st.builds(
            Message, role=st.sampled_from(["system", "user", "assistant"]), content=st.text()
        ),
        max_size=3,
    ).map(tuple),
    answer_schema=OBJECTS,
    seed=st.integers(0, 3),
)


def written(parameters: Mapping[str, Any], asked: Conversation) -> str:
    """The parts of a question, told apart by type too (1 is not True)."""
    return repr((sorted_deep(parameters), asked.messages, sorted_deep(asked.answer_schema))) + str(
        asked.seed
    )


def sorted_deep(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((key, sorted_deep(inner)) for key, inner in value.items())
    return [sorted_deep(inner) for inner in value] if isinstance(value, list) else (value,)


@given(OBJECTS, CONVERSATIONS, OBJECTS, CONVERSATIONS)
def test_keys_are_equal_when_all_parts_are(
    parameters: dict[str, Any], asked: Conversation, others: dict[str, Any], other: Conversation
) -> None:
    assert len(request_key(parameters, asked)) == 64
    same = written(parameters, asked) == written(others, other)
    assert (request_key(parameters, asked) == request_key(others, other)) == same


@given(OBJECTS, CONVERSATIONS, st.text(min_size=1), st.integers(1))
def test_a_key_changes_with_each_part(
    parameters: dict[str, Any], asked: Conversation, text: str, more: int
) -> None:
    key = request_key(parameters, asked)
    turns = (*asked.messages, Message(role="user", content=text))
    changed = [
        request_key({**parameters, "longer name": text}, asked),
        request_key(parameters, asked.model_copy(update={"messages": turns})),
        request_key(parameters, asked.model_copy(update={"seed": asked.seed + more})),
        request_key(parameters, asked.model_copy(update={"answer_schema": {"longer name": text}})),
    ]
    assert key not in changed
    assert len(set(changed)) == len(changed)
    backwards = dict(reversed(parameters.items()))
    assert request_key(backwards, asked.model_copy(update={"shared": 7})) == key


def test_an_answer_survives_reopening_with_its_question(tmp_path: Path) -> None:
    completion = Completion(
        text='{"a": "ü\0"}', finish_reason="length", prompt_tokens=12, completion_tokens=3
    )
    refused = Completion(text="", refusal="I cannot", prompt_tokens=5)
    with Ledger(tmp_path / "deep" / "llm.sqlite") as ledger:
        answer(ledger, call("one"), completion, cost=0.5)
        answer(ledger, call("two", task="select"), refused)
    with Ledger(tmp_path / "deep" / "llm.sqlite") as ledger:
        assert ledger.get(call("one").key) == completion
        assert ledger.get(call("two").key) == refused
        assert ledger.get(call("three").key) is None
        first, second = ledger.answers()
        assert (first.conversation, first.parameters) == (conversation("one"), PARAMETERS)
        assert (first.key, first.task, first.completion) == (
            call("one").key,
            "rewrite",
            completion,
        )
        assert (first.cost, first.seconds, first.attempts) == (0.5, 0.25, 3)
        assert second.cost is None
        assert [it.key for it in ledger.answers("select")] == [call("two").key]


def test_answers_are_read_in_pages(tmp_path: Path) -> None:
    with Ledger(None) as ledger:
        calls = [call(str(number)) for number in range(1203)]
        sent = ledger.send(calls, PARAMETERS)
        ledger.settle([Settlement(it, Completion(text=it.key)) for it in sent])
        assert [it.completion.text for it in ledger.answers()] == [it.key for it in calls]


def test_the_first_answer_to_a_question_stays() -> None:
    with Ledger(None) as ledger:
        answer(ledger, call(), Completion(text="first"))
        answer(ledger, call(), Completion(text="second"))
        stored = ledger.get(call().key)
        assert stored is not None
        assert stored.text == "first"


def test_what_a_second_answer_cost_stays_on_the_account(tmp_path: Path) -> None:
    """As when two runs, or a run and a job that it no longer waits for, ask the same."""
    path = tmp_path / "llm.sqlite"
    with Ledger(path) as ledger:
        for cost in (0.1, 0.2):
            answer(ledger, call(cost_bound=1.0), Completion(text="x"), cost)
    with Ledger(path, max_cost=1.0) as ledger:
        spent = ledger.spent()
        assert (spent.cost, spent.lost_cost) == (0.1, 0.2)
        assert ledger.budget.reserve(0.7) and not ledger.budget.reserve(0.1)


def test_texts_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    for part in range(2):  # a second process knows them too
        with Ledger(path) as ledger:
            for number in range(20):
                system = "a long text " * 1000
                asked = conversation(f"{part} {number}", system=system)
                key = request_key(PARAMETERS, asked)
                answer(ledger, Request("rewrite", key, asked), Completion(text="x"))
    with sqlite3.connect(path) as db:
        (count,) = db.execute("SELECT count(*) FROM texts WHERE text LIKE 'a long%'").fetchone()
        (all_texts,) = db.execute("SELECT count(*) FROM texts").fetchone()
    db.close()
    assert (count, all_texts) == (1, 3)  # and parameters and schema
    assert path.stat().st_size < 100_000


def test_half_a_surrogate_pair_in_a_question_is_no_obstacle() -> None:
    with Ledger(None) as ledger:
        answer(ledger, call("a\ud83d"), Completion(text="x"))
        assert ledger.get(call("a\ud83d").key) is not None


def test_spending_is_told_by_verb_and_counts_again_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    with Ledger(path) as ledger:
        for number in range(3):
            completion = Completion(text="x", prompt_tokens=10, completion_tokens=1)
            answer(ledger, call(f"r{number}"), completion, cost=0.1)
        answer(ledger, call("s", task="select"), Completion(text="x"), cost=None)
        [lost] = ledger.send([call("lost", cost_bound=0.25, task="select")], PARAMETERS)
        assert ledger.budget.reserve(0.25)
        ledger.settle([Settlement(lost, may_be_charged=True)])
        [free] = ledger.send([call("free", cost_bound=0.5)], PARAMETERS)
        assert ledger.budget.reserve(0.5)
        assert ledger.budget.reserved == 0.5
        ledger.settle([Settlement(free)])
        spent = ledger.spent()
    assert spent.by_task == {
        "rewrite": Spending(3, 30, 3, cost=0.1 + 0.1 + 0.1),
        "select": Spending(answers=1, unpriced=1, estimated=1, lost=1, lost_cost=0.25),
    }
    assert (spent.answers, spent.prompt_tokens, spent.lost, spent.unpriced) == (4, 30, 1, 1)
    assert spent.cost == pytest.approx(0.3)
    with Ledger(path) as ledger:
        again = ledger.spent()
        assert again.by_task["select"] == spent.by_task["select"]
        assert again.answers == spent.answers
        assert again.cost == pytest.approx(spent.cost)
        assert ledger.budget.reserved == 0


def test_what_was_spent_before_counts_against_the_limit(tmp_path: Path) -> None:
    with Ledger(tmp_path / "llm.sqlite") as ledger:
        answer(ledger, call("paid"), Completion(text="x"), cost=0.5)
        ledger.send([call("lost", cost_bound=0.3)], PARAMETERS)
    with Ledger(tmp_path / "llm.sqlite", max_cost=1.0) as ledger:
        assert not ledger.budget.reserve(0.21)
        assert ledger.budget.reserve(0.2)
        assert not ledger.budget.reserve(1e-9)


def test_a_limit_that_fits_exactly_fits() -> None:
    budget = Budget(0.3)  # 0.1 + 0.1 + 0.1 > 0.3 in floats
    for _ in range(1000):
        assert [budget.reserve(0.1) for _ in range(4)] == [True, True, True, False]
        for _ in range(3):
            budget.settle("rewrite", 0.1, Spending())
    assert budget.in_flight == 0


@given(
    st.floats(0, 10),
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1), st.integers(0, 3)), max_size=40),
)
def test_spent_and_reserved_never_pass_the_limit(
    limit: float, events: list[tuple[float, float, int]]
) -> None:
    budget = Budget(limit)
    waiting: list[tuple[float, float]] = []
    for worst, share, end in events:
        if budget.reserve(worst):
            waiting.append((worst, share))
        if waiting and end:
            cost, part = waiting.pop(0)
            if end == 1:
                budget.settle("rewrite", cost, Spending(answers=1, cost=cost * part))
            elif end == 2:
                budget.settle("select", cost, Spending(lost=1, lost_cost=cost))
            else:
                budget.settle("rewrite", cost, Spending())
        spent = budget.spent()
        assert spent.cost + spent.lost_cost + budget.reserved <= limit + 1e-9
        assert budget.in_flight == len(waiting)


def test_threads_cannot_reserve_more_than_there_is() -> None:
    with Ledger(None, max_cost=100.0) as ledger:
        granted: list[int] = []

        def take() -> None:
            granted.append(sum(ledger.budget.reserve(1.0) for _ in range(50)))

        in_threads(take, 8)
        assert sum(granted) == 100


def test_threads_may_store_and_read_at_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / "llm.sqlite") as ledger:
        names = iter(range(8))

        def work() -> None:
            name = next(names)
            for number in range(30):
                asked = call(f"{name} {number}")
                answer(ledger, asked, Completion(text=asked.key, prompt_tokens=1))
                stored = ledger.get(asked.key)
                assert stored is not None
                assert stored.text == asked.key

        in_threads(work, 8)
        assert ledger.spent().answers == len(list(ledger.answers())) == 240


def in_threads(work: Callable[[], None], count: int) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_job_is_found_again_until_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    calls = [call(str(number), cost_bound=0.25) for number in range(4)]
    with Ledger(path) as ledger:
        ledger.send(calls[:2], PARAMETERS, job="arrived")
        ledger.submitted("arrived", "batch_1")
        ledger.send(calls[2:3], PARAMETERS, job="unsure")
        ledger.send(calls[3:], PARAMETERS)
    with Ledger(path, max_cost=1.0) as ledger:
        arrived, unsure = ledger.open_jobs()
        assert (arrived.name, arrived.id, unsure.id) == ("arrived", "batch_1", None)
        assert [it.key for it in arrived.requests] == [it.key for it in calls[:2]]
        assert ledger.budget.reserved == 0.5
        assert ledger.spent() == Spending(
            lost=2, lost_cost=0.5, by_task={"rewrite": Spending(lost=2, lost_cost=0.5)}
        )
        assert not ledger.budget.reserve(0.01)

        ledger.forget(unsure)
        assert ledger.spent().lost_cost == 0.25
        assert ledger.budget.reserve(0.25)
        assert not ledger.budget.reserve(0.01)

        ledger.budget.adopted(2)
        first, second = arrived.requests
        completion = Completion(text="x", prompt_tokens=1)
        ends = [Settlement(first, completion, 0.125), Settlement(second, may_be_charged=True)]
        ledger.settle(ends, job="arrived")
        assert ledger.open_jobs() == []
    with Ledger(path) as ledger:
        assert ledger.open_jobs() == []
        assert ledger.get(calls[0].key) == completion
        spent = ledger.spent()
        assert (spent.cost, spent.lost, spent.lost_cost) == (0.125, 2, 0.5)
        assert ledger.budget.reserved == 0


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.llm.test_ledger import PARAMETERS, Completion, Ledger, Settlement, call
ledger = Ledger(Path(sys.argv[1]))
for number in range(10**6):
    asked = call(str(number), cost_bound=0.5)
    ledger.budget.reserve(0.5)
    [sent] = ledger.send([asked], PARAMETERS)
    ledger.settle([Settlement(sent, Completion(text=str(number), prompt_tokens=1), 0.25)])
    print(asked.key, flush=True)
"""


def test_what_was_stored_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    here = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), here], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        keys = [process.stdout.readline().strip() for _ in range(200)]
        os.kill(process.pid, signal.SIGKILL)
    with Ledger(path) as ledger:
        assert [ledger.get(key) for key in keys] == [
            Completion(text=str(number), prompt_tokens=1) for number in range(200)
        ]
        spent = ledger.spent()
        assert spent.answers >= 200
        assert spent.cost == spent.answers * 0.25
        assert spent.lost in (0, 1)
        assert spent.lost_cost == spent.lost * 0.5


def test_a_damaged_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(RunError, match=r"llm\.sqlite is damaged: .*move it away"):
        Ledger(path)


def test_damage_inside_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    with Ledger(path) as ledger:
        for number in range(50):
            answer(ledger, call(str(number)), Completion(text="x" * 500))
    pages = bytearray(path.read_bytes())
    for start in range(8192, len(pages) - 4096, 4096):
        pages[start : start + 200] = b"\xff" * 200
    path.write_bytes(pages)
    with pytest.raises(RunError, match="is damaged"), Ledger(path) as ledger:
        list(ledger.answers())


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    Ledger(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(RunError, match="found 99, need 1"):
        Ledger(path)


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE songs (title TEXT)")
    db.close()
    with pytest.raises(RunError, match="is not a ledger"):
        Ledger(path)


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot be used: .*writable"):
        Ledger(tmp_path / "file" / "llm.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="folder cannot be used"):
        Ledger(tmp_path / "folder")


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    with Ledger(path) as ledger:
        with pytest.raises(TypeError):
            ledger.send([call("fine"), call("bad")], {"not JSON": object()})
        with pytest.raises(sqlite3.Error):
            ledger.send([call("fine"), call("bad", cost_bound=object())], PARAMETERS)  # type: ignore[arg-type]
        answer(ledger, call("fine"), Completion(text="x"))
        assert next(ledger.answers()).conversation == conversation("fine")
    with Ledger(path) as ledger:
        assert ledger.spent().lost == 0


def test_a_job_handed_in_twice_does_not_hold_what_the_first_time_lost() -> None:
    with Ledger(None) as ledger:
        for _ in range(2):
            ledger.budget.reserve(0.25)
            [sent] = ledger.send([call(cost_bound=0.25)], PARAMETERS, job="same")
            ledger.submitted("same", "batch_1")
            [job] = ledger.open_jobs()
            assert job.requests == (sent,)
            ledger.settle([Settlement(sent, may_be_charged=True)], job="same")
        assert ledger.spent().lost == 2
