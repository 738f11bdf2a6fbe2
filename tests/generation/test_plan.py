"""Which records a run is about, and how a plan grows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reasonpix.datasets.publishing import publish
from reasonpix.errors import ReasonpixError, RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import outcome_counts, read_outcomes
from reasonpix.generation.plan import rows_for
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import TRIAL, Shell, WriteRecipe


def published(run: RunFolder, folder: Path) -> dict[str, bytes]:
    publish(run, folder)
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        *(
            ({"limit": limit}, f"limit: {limit!r} is not a number of images; give a positive whole "
             "number, or math.inf for all images")
            for limit in (2.5, 0, -1, "4", True, math.nan, -math.inf)
        ),
        *(
            ({"target_accepted": target}, f"target_accepted: {target!r} is not a number of images; "
             "give a positive whole number")
            for target in (2.5, 0, -1, "4", math.inf)
        ),
    ],
)  # fmt: skip
def test_a_limit_or_target_that_is_not_a_count(
    counts: dict[str, Any], message: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    with pytest.raises(ReasonpixError) as raised:
        generate(load_recipe(write_recipe()), tmp_path / "run", **counts)
    assert str(raised.value) == message
    assert not (tmp_path / "run").exists()


# -- a target -------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 10**6))
def test_more_rows_are_planned_than_the_rate_asks_for(
    target: int, accepted: int, planned: int
) -> None:
    accepted = min(accepted, planned, target - 1)
    wanted = rows_for(target, accepted, planned)
    assert wanted > planned
    assert accepted * wanted >= target * planned or (accepted == 0 and wanted == 2 * planned)


@pytest.mark.usefixtures("trial")
@pytest.mark.parametrize("target", [1, 4, 9])
def test_a_target_takes_no_more_images_than_it_needs(
    target: int, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    # Every third record goes through.
    captions = ["a bee", "nobody", "a ghost"] * 20
    options: dict[str, Any] = {
        "source": {"use": "trial-source", "captions": captions},
        "captioner": None,
        "extractor": "trial-extractor",
        "grounder": "trial-grounder",
    }
    made = []
    for size in (1, 4, 100):
        path = write_recipe(shard_size=size, **options)
        run = generate(load_recipe(path), tmp_path / f"{size}", target_accepted=target)
        ended = outcome_counts(run)
        assert target <= ended.accepted <= target + 3
        assert ended.total < 60
        made.append(published(run, tmp_path / f"dataset{size}"))
        # It is reached: nothing more is planned.
        generate(load_recipe(path), tmp_path / f"{size}", target_accepted=target)
        assert outcome_counts(run) == ended
    assert made[0] == made[1] == made[2]


def test_a_target_beyond_the_source_takes_all_of_it(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe())
    run = generate(recipe, tmp_path / "run", target_accepted=100)
    assert (run.plan().rows, run.plan().complete) == (7, True)
    limited = generate(recipe, tmp_path / "limited", limit=3, target_accepted=100)
    assert limited.plan().rows == 3


# -- filters of the whole run that decide on what follows ------------------------------------------

PAIRS = """
part: rewrite
seed: 3
shard_size: 2
candidates: 2
source:
  use: instruct-pix2pix
  path: {path}
  pairs: true
pipeline: {{planner: fake-planner}}
filters: [{{use: eq1, reject_fraction: 0.4}}, diversity]
"""


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Ten pairs of which each changes less than the one before; and a recipe that rewrites them."""
    root = tmp_path / "pairs"
    seeds = []
    for number in range(10):
        folder = root / f"{number:02d}"
        folder.mkdir(parents=True)
        prompt = {"input": "a bee", "edit": "turn it into a rabbit", "output": "a rabbit"}
        (folder / "prompt.json").write_text(json.dumps(prompt))
        Image.new("RGB", (16, 16), (0, 0, 0)).save(folder / "7_0.jpg")
        Image.new("RGB", (16, 16), (250 - 20 * number, 0, 0)).save(folder / "7_1.jpg")
        seeds.append([f"{number:02d}", ["7"]])
    (root / "seeds.json").write_text(json.dumps(seeds))
    path = tmp_path / "pairs.yaml"
    path.write_text(PAIRS.format(path=root))
    return path


def test_a_rank_is_taken_anew_when_the_run_grows(pairs: Path, tmp_path: Path) -> None:
    # Of the first three the last goes; of all ten the last four: the third is let through then.
    recipe = load_recipe(pairs)
    run = generate(recipe, tmp_path / "run", limit=3)
    assert [o.stage for o in read_outcomes(run)] == ["", "", "score-eq1"]
    run = generate(recipe, tmp_path / "run", limit=math.inf)
    whole = generate(recipe, tmp_path / "whole")
    assert [o.stage for o in read_outcomes(run)] == [""] * 6 + ["score-eq1"] * 4
    assert published(run, tmp_path / "a") == published(whole, tmp_path / "b")


