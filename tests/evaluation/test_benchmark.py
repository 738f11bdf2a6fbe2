from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from reasonpix.core.images import UndecodableImage, decode_mask
from reasonpix.errors import SourceError
from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.cases import Benchmark
from tests.support.benchmark_files import (
    HOLE,
    SIZE,
    descriptions,
    magicbrush_folder,
    magicbrush_parquet,
    marked,
    reason_edit,
)
from tests.support.benchmark_rows import benchmark, row, scene
from tests.support.pair_files import instruct_pix2pix, parquet, picture, png, rows


def read(path: Path | str, base: Path = Path(), **options: Any) -> Benchmark:
    return read_benchmark(BenchmarkOptions(path=str(path), **options), base)


def trouble(path: Path, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        read(path, **options)
    return str(caught.value)


# -- Ours


def test_what_the_builder_writes_is_read(tmp_path: Path) -> None:
    benchmark(tmp_path / "bench", [row(0), row(1)])
    found = read("bench", tmp_path)
    assert found.name == "bench"
    assert found.kinds == ["direct", "reasoning"]
    first, second = found.cases
    assert (first.id, second.id) == ("record-0", "record-1")
    assert first.row == "bench/data/test-00000.parquet row 0"
    assert second.instructions == {
        "direct": "Turn the bee to a rabbit, number 1.",
        "reasoning": "Something with ears, number 1.",
    }
    assert second.read_input().tobytes() == scene(1).tobytes()
    assert second.read_truth is not None
    assert second.read_truth().tobytes() == scene(1, edited=True).tobytes()
    assert (second.caption, second.edited_caption) == (
        "a bee and an apple",
        "a rabbit and an apple",
    )
    assert second.target == "rabbit"
    assert second.box is not None and second.box.xyxy == (16, 16, 41, 41)
    assert (second.box.width, second.box.height) == (64, 64)
    assert second.groups == {"category": "bee", "edit": "bee → rabbit"}
    assert second.read_mask is None


def test_a_row_without_a_direct_instruction_has_one_kind_only(tmp_path: Path) -> None:
    nothing = {"direct_instruction": None, "edited_caption": None, "caption": None, "box": None}
    unknown = {"selected": None, "target": None, "record_id": None}
    benchmark(tmp_path, [row(0), row(1, **nothing, **unknown)])
    case = read(tmp_path).cases[1]
    assert list(case.instructions) == ["reasoning"]
    assert (case.caption, case.edited_caption, case.target, case.box) == ("", "", None, None)
    assert case.groups == {}
    assert case.id == "row-000001"


def test_only_as_many_rows_as_the_limit_are_looked_at(tmp_path: Path) -> None:
    benchmark(tmp_path, [row(0), row(1), row(2, edit_prompt=" ")])
    assert len(read(tmp_path, limit=2).cases) == 2
    assert "row 2" in trouble(tmp_path)


def test_instructions_are_columns_by_kind(tmp_path: Path) -> None:
    benchmark(tmp_path, [row(0)])
    found = read(tmp_path, instructions={"said": "direct_instruction", "seen": "caption"})
    assert found.cases[0].instructions == {
        "said": "Turn the bee to a rabbit, number 0.",
        "seen": "a bee and an apple",
    }
    assert "no column 'sung'; it has" in trouble(tmp_path, instructions={"direct": "sung"})


def test_pairs_of_others_are_direct(tmp_path: Path) -> None:
    parquet(tmp_path / "pairs" / "test.parquet", rows(2))
    found = read(tmp_path / "pairs")
    assert found.kinds == ["direct"]
    assert found.cases[1].instructions == {"direct": "make it number 1"}
    assert [case.id for case in found.cases] == ["row-000000", "row-000001"]
    instruct_pix2pix(tmp_path / "ip2p", [{"input": "a", "edit": "b it", "output": "c"}])
    (case,) = read(tmp_path / "ip2p", split="train").cases
    assert (case.caption, case.instructions, case.edited_caption) == ("a", {"direct": "b it"}, "c")


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    magicbrush_parquet(tmp_path / "parquet")
    file = str(tmp_path / "parquet" / "data" / "dev-00000-of-00001.parquet")
    cache = str(tmp_path / "cache")
    data = datasets.Dataset.from_parquet(file, cache_dir=cache)
    for name in ("source_img", "mask_img", "target_img"):
        data = data.cast_column(name, datasets.Image())
    data.save_to_disk(str(tmp_path / "saved"))
    for one, other in zip(
        read(tmp_path / "saved").cases, read(tmp_path / "parquet", split="dev").cases, strict=True
    ):
        assert (one.id, one.instructions) == (other.id, other.instructions)
        assert one.read_input() == other.read_input()
        assert one.read_mask is not None and other.read_mask is not None
        assert np.array_equal(one.read_mask(), other.read_mask())


# -- MagicBrush


@pytest.mark.parametrize("captioned", [True, False])
def test_the_columns_of_magicbrush(tmp_path: Path, captioned: bool) -> None:
    magicbrush_parquet(tmp_path / "hub")
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "global_descriptions.json").write_text(json.dumps(descriptions()))
    captions = {"captions": "told"} if captioned else {}
    found = read("hub", tmp_path, split="dev", **captions)
    assert found.kinds == ["direct"]
    first, second = found.cases
    assert (first.id, second.id) == ("139-1", "139-2")
    assert second.instructions == {"direct": "Do number 2"}
    assert second.groups == {"turn": "2"}
    told = [(case.caption, case.edited_caption) for case in found.cases]
    if captioned:
        assert told == [
            ("what was there", "what turn 1 shows"),
            ("what turn 1 shows", "what turn 2 shows"),
        ]
    else:
        assert told == [("", "")] * 2
    assert second.read_input().tobytes() == picture(2, SIZE).tobytes()
    assert second.read_truth is not None
    assert second.read_truth().tobytes() == picture(3, SIZE).tobytes()
    assert second.read_mask is not None
    assert np.array_equal(second.read_mask(), marked())


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("above", [True, False])
def test_the_folder_of_magicbrush(tmp_path: Path, scale: int, above: bool) -> None:
    magicbrush_folder(tmp_path / "test", scale)
    first, second = read(tmp_path if above else tmp_path / "test").cases
    assert (first.id, second.id) == ("139-1", "139-2")
    assert "edit_sessions.json 139 turn 2" in second.row
    assert (second.caption, second.edited_caption) == ("what turn 1 shows", "what turn 2 shows")
    assert first.caption == "what was there"
    assert second.instructions == {"direct": "Do number 2"}
    assert second.groups == {"turn": "2"}
    assert second.read_input().tobytes() == picture(2, SIZE).tobytes()
    assert second.read_truth is not None
    assert second.read_truth().tobytes() == picture(3, SIZE).tobytes()
    assert second.read_mask is not None
    mask = second.read_mask()
    assert mask.dtype == bool and np.array_equal(mask, marked())  # in the input's size


