"""Storage on a remote store: files, leases, and what errors say."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from reasonpix.core.remote_storage import RemoteStorage
from reasonpix.errors import RunError
from tests.support.leases import foreign_lease
from tests.support.processes import kill, python
from tests.support.s3_server import BUCKET, needs_s3

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
        (BUCKET, {"AWS_ACCESS_KEY_ID": ""}, "check that the credentials are set and have access"),
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
        (
            "nothing://x/run",
            "nothing://x/run cannot be reached: .*use a protocol that fsspec knows",
        ),
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


def test_a_holder_on_another_machine(memory: str) -> None:
    storage = RemoteStorage(memory)
    storage.heartbeat_s = 0.1
    storage.write("holder", foreign_lease(20))
    with pytest.raises(
        RunError,
        match=r"in use by process 7 on far \(last heartbeat 20 s ago\).*try again in 40 s",
    ):
        storage.lock().__enter__()
    storage.write("holder", foreign_lease(70))
    with storage.lock():
        assert json.loads(storage.read("holder"))["pid"] == os.getpid()


@pytest.mark.parametrize("skew", [3600, -3600])
def test_a_holder_whose_clock_is_wrong_is_alive_as_long_as_it_beats(
    memory: str, skew: float
) -> None:
    storage, ended = RemoteStorage(memory), threading.Event()
    storage.heartbeat_s = 0.2
    storage.write("holder", foreign_lease(skew))

    def beat() -> None:
        while not ended.wait(0.05):
            RemoteStorage(memory).write("holder", foreign_lease(skew))

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
        other.write("holder", foreign_lease(0))
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
