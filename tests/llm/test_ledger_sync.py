"""The ledger of a run on a remote store, as several machines work on it in turn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from reasonpix.core.remote_storage import RemoteStorage
from reasonpix.core.storage import LocalStorage
from reasonpix.errors import RunError
from reasonpix.llm import ledger_sync
from reasonpix.llm.ledger import Ledger, Settlement
from reasonpix.llm.ledger_sync import ledger_file
from reasonpix.llm.requests import Request, request_key
from reasonpix.llm.types import Completion, Conversation, Message
from tests.support.leases import foreign_lease
from tests.support.s3_server import needs_s3


class Machine:
    """A machine with a state folder of its own, and what it does to the run folder's ledger."""

    def __init__(self, state: Path, url: str, patch: pytest.MonkeyPatch) -> None:
        self.state, self.url, self._patch = state, url, patch

    def __call__(self) -> RemoteStorage:
        self._patch.setenv("XDG_STATE_HOME", str(self.state))
        return RemoteStorage(self.url)

    def asks(self, *questions: str, cost: float = 1.0) -> None:
        with ledger_file(self()) as path, Ledger(path) as ledger:
            for question in questions:
                ask(ledger, question, str(self.state.name), cost)

    def asks_and_is_killed(self, *questions: str, cost: float = 1.0) -> None:
        """Answers are in its state folder, one more call is under way, and nothing was stored."""
        with ledger_sync.synced_replica(self()) as path:
            pass
        with Ledger(path) as ledger:
            for question in questions:
                ask(ledger, question, str(self.state.name), cost)
            ledger.send([call("lost")], {})

    def knows(self) -> dict[str, str]:
        with ledger_file(self(), write_back=False) as path, Ledger(path) as ledger:
            return {
                answer.conversation.messages[-1].content: answer.completion.text
                for answer in ledger.answers()
            }

    def spent(self) -> tuple[float, float]:
        with ledger_file(self(), write_back=False) as path, Ledger(path) as ledger:
            return ledger.spent().cost, ledger.spent().lost_cost


def conversation(question: str) -> Conversation:
    messages = (Message(role="system", content="shared"), Message(role="user", content=question))
    return Conversation(messages=messages, answer_schema={}, seed=0, shared=1)


def call(question: str, worst: float = 2.0) -> Request:
    asked = conversation(question)
    return Request("rewrite", request_key({"model": "m"}, asked), asked, worst)


def ask(ledger: Ledger, question: str, answer: str, cost: float = 1.0) -> None:
    if ledger.get(call(question).key) is None:
        (sent,) = ledger.send([call(question)], {"model": "m"})
        completion = Completion(text=answer, prompt_tokens=1, completion_tokens=1)
        ledger.settle([Settlement(sent, completion, cost)])


@pytest.fixture
def machines(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Machine, Machine]:
    return (
        Machine(tmp_path / "one", memory, monkeypatch),
        Machine(tmp_path / "two", memory, monkeypatch),
    )


def test_the_ledger_of_a_local_run_is_in_its_folder(tmp_path: Path) -> None:
    for write_back in (True, False):
        with ledger_file(LocalStorage(tmp_path), write_back=write_back) as path:
            assert path == tmp_path / "llm.sqlite"
    assert not path.exists()


def test_a_second_machine_goes_on_with_the_answers_of_the_first(
    machines: tuple[Machine, Machine],
) -> None:
    one, two = machines
    one.asks("a", "b")
    assert two.knows() == {"a": "one", "b": "one"}
    two.asks("b", "c")
    assert one.knows() == two.knows() == {"a": "one", "b": "one", "c": "two"}
    assert one.spent() == (3.0, 0.0)
    (kept,) = (two.state / "reasonpix").iterdir()
    assert kept.stat().st_mode & 0o077 == 0  # prompts are nobody else's business


def test_after_a_kill_the_same_machine_goes_on_with_its_copy(
    machines: tuple[Machine, Machine],
) -> None:
    one, two = machines
    one.asks_and_is_killed("a")
    assert one.knows() == {"a": "one"}
    with ledger_file(two(), write_back=False) as path:
        assert not path.exists()
    one.asks("b")
    assert two.knows() == {"a": "one", "b": "one"}
    assert two.spent() == (2.0, 2.0)  # the call that was under way may have been charged