def test_broken_turns_are_told_all_at_once(tmp_path: Path) -> None:
    magicbrush_folder(tmp_path)
    sessions = json.loads((tmp_path / "edit_sessions.json").read_text())
    first, second = sessions["139"]
    sessions["140"] = [first | {"instruction": "  "}, "nothing", {"input": "140-input.png"}]
    sessions["139"][1] = second | {"mask": "139-nowhere.png"}
    (tmp_path / "edit_sessions.json").write_text(json.dumps(sessions))
    told = descriptions() | {"140": {"139-output1.png": "x"}}
    (tmp_path / "global_descriptions.json").write_text(json.dumps(told))
    said = trouble(tmp_path)
    assert "4 broken rows" in said
    for line in (
        r"139 turn 2: 139-nowhere\.png: No such file",
        r"140 turn 1: its direct instruction is not a text: '  '; 139-input\.png: No such file",
        r"140 turn 2: names no input and no output",
        r"140 turn 3: names no output",
    ):
        assert re.search(line, said), said


def test_descriptions_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    magicbrush_folder(tmp_path)
    for name in ("global_descriptions.json", "local_descriptions.json"):
        (tmp_path / name).write_text("[")
        assert f"{name}: cannot be read" in trouble(tmp_path)
        (tmp_path / name).write_text("[]")
        assert f"{name}: expected {{image: {{file: description}}}}" in trouble(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "edit_sessions.json").write_text("[]")
    assert "edit_sessions.json: expected {image: [turn, …]}" in trouble(tmp_path)


