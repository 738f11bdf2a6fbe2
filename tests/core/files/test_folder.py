from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonpix.core.files.folder import files_under
from reasonpix.core.files.ignored import Ignored, IgnoredCounts, unread_columns, why_hidden


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_every_file_is_listed_or_ignored(tmp_path: Path) -> None:
    write(tmp_path, "b", "a/2", "a/10", "a.b/c", ".DS_Store", "._b", "Thumbs.db", "x/.hidden/in")
    write(tmp_path, "__MACOSX/a/._2", "DESKTOP.INI", "@eaDir/b@thumb.jpg", "PaxHeaders.7/b", "x/.y")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to("nowhere")
    listed = list(files_under(tmp_path))
    assert [name for name in listed if isinstance(name, str)] == [
        "a/10", "a/2", "a.b/c", "b", "broken",
    ]  # fmt: skip
    ignored = {item.name: item.reason for item in listed if isinstance(item, Ignored)}
    assert ignored == {
        ".DS_Store": "hidden",
        "._b": "metadata of macOS",
        "@eaDir/": "a file of the operating system",
        "DESKTOP.INI": "a file of the operating system",
        "PaxHeaders.7/": "a file of the operating system",
        "Thumbs.db": "a file of the operating system",
        "__MACOSX/": "a file of the operating system",
        "x/.hidden/": "hidden",
        "x/.y": "hidden",
    }


def test_a_root_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        list(files_under(tmp_path / "gone" / "x"))


@pytest.mark.parametrize("name", ["a.png", "./a.png", "../a", "a/b.c", "_a", "pax.png", "a._b"])
def test_plain_names_are_not_hidden(name: str) -> None:
    assert why_hidden(name) is None


REASONS = st.lists(st.tuples(st.text(), st.sampled_from("abcdefghijklmnopq")))


@given(REASONS)
def test_counts_are_of_everything_that_was_ignored(items: list[tuple[str, str]]) -> None:
    counts = IgnoredCounts()
    counts.add(*(Ignored(name, reason) for name, reason in items))
    assert len(counts) == len(items)
    lines = list(counts.lines())
    assert sum(int(line.split(maxsplit=2)[1].rstrip(":")) for line in lines) == len(items)
    assert IgnoredCounts.from_json(counts.as_json()) == counts


def test_lines_name_the_first_and_all_columns() -> None:
    counts = IgnoredCounts()
    counts.add(*(Ignored(f"{i}.txt", "not an image (.txt)") for i in range(5)))
    counts.add(*unread_columns("abcde"), Ignored(os.fsdecode(b"\xff"), "hidden"))
    assert list(counts.lines()) == [
        "ignored 5: not an image (.txt): 0.txt, 1.txt, 2.txt …",
        "ignored 5: a column that is not read: a, b, c, d, e",
        "ignored 1: hidden: \\udcff",
    ]