@pytest.mark.parametrize(
    "filters", ["filters=[]", "filters.0.reject_fraction=0.2", "filters=[diversity]"]
)
def test_a_run_that_another_recipe_made_grow_goes_on(
    filters: str, pairs: Path, tmp_path: Path
) -> None:
    # Both share what comes before the filters; the ranks of the one are taken anew.
    one, other, out = load_recipe(pairs), load_recipe(pairs, [filters]), tmp_path / "run"
    generate(one, out, limit=3)
    generate(other, out, limit=math.inf)
    run = generate(one, out)
    whole = generate(one, tmp_path / "whole")
    assert published(run, tmp_path / "a") == published(whole, tmp_path / "b")


# -- what a source lists --------------------------------------------------------------------------


def test_what_a_source_lists_twice_is_taken_once(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "same-as-a.png"):
        Image.new("RGB", (20, 20), "navy").save(images / name)
    listed = [{"id": n, "file_name": f} for n, f in enumerate(["a.png", "same-as-a.png", "a.png"])]
    (tmp_path / "v3det.json").write_text(json.dumps({"images": listed}))
    source = {"use": "v3det", "annotations": str(tmp_path / "v3det.json"), "images": str(images)}
    run = generate(load_recipe(write_recipe(source=source)), tmp_path / "run")
    ends = [(o.sample.item.native_id, o.status, o.reason) for o in read_outcomes(run)]
    assert sorted(ends) == [
        ("a.png", "ok", ""),
        ("a.png", "rejected", "the source lists it twice"),
        ("same-as-a.png", "ok", ""),  # another file, though of equal pixels
    ]
    assert len({o.sample.record_id for o in read_outcomes(run)}) == 3


# -- the command line -----------------------------------------------------------------------------


def test_the_command_line_grows_a_run(
    shell: Shell, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    command = ("generate", write_recipe(), "--out", "run")
    assert "2 of 2 records" in shell(*command, "--limit", "2", "--shard-size", "2").stdout
    assert "2 of 2 records" in shell(*command).stdout
    smaller = shell(*command, "--limit", "1")
    assert smaller.returncode == 1
    assert smaller.stderr == (
        "2 records are already planned, and a run cannot shrink; give --limit 2 or more, "
        "or another --out\n"
    )
    assert "4 of 4 records" in shell(*command, "--target-accepted", "3").stdout
    assert "7 of 7 records" in shell(*command, "--limit", "all").stdout
    wrong = shell(*command, "--limit", "few")
    assert (wrong.returncode, "'few' is neither a number of images" in wrong.stderr) == (2, True)


# -- where nothing can be written -----------------------------------------------------------------

FULL = """
import resource, signal, sys
from reasonpix.cli.main import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
cli(sys.argv[2:])
"""


def test_a_full_disk_stops_the_run_and_loses_nothing(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    # The system refuses to write files beyond a size, as a full disk refuses any.
    source = {"use": "fake-source", "count": 8}
    path, out = write_recipe(source=source, shard_size=2, filters=["no-op"]), tmp_path / "run"
    generate(load_recipe(path), tmp_path / "whole")
    sizes = [p.stat().st_size for p in (tmp_path / "whole").rglob("*.parquet")]
    code = [sys.executable, "-c", FULL, str(max(sizes) - 1)]
    done = subprocess.run(
        [*code, "generate", str(path), "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(TRIAL)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "cannot be written: File too large; make room, then run the same" in done.stderr
    assert "Traceback" not in done.stderr
    kept = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.parquet")}
    assert kept
    assert not list(out.rglob("*.tmp"))
    run = generate(load_recipe(path), out)
    after = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.parquet")}
    assert kept.items() <= after.items()
    assert published(run, tmp_path / "a") == published(
        RunFolder(tmp_path / "whole"), tmp_path / "b"
    )


@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_written(out: str, write_recipe: WriteRecipe) -> None:
    with pytest.raises(RunError, match=f"{out}.* cannot be written: .*name another"):
        generate(load_recipe(write_recipe()), out)


def test_drafts_of_killed_processes_are_removed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out = load_recipe(write_recipe()), tmp_path / "run"
    generate(recipe, out)
    (stage,) = (out / "stages").glob("edit-*")
    drafts = [stage / ".000000.parquet.123.tmp", out / ".plan.json.123.tmp"]
    for draft in drafts:
        draft.write_bytes(b"half")
    (out / "stages" / ".edit-old.123.tmp").mkdir()
    generate(recipe, out)
    assert not list(out.rglob(".*.tmp"))


# -- resources ------------------------------------------------------------------------------------


def test_resources_change_nothing_that_is_published(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(filters=["no-op"])
    plain = generate(load_recipe(path), tmp_path / "plain")
    body = yaml.safe_load(path.read_text())
    body["resources"] = {"edit": {"num_gpus": 0.5, "actors": 3}, "score-no-op": {"num_cpus": 2}}
    path.write_text(yaml.safe_dump(body))
    recipe = load_recipe(path)
    run = generate(recipe, tmp_path / "run")
    assert recipe.resources["edit"].actors == 3
    assert (tmp_path / "run" / "stages.json").read_bytes() == (
        tmp_path / "plain" / "stages.json"
    ).read_bytes()
    assert published(run, tmp_path / "a") == published(plain, tmp_path / "b")
    # The resolved recipe gives the same again.
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.resources == recipe.resources
