"""Runs on S3 that are killed end like undisturbed local ones."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from reasonpix.core.remote_storage import RemoteStorage
from reasonpix.datasets.publishing import publish
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.statistics import spending
from tests.conftest import Distribution, WriteRecipe
from tests.promises.test_llm_runs import PARROT
from tests.support.processes import kill, python
from tests.support.s3_server import needs_s3

GENERATE = """
import sys
from pathlib import Path
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
generate(load_recipe(Path(sys.argv[1])), sys.argv[2])
"""


@needs_s3
def test_a_run_on_s3_that_is_killed_again_and_again_ends_like_an_undisturbed_local_one(
    s3: str, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    recipe = write_recipe(shard_size=3, source={"use": "fake-source", "count": 75})
    storage, luck = RemoteStorage(s3), random.Random(1)
    for _ in range(2):
        with python(GENERATE, str(recipe), s3) as run:
            before = storage.size("stages")
            while run.poll() is None and storage.size("stages") == before:
                time.sleep(0.05)
            time.sleep(luck.random() / 4)
            kill(run)
        assert run.returncode == -signal.SIGKILL  # and not at its end already
        assert storage.exists("holder")
    published = []
    for out in (s3, str(tmp_path / "local")):
        done = generate(load_recipe(recipe), out)
        dataset = tmp_path / f"published-{len(published)}"
        publish(done, dataset)
        published.append(files(dataset))
    assert published[0] == published[1]
    assert not storage.exists("holder")
    shards = [
        f"stages/{stage}/{name}"
        for stage in storage.folders("stages")
        for name in storage.names(f"stages/{stage}")
    ]
    assert shards
    for name in (*shards, "plan.json", "stages.json"):
        assert storage.read(name) == (tmp_path / "local" / name).read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@needs_s3
def test_a_run_on_s3_that_is_killed_while_it_asks_asks_nothing_again_that_was_answered(
    s3: str,
    tmp_path: Path,
    write_recipe: WriteRecipe,
    distribution: Distribution,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    site = distribution("reasonpix-parrot", {"parrot": "parrot"}, parrot=PARROT)
    log, kills = tmp_path / "asked.txt", 2
    log.touch()
    planner = {"use": "parrot", "log": str(log)}
    recipe = write_recipe(planner=planner, shard_size=5, source={"use": "fake-source", "count": 40})
    for _ in range(kills):
        before = len(log.read_text().splitlines())
        with python(GENERATE, str(recipe), s3, PYTHONPATH=str(site)) as run:
            while run.poll() is None and len(log.read_text().splitlines()) < before + 9:
                time.sleep(0.005)
            kill(run)
        assert run.returncode == -signal.SIGKILL
    done = generate(load_recipe(recipe), s3)
    shutil.rmtree(tmp_path / "state")  # all is in the run folder
    spent = spending(done)
    asked = len(log.read_text().splitlines())
    assert spent.answers <= asked <= spent.answers + kills  # one call is under way at a time
    local = generate(load_recipe(recipe), tmp_path / "local")
    assert spending(local).answers == spent.answers
