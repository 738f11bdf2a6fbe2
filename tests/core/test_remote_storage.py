"""Run folders on a remote store: kills, holders, what its errors tell, and the ledger's copies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest

from reasonpix.core.remote_storage import RemoteStorage
from reasonpix.core.storage import LocalStorage
from reasonpix.datasets.publishing import publish
from reasonpix.errors import RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.statistics import spending
from reasonpix.llm import ledger_sync
from reasonpix.llm.ledger import Ledger, Request, Settlement
from reasonpix.llm.ledger_sync import ledger_file
from reasonpix.llm.requests import request_key
from reasonpix.llm.types import Completion, Conversation, Message
from tests.conftest import Distribution, WriteRecipe
from tests.promises.test_llm_runs import PARROT
from tests.support.s3_server import BUCKET, s3_server

needs_s3 = pytest.mark.skipif(
    not (find_spec("s3fs") and find_spec("moto")), reason="needs s3fs and moto[s3]"
)
number = count()


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture
def s3(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a folder that is not there yet."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/run-{next(number)}"


@pytest.fixture
def memory() -> str:
    return f"memory://remote-{next(number)}/run"


def python(code: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **more},
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


# -- Files

WRITE_FOR_EVER = """
import sys
from itertools import count
from reasonpix.core.remote_storage import RemoteStorage
storage = RemoteStorage(sys.argv[1])
for n in count():
    storage.write("shard", bytes([n % 251]) * int(sys.argv[2]))
    print(n, flush=True)
"""


@pytest.mark.parametrize("url", [pytest.param("s3", marks=needs_s3), "moved"])
def test_a_file_is_whole_whenever_its_writer_is_killed(
    url: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue("s3") if url == "s3" else f"local://{tmp_path}/run"
    size, storage, luck = 10_000_000, RemoteStorage(url), random.Random(0)
    for _ in range(3):
        with python(WRITE_FOR_EVER, url, str(size)) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(luck.random() / 4)
            kill(writer)
        data = storage.read("shard")
        assert len(data) == size
        assert data == data[:1] * size
        assert storage.names("") == ["shard"]


@needs_s3
def test_a_file_that_is_sent_in_parts_is_not_there_before_its_last(s3: str) -> None:
    storage = RemoteStorage(s3)
    with python(WRITE_FOR_EVER, s3, "120000000") as writer:
        time.sleep(1)
        kill(writer)
    assert all(len(storage.read(name)) == 120_000_000 for name in storage.names(""))


@needs_s3
def test_a_process_sees_at_once_what_another_one_does(s3: str) -> None:
    code = """
import sys
from reasonpix.core.remote_storage import RemoteStorage
storage = RemoteStorage(sys.argv[1])
for name in ("a", "b"):
    input() if name == "b" else None
    storage.write(f"stages/s/{name}", b"")
    print(storage.names("stages/s"), flush=True)
"""
    storage = RemoteStorage(s3)
    assert storage.names("stages/s") == []
    assert not storage.exists("stages/s/a")
    with subprocess.Popen(
        [sys.executable, "-c", code, s3], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdout.readline()
        assert storage.names("stages/s") == ["a"]
        assert storage.exists("stages/s/a")
        storage.write("stages/s/c", b"")
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline().strip() == "['a', 'b', 'c']"
        assert storage.names("stages/s") == ["a", "b", "c"]


def test_a_move_that_does_not_replace(tmp_path: Path) -> None:
    """As on SMB: a real file system whose `mv` refuses a name that is taken."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Refusing(LocalFileSystem):
        protocol = "refusing"

        def mv(self, path1: str, path2: str, **_: object) -> None:
            os.link(path1, path2)
            os.unlink(path1)

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    storage = RemoteStorage(f"refusing://{tmp_path}/run")
    storage.write("plan.json", b"1")
    storage.write("plan.json", b"2")
    assert storage.read("plan.json") == b"2"
    assert os.listdir(tmp_path / "run") == ["plan.json"]


GENERATE = """
import sys
from pathlib import Path
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
generate(load_recipe(Path(sys.argv[1])), sys.argv[2])
"""


