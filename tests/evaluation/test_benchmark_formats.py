"""Other people's benchmarks where their folders are not as tidy as they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from reasonpix.errors import SourceError
from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.benchmark_formats import Draft, magicbrush
from reasonpix.evaluation.benchmark_formats import reason_edit as read_reason_edit
from reasonpix.evaluation.cases import Case
from reasonpix.evaluation.magicbrush_captions import MagicBrushCaptions
from tests.support.benchmark_files import (
    SIZE,
    magicbrush_folder,
    magicbrush_parquet,
    marked,
    reason_edit,
)
from tests.support.pair_files import picture, png


def cases(folder: Path, **options: Any) -> list[Case]:
    return list(read_benchmark(BenchmarkOptions(path=str(folder), **options), Path()).cases)


def drafts(folder: Path) -> list[Draft]:
    found = list(read_reason_edit("bench", folder))
    assert all(isinstance(draft, Draft) for draft in found)
    return [draft for draft in found if isinstance(draft, Draft)]


# -- Reason-Edit


def top_rows(count: int) -> Image.Image:
    """A mask that marks so many of the rows."""
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[:count] = 255
    return Image.fromarray(mask)


def test_masks_go_with_their_images_where_numbers_have_no_zeros_before_them(tmp_path: Path) -> None:
    scenario = tmp_path / "3-Mirror"
    scenario.mkdir()
    for number in (1, 2, 10):  # 10_mask.jpg sorts before 1_mask.jpg, and 10.png after 1.png
        (scenario / f"{number}.png").write_bytes(png(picture(number, SIZE)))
        top_rows(number).save(scenario / f"{number}_mask.jpg", quality=95)
    (scenario / "Mirror_text.txt").write_text("one CLIP: a\nten CLIP: b\ntwo CLIP: c\n")
    found = cases(tmp_path)
    assert [case.id for case in found] == ["3-Mirror-1", "3-Mirror-10", "3-Mirror-2"]
    assert [case.instructions["reasoning"] for case in found] == ["one", "ten", "two"]
    assert [case.target for case in found] == ["a", "b", "c"]
    for case, rows in zip(found, (1, 10, 2), strict=True):
        assert case.read_mask is not None
        assert abs(int(case.read_mask().sum(0)[0]) - rows) <= 1  # JPEG
        assert case.read_input() == picture(rows, SIZE)


def test_scenarios_may_lie_one_deeper_and_keep_their_order(tmp_path: Path) -> None:
    flat = reason_edit(tmp_path / "flat")
    deep = reason_edit(tmp_path / "deep")
    (deep / "Understanding").mkdir()
    (deep / "1-Left-Right").rename(deep / "Understanding" / "1-Left-Right")
    assert [draft.id for draft in drafts(deep)] == [draft.id for draft in drafts(flat)]
    one = drafts(flat / "6-Reasoning")
    assert [draft.id for draft in one] == ["6-Reasoning-001", "6-Reasoning-002"]


def test_other_files_in_a_scenario_do_no_harm(tmp_path: Path) -> None:
    reason_edit(tmp_path)
    scenario = tmp_path / "6-Reasoning"
    (scenario / "notes.txt").write_text("ours")
    for name in ("._001.png", "._001_mask.jpg"):
        (scenario / name).write_bytes(b"left by a file manager")
    text = scenario / "Reason_test.txt"
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    found = drafts(tmp_path)
    assert [draft.groups["scenario"] for draft in found] == ["1-Left-Right"] * 2 + [
        "6-Reasoning"
    ] * 2
    assert found[2].instructions == {"reasoning": "Please replace what keeps us dry"}
    assert found[3].target == "dog"


def test_a_scenario_without_its_text_is_told(tmp_path: Path) -> None:
    reason_edit(tmp_path)
    (tmp_path / "6-Reasoning" / "Reason_test.txt").unlink()
    with pytest.raises(SourceError, match=r"Reason_test\.txt: cannot be read: .*No such file"):
        cases(tmp_path)
    (tmp_path / "6-Reasoning" / "Reason_test.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SourceError, match=r"Reason_test\.txt: cannot be read: line 1 is not UTF-8"):
        cases(tmp_path)


def test_pictures_beside_a_text_are_no_reason_edit(tmp_path: Path) -> None:
    shutil.copytree(reason_edit(tmp_path / "own") / "6-Reasoning", tmp_path / "pictures" / "mine")
    with pytest.raises(SourceError, match="not a pair dataset"):
        cases(tmp_path / "pictures")


# -- MagicBrush


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "", "no such.png", "..", 5])
def test_a_file_that_cannot_be_is_a_broken_row_and_not_the_end(
    tmp_path: Path, name: object
) -> None:
    magicbrush_folder(tmp_path)
    sessions = json.loads((tmp_path / "edit_sessions.json").read_text())
    sessions["139"][1]["input"] = name
    (tmp_path / "edit_sessions.json").write_text(json.dumps(sessions))
    with pytest.raises(SourceError, match=r"1 broken row\n.*139 turn 2: "):
        cases(tmp_path)


def test_half_a_character_as_an_image_id_can_be_shown(tmp_path: Path) -> None:
    magicbrush_folder(tmp_path)
    (tmp_path / "global_descriptions.json").unlink()
    sessions = json.loads((tmp_path / "edit_sessions.json").read_text())
    sessions["\ud800"] = sessions["139"]
    (tmp_path / "edit_sessions.json").write_text(json.dumps(sessions))
    with pytest.raises(SourceError, match="2 broken rows") as caught:
        cases(tmp_path)
    assert r"\ud800 turn 1: " in str(caught.value).encode().decode()


def test_sessions_keep_the_order_of_the_file(tmp_path: Path) -> None:
    magicbrush_folder(tmp_path)
    (tmp_path / "global_descriptions.json").unlink()
    sessions = json.loads((tmp_path / "edit_sessions.json").read_text())
    sessions["7"] = sessions["139"][:1]
    shutil.copytree(tmp_path / "images" / "139", tmp_path / "images" / "7")
    (tmp_path / "edit_sessions.json").write_text(json.dumps(sessions))
    found = cases(tmp_path)
    assert [case.id for case in found] == ["139-1", "139-2", "7-1"]
    assert {(case.caption, case.edited_caption) for case in found} == {("", "")}
    captions = MagicBrushCaptions(tmp_path)
    rows = [draft.row for draft in magicbrush("it", tmp_path, captions) if isinstance(draft, Draft)]
    assert rows == [
        "it/edit_sessions.json 139 turn 1",
        "it/edit_sessions.json 139 turn 2",
        "it/edit_sessions.json 7 turn 1",
    ]


def test_a_turn_may_come_without_a_mask(tmp_path: Path) -> None:
    magicbrush_folder(tmp_path)
    sessions = json.loads((tmp_path / "edit_sessions.json").read_text())
    del sessions["139"][0]["mask"]
    (tmp_path / "edit_sessions.json").write_text(json.dumps(sessions))
    first, second = cases(tmp_path)
    assert first.read_mask is None
    assert second.read_mask is not None and np.array_equal(second.read_mask(), marked())


@pytest.mark.parametrize("column", ["img_id", "turn_index", "mask_img", "instruction"])
def test_an_empty_cell_of_magicbrush_is_a_broken_row(tmp_path: Path, column: str) -> None:
    file = magicbrush_parquet(tmp_path) / "data" / "dev-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[1][column] = None
    pq.write_table(type(table).from_pylist(rows, table.schema), file)
    with pytest.raises(SourceError, match=r"1 broken row\n.*parquet row 1: ") as caught:
        cases(tmp_path, split="dev")
    assert column.removesuffix("_img") in str(caught.value)


# -- What is not read -----------------------------------------------------------------------------


def ignored(path: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level("WARNING", "reasonpix"):
        cases(path)
    return [record.getMessage().removeprefix(f"{path}: ") for record in caplog.records]


def test_other_files_of_reason_edit_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reason_edit(tmp_path)
    (tmp_path / "7-Other").mkdir()
    for name in ("6-Reasoning/003.jpg", "6-Reasoning/._001.png", "README.md", "7-Other/1.png"):
        (tmp_path / name).write_bytes(b"")
    assert ignored(tmp_path, caplog) == [
        "ignored 3: not an image, mask or text of a scenario: 6-Reasoning/003.jpg, 7-Other/1.png, "
        "README.md",
        "ignored 1: metadata of macOS: 6-Reasoning/._001.png",
    ]


def test_other_files_of_magicbrush_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    magicbrush_folder(tmp_path)
    (tmp_path / "images" / "unused").mkdir()
    (tmp_path / "images" / "unused" / "unused-input.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("notes")
    assert ignored(tmp_path, caplog) == [
        "ignored 2: a file that edit_sessions.json does not name: images/unused/unused-input.png, "
        "notes.txt"
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_texts_of_benchmarks_may_be_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    magicbrush_folder(tmp_path / "m")
    reason_edit(tmp_path / "r")
    before = [len(cases(tmp_path / name)) for name in "mr"]
    for path in (tmp_path / "m/edit_sessions.json", tmp_path / "r/6-Reasoning/Reason_test.txt"):
        path.write_bytes(path.read_text().replace("\n", "\r\n").encode(encoding))
    assert [len(cases(tmp_path / name)) for name in "mr"] == before
