"""The mini recipes from images to a published dataset, through the real plugins and checkpoints."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import skimage
from PIL import Image

from reasonpix.datasets.publishing import publish
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import funnel, read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.recipe_catalog import locate
from reasonpix.generation.run_folder import RunFolder
from reasonpix.inspection.gallery import write_gallery
from reasonpix.inspection.status import read_status
from reasonpix.plugin.intended_images import domain_of_dataset

SMALL = ("source.count=6", "shard_size=3", "pipeline.editor.num_inference_steps=3")


def test_the_command_of_the_tutorial_puts_another_captioner_in_its_place() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
    (recipe, override) = re.search(r"reasonpix generate (\S+) .*--set (\S+)", page).groups()
    here = override.replace("loud-captioner", "fake-captioner")  # the other is not installed
    captioner = load_recipe(locate(recipe), (here,)).component("captioner")
    assert captioner is not None and captioner.name == "fake-captioner"


def made(out: Path, *overrides: str, recipe: str = "mini/part3") -> Path:
    generate(load_recipe(locate(recipe), (*SMALL, *overrides)), out)
    return out


def published(run: Path) -> dict[str, bytes]:
    out = run.with_name(f"{run.name}-dataset")
    publish(RunFolder(run), out)
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("mini") / "run")


def test_scenes_become_edits(run: Path) -> None:
    ended = list(read_outcomes(RunFolder(run)))
    assert len(ended) == 6
    edited = [outcome for outcome in ended if outcome.sample.has_edit]
    assert len(edited) >= 4, [outcome.reason for outcome in ended]
    for outcome in edited:
        plan = outcome.sample.plan
        assert plan is not None
        assert plan.selected in outcome.sample.caption.text  # type: ignore[union-attr]
        before, after = outcome.sample.image(), outcome.sample.edited_image()
        x0, y0, x1, y1 = outcome.sample.box.pixels()
        outside = Image.new("L", before.size, 255)
        outside.paste(0, (x0, y0, x1, y1))
        black = Image.new("RGB", before.size)
        kept = [Image.composite(image, black, outside).tobytes() for image in (before, after)]
        assert kept[0] == kept[1], "the image outside the box was touched"
        assert before.tobytes() != after.tobytes()
    assert Path(write_gallery(RunFolder(run))).read_text().count("<article") == 6


def test_batch_size_and_order_change_no_byte(run: Path, tmp_path: Path) -> None:
    other = made(
        tmp_path / "run",
        *(f"pipeline.{slot}.batch_size=1" for slot in ("captioner", "grounder", "editor")),
        "shard_size=6",
    )
    assert published(other) == published(run)


def test_killed_and_resumed_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reasonpix", "generate", "mini/part3"]
    command += ["--out", str(tmp_path / "run"), *(f"--set={override}" for override in SMALL)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    edits = tmp_path / "run" / "stages"
    while process.poll() is None and not list(edits.glob("edit-*/000000.parquet")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert list(edits.glob("edit-*/*.parquet")), "it was killed before it had begun to edit"
    subprocess.run(command, check=True, capture_output=True)
    first = tmp_path / "first"
    made(first)
    assert published(tmp_path / "run") == published(first)


def test_part_two_takes_captions_from_the_source(tmp_path: Path) -> None:
    run = RunFolder(made(tmp_path / "run", recipe="mini/part2"))
    counts = dict(funnel(run))
    assert counts["caption"]["ok"] == 6
    assert sum(o.status == "ok" for o in read_outcomes(run)) >= 3


def test_photographs_go_through_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Real photographs of assorted sizes and modes: nonsense to mini models, never a failure."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in (Path(skimage.__file__).parent / "data").iterdir():
        if path.suffix in (".jpg", ".png"):  # the rest are drawings and arrays
            (folder / path.name).symlink_to(path)
    assert len(list(folder.iterdir())) >= 12
    overrides = (
        f"source={{use: image-folder, path: {folder}}}",
        "pipeline.editor.num_inference_steps=2",
        # Mini models recognise nothing here: any box will do, so that the editor has work.
        "pipeline.grounder.threshold=0.0",
        "pipeline.grounder.text_threshold=0.0",
    )
    run = tmp_path / "run"
    generate(load_recipe(locate("mini/part3"), overrides), run)
    counts = dict(funnel(RunFolder(run)))
    assert sum(stage["failed"] for stage in counts.values()) == 0
    edited = [
        outcome.sample for outcome in read_outcomes(RunFolder(run)) if outcome.sample.has_edit
    ]
    assert len(edited) >= 12
    for sample in edited:
        assert sample.edited_image().size == sample.image().size
    warnings = warnings_of(run)
    assert len(warnings) == 3
    for warned in warnings:
        assert "made for scenes of the sticker world" in warned
        assert "captioner blip2, grounder grounding-dino, editor gligen" in warned
    assert sum("sticker world" in record.getMessage() for record in caplog.records) == 1


def warnings_of(run: Path) -> list[str]:
    """The warnings in the status, in the gallery, and in the card of a published dataset."""
    publish(RunFolder(run), run.with_name("published"))
    pages = [
        "\n".join(read_status(RunFolder(run)).lines()),
        Path(write_gallery(RunFolder(run))).read_text(),
        run.with_name("published").joinpath("README.md").read_text(),
    ]
    return [line for page in pages for line in page.splitlines() if "arning" in line]


def test_scenes_of_the_mini_world_give_no_warning(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(run) == []
    made(run)  # again, to see what it says
    assert not [line for line in caplog.messages if "made for" in line]
    assert domain_of_dataset(run.with_name("published")) == "sticker-world"
