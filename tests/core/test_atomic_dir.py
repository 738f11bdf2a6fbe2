"""Folders that give way to new ones; `tests/test_publish.py` has those that appear."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reasonpix.core.atomic_dir import atomic_dir
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
    with atomic_dir(out, "write", replace=True) as draft:
        (draft / "new").touch()
        assert (out / "old").exists()
    assert names(out) == ["out", "out/new"]


def test_a_folder_stays_when_something_failed(out: Path) -> None:
    with pytest.raises(KeyError), atomic_dir(out, "write", replace=True) as draft:
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
        atomic_dir(out, "write", replace=True) as draft,
    ):
        (draft / "new").touch()
    assert names(out) == ["out", "out/old"]


def test_one_that_was_on_its_way_out_when_the_process_was_killed_comes_back(out: Path) -> None:
    os.rename(out, out.with_name(".out.old"))
    (out.parent / ".out.tmp").mkdir()
    (out.parent / ".out.tmp" / "link").symlink_to(out.parent)
    with pytest.raises(KeyError), atomic_dir(out, "write", replace=True):
        raise KeyError
    assert names(out) == ["out", "out/old"]


def test_nothing_gives_way_unasked(out: Path) -> None:
    with (
        pytest.raises(RunError, match="out exists; write to a new folder, or remove it first"),
        atomic_dir(out, "write"),
    ):
        raise AssertionError("not reached")
    assert names(out) == ["out", "out/old"]


def test_others_hidden_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    with atomic_dir(tmp_path / "out", "write") as draft:
        (draft / "new").touch()
    assert names(tmp_path / "out") == [".out.old", "out", "out/new"]
