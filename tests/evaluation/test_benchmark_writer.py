from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from reasonpix.cli.main import cli
from reasonpix.datasets.publishing import publish
from reasonpix.datasets.training_data import TrainingData
from reasonpix.errors import RunError, SourceError
from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.benchmark_writer import TEMPLATES, build_benchmark
from reasonpix.evaluation.cases import Benchmark
from reasonpix.evaluation.grounder_filters import GrounderFilters, filters_by_grounder
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.recipe_catalog import locate
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import WriteRecipe
from tests.support.pair_files import parquet, picture, png

PAIRS = {
    "use": "fake-source",
    "count": 5,
    "caption": "a square",
    "edited_caption": "a square with a hole",
    "instruction": "make a hole",
}


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Twelve records, of which two are rejected."""
    recipe = write_recipe(
        source={"use": "fake-source", "count": 12},
        planner={"use": "fake-planner", "target": "owl"},
        filters=[{"use": "eq1", "reject_fraction": 0.2}],
    )
    return generate(load_recipe(recipe), tmp_path / "run")


def read(path: Path) -> Benchmark:
    return read_benchmark(BenchmarkOptions(path=str(path)), Path())


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def taken(run: RunFolder) -> list[Any]:
    return [outcome for outcome in read_outcomes(run) if outcome.status == "ok"]


def training(path: Path, *rows: dict[str, Any]) -> str:
    """A dataset to train on: a pair of its own, and `rows` that differ from it in some columns."""
    own = {
        "input_image": {"bytes": png(picture(90)), "path": None},
        "edit_prompt": "nothing like it",
        "edited_image": {"bytes": png(picture(91)), "path": None},
    }
    parquet(path / "train.parquet", [own, *(own | row for row in rows)])
    return str(path)


def encoded(image: Image.Image, kind: str) -> dict[str, Any]:
    """The same pixels in other bytes."""
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG", compress_level=0)
    else:
        image.save(buffer, "WEBP", lossless=True, exact=True)
    return {"bytes": buffer.getvalue(), "path": None}


def test_what_is_built_is_what_is_read(run: RunFolder, tmp_path: Path) -> None:
    built = build_benchmark(run, tmp_path / "bench")
    wanted = {outcome.sample.record_id: outcome.sample for outcome in taken(run)}
    assert (built.rows, dict(built.left_out)) == (len(wanted), {})
    found = read(tmp_path / "bench")
    assert found.kinds == ["direct", "reasoning"]
    assert [case.id for case in found.cases] == list(wanted)
    for case in found.cases:
        sample = wanted[case.id]
        assert sample.plan is not None and sample.caption is not None
        assert case.read_input().tobytes() == sample.image().tobytes()
        assert case.read_truth is not None
        assert case.read_truth().tobytes() == sample.edited_image().tobytes()
        assert case.caption == sample.caption.text == "a bee and a rabbit"
        assert case.edited_caption == "an owl and a rabbit"
        assert case.instructions["reasoning"] == sample.plan.instruction
        assert case.target == "owl"
        assert case.box == sample.box
        assert case.groups == {"category": "bee", "edit": "bee → owl"}
    table = pq.read_table(tmp_path / "bench" / "data" / "test-00000.parquet").to_pylist()
    natives = [sample.item.native_id for sample in wanted.values()]
    assert [row["source_id"] for row in table] == natives
    assert {row["selected"] for row in table} == {"bee"}


def test_direct_instructions_come_from_several_templates(run: RunFolder, tmp_path: Path) -> None:
    build_benchmark(run, tmp_path / "one")
    build_benchmark(run, tmp_path / "two", seed=1)
    one, two = (
        [case.instructions["direct"] for case in read(tmp_path / name).cases]
        for name in ("one", "two")
    )
    possible = {it.format(selected="bee", target="an owl") for it in TEMPLATES}
    assert len(possible) == len(TEMPLATES) >= 8
    assert set(one) <= possible and len(set(one)) >= 3
    assert one != two
    assert "Turn the bee to an owl." in possible


def test_a_rewritten_pair_keeps_its_own_words(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = generate(load_recipe(write_recipe(source=PAIRS, part="rewrite")), tmp_path / "run")
    assert build_benchmark(run, tmp_path / "bench").rows == 5
    for case in read(tmp_path / "bench").cases:
        assert case.instructions["direct"] == "make a hole"
        assert case.instructions["reasoning"] not in ("", "make a hole")
        assert (case.caption, case.edited_caption) == ("a square", "a square with a hole")
        assert (case.target, case.box) == (None, None)


# -- The choice


def test_the_same_run_and_seed_give_the_same_bytes(run: RunFolder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_benchmark(run, tmp_path / name, count=4, seed=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert set(tree(tmp_path / "one")) == {
        "README.md",
        "benchmark.json",
        "data/test-00000.parquet",
    }


def test_the_choice_hangs_on_the_seed_and_not_on_the_count(run: RunFolder, tmp_path: Path) -> None:
    def ids(count: int, seed: int) -> set[str]:
        out = tmp_path / f"{count}-{seed}"
        assert build_benchmark(run, out, count=count, seed=seed).rows == count
        return {case.id for case in read(out).cases}

    assert ids(3, 0) < ids(6, 0)
    assert len({frozenset(ids(3, seed)) for seed in (1, 2, 3)}) > 1


def test_too_few_rows_are_refused(run: RunFolder, tmp_path: Path) -> None:
    rows = len(taken(run))
    with pytest.raises(RunError) as caught:
        build_benchmark(run, tmp_path / "bench", count=rows + 1)
    said = str(caught.value)
    assert f"has samples for {rows} rows, but {rows + 1} are wanted" in said
    assert f"reasonpix generate RECIPE --out {run} --limit N" in said
    assert not (tmp_path / "bench").exists()
    (tmp_path / "bench").mkdir()
    with pytest.raises(RunError, match="bench exists"):
        build_benchmark(run, tmp_path / "bench")


# -- Apart from what is trained on


@pytest.mark.parametrize("column", ["input_image", "edited_image"])
@pytest.mark.parametrize("which", ["input", "edited"])
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_an_image_that_is_trained_on_is_left_out_however_encoded(
    run: RunFolder, tmp_path: Path, column: str, which: str, kind: str
) -> None:
    sample = taken(run)[2].sample
    image = sample.image() if which == "input" else sample.edited_image()
    known = encoded(image, kind)
    load = sample.images["input"].load
    assert load is not None and known["bytes"] not in (load(), sample.edited_png())
    dataset = training(tmp_path / "part1", {column: known})
    built = build_benchmark(run, tmp_path / "bench", disjoint_from=[dataset])
    assert dict(built.left_out) == {"an image of the training data": 1}
    assert built.rows == len(taken(run)) - 1
    assert sample.record_id not in {case.id for case in read(tmp_path / "bench").cases}


def test_images_of_other_pixels_are_no_reason(run: RunFolder, tmp_path: Path) -> None:
    image = taken(run)[2].sample.image()
    image.putpixel((0, 0), (1, 2, 3))
    dataset = training(tmp_path / "part1", {"input_image": encoded(image, "png")})
    built = build_benchmark(run, tmp_path / "bench", disjoint_from=[dataset])
    assert (built.rows, dict(built.left_out)) == (len(taken(run)), {})


def test_an_instruction_that_is_trained_on_is_left_out_however_written(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = PAIRS | {"count": 12}
    run = generate(load_recipe(write_recipe(source=source, part="rewrite")), tmp_path / "run")
    said = [outcome.sample.instruction for outcome in taken(run)]
    leaked = said[0]
    others = sum(text != leaked for text in said)
    assert 0 < others < len(said)
    dataset = training(tmp_path / "part1", {"edit_prompt": f"  {leaked.upper()[:-1]} … !"})
    built = build_benchmark(run, tmp_path / "bench", disjoint_from=[dataset])
    assert dict(built.left_out) == {"an instruction of the training data": len(said) - others}
    cases = read(tmp_path / "bench").cases
    assert [case.instructions["reasoning"] for case in cases] == [t for t in said if t != leaked]


def test_a_run_that_is_trained_on_gives_nothing(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "part3")
    rows = len(taken(run))
    with pytest.raises(
        RunError, match=f"has samples for 0 rows, .* {rows} more are in the training data"
    ):
        build_benchmark(run, tmp_path / "bench", disjoint_from=[str(tmp_path / "part3")])


def test_what_cannot_be_compared_is_told(run: RunFolder, tmp_path: Path) -> None:
    dataset = training(tmp_path / "part1", {"input_image": {"bytes": b"?", "path": None}})
    with pytest.raises(SourceError, match=r"train\.parquet row 1: .*cannot be compared"):
        build_benchmark(run, tmp_path / "bench", disjoint_from=[dataset])
    with pytest.raises(SourceError, match="no such folder or file"):
        build_benchmark(run, tmp_path / "bench", disjoint_from=[str(tmp_path / "nowhere")])
    assert not (tmp_path / "bench").exists()


def test_the_card_says_what_was_checked(run: RunFolder, tmp_path: Path) -> None:
    image = encoded(taken(run)[0].sample.image(), "png")
    dataset = training(tmp_path / "part1", {"input_image": image})
    build_benchmark(run, tmp_path / "bench", count=4, disjoint_from=[dataset], seed=7)
    text = (tmp_path / "bench" / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["pretty_name"].startswith("A benchmark")
    files = [{"split": "test", "path": "data/test-*.parquet"}]
    assert told["configs"][0]["data_files"] == files
    assert "4 test cases, made by the pipeline" in body
    assert "is in `part1`" in body
    assert "1 accepted samples share an image of the training data and are left out" in body
    more = len(taken(run)) - 1 - 4
    assert f"drawn with seed 7; {more} others were available" in body
    for section in ("Components", "Licences", "Filters", "Records by stage", "Recipe"):
        assert f"\n## {section}\n" in body
    assert str(tmp_path) not in text
    build_benchmark(run, tmp_path / "unchecked")
    unchecked = (tmp_path / "unchecked" / "README.md").read_text(encoding="utf-8")
    assert "No training data were excluded" in unchecked and "--disjoint-from" in unchecked


# -- The sticker world


def test_a_mini_benchmark_shares_no_hint_with_training(tmp_path: Path) -> None:
    world = pytest.importorskip("reasonpix_mini.world")
    changes = (
        "source.count=24",
        "pipeline.captioner=fake-captioner",
        "pipeline.extractor=fake-extractor",
        "pipeline.grounder=fake-grounder",
        "pipeline.editor=fake-editor",
        "pipeline.planner.hints=held_out",
        "filters=[]",
    )
    run = generate(load_recipe(locate("mini/part3"), changes), tmp_path / "run")
    assert build_benchmark(run, tmp_path / "bench", count=16).rows == 16
    categories = world.categories()
    known = [hint for category in categories.values() for hint in category.hints]
    for case in read(tmp_path / "bench").cases:
        said = case.instructions["reasoning"]
        assert not [hint for hint in known if re.search(rf"\b{re.escape(hint)}", said, re.I)]
        assert case.target is not None
        assert any(
            re.search(rf"\b{re.escape(hint)}", said, re.I)
            for hint in categories[case.target].held_out_hints
        )


# -- Training data of models, and the grounder of filters


@pytest.fixture
def sticker_run(write_recipe: WriteRecipe, tmp_path: Path) -> Callable[[str], RunFolder]:
    """Scenes of the sticker world with the lexicon's hints, edited by a fake."""

    def make(hints: str) -> RunFolder:
        recipe = write_recipe(
            f"{hints}.yaml",
            source={"use": "stickers", "split": "test", "count": 6, "captions": True},
            captioner=None,
            planner={"use": "lexicon", "hints": hints},
        )
        return generate(load_recipe(recipe), tmp_path / f"run-{hints}")

    return make