@needs_s3
def test_a_run_on_s3_that_is_killed_again_and_again_ends_like_an_undisturbed_local_one(
    s3: str, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    recipe = write_recipe(shard_size=3, source={"use": "fake-source", "count": 75})
    storage, luck = RemoteStorage(s3), random.Random(1)
    for _ in range(2):
        with python(GENERATE, str(recipe), s3) as run:
            before = storage.size("stages")
            while run.poll() is None and storage.size("stages") == before:
                time.sleep(0.05)
            time.sleep(luck.random() / 4)
            kill(run)
        assert run.returncode == -signal.SIGKILL  # and not at its end already
        assert storage.exists("holder")
    published = []
    for out in (s3, str(tmp_path / "local")):
        done = generate(load_recipe(recipe), out)
        dataset = tmp_path / f"published-{len(published)}"
        publish(done, dataset)
        published.append(files(dataset))
    assert published[0] == published[1]
    assert not storage.exists("holder")
    shards = [
        f"stages/{stage}/{name}"
        for stage in storage.folders("stages")
        for name in storage.names(f"stages/{stage}")
    ]
    assert shards
    for name in (*shards, "plan.json", "stages.json"):
        assert storage.read(name) == (tmp_path / "local" / name).read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- Errors


NOBODY = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
WRITE_IN_VAIN = """
import sys
import s3fs
from reasonpix.errors import RunError
from reasonpix.core.remote_storage import RemoteStorage
s3fs.S3FileSystem.retries = 1
try:
    RemoteStorage(sys.argv[1]).write("plan.json", b"")
except RunError as error:
    print(error)
"""


@needs_s3
@pytest.mark.parametrize(
    ("bucket", "environment", "mend"),
    [
        ("no-such-bucket", {}, "check that the bucket or folder exists"),
        (BUCKET, {"AWS_ACCESS_KEY_ID": ""}, "check that the credentials are set and allow it"),
        (
            BUCKET,
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"},
            "check the network and",
        ),
    ],
)
def test_errors_say_what_to_do(
    s3: str, bucket: str, environment: dict[str, str], mend: str
) -> None:
    if "AWS_ACCESS_KEY_ID" in environment:  # nor anywhere else
        nowhere = {"AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
        environment = {**environment, "AWS_SECRET_ACCESS_KEY": "", **nowhere}
    with python(WRITE_IN_VAIN, f"s3://{bucket}/run", **environment) as writer:
        said, _ = writer.communicate()
    assert said.startswith(f"s3://{bucket}/run/plan.json cannot be written: ")
    assert mend in said and "finished work is kept" in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://bucket/run", "gs://bucket/run needs a package .*: pip install gcsfs"),
        ("az://container/run", "pip install adlfs"),
        ("sftp://me@host/run", "pip install paramiko"),
        ("nothing://x/run", "nothing://x/run cannot be reached: .*name one that fsspec knows"),
        ("simplecache::s3://bucket/run", "chains stores"),
    ],
)
def test_urls_of_no_use(url: str, said: str) -> None:
    if find_spec(said.rpartition(" ")[2]):
        pytest.skip("it is installed")
    with pytest.raises(RunError, match=said):
        RemoteStorage(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:secret@bucket/run",
        "s3://AKIA:sec/ret@bucket/run",
        "sftp://me:secret@127.0.0.1:1/run",
        "memory://me:secret@x/run",
        "foo://host/run?token=secret",
    ],
)
def test_no_password_in_a_message(url: str) -> None:
    with pytest.raises(RunError) as raised:
        RemoteStorage(url)
    said = str(raised.value)
    assert "***" in said and "secret" not in said and "sec/ret" not in said


def test_no_password_in_what_a_library_says(tmp_path: Path) -> None:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Telling(LocalFileSystem):
        protocol = "telling"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(path).rpartition("@host")[2]

        def ls(self, path: str, detail: bool = False, **_: object) -> list[str]:
            raise ConnectionError(f"login of me with secret-word at {path} failed")

    fsspec.register_implementation("telling", Telling, clobber=True)
    with pytest.raises(RunError, match=r"\*\*\*@host.*with \*\*\* at.*network") as raised:
        RemoteStorage(f"telling://me:secret-word@host{tmp_path}").names("")
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


# -- The journal and the holder

HOLD = """
import sys, time
from reasonpix.core.remote_storage import RemoteStorage
storage = RemoteStorage(sys.argv[1])
storage.heartbeat_s = 0.1
with storage.lock():
    storage.append("journal.jsonl", "1")
    storage.append("journal.jsonl", "2")
    print("held", flush=True)
    time.sleep(60)
"""


