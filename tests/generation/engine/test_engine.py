from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reasonpix.datasets.publishing import publish
from reasonpix.errors import ReasonpixError, RunError
from reasonpix.generation.engine.engine import Progress, generate
from reasonpix.generation.outcomes import funnel, read_outcomes
from reasonpix.generation.recipe import Recipe, load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import TRIAL, Distribution, WriteRecipe

STAGES = ["read", "caption", "extract", "ground", "plan", "edit", "score-no-op"]

TRIALS = {
    "extractor": "trial-extractor",
    "grounder": "trial-grounder",
    "planner": "trial-planner",
    "editor": "trial-editor",
}


def computed(out: Path) -> list[str]:
    """The stages that the journal tells of, without their fingerprints, shard by shard."""
    told = [line["stage"] for line in RunFolder(out).journal() if "ok" in line]
    order = [*STAGES, "score-trial-filter", "score-eq1"]
    return sorted((stage.rpartition("-")[0] for stage in told), key=order.index)


def published(out: Path, name: str = "dataset") -> dict[str, bytes]:
    folder = out.with_name(name)
    publish(RunFolder(out), folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def ends(run: RunFolder) -> list[tuple[str, str, str]]:
    return [(o.status, o.stage, o.reason) for o in read_outcomes(run)]


# -- what is computed, and what is not ------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("pipeline.captioner=trial-captioner", "caption"),
        ("pipeline.captioner.caption=a cat", "caption"),
        ("pipeline.extractor=trial-extractor", "extract"),
        ("pipeline.grounder=trial-grounder", "ground"),
        ("pipeline.planner=trial-planner", "plan"),
        ("pipeline.planner.target=cat", "plan"),
        ("pipeline.editor=trial-editor", "edit"),
        ("filters.0=trial-filter", "score-trial-filter"),
        ("filters.0.tolerance=3", "score-no-op"),
    ],
)
@pytest.mark.usefixtures("trial")
def test_a_swap_of_one_line_recomputes_that_stage_and_those_after(
    change: str, first: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(shard_size=4, filters=["no-op"], source={"use": "fake-source", "count": 5})
    out = tmp_path / "run"
    generate(load_recipe(path), out)
    assert computed(out) == [stage for stage in STAGES for _ in range(2)]
    before = {folder: os.listdir(folder) for folder in (out / "stages").iterdir()}
    (out / "journal.jsonl").unlink()

    run = generate(load_recipe(path, [change]), out)
    after = STAGES[STAGES.index(first) :] if first in STAGES else [first]
    assert computed(out) == [stage for stage in after for _ in range(2)]
    assert {folder: os.listdir(folder) for folder in before} == before
    assert len(list((out / "stages").iterdir())) == len(before) + len(after)
    assert [status for status, _, _ in ends(run)] == ["ok"] * 5

    # And back again: everything is still there.
    (out / "journal.jsonl").unlink()
    generate(load_recipe(path), out)
    assert computed(out) == []


@pytest.mark.usefixtures("trial")
def test_another_source_is_another_run(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe())
    generate(recipe, tmp_path / "run")
    other = load_recipe(write_recipe(), ["source=trial-source", "pipeline.captioner=null"])
    with pytest.raises(RunError, match=r"another source \(use was .*another --out"):
        generate(other, tmp_path / "run")
    run = generate(other, tmp_path / "other")
    assert [outcome.status for outcome in read_outcomes(run)] == ["ok"]


def test_a_finished_run_computes_nothing_again(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(shard_size=3, filters=["no-op"]))
    out = tmp_path / "run"
    generate(recipe, out)
    shards = sorted((out / "stages").rglob("*.parquet"))
    kept = [*shards, out / "plan.json"]
    before = [path.stat().st_mtime_ns for path in kept]
    first = published(out, "first")
    seen: list[Progress] = []
    generate(recipe, out, report=seen.append)
    assert sorted((out / "stages").rglob("*.parquet")) == shards
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert [(now.shards_done, now.reused, now.ok) for now in seen] == [(3, 3, 0)] * len(STAGES)
    assert published(out, "second") == first


def test_progress_counts_up_to_the_whole(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    seen: list[Progress] = []
    generate(load_recipe(write_recipe(shard_size=3)), tmp_path / "run", report=seen.append)
    read = [(now.shards_done, now.ok) for now in seen if now.stage == "read"]
    assert read == [(0, 0), (1, 3), (2, 6), (3, 7)]


def test_another_source_option_is_told_by_its_value(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe()
    generate(load_recipe(path), tmp_path / "run")
    with pytest.raises(RunError, match=r"\(options.count was 7, is 6\).*another --out"):
        generate(load_recipe(path, ["source.count=6"]), tmp_path / "run")


def test_another_seed_reuses_what_no_seed_decides(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path, out = write_recipe(), tmp_path / "run"
    generate(load_recipe(path), out)
    (out / "journal.jsonl").unlink()
    generate(load_recipe(path, ["seed=1"]), out)
    assert computed(out) == ["plan", "edit"]


def test_a_run_grows_but_does_not_shrink(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path, out = (
        write_recipe(filters=[{"use": "eq1", "reject_fraction": 0.3}], shard_size=2),
        tmp_path / "run",
    )
    recipe = load_recipe(path)
    run = generate(recipe, out, limit=3)
    assert [shard.rows for shard in run.shards()] == [2, 1]
    generate(recipe, out)  # as it was planned
    assert [shard.rows for shard in run.shards()] == [2, 1]
    (out / "journal.jsonl").unlink()
    generate(load_recipe(path, ["shard_size=3"]), out, limit=5)
    assert [shard.rows for shard in run.shards()] == [2, 1, 2]
    assert set(computed(out)) == {*STAGES[:-1], "score-eq1"}
    assert len(computed(out)) == len(STAGES)
    with pytest.raises(RunError, match=r"5 records are already planned.* --limit 5 or more"):
        generate(recipe, out, limit=4)
    generate(recipe, out, limit=math.inf)
    assert published(out) == published(generate_whole(recipe, tmp_path / "whole"), "other")


def generate_whole(recipe: Recipe, out: Path) -> Path:
    generate(recipe, out)
    return out


def test_images_that_are_new_in_the_source_are_added_when_all_are_asked_for(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()

    def put(name: str, red: int) -> None:
        Image.new("RGB", (20, 20), (red, 0, 0)).save(folder / name)

    put("b.png", 1)
    put("d.png", 2)
    (folder / "c.png").write_bytes(b"broken")
    recipe = load_recipe(write_recipe(source={"use": "image-folder", "path": str(folder)}))
    run = generate(recipe, tmp_path / "run")
    put("a.png", 3)
    put("c.png", 4)  # mended: another image
    generate(recipe, tmp_path / "run")
    assert len(ends(run)) == 3
    generate(recipe, tmp_path / "run", limit=math.inf)
    names = [(o.sample.item.native_id, o.status) for o in read_outcomes(run)]
    assert names == [
        ("b.png", "ok"), ("c.png", "failed"), ("d.png", "ok"), ("a.png", "ok"), ("c.png", "ok")
    ]  # fmt: skip
    generate(recipe, tmp_path / "run", limit=math.inf)
    assert len(ends(run)) == 5


def test_a_folder_of_other_files_is_no_run_folder(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "recipe.txt").write_text("soup")
    with pytest.raises(
        RunError, match=r"photos holds 'recipe.txt' and is not a run folder; name a"
    ):
        generate(recipe, tmp_path / "photos")
    (tmp_path / "photos" / "recipe.txt").unlink()
    generate(recipe, tmp_path / "photos")


CAREFUL = """
from reasonpix.errors import ReasonpixError
from reasonpix.plugin.fakes import FakePlanner
from reasonpix.plugin.hookspecs import hookimpl
class Careful(FakePlanner):
    name = "careful-planner"
    def check(self):
        raise ReasonpixError("the planner has no key")
@hookimpl
def planners():
    return [Careful]
"""


def test_what_is_missing_is_told_before_anything_is_computed(
    write_recipe: WriteRecipe, distribution: Distribution, tmp_path: Path
) -> None:
    distribution("careful", {"careful-planner": "careful"}, careful=CAREFUL)
    recipe = load_recipe(write_recipe(planner="careful-planner"))
    with pytest.raises(ReasonpixError, match="the planner has no key"):
        generate(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


HOLD = """
import sys, time
from pathlib import Path
from reasonpix.generation.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).storage.lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_is_at_work(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out = load_recipe(write_recipe()), tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"in use by process {other.pid} on .*; wait for it"):
            generate(recipe, out)
        assert not (out / "plan.json").exists()
        other.kill()
    generate(recipe, out)
    generate(recipe, out)  # and lets go of it


# -- determinism ----------------------------------------------------------------------------------

CAPTIONS = [
    "a bee and a rabbit", "a ghost", "nobody", "a raises-in-editor", "a problem-in-planner",
    "a giant", "a reject-me", "torn", "a stretcher", "unlisted", "a cat", "a stray", "a ghost a dog"
]  # fmt: skip


def hard(write_recipe: WriteRecipe, **more: Any) -> Path:
    """A recipe in which hardly a record goes well."""
    options = {
        "source": {"use": "trial-source", "captions": CAPTIONS},
        "captioner": None,
        "filters": ["trial-filter", {"use": "eq1", "reject_fraction": 0.4}, "region-distance"],
    }
    return write_recipe(**{**options, **TRIALS, **more})


@pytest.mark.parametrize("captions", [CAPTIONS, ["a bee", "a cat", "a dog", "a fox"]])
@pytest.mark.usefixtures("trial")
def test_the_dataset_does_not_depend_on_the_shards(
    captions: list[str], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    made = []
    for size in (1, 3, 100):
        out = tmp_path / f"run{size}"
        source = {"use": "trial-source", "captions": captions}
        generate(load_recipe(hard(write_recipe, shard_size=size, source=source)), out)
        made.append(published(out, f"dataset{size}"))
    assert made[0] == made[1] == made[2]
    assert set(made[0]) == {"README.md", "data/train-00000.parquet"}


@pytest.mark.usefixtures("trial")
def test_the_seed_decides(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    data = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate(load_recipe(hard(write_recipe, seed=seed)), tmp_path / name)
        data[name] = published(tmp_path / name, f"dataset-{name}")["data/train-00000.parquet"]
    assert data["a"] == data["b"] != data["c"]


@pytest.mark.usefixtures("trial")
def test_killed_at_any_moment_a_run_goes_on_to_the_same_dataset(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    slow = {"pause_s": 0.01}
    options = {slot: {"use": use, **slow} for slot, use in TRIALS.items()}
    recipe = hard(write_recipe, shard_size=2, **options)
    whole = tmp_path / "whole"
    generate(load_recipe(recipe), whole)

    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "reasonpix",
        "generate",
        str(recipe),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(TRIAL)}
    moments = random.Random(7)
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        already = len(list(out.rglob("*.parquet")))
        wanted = already + moments.randrange(1, 20)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(out.rglob("*.parquet"))) >= wanted:
                time.sleep(moments.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    generate(load_recipe(recipe), out)
    assert published(out, "one") == published(whole, "other")


# -- what goes wrong with one record --------------------------------------------------------------


@pytest.mark.usefixtures("trial")
@pytest.mark.parametrize("shard_size", [1, 100])
def test_each_record_ends_with_its_stage_and_reason(
    shard_size: int, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    expected = [
        ("a bee", "ok", "", ""),
        ("unlisted", "failed", "source", "1: source declined"),
        ("torn", "failed", "read", "2: not an image"),
        ("", "rejected", "caption", "the source has no caption and the recipe has no captioner"),
        ("nobody here", "rejected", "extract", "no entity in 'nobody here'"),
        ("a raises-in-extractor", "failed", "extract", "ValueError: extractor stumbled"),
        ("a problem-in-extractor", "rejected", "extract", "extractor declined"),
        ("a ghost", "rejected", "ground", "no box found for ghost"),
        ("a giant", "failed", "ground", "InvalidBox: (0.0, 0.0, 48.0, 16.0) leaves the image"),
        ("a raises-in-grounder", "failed", "ground", "ValueError: grounder stumbled"),
        ("a problem-in-grounder", "rejected", "ground", "grounder declined"),
        ("a stray", "failed", "plan", "the planner selected 'unicorn', which is not one of stray"),
        ("a raises-in-planner", "failed", "plan", "ValueError: planner stumbled"),
        ("a problem-in-planner", "rejected", "plan", "planner declined"),
        (
            "a stretcher",
            "failed",
            "edit",
            "the editor returned RGB of size (48, 16) for an RGB image of size (24, ",
        ),
        ("a grey", "failed", "edit", "the editor returned L of size (24, 16)"),
        ("a raises-in-editor", "failed", "edit", "ValueError: editor stumbled"),
        ("a problem-in-editor", "rejected", "edit", "editor declined"),
        ("a nan", "failed", "score-trial-filter", "score 'green' is nan"),
        ("a raises-in-filter", "failed", "score-trial-filter", "ValueError: filter stumbled"),
        ("a problem-in-filter", "rejected", "score-trial-filter", "filter declined"),
        ("a reject-me", "rejected", "score-trial-filter", "it was asked for"),
        ("a ghost and a dog", "ok", "", ""),
    ]
    path = write_recipe(
        shard_size=shard_size,
        source={"use": "trial-source", "captions": [caption for caption, *_ in expected]},
        captioner=None,
        filters=["trial-filter", "no-op"],
        **TRIALS,
    )
    run = generate(load_recipe(path), tmp_path / "run")
    for (caption, *end), found in zip(expected, ends(run), strict=True):
        assert found[:2] == tuple(end[:2]), caption
        assert found[2].startswith(end[2]), caption

    stages = funnel(run)
    assert [stage for stage, _ in stages] == [
        "source", *STAGES[:-1], "score-trial-filter", "score-no-op",
    ]  # fmt: skip
    reaching = len(expected)
    for stage, counts in stages:
        assert sum(counts.values()) == reaching, stage
        reaching = counts["ok"]
    assert reaching == 2

    # Trying the others again gives the same: nothing of it depended on its neighbours.
    assert [o.sample.item.native_id for o in read_outcomes(run) if o.status == "ok"] == ["0", "22"]


@pytest.mark.usefixtures("trial")
def test_a_captioner_that_stumbles_over_one_image(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    captioner = {"use": "trial-captioner", "variant": "62 64"}  # the reds of images 2 and 4
    run = generate(load_recipe(write_recipe(captioner=captioner)), tmp_path / "run")
    assert [(status, stage) for status, stage, _ in ends(run)] == [
        ("failed", "caption") if number in (2, 4) else ("ok", "") for number in range(7)
    ]


@pytest.mark.parametrize("surplus", [-1, 1])
@pytest.mark.parametrize(
    "slot", ["captioner", "extractor", "grounder", "planner", "editor", "filter"]
)
@pytest.mark.usefixtures("trial")
def test_a_component_that_answers_too_much_or_too_little(
    slot: str, surplus: int, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    wrong = {"use": f"trial-{slot}", "surplus": surplus}
    changes = {"filters": [wrong]} if slot == "filter" else {slot: wrong}
    path = write_recipe(source={"use": "fake-source", "count": 3}, **changes)
    what = f"'trial-{slot}' gave a batch of {3 + surplus} for a batch of 3"
    with pytest.raises(RunError, match=what):
        generate(load_recipe(path), tmp_path / "run")


def test_images_of_all_kinds_of_damage(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (20, 20), "navy").save(folder / "good.png")
    Image.new("RGB", (20, 20), "navy").save(folder / "deep" / "er" / "good.JPG", "JPEG")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not found")
    (folder / "half.png").write_bytes((folder / "good.png").read_bytes()[:60])
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "ignored.txt").write_text("no image")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write((folder / "good.png").read_bytes())
    path = write_recipe(source={"use": "image-folder", "path": str(folder)})
    run = generate(load_recipe(path), tmp_path / "run")
    found = {o.sample.item.native_id: (o.status, o.stage, o.reason) for o in read_outcomes(run)}
    assert found == {
        "good.png": ("ok", "", ""),
        "deep/er/good.JPG": ("ok", "", ""),
        "empty.png": ("failed", "read", "empty.png: the file is empty"),
        "text.jpg": ("failed", "read", "text.jpg: not an image, or a format that cannot be read"),
        "half.png": ("failed", "read", found["half.png"][2]),
        "dangling.png": ("failed", "source", "dangling.png: No such file or directory"),
        "'\\udcff.png'": ("failed", "source", "'\\udcff.png': its name is not UTF-8"),
    }
    assert found["half.png"][2].startswith("half.png: damaged image: ")
    assert published(tmp_path / "run")


def test_an_empty_folder(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = write_recipe(source={"use": "image-folder", "path": str(tmp_path / "images")})
    with pytest.raises(RunError, match="the source 'image-folder' has no images"):
        generate(load_recipe(path), tmp_path / "run")


def test_an_image_that_changes_after_the_plan(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), "navy").save(folder / name)
    path = write_recipe(source={"use": "image-folder", "path": str(folder)})
    run = generate(load_recipe(path), tmp_path / "run")
    Image.new("RGB", (20, 20), "pink").save(folder / "b.png")
    generate(load_recipe(path, ["pipeline.captioner.caption=a cat"]), tmp_path / "run")
    (first, second) = ends(run)
    assert first == ("ok", "", "")
    assert second[:2] == ("failed", "caption")
    assert "the file changed since the run was planned" in second[2]


def test_a_limit_takes_the_first_images(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = generate(load_recipe(write_recipe()), tmp_path / "run", limit=3)
    assert [o.sample.item.native_id for o in read_outcomes(run)] == ["0", "1", "2"]
    assert [(shard.rows, run.plan().complete) for shard in run.shards()] == [(3, False)]
