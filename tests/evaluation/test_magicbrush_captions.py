"""Which of MagicBrush's captions CLIP-T is read with, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.cases import Benchmark
from tests.support.benchmark_files import magicbrush_folder, magicbrush_parquet

LOCAL = {"139": {"139-output1.png": "a hat", "139-output2.png": "a red hat"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """MagicBrush's test folder with global descriptions only."""
    return magicbrush_folder(tmp_path / "test")


def read(path: Path, **options: Any) -> Benchmark:
    return read_benchmark(BenchmarkOptions(path=str(path), **options), Path())


def write_local(folder: Path, told: object, encoding: str = "utf-8") -> None:
    text = json.dumps(told, ensure_ascii=False)
    (folder / "local_descriptions.json").write_text(text, encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_clip_t_is_read_with_local_descriptions_and_methods_with_global_ones(
    folder: Path, encoding: str
) -> None:
    write_local(folder, LOCAL, encoding)
    found = read(folder)
    assert [case.clip_t_caption for case in found.cases] == ["a hat", "a red hat"]
    assert [case.edited_caption for case in found.cases] == [
        "what turn 1 shows",
        "what turn 2 shows",
    ]
    assert found.cases[0].caption == "what was there"
    (note,) = found.caption_notes
    assert "local descriptions (local_descriptions.json), as its published" in note


def test_without_local_descriptions_the_note_says_that_numbers_are_not_comparable(
    folder: Path,
) -> None:
    found = read(folder)
    assert [case.clip_t_caption for case in found.cases] == [
        "what turn 1 shows",
        "what turn 2 shows",
    ]
    (note,) = found.caption_notes
    assert "global descriptions (global_descriptions.json)" in note and "not comparable" in note


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({}, "missing"),
        ({"139-output2.png": None}, "missing"),
        ({"139-output2.png": ""}, "not a text"),
        ({"139-output2.png": ["a hat"]}, "not a text"),
        ("a hat", "missing"),
    ],
)
def test_a_turn_without_a_local_description_has_no_clip_t_and_is_named(
    folder: Path, entry: Any, why: str
) -> None:
    whole = {"139-output1.png": "a hat"} | entry if isinstance(entry, dict) else entry
    write_local(folder, {"139": whole})
    found = read(folder)
    lacking = 1 if isinstance(entry, dict) else 2
    # A global caption in its place would mix two kinds of captions in one mean.
    assert [case.clip_t_caption for case in found.cases][-lacking:] == [""] * lacking
    assert f"lacks the descriptions of {lacking} image" in found.caption_notes[1]
    assert f"139-output2.png ({why})" in found.caption_notes[1]
    assert "CLIP-T is not computed there" in found.caption_notes[1]


def test_global_descriptions_that_are_missing_are_counted(folder: Path) -> None:
    told = {"139": {"139-output1.png": "what turn 1 shows"}}
    (folder / "global_descriptions.json").write_text(json.dumps(told))
    found = read(folder)
    assert [case.clip_t_caption for case in found.cases] == ["what turn 1 shows", ""]
    assert "lacks the descriptions of 2 images: 139-input.png (missing), " in found.caption_notes[1]
    assert "139-output2.png (missing)" in found.caption_notes[1]


def test_local_descriptions_alone_and_none_at_all(folder: Path) -> None:
    write_local(folder, LOCAL)
    (folder / "global_descriptions.json").unlink()
    found = read(folder)
    assert [case.clip_t_caption for case in found.cases] == ["a hat", "a red hat"]
    assert [case.edited_caption for case in found.cases] == ["", ""]
    assert "no captions for CLIP direction" in found.caption_notes[1]
    (folder / "local_descriptions.json").unlink()
    assert "so CLIP-T is not computed" in read(folder).caption_notes[0]


def test_the_split_on_the_hub_takes_both_files_from_a_folder(folder: Path, tmp_path: Path) -> None:
    write_local(folder, LOCAL)
    magicbrush_parquet(tmp_path / "hub")
    found = read(tmp_path / "hub", split="dev", captions=folder)
    assert [case.clip_t_caption for case in found.cases] == ["a hat", "a red hat"]
    assert "local descriptions" in found.caption_notes[0]
    assert read(tmp_path / "hub", split="dev", captions=folder, limit=1).cases[0].caption


def test_many_missing_descriptions_are_counted_and_the_first_are_named(folder: Path) -> None:
    sessions = json.loads((folder / "edit_sessions.json").read_text())
    turn = sessions["139"][0]
    for number in range(12):
        image = folder / "images" / "139" / f"{number}.png"
        image.write_bytes((folder / "images" / "139" / turn["output"]).read_bytes())
    turns = [turn | {"output": f"{number}.png"} for number in range(12)]
    (folder / "edit_sessions.json").write_text(json.dumps({"139": turns}))
    write_local(folder, {})
    note = read(folder).caption_notes[1]
    assert "of 12 images: 0.png (missing), " in note and "9.png" in note
    assert "10.png" not in note and "and 2 more" in note
