from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reasonpix.datasets.publishing import FORMS, publish
from reasonpix.errors import ReasonpixError, RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import current_stages
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import WriteRecipe

FILTERS = ["no-op", {"use": "eq1", "reject_fraction": 0.3}]
PAIRS = {
    "use": "fake-source",
    "count": 5,
    "caption": "a square",
    "edited_caption": "a square with a hole",
    "instruction": "make a hole",
}


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Seven records of which the two with the smallest change are rejected."""
    return generate(load_recipe(write_recipe(shard_size=3, filters=FILTERS)), tmp_path / "run")


@pytest.fixture
def rewritten(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Five records whose instructions were rewritten."""
    recipe = write_recipe("part1.yaml", source=PAIRS, filters=["eq1"], part="rewrite")
    text = recipe.read_text().replace("- eq1", "- {use: eq1, value: 0.0001}")
    recipe.write_text(text)
    return generate(load_recipe(recipe), tmp_path / "part1")


def tree(folder: Path) -> dict[str, bytes]:
    """All files by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_run_is_published_the_same(
    rewritten: RunFolder, tmp_path: Path, form: str
) -> None:
    for name in ("one", "two"):
        assert publish(rewritten, tmp_path / name, form) > 0
    one = tree(tmp_path / "one")
    assert one == tree(tmp_path / "two")
    assert "README.md" in one
    assert len(one) > 1
    assert not re.search(r"\b20[2-9]\d-\d\d", one["README.md"].decode())
    assert str(tmp_path) not in one["README.md"].decode()


@pytest.mark.parametrize("form", ["hf", "instruct-pix2pix", "webdataset"])
def test_how_it_was_computed_leaves_no_trace(
    write_recipe: WriteRecipe, run: RunFolder, tmp_path: Path, form: str
) -> None:
    path = write_recipe("other.yaml", shard_size=2, filters=FILTERS)
    path.write_text(path.read_text() + "resources: {caption: {num_cpus: 2}, edit: {actors: 2}}\n")
    other = generate(load_recipe(path), tmp_path / "other")
    assert "resources" in (tmp_path / "other" / "recipe.yaml").read_text()
    publish(run, tmp_path / "one", form)
    publish(other, tmp_path / "two", form)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_progress_is_told(run: RunFolder, tmp_path: Path) -> None:
    told: list[int] = []
    assert publish(run, tmp_path / "dataset", report=told.append) == 5
    assert told == [1, 2, 3, 4, 5]


def test_an_existing_folder_is_left_alone(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    with pytest.raises(RunError, match="dataset exists; publish to a new folder"):
        publish(run, tmp_path / "dataset")
    assert list((tmp_path / "dataset").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match="link exists; publish to a new folder"):
        publish(run, tmp_path / "link")


@pytest.mark.parametrize("out", ["s3://bucket/data", Path("s3://bucket/data"), "file:///tmp/x"])
def test_a_url_is_no_folder_of_this_machine(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="is a URL; publish to a folder on this machine"):
        publish(run, Path(out))
    assert set(tmp_path.rglob("*")) == before


def test_an_unfinished_run_is_refused(run: RunFolder, tmp_path: Path) -> None:
    folder = next(entry.folder for entry in current_stages(run) if entry.stage == "edit")
    run.storage.remove(f"stages/{folder}/000001.parquet")
    with pytest.raises(RunError, match="not finished: stage edit lacks 1 of 3 shards; run "):
        publish(run, tmp_path / "dataset")
    run.storage.remove("stages.json")
    with pytest.raises(RunError, match=r"stages\.json cannot be read.*generate.* again"):
        publish(run, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_accepted_nothing_is_refused_with_the_cause(
    write_recipe: WriteRecipe, tmp_path: Path, form: str
) -> None:
    """The filters did it, so no form blames anything else."""
    recipe = write_recipe(source=PAIRS, filters=[{"use": "eq1", "value": 100}], part="rewrite")
    run = generate(load_recipe(recipe), tmp_path / "run")
    with pytest.raises(RunError) as refused:
        publish(run, tmp_path / "dataset", form)
    assert re.fullmatch(
        rf"{run} accepted none of its 5 records: score-eq1 rejected 5 \(such as: distance "
        rf"[\d.]+ < τ 100.0\); try other thresholds with `reasonpix refilter {run}`; "
        rf"`reasonpix gallery {run}` shows all reasons",
        str(refused.value),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run"]


@pytest.mark.usefixtures("trial")
@pytest.mark.parametrize(
    ("captions", "where", "cure"),
    [
        (["torn", "torn"], "read failed 2", "repair the images"),
        (["nobody", "a ghost"], "extract rejected 1, ground rejected 1", "change the recipe"),
        (["a raises-in-planner"] * 2, "plan failed 2", "--retry-failed`"),
        (["unlisted"], "source failed 1", "--limit all`"),
    ],
)
def test_what_stopped_every_record_is_named_with_counts(
    write_recipe: WriteRecipe, tmp_path: Path, captions: list[str], where: str, cure: str
) -> None:
    path = write_recipe(
        source={"use": "trial-source", "captions": captions},
        captioner=None,
        extractor="trial-extractor",
        grounder="trial-grounder",
        planner="trial-planner",
    )
    run = generate(load_recipe(path), tmp_path / "run")
    records = f"{len(captions)} record{'s' * (len(captions) > 1)}"
    counts = f"accepted none of its {records}: {where} (such as: "
    with pytest.raises(RunError) as refused:
        publish(run, tmp_path / "dataset")
    assert counts in str(refused.value) and cure in str(refused.value)


@pytest.mark.parametrize("inside", ["", "dataset", "stages/dataset", "../run/deep/er"])
def test_a_run_folder_is_no_place_for_a_dataset(
    run: RunFolder, tmp_path: Path, inside: str
) -> None:
    before = tree(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for place in (tmp_path / "run" / inside, tmp_path / "link" / inside):
        with pytest.raises(RunError, match=r"run.* publish to a folder outside of it"):
            publish(run, place)
    assert tree(tmp_path / "run") == before
    assert publish(run, tmp_path / "runs-of-mine" / ".." / "dataset") == 5


def test_a_recipe_that_cannot_be_read_is_told(run: RunFolder, tmp_path: Path) -> None:
    run.storage.write("recipe.yaml", b"[")
    with pytest.raises(RunError, match=r"recipe\.yaml cannot be read.*generate.* again"):
        publish(run, tmp_path / "dataset")
    run.storage.remove("recipe.yaml")
    with pytest.raises(RunError, match=r"has no recipe\.yaml"):
        publish(run, tmp_path / "dataset")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run"]


@pytest.mark.parametrize("form", ["hf", "instruct-pix2pix", "webdataset"])
def test_an_image_that_changed_is_not_published(
    write_recipe: WriteRecipe, tmp_path: Path, form: str
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20), "navy").save(folder / "a.png")
    path = write_recipe(source={"use": "image-folder", "path": str(folder)})
    run = generate(load_recipe(path), tmp_path / "run")
    Image.new("RGB", (20, 20), "pink").save(folder / "a.png")
    with pytest.raises(RunError, match=r"a\.png: the file changed since the run was planned"):
        publish(run, tmp_path / "dataset", form)
    (folder / "a.png").unlink()
    with pytest.raises(RunError, match=r"a\.png: .*No such file"):
        publish(run, tmp_path / "dataset", form)
    assert not (tmp_path / "dataset").exists()


# -- All of it or nothing


@pytest.mark.parametrize("form", FORMS)
def test_a_publishing_that_is_stopped_leaves_nothing(
    rewritten: RunFolder, tmp_path: Path, form: str
) -> None:
    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        publish(rewritten, tmp_path / "dataset", form, stop)
    assert set(tmp_path.iterdir()) == before


def test_a_publishing_that_was_killed_is_begun_anew(run: RunFolder, tmp_path: Path) -> None:
    code = """if True:
        import os, signal
        from pathlib import Path
        from reasonpix.datasets.publishing import publish
        from reasonpix.generation.run_folder import RunFolder
        def kill(done):
            if done == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        publish(RunFolder("run"), Path("dataset"), "instruct-pix2pix", kill)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "dataset").exists()
    left = tmp_path / ".dataset.tmp"
    assert left.is_dir()
    (left / "0000099").mkdir()
    (left / "0000099" / "0_0.jpg").write_bytes(b"of an earlier form")
    publish(run, tmp_path / "dataset", "hf")
    assert set(tree(tmp_path / "dataset")) == {"README.md", "data/train-00000.parquet"}
    assert not left.exists()