@needs_s3
def test_after_a_kill_the_next_one_holds_at_once_and_reads_the_journal(s3: str) -> None:
    storage = RemoteStorage(s3)
    with python(HOLD, s3) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunError, match=rf"in use by process {holder.pid} on"):
            storage.lock().__enter__()
        until = time.monotonic() + 5
        while not storage.exists("journal.jsonl") and time.monotonic() < until:
            time.sleep(0.05)
        kill(holder)
    started = time.monotonic()
    with storage.lock():
        assert time.monotonic() - started < 2
        storage.append("journal.jsonl", "3")
    assert RemoteStorage(s3).read("journal.jsonl") == b"1\n2\n3\n"
    assert storage.names("") == ["journal.jsonl"]


def elsewhere(seconds_ago: float, token: str = "t") -> bytes:
    facts = {"who": "process 7 on far", "machine": "far", "pid": 7, "token": token}
    return json.dumps({**facts, "time": time.time() - seconds_ago}).encode()


def test_a_holder_on_another_machine(memory: str) -> None:
    storage = RemoteStorage(memory)
    storage.heartbeat_s = 0.1
    storage.write("holder", elsewhere(20))
    with pytest.raises(
        RunError,
        match=r"in use by process 7 on far \(last heartbeat 20 s ago\).*try again in 40 s",
    ):
        storage.lock().__enter__()
    storage.write("holder", elsewhere(70))
    with storage.lock():
        assert json.loads(storage.read("holder"))["pid"] == os.getpid()


@pytest.mark.parametrize("skew", [3600, -3600])
def test_a_holder_whose_clock_is_wrong_is_alive_as_long_as_it_beats(
    memory: str, skew: float
) -> None:
    storage, ended = RemoteStorage(memory), threading.Event()
    storage.heartbeat_s = 0.2
    storage.write("holder", elsewhere(skew))

    def beat() -> None:
        while not ended.wait(0.05):
            RemoteStorage(memory).write("holder", elsewhere(skew))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(RunError, match="in use by process 7 on far"):
            storage.lock().__enter__()
    finally:
        ended.set()
        beating.join()
    with storage.lock():
        pass


def test_who_was_taken_over_stops_and_leaves_the_other_alone(memory: str) -> None:
    storage, other = RemoteStorage(memory), RemoteStorage(memory)
    storage.heartbeat_s = 0.05
    with pytest.raises(RunError, match="taken over by process 7 on far"), storage.lock():
        storage.append("journal.jsonl", "mine")
        other.write("journal.jsonl", b"theirs\n")
        other.write("holder", elsewhere(0))
        until = time.monotonic() + 5
        while time.monotonic() < until:
            storage.write("stages/a/0.parquet", b"")
            time.sleep(0.02)
    assert json.loads(other.read("holder"))["machine"] == "far"
    assert other.read("journal.jsonl") == b"theirs\n"


def test_the_holder_of_a_local_folder_that_was_copied_holds_nothing(memory: str) -> None:
    storage = RemoteStorage(memory)
    storage.write("holder", b"process 1 on a laptop\n")
    with storage.lock():
        pass


# -- The ledger


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
        two().write("holder", elsewhere(0))
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
def test_a_run_on_s3_that_is_killed_while_it_asks_asks_nothing_again_that_was_answered(
    s3: str,
    tmp_path: Path,
    write_recipe: WriteRecipe,
    distribution: Distribution,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    site = distribution("reasonpix-parrot", {"parrot": "parrot"}, parrot=PARROT)
    log, kills = tmp_path / "asked.txt", 2
    log.touch()
    planner = {"use": "parrot", "log": str(log)}
    recipe = write_recipe(planner=planner, shard_size=5, source={"use": "fake-source", "count": 40})
    for _ in range(kills):
        before = len(log.read_text().splitlines())
        with python(GENERATE, str(recipe), s3, PYTHONPATH=str(site)) as run:
            while run.poll() is None and len(log.read_text().splitlines()) < before + 9:
                time.sleep(0.005)
            kill(run)
        assert run.returncode == -signal.SIGKILL
    done = generate(load_recipe(recipe), s3)
    shutil.rmtree(tmp_path / "state")  # all is in the run folder
    spent = spending(done)
    asked = len(log.read_text().splitlines())
    assert spent.answers <= asked <= spent.answers + kills  # one call is under way at a time
    local = generate(load_recipe(recipe), tmp_path / "local")
    assert spending(local).answers == spent.answers


@needs_s3
def test_the_ledger_on_s3(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Machine(tmp_path / "one", s3, monkeypatch)
    two = Machine(tmp_path / "two", s3, monkeypatch)
    one.asks("a")
    two.asks("b")
    assert one.knows() == {"a": "one", "b": "two"}
    assert one().names("") == ["llm.id", "llm.sqlite"]
