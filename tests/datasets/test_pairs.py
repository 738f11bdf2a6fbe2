"""Datasets of pairs as we publish them, as others do, and broken in all ways."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from reasonpix.datasets.pairs import Data, Pairs, View, read_pairs
from reasonpix.datasets.publishing import publish
from reasonpix.errors import SourceError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import WriteRecipe
from tests.support.pair_files import instruct_pix2pix, pair, parquet, picture, png, rows

FORMS = ["hf", "webdataset", "instruct-pix2pix"]
REWRITING = {
    "source": {
        "use": "fake-source",
        "count": 4,
        "caption": "a square",
        "edited_caption": "a square with a hole",
        "instruction": "make a hole",
    },
    "part": "rewrite",
}


def read(path: Path | list[Path], **options: Any) -> Pairs:
    named = [str(one) for one in path] if isinstance(path, list) else str(path)
    return read_pairs(Data(path=named, **{"resolution": 32, **options}))


def refused(path: Path | list[Path], **options: Any) -> str:
    with pytest.raises(SourceError) as raised:
        read(path, **options).check()
    return str(raised.value)


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.mode == other.mode == "RGB" and np.array_equal(np.asarray(image), other)


@pytest.fixture
def replaced(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Three records of Part III."""
    source = {"use": "fake-source", "count": 3}
    return generate(load_recipe(write_recipe(source=source)), tmp_path / "run3")