def test_two_at_once_do_not_mix(run: RunFolder, tmp_path: Path) -> None:
    def second(done: int) -> None:
        with pytest.raises(RunError, match=r"another process is publishing to .*dataset; wait"):
            publish(run, tmp_path / "dataset")

    assert publish(run, tmp_path / "dataset", report=second) == 5
    assert set(tree(tmp_path / "dataset")) == {"README.md", "data/train-00000.parquet"}


def test_a_place_that_cannot_be_written_is_told(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        RunError, match="file/dataset cannot be written: Not a directory; name a folder that can"
    ):
        publish(run, tmp_path / "file" / "dataset")
    with pytest.raises(RunError, match="/proc/nowhere/dataset cannot be written: "):
        publish(run, Path("/proc/nowhere/dataset"))


@pytest.mark.skipif(os.getuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_told(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(RunError, match="locked/dataset cannot be written: Permission denied"):
        publish(run, tmp_path / "locked" / "dataset")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Until it is over the system takes no file larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_told_and_taken_away(
    rewritten: RunFolder, tmp_path: Path, form: str
) -> None:
    before = set(tmp_path.iterdir())
    with (
        largest_file(700),
        pytest.raises(RunError, match="dataset cannot be written: File too large; make room, then"),
    ):
        publish(rewritten, tmp_path / "dataset", form)
    assert set(tmp_path.iterdir()) == before


def test_a_format_that_is_not_a_name(tmp_path: Path) -> None:
    to: Any = None
    with pytest.raises(ReasonpixError, match=r"^no dataset format None; known are hf, "):
        publish(tmp_path / "run", tmp_path / "dataset", to)
