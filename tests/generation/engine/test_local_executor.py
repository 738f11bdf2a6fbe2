"""Stages in threads: overlap, turns, memory, and how a run ends before its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import TRIAL, Distribution, WriteRecipe

WATCHED = '''
"""Components that write down what happens to them."""
import json, os, threading, time
from pathlib import Path
from pydantic import Field
from reasonpix.errors import ReasonpixError
from reasonpix.plugin.fakes import FakeCaptioner, FakeCaptionerOptions
from reasonpix.plugin.fakes import FakeEditor, FakeEditorOptions
from reasonpix.plugin.fakes import FakeGrounder
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.components import (Options)

def tell(**facts):
    with open(os.environ["WATCHED"], "a") as log:
        log.write(json.dumps({"time": time.monotonic(), **facts}) + "\\n")

class Pausing(Options):
    pause_s: float = Field(0.0, description="Seconds of each batch")
    fingerprint_exclude = frozenset({"pause_s"})

class CaptionerOptions(FakeCaptionerOptions, Pausing):
    holds: int = Field(1000, description="Images that memory holds")
    error: str = Field("MemoryError", description="What it raises beyond")
    spoils: bool = Field(False, description="Paints over the images that it is given")
    stumbles: Path | None = Field(None, description="Over the reds in this file, while it is there")

class Captioner(FakeCaptioner):
    name = "watched-captioner"
    Options = CaptionerOptions
    def load(self):
        tell(what="load", who="captioner")
    def close(self):
        tell(what="close", who="captioner")
    def caption(self, images):
        tell(what="begin", who="captioner", size=len(images))
        if self.options.stumbles and self.options.stumbles.exists():
            reds = self.options.stumbles.read_text().split()
            if any(str(image.getpixel((0, 0))[0]) in reds for image in images):
                raise ValueError("stumbled")
        if len(images) > self.options.holds:
            if self.options.error == "MemoryError":
                raise MemoryError
            raise RuntimeError(self.options.error)
        time.sleep(self.options.pause_s)
        if self.options.spoils:
            for image in images:
                image.paste((1, 2, 3), (0, 0, *image.size))
        tell(what="end", who="captioner", size=len(images))
        return super().caption(images)

class Grounder(FakeGrounder):
    name = "watched-grounder"
    Options = Pausing
    def load(self):
        tell(what="load", who="grounder")
    def close(self):
        tell(what="close", who="grounder")
    def ground(self, images, categories):
        tell(what="begin", who="grounder", size=len(images), thread=threading.get_ident())
        time.sleep(self.options.pause_s)
        tell(what="end", who="grounder", size=len(images))
        return super().ground(images, categories)

class EditorOptions(FakeEditorOptions, Pausing):
    broken: Path | None = Field(None, description="While this file is there, it stumbles")

class Editor(FakeEditor):
    name = "watched-editor"
    Options = EditorOptions
    def load(self):
        tell(what="load", who="editor")
    def close(self):
        tell(what="close", who="editor")
    def edit(self, requests):
        tell(what="begin", who="editor", size=len(requests))
        if self.options.broken and self.options.broken.exists():
            reds = self.options.broken.read_text().split()
            if any(str(r.image.getpixel((0, 0))[0]) in reds for r in requests):
                raise ValueError("no network")
        time.sleep(self.options.pause_s)
        tell(what="end", who="editor", size=len(requests))
        return super().edit(requests)

@hookimpl
def captioners():
    return [Captioner]
@hookimpl
def grounders():
    return [Grounder]
@hookimpl
def editors():
    return [Editor]
'''

Watch = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def watch(distribution: Distribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The watched components, installed, and what happened to them."""
    import json

    names = ["watched-captioner", "watched-grounder", "watched-editor"]
    site = distribution("watched", dict.fromkeys(names, "watched"), watched=WATCHED)
    log = tmp_path / "watched.jsonl"
    log.touch()
    monkeypatch.setenv("WATCHED", str(log))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(TRIAL)]))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def pausing(name: str, pause_s: float, **more: Any) -> dict[str, Any]:
    return {"use": f"watched-{name}", "pause_s": pause_s, **more}