# -- Reason-Edit


def test_reason_edit(tmp_path: Path) -> None:
    found = read(reason_edit(tmp_path / "ReasonEdit"))
    assert found.kinds == ["reasoning"]
    assert [case.id for case in found.cases] == [
        "1-Left-Right-001",
        "1-Left-Right-002",
        "6-Reasoning-001",
        "6-Reasoning-002",
    ]
    case = found.cases[2]
    assert case.instructions == {"reasoning": "Please replace what keeps us dry"}
    assert case.target == "cat 1"
    assert case.groups == {"scenario": "6-Reasoning"}
    assert case.read_truth is None
    assert case.read_input().tobytes() == picture(11, SIZE).tobytes()
    assert case.read_mask is not None
    mask = case.read_mask()
    assert mask.shape == SIZE[::-1]
    assert np.mean(mask == marked()) > 0.99  # JPEG
    assert case.row.endswith("6-Reasoning/Reason_test.txt line 1")


def test_the_target_is_looked_for_around_the_mask(tmp_path: Path) -> None:
    case = read(reason_edit(tmp_path)).cases[0]
    assert case.box is not None
    # A JPEG's edges are a pixel soft.
    assert case.box.xyxy == pytest.approx(HOLE, abs=1)
    assert (case.box.width, case.box.height) == SIZE


def test_a_mask_of_another_aspect_is_refused(tmp_path: Path) -> None:
    reason_edit(tmp_path)
    wide = Image.new("L", (100, 20))
    wide.paste(255, (0, 0, 50, 20))
    wide.save(tmp_path / "1-Left-Right" / "002_mask.jpg")
    said = trouble(tmp_path)
    assert "line 2: mask: 100x20 pixels; the image has 32x24, another aspect ratio" in said
    assert "1 broken row" in said


def test_scenarios_that_do_not_add_up_are_told(tmp_path: Path) -> None:
    reason_edit(tmp_path)
    (tmp_path / "6-Reasoning" / "001_mask.jpg").unlink()
    said = trouble(tmp_path)
    assert "6-Reasoning: 2 images (*.png), 1 masks (*_mask.jpg) and 2 lines" in said
    (tmp_path / "6-Reasoning" / "002_mask.jpg").unlink()
    found = read(tmp_path)  # a scenario may have none
    assert [case.read_mask is None for case in found.cases] == [False, False, True, True]
    (tmp_path / "6-Reasoning" / "Reason_test.txt").write_text("CLIP: cat\nfine\n")
    assert "line 1: its reasoning instruction is not a text: ''" in trouble(tmp_path)


# -- Masks


def test_a_picture_is_no_mask() -> None:
    with pytest.raises(UndecodableImage, match="it has no transparent pixels"):
        decode_mask(png(picture(1)))
    black = picture(1).point(lambda value: 0)
    with pytest.raises(UndecodableImage, match="it marks nothing"):
        decode_mask(png(black))
    with pytest.raises(UndecodableImage, match="not an image"):
        decode_mask(b"no image")


# -- What is wrong


