"""Datasets of pairs as image folders and tars, and what is told of all that is not read."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonpix.core.files.ignored import Ignored
from reasonpix.datasets.formats import open_reader
from reasonpix.datasets.pairs import Data, Pairs, read_pairs
from reasonpix.datasets.training_data import training_data_of_dataset
from reasonpix.errors import SourceError
from reasonpix.plugin.components import Source, SourceItem
from reasonpix.plugin.registry import find
from tests.support.pair_files import instruct_pix2pix, pair, parquet, rows


def read(path: Path, **options: Any) -> Pairs:
    return read_pairs(Data(path=str(path), resolution=32, **options))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(SourceError) as raised:
        read(path, **options)
    return str(raised.value)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[Path, Path], list[str]]:
    """What the log says of a dataset's ignored parts while its pairs are read."""

    def read_told(path: Path, root: Path) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "reasonpix"):
            read(path)
        return [record.getMessage().replace(f"{root}", "…") for record in caplog.records]

    return read_told


# -- Image folders with metadata ------------------------------------------------------------------

METADATA = [
    {
        "input_image_file_name": f"in/{number}.png",
        "edited_image_file_name": f"{number}-edited.png",
        "edit_prompt": f"make it № {number}",
        "caption": "a café",
        "edited_caption": "a bar",
    }
    for number in range(3)
]


def image_folder(folder: Path, rows: list[dict[str, Any]] = METADATA) -> Path:
    (folder / "in").mkdir(parents=True)
    for number, row in enumerate(rows):
        before, after = pair(number)
        (folder / f"in/{number}.png").write_bytes(before)
        (folder / f"{number}-edited.png").write_bytes(after)
        assert row
    return folder


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


SOURCE = {
    "image": "input_image",
    "edited_image": "edited_image",
    "instruction": "edit_prompt",
    "caption": "caption",
    "edited_caption": "edited_caption",
}