@pytest.fixture
def rewritten(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Four records of Part I, which have a direct instruction too."""
    return generate(load_recipe(write_recipe("part1.yaml", **REWRITING)), tmp_path / "run1")


# -- What we publish ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_what_we_publish_is_read(replaced: RunFolder, tmp_path: Path, form: str) -> None:
    publish(replaced, tmp_path / "dataset", form)
    pairs = read(tmp_path / "dataset")
    known = [outcome.sample for outcome in read_outcomes(replaced) if outcome.status == "ok"]
    assert [example.instruction for example in pairs.examples] == [s.instruction for s in known]
    assert {example.column for example in pairs.examples} == {"edit_prompt"}
    assert pairs.skipped == []
    for number, sample in enumerate(known):
        before, after = pairs.images(number)
        if form == "instruct-pix2pix":  # JPEG
            off = np.abs(np.asarray(before, float) - np.asarray(sample.image(), float))
            assert off.max() <= 8
        else:
            assert same(before, sample.image())
            assert same(after, sample.edited_image())


@pytest.mark.parametrize("form", FORMS)
def test_every_row_is_used_with_each_of_its_instructions(
    rewritten: RunFolder, replaced: RunFolder, tmp_path: Path, form: str
) -> None:
    publish(rewritten, tmp_path / "one", form)
    publish(replaced, tmp_path / "three", form)
    both = ["edit_prompt", "direct_instruction"]
    pairs = read([tmp_path / "one", tmp_path / "three"], instructions=both)
    found = [(example.column, example.instruction) for example in pairs.examples]
    assert found[1] == ("direct_instruction", "make a hole")
    assert [column for column, _ in found] == both * 4 + ["edit_prompt"] * 3  # Part III has none
    assert same(pairs.images(0)[0], pairs.images(1)[0])
    assert read(tmp_path / "one").examples[0].column == "edit_prompt"
    assert len(read(tmp_path / "one").examples) == 4  # never by itself


@pytest.mark.parametrize("form", FORMS)
def test_plain_text_comes_along(rewritten: RunFolder, tmp_path: Path, form: str) -> None:
    publish(rewritten, tmp_path / "one", form)
    assert {e.plain for e in read(tmp_path / "one").examples} == {None}
    aligned = read(tmp_path / "one", align="direct_instruction")
    assert {e.plain for e in aligned.examples} == {"make a hole"}
    assert refused(tmp_path / "one", align="direct").startswith(f"{tmp_path}/one")


def test_contents_are_hashed(tmp_path: Path) -> None:
    parquet(tmp_path / "d" / "a.parquet", rows(2))
    first, second = read(tmp_path / "d").examples
    before, after = pair(1)
    assert second.input_image == hashlib.sha256(before).hexdigest()
    assert second.edited_image == hashlib.sha256(after).hexdigest()
    assert first.row == f"{tmp_path}/d/a.parquet row 0"


# -- What others publish --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [
        ("input_image", "edit_prompt", "edited_image"),
        ("original_image", "edit_prompt", "edited_image"),
        ("source_img", "instruction", "target_img"),
    ],
)
def test_columns_are_found_by_their_names(tmp_path: Path, columns: tuple[str, str, str]) -> None:
    for number, name in enumerate(("train-00000-of-00002-ab", "train-00001-of-00002-cd")):
        content = rows(4, columns, img_id="77")
        parquet(tmp_path / "d" / "data" / f"{name}.parquet", content[2 * number :][:2])
    parquet(tmp_path / "d" / "data" / "dev-00000-of-00001.parquet", rows(1, columns))
    pairs = read(tmp_path / "d")
    assert [e.instruction for e in pairs.examples] == [f"make it number {i}" for i in range(4)]
    assert {e.column for e in pairs.examples} == {columns[1]}
    assert same(pairs.images(3)[0], picture(6))
    assert same(pairs.images(3)[1], picture(7))
    assert pairs.examples[3].row.endswith("d/data/train-00001-of-00002-cd.parquet row 1")
    assert len(read(tmp_path / "d", split="validation").examples) == 1
    assert "no file of split 'test' among its 3, such as data/dev-" in refused(
        tmp_path / "d", split="test"
    )


def test_one_file_is_a_dataset(tmp_path: Path) -> None:
    path = parquet(tmp_path / "validation.parquet", rows(2))
    assert [e.row for e in read(path).examples] == [f"{path} row 0", f"{path} row 1"]


def test_images_may_be_plain_bytes(tmp_path: Path) -> None:
    before, after = pair(0)
    table = pa.table({"input_image": [before], "edit_prompt": ["x"], "edited_image": [after]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert same(read(tmp_path / "a.parquet").images(0)[1], picture(1))


def test_images_may_be_files(tmp_path: Path) -> None:
    content = rows(2)
    (tmp_path / "x.png").write_bytes(png(picture(5)))
    content[0]["input_image"] = {"bytes": None, "path": str(tmp_path / "x.png")}
    path = parquet(tmp_path / "a.parquet", content)
    assert same(read(path).images(0)[0], picture(5))


def test_instruct_pix2pix_as_its_authors_wrote_it(tmp_path: Path) -> None:
    prompts = [{"caption": "a bee", "edit": "a dog", "output": "x"}, {"edit": "a cat"}]
    folder = instruct_pix2pix(tmp_path / "ip2p", prompts, seeds=2)
    (folder / "0000000" / "metadata.jsonl").write_text('{"seed": 100, "p2p_threshold": 0.5}\n')
    pairs = read(folder)
    assert [e.instruction for e in pairs.examples] == ["a dog", "a dog", "a cat", "a cat"]
    assert pairs.examples[3].row == f"{folder}/0000001 seed 101"
    with Image.open(folder / "0000001" / "101_1.jpg") as image:
        assert same(pairs.images(3)[1], image.convert("RGB"))
    assert [e.plain for e in read(folder, align="caption").examples] == ["a bee"] * 2 + [None] * 2
    assert "no column 'direct_instruction'; it has caption, edit_prompt" in refused(
        folder, instructions=["direct_instruction"]
    )
    assert "an InstructPix2Pix folder has no splits" in refused(folder, split="test")


@pytest.mark.parametrize("dictionary", [False, True])
def test_saved_datasets(tmp_path: Path, dictionary: bool) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        source_img=datasets.Image(), instruction=datasets.Value("string"),
        target_img=datasets.Image(),
    )  # fmt: skip
    content = rows(5, ("source_img", "instruction", "target_img"))
    data = datasets.Dataset.from_list(content, features=features)
    if dictionary:
        data = datasets.DatasetDict(dev=data)
    data.save_to_disk(tmp_path / "saved")
    pairs = read(tmp_path / "saved", split="dev" if dictionary else "train")
    assert [e.instruction for e in pairs.examples] == [f"make it number {i}" for i in range(5)]
    assert same(pairs.images(4)[0], picture(8))
    assert pairs.examples[4].row == f"{tmp_path}/saved row 4"
    with pytest.raises(SourceError, match=r"saved: no column 'edit'; it has instruction, source"):
        read(tmp_path / "saved", split="dev" if dictionary else "train", instructions=["edit"])
    if dictionary:
        assert "cannot open dataset" in refused(tmp_path / "saved")


def test_a_hub_id_that_cannot_be_reached(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = """if True:
        from reasonpix.datasets.pairs import *
        try:
            read_pairs(Data(path="nobody/nothing"))
        except SourceError as error:
            print(error)
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "nobody/nothing: no folder or file here, and as a hub id: " in done.stdout, done.stderr


def test_paths_are_relative_to_the_base(tmp_path: Path) -> None:
    parquet(tmp_path / "d" / "a.parquet", rows(1))
    pairs = read_pairs(Data(path="d"), tmp_path)
    assert pairs.examples[0].row == "d/a.parquet row 0"


def test_a_limit_counts_rows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        parquet(tmp_path / name / "x.parquet", rows(3, direct_instruction="do it"))
    both = ["edit_prompt", "direct_instruction"]
    pairs = read([tmp_path / "a", tmp_path / "b"], limit=4, instructions=both)
    assert len(pairs.examples) == 8
    assert pairs.examples[-1].row == f"{tmp_path}/b/x.parquet row 0"


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    parquet(tmp_path / "a.parquet", rows(4))
    data = Data(path=str(tmp_path / "a.parquet"))
    pairs = read_pairs(data, report=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    pairs.check(lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_images_are_read_in_any_order_from_any_thread(tmp_path: Path) -> None:
    for file in range(3):
        content = rows(30)[10 * file :][:10]
        parquet(tmp_path / "d" / f"{file}.parquet", content, group=2)
    pairs = read(tmp_path / "d")
    order = np.random.default_rng(0).permutation(np.tile(np.arange(30), 4)).tolist()
    with ThreadPoolExecutor(8) as threads:
        for number, (before, after) in zip(order, threads.map(pairs.images, order), strict=True):
            assert same(before, picture(2 * number))
            assert same(after, picture(2 * number + 1))


# -- What is no dataset ---------------------------------------------------------------------------


def test_what_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: not a pair dataset; expected .parquet" in refused(tmp_path / "empty")
    assert "no such folder or file" in refused(tmp_path / "nowhere")
    assert "a revision is for hub ids" in refused(tmp_path / "empty", revision="main")
    (tmp_path / "text.parquet").write_text("I am no table")
    assert "text.parquet: cannot be read as a parquet file" in refused(tmp_path / "text.parquet")
    (tmp_path / "text.tar").write_text("I am no tape")
    assert "text.tar: not readable as an uncompressed tar file" in refused(tmp_path / "text.tar")
    (tmp_path / "ip2p").mkdir()
    (tmp_path / "ip2p" / "seeds.json").write_text("{")
    assert "seeds.json: cannot be read" in refused(tmp_path / "ip2p")


def test_no_rows(tmp_path: Path) -> None:
    content = rows(1)
    path = parquet(tmp_path / "a.parquet", content)
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert "a.parquet: no rows in split 'train'" in refused(path)
    (tmp_path / "seeds.json").write_text("[]")
    assert "no rows in split" in refused(tmp_path)


def test_missing_columns_always_stop(tmp_path: Path) -> None:
    content = [{k: v for k, v in row.items() if k != "edited_image"} for row in rows(2)]
    path = parquet(tmp_path / "a.parquet", content)
    for broken in ("stop", "skip"):
        assert "no column 'edited_image' beside 'input_image'; it has" in refused(
            path, broken=broken
        )
    parquet(path, [{"image": {"bytes": b"", "path": ""}, "text": "x"}])
    assert "no columns of input and edited images, such as 'input_image' and" in refused(path)
    parquet(path, rows(1))
    assert "no column 'reason'; it has edit_prompt, edited_image" in refused(
        path, instructions=["reason"], broken="skip"
    )
    assert "no column 'plain'" in refused(path, align="plain", broken="skip")
    parquet(path, [{k: v for k, v in row.items() if k != "edit_prompt"} for row in rows(2)])
    assert "no column 'edit_prompt'" in refused(path, broken="skip")


def test_columns_of_another_type(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", rows(1))
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "edit_prompt", pa.array([5])), path)
    assert "column 'edit_prompt' holds int64, not text" in refused(path)
    pq.write_table(table.set_column(0, "input_image", pa.array(["x"])), path)
    assert "column 'input_image' holds string, not images" in refused(path)


def test_all_that_is_no_dataset_is_told_at_once(tmp_path: Path) -> None:
    parquet(tmp_path / "a" / "a.parquet", rows(1, ("x", "y", "z")))
    told = refused([tmp_path / "nowhere", tmp_path / "a"])
    assert "nowhere: no such folder" in told
    assert "a/a.parquet: no columns" in told


def test_a_column_that_never_holds_text_is_a_mistake(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", rows(2, direct_instruction=None))
    told = refused(path, instructions=["edit_prompt", "direct_instruction"])
    assert told == "instructions: no row has text in 'direct_instruction'; remove it"


def test_a_tar_that_was_cut(rewritten: RunFolder, tmp_path: Path) -> None:
    publish(rewritten, tmp_path / "d", "webdataset")
    path = tmp_path / "d" / "data" / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    assert "train-00000.tar: not readable as an uncompressed tar file" in refused(tmp_path / "d")


@pytest.mark.parametrize(
    "options",
    [{"resolution": 0}, {"crops": 0}, {"broken": "mend"}, {"shuffle": True}, {"instructions": []}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Data(path="x", **options)


# -- Broken rows ----------------------------------------------------------------------------------


def broken_rows() -> list[dict[str, Any]]:
    """Six rows, of which the first and the last are sound."""
    content = rows(7, size=(48, 32))
    content[1]["edit_prompt"] = "  "
    content[2]["edit_prompt"] = None
    whole = content[3]["edited_image"]["bytes"]
    content[3]["edited_image"] = {"bytes": whole[: len(whole) // 2], "path": None}
    content[4]["edited_image"] = {"bytes": png(picture(9, (32, 48))), "path": None}
    content[5]["input_image"] = None
    return content


WRONG = {
    1: "no text in 'edit_prompt': '  '",
    2: "no instruction: nothing in 'edit_prompt'",
    3: "edited image: damaged image: ",
    4: "the input image has 48x32 pixels and the edited one 32x48: their aspect ratios differ",
    5: "no image in 'input_image'",
}


def test_all_broken_rows_are_told_before_anything_else(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", broken_rows())
    with pytest.raises(SourceError) as raised:
        read(path)
    told = str(raised.value)
    assert told.startswith("data: 5 broken rows of 7\n")
    for row, what in WRONG.items():
        assert f"  {path} row {row}: {what}" in told
    assert told.endswith("or set `broken: skip` to train on the others")


def test_undecodable_images_are_found_by_the_check(tmp_path: Path) -> None:
    content = [row for number, row in enumerate(broken_rows()) if number in (0, 3, 4, 6)]
    path = parquet(tmp_path / "a.parquet", content)
    pairs = read(path)
    assert len(pairs.examples) == 4
    with pytest.raises(SourceError, match=r"2 broken rows\n.* row 1: edited image: damaged"):
        pairs.check()
    with pytest.raises(SourceError, match=re.escape(f"{path} row 1: edited image: damaged")):
        pairs.images(1)


def test_broken_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", broken_rows())
    pairs = read(path, broken="skip")
    assert [row for row, _ in pairs.skipped] == [f"{path} row {i}" for i in (1, 2, 5)]
    pairs.check()
    skipped = dict(pairs.skipped)
    assert set(skipped) == {f"{path} row {row}" for row in WRONG}
    for row, what in WRONG.items():
        assert skipped[f"{path} row {row}"].startswith(what)
    assert [pairs.examples[i].row for i in pairs.usable()] == [f"{path} row 0", f"{path} row 6"]


def test_no_more_than_ten_are_shown(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [row | {"edit_prompt": ""} for row in rows(13)])
    told = refused(path)
    assert told.startswith("data: 13 broken rows of 13")
    assert f"{path} row 9: " in told
    assert "row 10" not in told
    assert "… and 3 more" in told
    assert refused(path, broken="skip").startswith("data: no row can be used")


def test_all_that_is_wrong_with_a_row_is_told(tmp_path: Path) -> None:
    content = rows(2)
    content[1] |= {"edit_prompt": "", "edited_image": None}
    told = refused(parquet(tmp_path / "a.parquet", content))
    assert "row 1: no text in 'edit_prompt': ''; no image in 'edited_image'" in told


def test_an_empty_text_is_not_a_missing_one(tmp_path: Path) -> None:
    content = rows(3)
    texts = ["now", None, ""]
    content = [r | {"direct_instruction": text} for r, text in zip(content, texts, strict=True)]
    path = parquet(tmp_path / "a.parquet", content)
    both = ["edit_prompt", "direct_instruction"]
    assert "1 broken row of 3\n" in refused(path, instructions=both)
    pairs = read(path, instructions=both, broken="skip")
    assert [e.row[-5:] for e in pairs.examples] == ["row 0", "row 0", "row 1"]


def test_broken_instruct_pix2pix(tmp_path: Path) -> None:
    folder = instruct_pix2pix(tmp_path / "ip2p", [{"edit": "a"}] * 5)
    (folder / "0000001" / "prompt.json").write_text("{")
    (folder / "0000002" / "prompt.json").unlink()
    (folder / "0000003" / "100_1.jpg").unlink()
    (folder / "0000004" / "prompt.json").write_text(json.dumps({"edit": 5}))
    told = refused(folder)
    assert "4 broken rows of 5" in told
    assert "ip2p/0000001 seed 100: its JSON cannot be read: " in told
    assert "0000002 seed 100: 0000002/prompt.json: No such file or directory" in told
    assert "0000003 seed 100: 0000003/100_1.jpg: No such file or directory" in told
    assert "0000004 seed 100: no text in 'edit_prompt': 5" in told


def test_an_incomplete_sample_of_a_tar(rewritten: RunFolder, tmp_path: Path) -> None:
    publish(rewritten, tmp_path / "d", "webdataset")
    path = tmp_path / "d" / "data" / "train-00000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member)) for member in tar]
        kept = [(m, f.read()) for m, f in members if f is not None]
    with tarfile.open(path, "w") as tar:
        for member, data in kept[1:]:  # sorted, so the first is an edited image
            tar.addfile(member, io.BytesIO(data))
    key = kept[0][0].name.partition(".")[0]
    assert f"{path} sample {key}: has no member .edited" in refused(tmp_path / "d")


def test_a_damaged_row_group_breaks_its_rows_alone(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", rows(6), group=3)
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)
    pairs = read(path, broken="skip")
    assert [e.row for e in pairs.examples] == [f"{path} row {i}" for i in range(3)]
    assert "row group cannot be read" in pairs.skipped[0][1]


def test_an_image_that_changes_later_is_refused(tmp_path: Path) -> None:
    folder = instruct_pix2pix(tmp_path / "ip2p", [{"edit": "a"}])
    pairs = read(folder)
    picture(99).save(folder / "0000000" / "100_0.jpg")
    with pytest.raises(SourceError, match=r"seed 100: the input image changed since it was read"):
        pairs.images(0)


def test_sizes_may_be_a_pixel_off_by_rounding(tmp_path: Path) -> None:
    content = rows(2)
    for row, size in zip(content, ((256, 171), (256, 175)), strict=True):
        row["input_image"] = {"bytes": png(picture(0, (512, 341))), "path": None}
        row["edited_image"] = {"bytes": png(picture(0, size)), "path": None}
    told = refused(parquet(tmp_path / "a.parquet", content))
    assert told.startswith("data: 1 broken row\n")
    assert "row 1: the input image has 512x341 pixels and the edited one 256x175" in told


# -- Views ----------------------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Pairs of 64x40 pixels."""
    return parquet(tmp_path / "wide.parquet", rows(3, size=(64, 40)))


@pytest.mark.parametrize(("fit", "box"), [("stretch", (0, 0, 64, 40)), ("crop", (12, 0, 52, 40))])
def test_the_first_view_is_the_whole_or_the_centre(
    wide: Path, fit: str, box: tuple[int, int, int, int]
) -> None:
    pairs = read(wide, fit=fit)
    assert pairs.views == 1
    for number in range(3):
        for image, seed in zip(pairs.images(number), (2 * number, 2 * number + 1), strict=True):
            assert same(pairs.geometry(number, 0).of(image), picture(seed, (64, 40)).crop(box))


def test_the_whole_is_the_default(wide: Path) -> None:
    assert read(wide).geometry(0, 0) == View("stretch", 1.0, 0.5, 0.5, flip=False)


def test_with_a_flip_every_other_view_is_mirrored(wide: Path) -> None:
    pairs = read(wide, flip=True, crops=2)
    assert pairs.views == 4
    views = [pairs.geometry(1, view) for view in range(4)]
    assert [view.flip for view in views] == [False, True, False, True]
    assert [view._replace(flip=False) for view in views[::2]] == [
        view._replace(flip=False) for view in views[1::2]
    ]


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_views_are_chosen_by_the_image(wide: Path, fit: str) -> None:
    pairs, again = (read(wide, crops=50, flip=True, fit=fit) for _ in range(2))
    drawn = [[pairs.geometry(number, view) for view in range(0, 100, 2)] for number in range(3)]
    for number, views in enumerate(drawn):
        assert views[0] == View(pairs.data.fit, 1.0, 0.5, 0.5, flip=False)
        assert all(view.fit == fit and 0.8 <= view.scale < 1 for view in views[1:])
        assert min(view.x for view in views) < 0.1 < 0.9 < max(view.x for view in views)
        assert len(set(views)) == 50
        assert views == [again.geometry(number, view) for view in range(0, 100, 2)]
    assert drawn[0][1:] != drawn[1][1:]
    with pytest.raises(IndexError):
        pairs.geometry(0, 100)


def test_the_images_of_every_row_are_shown_to_a_visitor(tmp_path: Path) -> None:
    content = rows(4)
    for row in content:
        row["direct_instruction"] = "the same"
    content[2]["edited_image"] = {"bytes": b"broken", "path": None}
    pairs = read(
        parquet(tmp_path / "a.parquet", content),
        broken="skip",
        instructions=["edit_prompt", "direct_instruction"],
    )
    seen: dict[int, bytes] = {}

    def visit(example: int, images: tuple[Image.Image, Image.Image]) -> None:
        seen[example] = images[1].tobytes()

    pairs.check(visit=visit)
    assert seen == {2 * row: picture(2 * row + 1).tobytes() for row in (0, 1, 3)}


def test_rows_may_be_left_out_though_none_is_broken(tmp_path: Path) -> None:
    pairs = read(parquet(tmp_path / "a.parquet", rows(3)))
    first, second, third = (example.row for example in pairs.examples)
    pairs.leave_out({second: "no edit is visible"})
    assert pairs.usable() == [0, 2]
    assert pairs.skipped == [(second, "no edit is visible")]
    with pytest.raises(SourceError, match=rf"no row can be used\n  {second}: no edit is visible"):
        pairs.leave_out({first: "too", third: "too"})


def test_it_loads_where_a_process_has_no_affinity() -> None:
    """As on macOS."""
    code = "import os; vars(os).pop('sched_getaffinity', None); import reasonpix.datasets.pairs"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    parquet(tmp_path / "pairs.parquet", rows(2))
    (tmp_path / "._pairs.parquet").write_bytes(b"of a file manager")
    (tmp_path / ".trash").mkdir()
    parquet(tmp_path / ".trash" / "old.parquet", rows(3))
    assert len(read_pairs(Data(path=str(tmp_path))).examples) == 2


@pytest.mark.parametrize("extra", [(), ("record_id", "agreement"), ("score_chosen",)])
def test_preference_pairs_are_named(extra: tuple[str, ...], tmp_path: Path) -> None:
    table = pa.table({name: ["x"] for name in ("prompt", "chosen", "rejected", *extra)})
    (tmp_path / "p" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "p" / "data" / "train-00000.parquet")
    problem = refused(tmp_path / "p")
    assert "a dataset of preference pairs, which has no images" in problem
    assert "expected one of the forms hf, instruct-pix2pix and webdataset" in problem