def test_all_broken_rows_are_told_at_once(tmp_path: Path) -> None:
    whole = row(1)["input_image"]["bytes"]
    benchmark(
        tmp_path,
        [
            row(0),
            row(1, input_image={"bytes": whole[: len(whole) // 2], "path": None}),
            row(2, edit_prompt=None, direct_instruction=None),
            row(3, box=[1.0, 2.0, 3.0]),
            row(4, box=[10.0, 10.0, 500.0, 20.0]),
            row(5, edited_image=None),
            row(6, record_id="record-0"),
            row(7, edit_prompt="", edited_image={"bytes": b"x", "path": None}),
        ],
    )
    said = trouble(tmp_path)
    assert "7 broken rows" in said
    for line in (
        r"row 1: input image: ",
        r"row 2: no instruction: neither direct nor reasoning",
        r"row 3: box: expected four numbers, not \[1\.0, 2\.0, 3\.0\]",
        r"row 4: box: .*leaves the image of 64x64 pixels",
        r"row 5: no image in 'edited_image'",
        r"row 6: its id 'record-0' is also that of .*row 0",
        r"row 7: its reasoning instruction is not a text: ''; edited image: ",
    ):
        assert re.search(rf"test-00000\.parquet {line}", said), said


def test_what_is_no_benchmark_is_told(tmp_path: Path) -> None:
    assert "no such folder" in trouble(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "not a pair dataset" in trouble(tmp_path / "empty")
    benchmark(tmp_path / "none", [])
    assert "it has no cases" in trouble(tmp_path / "none")
    benchmark(tmp_path / "bench", [row(0)])
    assert "no file of split 'dev'" in trouble(tmp_path / "bench", split="dev")
    captions = tmp_path / "told"
    captions.mkdir()
    assert "is not a folder with MagicBrush's local_descriptions.json" in trouble(
        tmp_path / "bench", captions=captions
    )
    (captions / "local_descriptions.json").write_text("{}")
    assert "lacks the columns img_id and turn_index" in trouble(
        tmp_path / "bench", captions=captions
    )
    reason_edit(tmp_path / "reason")
    assert "captions is not an option" in trouble(tmp_path / "reason", captions=captions)
    assert "instructions is not an option" in trouble(tmp_path / "reason", instructions={"a": "b"})


def test_options_are_checked() -> None:
    with pytest.raises(ValidationError, match="extra"):
        BenchmarkOptions.model_validate({"path": "x", "columns": "y"})
    with pytest.raises(ValidationError):
        BenchmarkOptions(path="x", instructions={})
    for kind in ("", "..", "../../edits", "a/b", "a\0", "x" * 51):  # a folder is named by it
        with pytest.raises(ValidationError, match="instructions"):
            BenchmarkOptions(path="x", instructions={kind: "edit_prompt"})
    for field in BenchmarkOptions.model_fields.values():
        assert field.description


def test_an_image_that_changed_is_not_taken_for_what_was_read(tmp_path: Path) -> None:
    magicbrush_folder(tmp_path)
    case = read(tmp_path).cases[0]
    assert case.read_truth is not None and case.read_mask is not None
    images = tmp_path / "images" / "139"
    shutil.copy(images / "139-output2.png", images / "139-output1.png")
    shutil.copy(images / "139-mask2.png", images / "139-mask1.png")
    case.read_input()
    with pytest.raises(
        SourceError, match="139 turn 1: the edited image changed during the evaluation"
    ):
        case.read_truth()
    with pytest.raises(SourceError, match="139 turn 1: the mask changed during the evaluation"):
        case.read_mask()
    (images / "139-input.png").unlink()
    with pytest.raises(SourceError, match=r"139 turn 1: 139-input\.png: No such file"):
        case.read_input()


@pytest.mark.parametrize("name", ["../etc", "a/b", "a\\b", ".hidden", "ä", "", "x" * 300, "a b"])
def test_ids_can_name_a_file(tmp_path: Path, name: str) -> None:
    benchmark(tmp_path, [row(0, record_id=name), row(1, record_id=name + "?")])
    one, other = (case.id for case in read(tmp_path).cases)
    assert one != other
    for found in (one, other):
        assert re.fullmatch(r"[\w-][\w.-]{0,99}", found, re.ASCII)
    assert [case.id for case in read(tmp_path).cases] == [one, other]