def ends(run: RunFolder) -> list[tuple[str, str, str]]:
    return [(o.status, o.stage, o.reason) for o in read_outcomes(run)]


def files(out: Path) -> dict[str, bytes]:
    kept = [path for path in out.rglob("*.parquet")] + [out / "plan.json", out / "stages.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept}


# -- at the same time -----------------------------------------------------------------------------


def test_stages_are_at_work_at_the_same_time(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(
        source={"use": "fake-source", "count": 12},
        shard_size=1,
        captioner=pausing("captioner", 0.05),
        grounder=pausing("grounder", 0.05),
        editor=pausing("editor", 0.05),
    )
    generate(load_recipe(path), tmp_path / "run")
    under_way: set[str] = set()
    together = set()
    for line in watch():
        if line["what"] == "begin":
            under_way.add(line["who"])
            together.add(frozenset(under_way))
        elif line["what"] == "end":
            under_way.discard(line["who"])
    assert frozenset({"captioner", "grounder", "editor"}) in together


def test_a_component_is_shared_and_used_by_one_at_a_time(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    # The filter asks the grounder, too, while it grounds other shards.
    path = write_recipe(
        source={"use": "fake-source", "count": 6},
        shard_size=1,
        grounder=pausing("grounder", 0.02),
        filters=["regrounded"],
    )
    generate(load_recipe(path), tmp_path / "run")
    told = [line["what"] for line in watch() if line["who"] == "grounder"]
    assert told == ["load", *["begin", "end"] * 12, "close"]
    threads = {line["thread"] for line in watch() if "thread" in line}
    assert len(threads) == 2


def test_a_component_that_paints_over_its_images_spoils_no_other_stage(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    made = []
    for spoils in (False, True):
        captioner = pausing("captioner", 0, spoils=spoils)
        path = write_recipe(captioner=captioner, filters=["no-op"])
        run = generate(load_recipe(path), tmp_path / f"{spoils}")
        made.append([o.sample.edited_png() for o in read_outcomes(run)])
    assert made[0] == made[1]


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        "MemoryError",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_a_batch_that_memory_does_not_hold_is_halved_and_the_limit_remembered(
    error: str, watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = {"use": "fake-source", "count": 20}
    captioner = pausing("captioner", 0, holds=3, error=error)
    path = write_recipe(source=source, shard_size=10, captioner=captioner)
    run = generate(load_recipe(path), tmp_path / "run")
    assert [status for status, *_ in ends(run)] == ["ok"] * 20
    sizes = [line["size"] for line in watch() if line["what"] == "begin"]
    assert sizes == [10, 5, 3, 3, 3, 1, 3, 3, 3, 1]

    whole = write_recipe("whole.yaml", source=source, shard_size=10, captioner="watched-captioner")
    other = generate(load_recipe(whole), tmp_path / "whole")
    assert [o.sample.caption for o in read_outcomes(run)] == [
        o.sample.caption for o in read_outcomes(other)
    ]


def test_an_image_that_memory_does_not_hold_alone_fails_alone(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    captioner = pausing("captioner", 0, holds=0, error="CUDA out of memory")
    run = generate(load_recipe(write_recipe(captioner=captioner)), tmp_path / "run")
    assert ends(run) == [("failed", "caption", "RuntimeError: CUDA out of memory")] * 7


@pytest.mark.parametrize("share", [0, 0.6])
def test_models_that_do_not_fit_together_take_turns(
    share: float, watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(
        shard_size=2,
        captioner=pausing("captioner", 0.01),
        grounder=pausing("grounder", 0.01),
        editor=pausing("editor", 0.01),
    )
    memory_gb = share * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    path.write_text(
        path.read_text()
        + f"resources: {{ground: {{memory_gb: {memory_gb}}}, edit: {{memory_gb: {memory_gb}}}}}\n"
    )
    generate(load_recipe(path), tmp_path / "run")
    told = [(line["what"], line["who"]) for line in watch() if line["what"] in ("load", "close")]
    loads = [("load", "captioner"), ("load", "grounder"), ("load", "editor")]
    closes = [("close", "captioner"), ("close", "grounder"), ("close", "editor")]
    if share:
        assert told == [*loads[:2], *closes[:2], loads[2], closes[2]]
    else:
        assert told == loads + closes


# -- the end before the end -----------------------------------------------------------------------


def started(path: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "reasonpix", "generate", str(path), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_what_is_at_work_and_says_how_to_go_on(
    number: signal.Signals, watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(
        source={"use": "fake-source", "count": 40}, shard_size=2, editor=pausing("editor", 0.2)
    )
    out = tmp_path / "run"
    process = started(path, out)
    wait_for(lambda: sum(line["who"] == "editor" for line in watch()) > 3)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert told.splitlines() == [
        "stopping after the shards at work are finished",
        "stopped; run the same command again to continue",
    ]
    begun = [line for line in watch() if line["who"] == "editor" and line["what"] == "begin"]
    edited = list((out / "stages").glob("edit-*/*.parquet"))
    assert 0 < len(edited) == len(begun) < 20
    assert not list(out.rglob("*.tmp"))
    # Each unit that was finished is in the journal, but for one that was just being told of.
    units = [line for line in RunFolder(out).journal() if "ok" in line]
    assert 0 <= len(list((out / "stages").glob("*-*/*.parquet"))) - len(units) <= 1
    generate(load_recipe(path), out)
    generate(load_recipe(path), tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_second_signal_does_not_wait(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(editor=pausing("editor", 60))
    process = started(path, tmp_path / "run")
    wait_for(lambda: any(line["who"] == "editor" and line["what"] == "begin" for line in watch()))
    process.send_signal(signal.SIGINT)
    assert process.stderr and process.stderr.readline().startswith("stopping")
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert time.monotonic() - before < 10
    assert process.returncode == 130
    assert "run the same command again to continue" in told


def test_what_one_stage_raises_stops_the_others(
    watch: Watch, write_recipe: WriteRecipe, distribution: Distribution, tmp_path: Path
) -> None:
    from reasonpix.errors import ReasonpixError

    broke = WATCHED.replace('raise ValueError("no network")', 'raise ReasonpixError("no key")')
    site = broke.replace("watched-", "broke-")
    names = ["broke-captioner", "broke-grounder", "broke-editor"]
    distribution("broke", dict.fromkeys(names, "broke"), broke=site)
    broken = tmp_path / "broken"
    broken.write_text("64")
    editor = {"use": "broke-editor", "broken": str(broken)}
    path = write_recipe(source={"use": "fake-source", "count": 30}, shard_size=1, editor=editor)
    with pytest.raises(ReasonpixError, match="no key"):
        generate(load_recipe(path), tmp_path / "run")
    broken.unlink()
    run = generate(load_recipe(path), tmp_path / "run")
    assert [status for status, *_ in ends(run)] == ["ok"] * 30


# -- once more ------------------------------------------------------------------------------------


def test_what_failed_is_computed_anew_and_nothing_else(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    editor = pausing("editor", 0, broken=str(broken))
    path = write_recipe(
        source={"use": "fake-source", "count": 9},
        shard_size=3,
        editor=editor,
        filters=["no-op", {"use": "eq1", "reject_fraction": 0.4}],
    )
    recipe, out = load_recipe(path), tmp_path / "run"
    whole = generate(recipe, tmp_path / "whole")
    reds = [o.sample.image().getpixel((0, 0))[0] for o in read_outcomes(whole)]
    broken.write_text(f"{reds[4]} {reds[8]}")
    run = generate(recipe, out)
    failed = [(status, stage) for status, stage, _ in ends(run)].count(("failed", "edit"))
    assert failed == 2
    generate(recipe, out)
    assert ends(run).count(("failed", "edit", "ValueError: no network")) == 2

    broken.unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    asked = len(watch())
    generate(recipe, out, retry_failed=True)
    begun = [line for line in watch()[asked:] if line["what"] == "begin"]
    assert [(line["who"], line["size"]) for line in begun] == [("editor", 1)] * 2
    assert files(out) == files(tmp_path / "whole")
    changed = {p.stem for p, mtime in before.items() if p.stat().st_mtime_ns != mtime}
    assert changed == {"000001", "000002"}
    # And when nothing failed, nothing is done.
    generate(recipe, out, retry_failed=True)
    assert files(out) == files(tmp_path / "whole")


def test_a_retry_that_is_killed_loses_nothing(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    editor = pausing("editor", 0, broken=str(broken))
    path = write_recipe(shard_size=2, editor=editor, filters=["no-op"])
    recipe, out = load_recipe(path), tmp_path / "run"
    whole = generate(recipe, tmp_path / "whole")
    reds = [o.sample.image().getpixel((0, 0))[0] for o in read_outcomes(whole)]
    broken.write_text(f"{reds[1]} {reds[5]}")
    generate(recipe, out)
    # As a process leaves it that was killed after it had reopened the shards.
    from reasonpix.generation.engine.reopening import reopen_failed
    from reasonpix.generation.pipeline import stages_of

    reopen_failed(RunFolder(out), stages_of(recipe))
    assert len(list(out.rglob("*.partial.parquet"))) == 2
    broken.unlink()
    generate(recipe, out)
    assert files(out) == files(tmp_path / "whole")


def stumbling(write_recipe: WriteRecipe, name: str, broken: Path, **changes: Any) -> Path:
    """A recipe whose captioner stumbles over an image while the file `broken` is there."""
    captioner = {"use": "watched-captioner", "stumbles": str(broken)}
    return write_recipe(name, shard_size=2, captioner=captioner, **changes)


def test_a_retry_leaves_other_recipes_in_the_folder_whole(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    # Both share read and caption; the caption that failed is mended by the one.
    broken, out = tmp_path / "broken", tmp_path / "run"
    broken.write_text("64")
    one = load_recipe(stumbling(write_recipe, "one.yaml", broken, editor="watched-editor"))
    other = load_recipe(stumbling(write_recipe, "other.yaml", broken, filters=["no-op"]))
    generate(one, out)
    generate(other, out)
    assert [status for status, *_ in ends(RunFolder(out))].count("failed") == 1
    broken.unlink()
    generate(other, out, retry_failed=True)
    assert [status for status, *_ in ends(RunFolder(out))].count("failed") == 0
    run = generate(one, out)
    assert [status for status, *_ in ends(run)] == ["ok"] * 7


@pytest.mark.parametrize("stages", [["caption", "ground"], ["read"], ["plan", "score-no-op"]])
def test_a_file_that_is_deleted_is_made_again_with_all_that_follows(
    stages: list[str], watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(shard_size=3, filters=["no-op", {"use": "eq1", "reject_fraction": 0.3}])
    out = tmp_path / "run"
    generate(load_recipe(path), out)
    before = files(out)
    for stage in stages:
        (folder,) = (out / "stages").glob(f"{stage}-*")
        (folder / "000001.parquet").unlink()
    generate(load_recipe(path), out)
    assert files(out) == before


def test_of_a_finished_shard_and_one_to_be_completed_the_finished_counts(
    watch: Watch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    broken, out = tmp_path / "broken", tmp_path / "run"
    broken.write_text("64")
    recipe = load_recipe(stumbling(write_recipe, "recipe.yaml", broken))
    run = generate(recipe, out)
    # As a process leaves it that was killed between writing the one and removing the other.
    for whole in (out / "stages").glob("*-*/*.parquet"):
        whole.with_name(f"{whole.stem}.partial.parquet").write_bytes(whole.read_bytes())
    generate(recipe, out)
    broken.unlink()
    generate(recipe, out, retry_failed=True)
    assert [status for status, *_ in ends(run)] == ["ok"] * 7