def test_hints_that_installed_models_were_trained_on_are_warned_of(
    sticker_run: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    arguments = ["benchmark", str(sticker_run("train")), "--out", str(tmp_path / "bench")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    rows = len(read(tmp_path / "bench").cases)
    assert rows >= 3
    card = (tmp_path / "bench" / "README.md").read_text(encoding="utf-8")
    for model in ("mini/instruct-pix2pix", "mini/reasonpix2pix"):
        told = f"The training data of {model} (rendered edits of the sticker world, train, "
        for text in (result.stderr, card):
            assert told in text
    assert f"{rows} of {rows} reasoning instructions and the images of 0 of {rows}" in result.stderr
    assert "--disjoint-from mini/instruct-pix2pix" in result.stderr
    with pytest.raises(RunError, match="samples for 0 rows"):
        build_benchmark(
            RunFolder(tmp_path / "run-train"),
            tmp_path / "none",
            disjoint_from=["mini/reasonpix2pix"],
        )


def test_held_out_hints_are_in_no_training_data(
    sticker_run: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    summary = build_benchmark(sticker_run("held_out"), tmp_path / "bench")
    for overlap in summary.overlaps.values():  # a direct template may be shared
        assert overlap.images == 0 and overlap.instructions["reasoning"][0] == 0
    model = ["mini/instruct-pix2pix"]
    disjoint = build_benchmark(
        RunFolder(tmp_path / "run-held_out"), tmp_path / "other", disjoint_from=model
    )
    assert (disjoint.rows, disjoint.left_out) == (summary.rows, {})


def test_a_trained_model_stands_for_its_data(run: RunFolder, tmp_path: Path) -> None:
    sample = taken(run)[0].sample
    TrainingData.of_dataset("mine", 1, [sample.image()]).write(folder(tmp_path / "one" / "model"))
    TrainingData.of_dataset("mine", 1, (), [sample.instruction]).write(folder(tmp_path / "two"))
    # A folder of `reasonpix train`, and a model.
    one = build_benchmark(run, tmp_path / "out", disjoint_from=[str(tmp_path / "one")])
    assert one.left_out == {"an image of the training data": 1}
    with pytest.raises(RunError, match="10 more are in the training data"):  # all say the same
        build_benchmark(run, tmp_path / "none", disjoint_from=[str(tmp_path / "two")])
    (folder(tmp_path / "three") / "model_index.json").write_text("{}")
    with pytest.raises(SourceError, match="does not record its training data"):
        build_benchmark(run, tmp_path / "none", disjoint_from=[str(tmp_path / "three")])


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("filters", [[], ["eq1"], ["regrounded"], ["eq1", "regrounded"]])
def test_the_grounder_that_filtered_a_benchmark_is_recorded(
    write_recipe: WriteRecipe, tmp_path: Path, filters: list[str]
) -> None:
    options = {
        "eq1": {"use": "eq1", "value": 1e-9},
        "regrounded": {"use": "regrounded", "overlap": 0.01},
    }
    recipe = write_recipe(filters=[options[name] for name in filters])
    run = generate(load_recipe(recipe), tmp_path / "run")
    if "regrounded" in filters:  # the fake grounder still finds the source, so all are rejected
        filtered = filters_by_grounder(run)
        (one,) = filtered.filters
        assert (one.filter, one.grounder) == ("regrounded", "fake-grounder")
        assert "(fake-grounder, filter regrounded)" in filtered.sentence()
        return
    build_benchmark(run, tmp_path / "bench")
    card = (tmp_path / "bench" / "README.md").read_text(encoding="utf-8")
    assert "No filter used a grounder" in card
    assert read(tmp_path / "bench").grounder_filters == GrounderFilters()
