"""Atomic folders and locks; `tests/datasets/test_publishing.py` has more about new folders."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reasonpix.core.atomic import Locked, atomic_dir, is_locked, lock, output_dir
from reasonpix.errors import RunError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that is to be replaced."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    return tmp_path / "out"


def names(out: Path) -> list[str]:
    """What stands beside it, and in it."""
    return sorted(it.relative_to(out.parent).as_posix() for it in out.parent.rglob("*"))


def test_a_folder_gives_way_when_all_went_well(out: Path) -> None:
    with output_dir(out, "write", replace=True) as draft:
        (draft / "new").touch()
        assert (out / "old").exists()
    assert names(out) == ["out", "out/new"]


def test_a_folder_stays_when_something_failed(out: Path) -> None:
    with pytest.raises(KeyError), output_dir(out, "write", replace=True) as draft:
        (draft / "new").touch()
        raise KeyError
    assert names(out) == ["out", "out/old"]


def test_a_folder_stays_where_the_new_one_cannot_take_its_place(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if target == out and source.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with (
        pytest.raises(RunError, match=r"out cannot be written: .*; make room, then write again"),
        output_dir(out, "write", replace=True) as draft,
    ):
        (draft / "new").touch()
    assert names(out) == ["out", "out/old"]


def test_one_that_was_on_its_way_out_when_the_process_was_killed_comes_back(out: Path) -> None:
    os.rename(out, out.with_name(".out.old"))
    (out.parent / ".out.tmp").mkdir()
    (out.parent / ".out.tmp" / "link").symlink_to(out.parent)
    with pytest.raises(KeyError), output_dir(out, "write", replace=True):
        raise KeyError
    assert names(out) == ["out", "out/old"]


def test_nothing_gives_way_unasked(out: Path) -> None:
    with (
        pytest.raises(RunError, match="out exists; write to a new folder, or remove it first"),
        output_dir(out, "write"),
    ):
        raise AssertionError("not reached")
    assert names(out) == ["out", "out/old"]


def test_others_hidden_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    with output_dir(tmp_path / "out", "write") as draft:
        (draft / "new").touch()
    assert names(tmp_path / "out") == [".out.old", "out", "out/new"]


def test_without_words_errors_are_those_of_the_system(out: Path) -> None:
    with pytest.raises(FileExistsError), atomic_dir(out):
        raise AssertionError("not reached")
    with atomic_dir(out, replace=True), pytest.raises(Locked), atomic_dir(out, replace=True):
        raise AssertionError("not reached")


def test_a_lock_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from reasonpix.core.atomic import lock\n"
    code += "with lock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"

    def hold() -> None:
        with lock(path, wait=True):
            assert is_locked(path)

    with pytest.raises(FileNotFoundError):
        is_locked(path)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert is_locked(path)
        with pytest.raises(Locked), lock(path):
            raise AssertionError("not reached")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(hold)
            time.sleep(0.2)
            assert not waiting.done()
            holder.kill()
            waiting.result(10)
    assert not is_locked(path)


def test_a_lock_of_a_folder_that_was_renamed_meanwhile_is_worthless(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def slow(descriptor: int, kind: int) -> None:
        out.rename(out.with_name("elsewhere"))
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(Locked), lock(out):
        raise AssertionError("not reached")
