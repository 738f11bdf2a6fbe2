"""Counts in the form of Table 2 of the paper, of runs and of what is published from them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reasonpix.datasets.columns import FEATURES, schema_of
from reasonpix.datasets.publishing import FORMS, publish
from reasonpix.errors import RunError, SourceError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.inspection.parts import PartRecords, read_parts, table_lines
from tests.conftest import Shell, WriteRecipe
from tests.support.benchmark_rows import benchmark, row

PAIRS = {"use": "fake-source", "count": 4, "caption": "a bee", "instruction": "add a hole",
         "edited_caption": "a bee with a hole"}  # fmt: skip
FILTERS = [{"use": "eq1", "reject_fraction": 0.3}]


@pytest.fixture
def runs(write_recipe: WriteRecipe, tmp_path: Path) -> dict[str, RunFolder]:
    """A run of each part."""
    recipes = {
        "I": write_recipe("1.yaml", source=PAIRS, part="rewrite"),
        "II": write_recipe("2.yaml", source={"use": "fake-source", "caption": "a bee"},
                           captioner=None, filters=FILTERS),
        "III": write_recipe("3.yaml", filters=FILTERS),
    }  # fmt: skip
    return {
        part: generate(load_recipe(recipe), tmp_path / f"run{part}")
        for part, recipe in recipes.items()
    }


def counts(where: str, split: str = "train") -> dict[str, int]:
    return {part: len(ids) for part, ids in read_parts(where, split).records.items()}


def test_the_table_has_the_papers_form_and_ours_beside_it(
    runs: dict[str, RunFolder], shell: Shell
) -> None:
    done = shell("parts", "runI", "runII", "runIII")
    assert done.returncode == 0, done.stderr
    assert {part: counts(str(run)) for part, run in runs.items()} == {
        "I": {"I": 4}, "II": {"II": 3}, "III": {"III": 5}
    }  # fmt: skip
    assert done.stdout.splitlines()[:6] == [
        "          Input Image      Edited Image     Instruction     Paper     Ours",
        "Part I    InstructPix2Pix  InstructPix2Pix  Generated       8,013        4",
        "Part II   InstructPix2Pix  Generated        Generated       4,141        3",
        "Part III  V3Det            Generated        Generated      28,058        5",
        "Total                                                      40,212       12",
        "",
    ]
    assert "runIII: Part III 5 of 7 records; source of the images: fake-source" in done.stdout


@pytest.mark.parametrize("form", [form for form in FORMS if form != "preference"])
def test_a_dataset_counts_as_its_run(runs: dict[str, RunFolder], tmp_path: Path, form: str) -> None:
    for part, run in runs.items():
        publish(run, tmp_path / part, form)
        published, of_run = read_parts(str(tmp_path / part)), read_parts(str(run))
        assert {it: sorted(ids) for it, ids in published.records.items()} == {
            it: sorted(ids) for it, ids in of_run.records.items()
        }
        count = len(published.records[part])
        assert published.detail == f"of {count} rows; source of the images: fake-source"
        # Listed together, each record counts once.
        lines = [*table_lines([of_run, published, published])]
        assert lines[4] == next(it for it in table_lines([of_run]) if it.startswith("Total"))
        assert lines[-1] == f"Part {part}: {count} records listed more than once, each counted once"


def test_parts_that_were_joined_are_counted_apart(tmp_path: Path) -> None:
    rows = [row(n, part=part) for n, part in enumerate(["I", "III", "III", None, "IV", "II"])]
    folder = str(benchmark(tmp_path / "data", rows))
    assert counts(folder, "test") == {"I": 1, "II": 1, "III": 2}
    assert read_parts(folder, "test").detail == (
        "of 6 rows; 2 rows that name no part; source of the images: not recorded"
    )


def test_only_equal_records_of_one_part_count_once(tmp_path: Path) -> None:
    ids = [("I", "a"), ("II", "a"), ("II", "a"), ("II", "b"), ("III", None), ("III", None)]
    rows = [row(n, part=part, record_id=record_id) for n, (part, record_id) in enumerate(ids)]
    lines = [*table_lines([read_parts(str(benchmark(tmp_path / "data", rows)), "test")])]
    assert [line.split()[-1] for line in lines[1:5]] == ["1", "2", "2", "5"]
    assert lines[7:] == ["Part II: 1 record listed more than once, each counted once"]


def test_the_source_is_the_one_of_the_card(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "data", [row(0)])
    for head, source in (
        ("image_source: image-folder", "image-folder"),
        ("license: mit", "not recorded"),
        ("image_source:", "not recorded"),
    ):
        (folder / "README.md").write_text(f"---\n{head}\n---\n# Title\n")
        detail = read_parts(str(folder), "test").detail
        assert detail == f"of 1 row; source of the images: {source}"


def test_large_counts_keep_the_columns() -> None:
    records = [str(n) for n in range(400_000)]
    lines = [*table_lines([PartRecords("a", {"III": records}, "of 1 row")])]
    assert lines[3].endswith("  28,058  400,000") and lines[4].endswith("  40,212  400,000")
    assert len({len(line) for line in lines[:5]}) == 1


def test_what_cannot_be_counted_is_told(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    features = {name: kind for name, kind in FEATURES.items() if name != "part"}
    (tmp_path / "old").mkdir()
    cells = {name: it for name, it in row(0).items() if name != "part"}
    table = pa.Table.from_pylist([cells], schema=schema_of(features))
    pq.write_table(table, tmp_path / "old" / "train.parquet")
    with pytest.raises(
        SourceError, match=r"no column 'part'.*only datasets published by reasonpix"
    ):
        read_parts(str(tmp_path / "old"))
    with pytest.raises(SourceError, match="no such folder or file"):
        read_parts(str(tmp_path / "nowhere"))
    run = runs["III"]
    folder = next(it for it in run.storage.folders("stages") if it.startswith("edit"))
    run.storage.remove(f"stages/{folder}")
    with pytest.raises(RunError, match="is not finished"):
        read_parts(str(run))