def test_machines_that_both_went_on_lose_no_answer_and_no_cost(
    machines: tuple[Machine, Machine],
) -> None:
    one, two = machines
    one.asks("a")
    one.asks_and_is_killed("b", "c", cost=10)
    two.asks("c", "d", cost=100)
    # The shards in the folder were made with the answer that is in the store.
    everything = {"a": "one", "b": "one", "c": "two", "d": "two"}
    assert one.knows() == everything
    one.asks()  # nothing new, but what it alone knew is to be stored
    assert two.knows() == everything
    one.asks("e", cost=1000)
    everything["e"] = "one"
    for _ in range(3):  # merging again changes nothing
        for machine in machines:
            machine.asks()
            assert machine.knows() == everything
            assert machine.spent() == (1 + 10 + 200 + 1000, 10 + 2)


def test_a_job_that_is_out_is_fetched_wherever_the_run_goes_on(
    machines: tuple[Machine, Machine],
) -> None:
    one, two = machines
    with ledger_file(one()) as path, Ledger(path) as ledger:
        ledger.send([call("a"), call("b")], {"model": "m"}, job="job")
        ledger.submitted("job", "batch-1")
    with ledger_file(two()) as path, Ledger(path) as ledger:
        (job,) = ledger.open_jobs()
        assert (job.id, len(job.requests)) == ("batch-1", 2)
        completion = Completion(text="two", prompt_tokens=1, completion_tokens=1)
        ledger.settle([Settlement(sent, completion, 1.0) for sent in job.requests], job="job")
    with ledger_file(one()) as path, Ledger(path) as ledger:
        assert ledger.open_jobs() == []
    assert one.knows() == {"a": "two", "b": "two"}
    assert one.spent() == (2.0, 0.0)


def test_a_run_folder_that_was_made_anew_has_no_answers(machines: tuple[Machine, Machine]) -> None:
    one, _ = machines
    one.asks("a")
    one().remove("llm.sqlite")
    one().remove("llm.id")
    one.asks("b")
    assert one.knows() == {"b": "one"}


def test_the_ledger_of_a_local_folder_that_was_copied(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    one, _ = machines
    with Ledger(tmp_path / "llm.sqlite") as ledger:
        ask(ledger, "a", "local")
    one().write("llm.sqlite", (tmp_path / "llm.sqlite").read_bytes())
    assert one.knows() == {"a": "local"}
    one.asks("a", "b")
    assert one.knows() == {"a": "local", "b": "one"}


def test_answers_are_stored_when_a_run_breaks_and_while_it_works(
    machines: tuple[Machine, Machine],
) -> None:
    one, two = machines
    with (
        pytest.raises(KeyboardInterrupt),
        ledger_sync.synced_replica(one(), push_interval_s=0.05) as path,
        Ledger(path) as ledger,
    ):
        ask(ledger, "a", "one")
        until = time.monotonic() + 5
        while not one().exists("llm.sqlite") and time.monotonic() < until:
            time.sleep(0.02)
        assert two.knows() == {"a": "one"}
        ask(ledger, "b", "one")
        raise KeyboardInterrupt
    assert two.knows() == {"a": "one", "b": "one"}


def test_a_run_that_asks_nothing_stores_nothing(machines: tuple[Machine, Machine]) -> None:
    one, _ = machines
    one.asks("a")
    before = one().version("llm.sqlite")
    one.asks("a")
    assert one().version("llm.sqlite") == before


def test_a_ledger_that_cannot_be_stored_is_kept_here(machines: tuple[Machine, Machine]) -> None:
    one, two = machines
    storage = one()
    storage.heartbeat_s = 0.05
    with (
        pytest.raises(RunError, match=r"taken over.*are kept in (.*)one/reasonpix/.*llm\.sqlite"),
        storage.lock(),
        ledger_file(storage) as path,
        Ledger(path) as ledger,
    ):
        ask(ledger, "a", "one")
        two().write("holder", foreign_lease(0))
        time.sleep(0.3)
    two.asks("b")
    assert one.knows() == {"a": "one", "b": "two"}


def test_ledgers_of_different_versions_are_not_mixed(machines: tuple[Machine, Machine]) -> None:
    import sqlite3
    from contextlib import closing

    one, two = machines
    one.asks_and_is_killed("a")
    with ledger_file(two()) as path, closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(RunError, match="different versions"):
        one.asks("b")
    assert not list(path.parent.glob("draft-*"))


def test_a_damaged_ledger_in_the_store(machines: tuple[Machine, Machine]) -> None:
    one, _ = machines
    one.asks_and_is_killed("a")
    one().write("llm.sqlite", b"nothing like it")
    with pytest.raises(RunError, match=r"cannot be merged.*not a database"):
        one.asks("b")


@needs_s3
def test_the_ledger_on_s3(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Machine(tmp_path / "one", s3, monkeypatch)
    two = Machine(tmp_path / "two", s3, monkeypatch)
    one.asks("a")
    two.asks("b")
    assert one.knows() == {"a": "one", "b": "two"}
    assert one().names("") == ["llm.id", "llm.sqlite"]
