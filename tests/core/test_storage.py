"""What every storage promises, on this machine, on object stores and on others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from reasonpix.core.remote_storage import RemoteStorage, open_storage
from reasonpix.core.storage import LocalStorage, Storage
from reasonpix.errors import RunError
from tests.support.s3_server import BUCKET, needs_s3

S3 = pytest.param(
    "s3",
    marks=needs_s3,
)
number = count()
Open = Callable[[], Storage]


@pytest.fixture(params=["local", "memory", "moved", S3])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Open the same folder, each time as another object."""
    where = {
        "local": str(tmp_path / "run"),
        "memory": f"memory://test-{next(number)}/run",
        "moved": f"local://{tmp_path}/run",  # through fsspec, as SFTP is: by drafts that are moved
        "s3": f"s3://{BUCKET}/test-{next(number)}/run",
    }[request.param]
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3_environment").items():
            monkeypatch.setenv(name, value)
    return lambda: open_storage(where)


@pytest.fixture
def storage(opened: Open) -> Storage:
    return opened()


def test_a_file_holds_what_was_written_last(opened: Open) -> None:
    storage = opened()
    storage.write("stages/source/000000.parquet", b"first")
    storage.write("stages/source/000000.parquet", b"second")
    assert opened().read("stages/source/000000.parquet") == b"second"


def test_what_is_not_there(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("plan.json")
    storage.write("stages/a/0.parquet", b"")
    with pytest.raises(FileNotFoundError):
        storage.read("stages/b/0.parquet")
    assert storage.names("stages/b") == storage.folders("stages/b") == []
    assert storage.size("stages/b") == 0
    assert not storage.exists("plan.json")
    storage.remove("plan.json")
    storage.remove("stages/b")


def test_names_and_folders(storage: Storage) -> None:
    for name in ("plan.json", "stages/a/1.parquet", "stages/a/0.parquet", "stages/ab/0.parquet"):
        storage.write(name, b"12")
    assert storage.names("") == ["plan.json"]
    assert storage.folders("") == ["stages"]
    assert storage.names("stages") == []
    assert storage.folders("stages") == ["a", "ab"]
    assert storage.names("stages/a") == ["0.parquet", "1.parquet"]
    assert storage.names("plan.json") == []
    assert storage.exists("stages/a/0.parquet")
    assert not storage.exists("stages/a")
    assert storage.size("stages/a") == 4
    assert storage.size("stages") == 6


def test_a_listing_shows_what_another_has_written_since(opened: Open) -> None:
    reader, writer = opened(), opened()
    writer.write("stages/a/0.parquet", b"")
    assert reader.names("stages/a") == ["0.parquet"]
    writer.write("stages/a/1.parquet", b"")
    assert reader.names("stages/a") == ["0.parquet", "1.parquet"]
    writer.remove("stages/a/0.parquet")
    assert reader.names("stages/a") == ["1.parquet"]
    assert not reader.exists("stages/a/0.parquet")


def test_a_folder_of_more_files_than_a_page_of_a_listing(storage: Storage) -> None:
    names = [f"{n:06d}.parquet" for n in range(1010)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: storage.write(f"stages/a/{name}", b""), names))
    assert storage.names("stages/a") == names
    storage.remove("stages/a")
    assert storage.names("stages/a") == []


def test_rename_replaces(storage: Storage) -> None:
    storage.write("stages/a/0.parquet", b"new")
    storage.write("stages/a/0.partial.parquet", b"old")
    storage.rename("stages/a/0.parquet", "stages/a/0.partial.parquet")
    assert storage.names("stages/a") == ["0.partial.parquet"]
    assert storage.read("stages/a/0.partial.parquet") == b"new"


def test_remove_takes_a_folder_and_not_its_neighbour(storage: Storage) -> None:
    for name in ("stages/a/0.parquet", "stages/a/1.parquet", "stages/ab/0.parquet"):
        storage.write(name, b"")
    storage.remove("stages/a")
    assert storage.folders("stages") == ["ab"]
    storage.write("holder", b"")
    storage.write("holders", b"")
    storage.remove("holder")
    assert storage.names("") == ["holders"]


def test_a_journal_goes_on_from_one_session_to_the_next(opened: Open) -> None:
    first = opened()
    with first.lock():
        first.append("journal.jsonl", "1")
        first.append("journal.jsonl", "ü")
        assert first.read("journal.jsonl").decode() == "1\nü\n"
        first.append("journal.jsonl", "3")
    second = opened()
    second.append("journal.jsonl", "4")
    with second.lock():
        second.append("journal.jsonl", "5")
    assert opened().read("journal.jsonl").decode() == "1\nü\n3\n4\n5\n"


def test_lines_of_many_threads_are_all_there(opened: Open) -> None:
    storage = opened()
    with storage.lock(), ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: storage.append("journal.jsonl", f"{n:03d}"), range(200)))
    lines = opened().read("journal.jsonl").decode().split()
    assert sorted(lines) == [f"{n:03d}" for n in range(200)]


def test_the_journal_is_kept_when_a_run_breaks(opened: Open) -> None:
    storage = opened()
    with pytest.raises(KeyboardInterrupt), storage.lock():
        storage.append("journal.jsonl", "1")
        raise KeyboardInterrupt
    assert opened().read("journal.jsonl") == b"1\n"


def test_one_holder_at_a_time(opened: Open) -> None:
    with opened().lock():
        with pytest.raises(RunError, match=r"run is in use by process \d+ on .*wait for it"):
            opened().lock().__enter__()
        opened().write("plan.json", b"")  # a worker of the holder
    with opened().lock():
        pass
    with pytest.raises(ValueError, match="broken"), opened().lock():
        raise ValueError("broken")
    with opened().lock():
        pass


def test_of_many_that_come_at_once_one_holds(opened: Open) -> None:
    came, done = threading.Barrier(6), threading.Barrier(6)

    def hold(storage: Storage) -> bool:
        came.wait()
        try:
            with storage.lock():
                done.wait()
                return True
        except RunError:
            done.wait()
            return False

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(hold, [opened() for _ in range(6)])) == 1


def test_tidy_removes_drafts_and_nothing_else(storage: Storage, tmp_path: Path) -> None:
    storage.write("plan.json", b"")
    storage.write("stages/a/0.parquet", b"")
    root = tmp_path / "run"
    drafts = [root / ".plan.json.1.tmp", root / "stages/a/.0.parquet.1.tmp"]
    if root.exists():  # object stores know no drafts
        for draft in drafts:
            draft.write_bytes(b"half")
    assert storage.names("") == ["plan.json"]
    with storage.lock():
        storage.remove_drafts()
    assert not any(draft.exists() for draft in drafts)
    assert storage.read("plan.json") == b""
    assert storage.names("stages/a") == ["0.parquet"]


def test_which_storage(tmp_path: Path) -> None:
    assert open_storage(tmp_path).local == tmp_path
    assert isinstance(open_storage(f"file://{tmp_path}"), LocalStorage)
    remote = open_storage("memory://bucket/run/")
    assert isinstance(remote, RemoteStorage)
    assert (str(remote), remote.local) == ("memory://bucket/run", None)