def generated(path: Path, **options: object) -> list[Any]:
    """The items of `generate`'s source for the same folder."""
    cls = find("source", "hf-dataset")
    made = cls(cls.Options.model_validate({"path": str(path), **SOURCE, **options}))
    assert isinstance(made, Source)
    made.load()
    return list(made.items())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_one_folder_is_read_by_generate_and_train(name: str, encoding: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    text = as_csv(METADATA) if name.endswith("csv") else as_jsonl(METADATA)
    (folder / name).write_bytes(text.encode(encoding))
    trained = read(folder).examples
    items = [item for item in generated(folder) if isinstance(item, SourceItem)]
    assert [example.instruction for example in trained] == [f"make it № {i}" for i in range(3)]
    assert [(item.content, item.pair and item.pair.content) for item in items] == [
        (example.input_image, example.edited_image) for example in trained
    ]
    assert [(item.caption, item.pair and item.pair.caption) for item in items] == [
        ("a café", "a bar")
    ] * 3
    read(folder).check()


def test_a_table_of_metadata_is_read_too(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    pq.write_table(pa.Table.from_pylist(METADATA), folder / "metadata.parquet")
    assert len(read(folder).examples) == 3


def test_splits_are_folders_with_their_own_metadata(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = image_folder(tmp_path / split)
        (folder / "metadata.jsonl").write_text(as_jsonl(METADATA[: 1 if split == "test" else 3]))
    assert len(read(tmp_path).examples) == 3
    assert len(read(tmp_path, split="test").examples) == 1
    assert "no file of split 'dev'" in refused(tmp_path, split="dev")
    ignored = {item.name for item in generated(tmp_path) if isinstance(item, Ignored)}
    assert "test/metadata.jsonl" in ignored and "train/metadata.jsonl" not in ignored


def test_what_an_image_folder_leaves_over_is_told(tmp_path: Path, told: Any) -> None:
    folder = image_folder(tmp_path / "data")
    (folder / "metadata.jsonl").write_text(
        as_jsonl([METADATA[0] | {"mixed": 1}, METADATA[1] | {"mixed": "one"}])
    )
    (folder / "notes.txt").write_text("notes")
    (folder / ".DS_Store").write_text("")
    assert told(folder, tmp_path) == [
        "…/data: ignored 3: a file that no row names: 2-edited.png, in/2.png, notes.txt",
        "…/data: ignored 2: a column that is not read: caption, edited_caption",
        "…/data: ignored 1: hidden: .DS_Store",
        "…/data: ignored 1: a column with values of several types: mixed",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"file_name": "a.png"}\n{"file_name": \n', "metadata.jsonl: cannot be read: line 2: "),
        ('["a.png"]', "line 1: expected an object of columns, got ['a.png']"),
        ('{"file_name": "a.png", "image": "b"}', "line 1: the column 'image' is given twice"),
        ('{"file_name": "a", "file_name": "b"}', "line 1: the key 'file_name' is given twice"),
        ('{"file_name": "../../etc/passwd"}', "'../../etc/passwd' is not below the folder"),
        ('{"input_image_file_name": "/etc/passwd"}', "'/etc/passwd' is not below the folder"),
        ('{"input_image_file_name": 5}', "a file name is a text with /, not 5"),
        ('{"image": "a.png", "text": "b"}', "no column names images; expected file_name, or"),
        ("", "no column names images; expected file_name, or"),
    ],
)
def test_metadata_that_cannot_be_read(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(text)
    assert why in refused(tmp_path)


@pytest.mark.parametrize(
    ("values", "line", "kind"),
    [
        (["a bee", 7, "a dog"], 2, "a number"),
        ([7, "a bee", "a dog"], 1, "a number"),
        (["a bee", None, ["a dog"]], 3, "a list"),
        (["a bee", {"en": "a dog"}, "x"], 2, "an object"),
        (["a bee", "x", True], 3, "a truth value"),
        ([[1], ["a bee"], None], 1, "a list"),
    ],
)
def test_a_column_of_several_types_names_the_row(
    values: list[object], line: int, kind: str, tmp_path: Path
) -> None:
    rows = [
        {**row, "caption": "a bee", "edit_prompt": value}
        for row, value in zip(METADATA, values, strict=True)
    ]
    folder = image_folder(tmp_path / "data")
    (folder / "metadata.jsonl").write_text(as_jsonl(rows))
    problem = f"data/metadata.jsonl line {line}: 'edit_prompt' is {kind}, not text"
    assert problem in refused(folder)
    with pytest.raises(SourceError, match=re.escape(problem)):
        training_data_of_dataset(str(folder))
    cls = find("source", "hf-dataset")
    columns = {"image": "input_image", "path": str(folder)}
    with pytest.raises(SourceError, match=re.escape(problem)):
        cls(cls.Options.model_validate({**columns, "caption": "edit_prompt"})).load()
    # Other columns can be read.
    source = cls(cls.Options.model_validate({**columns, "caption": "caption"}))
    source.load()
    ignored = [it.reason for it in source.items() if isinstance(it, Ignored)]
    assert "a column with values of several types" in ignored


def test_a_row_without_its_file_is_a_broken_row(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    (folder / "metadata.jsonl").write_text(as_jsonl(METADATA))
    (folder / "in/1.png").unlink()
    pairs = read(folder, broken="skip")
    assert len(pairs.usable()) == 2
    [(row, why)] = pairs.skipped
    assert row.endswith("row 1") and "No such file" in why


# -- Tars -----------------------------------------------------------------------------------------


def members(number: int, key: str | None = None) -> list[tuple[str, bytes]]:
    before, after = pair(number)
    facts = json.dumps({"edit_prompt": f"number {number}"}).encode()
    name = key or f"s{number}"
    return [(f"{name}.input.png", before), (f"{name}.edited.png", after), (f"{name}.json", facts)]


def tar(path: Path, content: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in content:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def test_two_samples_of_a_key_are_two_rows(tmp_path: Path) -> None:
    content = [*members(0, "a"), *members(1), *members(2, "a"), *members(3, "a")]
    pairs = read(tar(tmp_path / "a.tar", content))
    assert [example.instruction for example in pairs.examples] == [
        f"number {number}" for number in range(4)
    ]
    assert [example.row.rpartition(" sample ")[2] for example in pairs.examples] == [
        "a", "s1", "a (2)", "a (3)",
    ]  # fmt: skip
    pairs.check()


APPLE = [(f"._s0.{kind}", b"\0\5\x16\7") for kind in ("input.png", "edited.png", "json")]


@pytest.mark.parametrize(
    "junk",
    [
        APPLE,
        [(f"__MACOSX/{name}", data) for name, data in APPLE],
        [("PaxHeaders.5/s0.json", b"30 mtime=1\n")],
        [("./._.DS_Store", b""), (".DS_Store", b"")],
        [("Thumbs.db", b""), ("desktop.ini", b"")],
    ],
)
def test_a_tar_of_a_file_manager_is_read(
    junk: list[tuple[str, bytes]], tmp_path: Path, told: Any
) -> None:
    path = tar(tmp_path / "a.tar", [*junk[:1], *members(0), *junk[1:], *members(1)])
    lines = told(path, tmp_path)
    assert sum(int(line.split()[2].rstrip(":")) for line in lines) == len(junk)
    assert len(read(path).examples) == 2


def test_members_that_are_not_read_are_told(tmp_path: Path, told: Any) -> None:
    content = [*members(0), ("s0.mask.png", b""), ("README", b""), ("info.yaml", b"")]
    assert told(tar(tmp_path / "a.tar", content), tmp_path) == [
        "…/a.tar: ignored 1: a member without a suffix: README",
        "…/a.tar: ignored 1: a member .mask, which is not read: s0.mask.png",
        "…/a.tar: ignored 1: a member .yaml, which is not read: info.yaml",
    ]


def test_mixed_samples_of_a_key_are_broken_rows(tmp_path: Path) -> None:
    first, second = members(0, "a"), members(1, "a")
    mixed = [member for both in zip(first, second, strict=True) for member in both]
    pairs = read(tar(tmp_path / "a.tar", [*mixed, *members(2)]), broken="skip")
    assert [example.instruction for example in pairs.examples] == ["number 2"]
    assert {why for _, why in pairs.skipped} == {
        "several samples have this key, and their members cannot be told apart"
    }


@given(
    content=st.permutations([*members(0, "a"), *members(1, "a"), *members(2, "b")]), data=st.data()
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_order_of_members_mixes_or_loses_samples(
    content: list[tuple[str, bytes]], data: Any, tmp_path: Path
) -> None:
    kept = content[: data.draw(st.integers(1, len(content)))]
    try:
        pairs = read(tar(tmp_path / "a.tar", kept), broken="skip")
    except SourceError as error:
        assert "no row can be used" in str(error) or "in any of its samples" in str(error)
        return
    whole = {example.row: example for example in pairs.examples}
    named = {name.partition(".")[0] for name, _ in kept}
    rows_of = {row.rpartition(" sample ")[2][0] for row in [*whole, *dict(pairs.skipped)]}
    assert rows_of == named
    if any(row.endswith("sample b") for row in whole):
        [b] = [example for row, example in whole.items() if row.endswith("sample b")]
        assert b.instruction == "number 2"
        assert pairs.opened(pairs.examples.index(b))


# -- Other formats --------------------------------------------------------------------------------


def test_files_beside_a_table_are_told(tmp_path: Path, told: Any) -> None:
    folder = tmp_path / "data"
    parquet(folder / "train-0.parquet", rows(2, note="x", other="y"))
    parquet(folder / "test-0.parquet", rows(1))
    (folder / "more.tar.gz").write_bytes(b"")
    (folder / "README.md").write_text("")
    (folder / "._train-0.parquet").write_text("")
    assert told(folder, tmp_path) == [
        "…/data: ignored 2: not a data file: README.md, more.tar.gz",
        "…/data: ignored 2: a column that is not read: note, other",
        "…/data: ignored 1: metadata of macOS: ._train-0.parquet",
        "…/data: ignored 1: a file of another split: test-0.parquet",
    ]


def test_files_that_seeds_do_not_name_are_told(tmp_path: Path, told: Any) -> None:
    folder = instruct_pix2pix(
        tmp_path / "data", [{"input": "a", "edit": "b", "output": "c", "url": "d"}], seeds=2
    )
    (folder / "0000000/999_0.jpg").write_bytes(b"")
    (folder / "0000009").mkdir()
    (folder / "0000009/prompt.json").write_text("{}")
    assert told(folder, tmp_path) == [
        "…/data: ignored 3: a column that is not read: url, caption, edited_caption",
        "…/data: ignored 2: a file that seeds.json does not name: 0000000/999_0.jpg, "
        "0000009/prompt.json",
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_prompts_in_any_encoding_are_read_by_train(encoding: str, tmp_path: Path) -> None:
    folder = instruct_pix2pix(tmp_path, [{"input": "a", "edit": "café", "output": "c"}])
    for path in (folder / "seeds.json", folder / "0000000/prompt.json"):
        text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
        path.write_bytes(text.encode(encoding))
    row = '{"input_image_file_name": "0000000/100_0.jpg", "direct_instruction": "thé"}\r\n'
    (folder / "metadata.jsonl").write_bytes(row.encode(encoding))
    both = ["edit_prompt", "direct_instruction"]
    examples = read(folder, instructions=both).examples
    assert [example.instruction for example in examples] == ["café", "thé"]


def test_an_unlisted_format_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(SourceError, match=r"not a pair dataset; expected .*metadata\.jsonl"):
        open_reader(str(tmp_path), Path(), "train", None)
