"""Runs on Ray: the bytes of a local run, whatever happens to workers, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from reasonpix.generation.run_folder import RunFolder
from tests.conftest import TRIAL

pytest.importorskip("ray", reason="the extra reasonpix[ray] is not installed")

ODD = '''
"""An editor that misbehaves where the options name a folder for its marks."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from reasonpix_trial import TrialEditor, TrialOptions

from reasonpix.errors import WeightsError
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.llm.types import Completion
from reasonpix.llm.planner import LLMPlanner, LLMPlannerOptions
from reasonpix.plugin.components import (Options)


class OddOptions(TrialOptions):
    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"pause_s", "marks"})

    marks: Path | None = Field(None, description="Where it notes who was asked; None: be good")


class OddEditor(TrialEditor):
    name: ClassVar[str] = "odd-editor"
    Options: ClassVar[type[Options]] = OddOptions

    def edit(self, requests):
        if self.options.marks:
            for request in requests:
                self.act(request.selected)
        return super().edit(requests)

    def act(self, cue):
        marks = self.options.marks
        with (marks / cue).open("a") as mark:
            mark.write(f"{os.getpid()}\\n")
        is_first = len((marks / cue).read_text().split()) == 1
        if cue == "dies-once" and is_first or cue == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if cue == "hangs-once" and is_first or cue == "hangs":
            time.sleep(60)
        if cue == "stops":
            raise WeightsError("the weights went away")


class ParrotOptions(LLMPlannerOptions):
    fingerprint_exclude: ClassVar[frozenset[str]] = LLMPlannerOptions.fingerprint_exclude | {"log"}

    log: Path = Field(description="Where it notes what happened")


class Parrot(LLMPlanner[ParrotOptions]):
    name: ClassVar[str] = "odd-parrot"
    Options: ClassVar[type[Options]] = ParrotOptions
    max_answer_tokens = 30
    concurrency = 4
    busy = 0
    lock = threading.Lock()

    def complete(self, conversations):
        with self.lock:
            Parrot.busy += len(conversations)
            note = f"{os.getpid()} {os.environ['PARROT_KEY']} {Parrot.busy}\\n"
            with self.options.log.open("a") as log:
                log.write(note)
        time.sleep(0.1)
        with self.lock:
            Parrot.busy -= len(conversations)
        answer = {"selected": "bee", "target": "pear", "instruction": "Something sweet, please.",
                  "selected_synonyms": [], "target_synonyms": []}
        return [Completion(text=json.dumps(answer), prompt_tokens=1000, completion_tokens=20)
                for _ in conversations]


@hookimpl
def editors():
    return [OddEditor]


@hookimpl
def planners():
    return [Parrot]
'''
PER_SHARD = 3
LIGHT = {"num_cpus": 0.1}


class Place:
    """A folder with a plugin, recipes, and a local run of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        site = root / "site"
        info = site / "odd-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[reasonpix]\nodd-editor = odd\nodd-parrot = odd\n")
        (site / "odd.py").write_text(ODD)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(site), str(TRIAL))),
            "HOME": str(root),  # where Ray keeps the key of its clusters
            "RAY_AUTH_MODE": "token",
            "PARROT_KEY": "of-the-driver",
        }

    def recipe(
        self,
        shards: list[str],
        marks: Path | None = None,
        pause_s: float = 0,
        planner: object = "trial-planner",
        **resources: dict[str, object],
    ) -> Path:
        """A recipe of `shards`, each a cue; `resources` of stages that take more than a little."""
        captions = [f"a {cue} and a bee" for cue in shards for _ in range(PER_SHARD)]
        stages = ("read", "caption", "extract", "ground", "plan", "edit", "score-no-op")
        editor = {"use": "odd-editor", "pause_s": pause_s}
        if marks:
            marks.mkdir(exist_ok=True)
            editor["marks"] = str(marks)
        recipe = {
            "shard_size": PER_SHARD,
            "source": {"use": "trial-source", "captions": captions},
            "pipeline": {
                "extractor": "trial-extractor",
                "grounder": "trial-grounder",
                "planner": planner,
                "editor": editor,
            },
            "filters": ["no-op"],
            "resources": {stage: LIGHT | resources.get(stage, {}) for stage in stages},
        }
        path = self.root / f"recipe{len(list(self.root.glob('recipe*')))}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    def start(self, recipe: Path, out: Path, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "reasonpix",
                "generate",
                recipe,
                "--out",
                out,
                *options,
            ],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, recipe: Path, out: Path, *options: str) -> tuple[int, str]:
        """The exit status, and all that it wrote."""
        with self.start(recipe, out, *options) as process:
            output, errors = process.communicate()
        return process.returncode, output + errors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("cluster"))


HEAD = """
import logging, sys
import ray
ray.init(
    address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=2,
    object_store_memory=10**8, logging_level=logging.CRITICAL,
)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(place: Place) -> Iterator[str]:
    """The address of a running cluster of this machine."""
    with subprocess.Popen(
        [sys.executable, "-c", HEAD],
        env={
            **place.environment,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "PARROT_KEY": "of-the-cluster",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


def stored(out: Path) -> dict[str, bytes]:
    """What two runs of one recipe have in common, byte for byte."""
    files = [out / "plan.json", *(out / "stages").rglob("*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.is_file()}


def without(stage: str, done: Path, out: Path) -> Path:
    """A copy of a run in which one stage has still to be done."""
    shutil.copytree(done, out)
    (folder,) = out.glob(f"stages/{stage}-*")
    shutil.rmtree(folder)
    (out / "journal.jsonl").unlink()
    return out


def listed(marks: Path, cue: str) -> list[str]:
    """The processes that were asked for an edit of `cue`, one line a record."""
    return (marks / cue).read_text().split()


def test_a_cluster_gives_the_bytes_of_a_local_run_whatever_happens_to_its_workers(
    place: Place, cluster: str, tmp_path: Path
) -> None:
    shards = ["calm", "dies-once", "hangs-once", "good", "fine"]
    status, told = place.run(place.recipe(shards), tmp_path / "local")
    assert status == 0, told
    out, marks = without("edit", tmp_path / "local", tmp_path / "ray"), tmp_path / "marks"
    recipe = place.recipe(shards, marks, edit={"timeout_s": 4, "recycle_after": 2})
    status, told = place.run(recipe, out, "--executor", "ray", "--address", cluster)
    assert status == 0, told
    assert stored(out) == stored(tmp_path / "local")
    # Each died or hung over one shard, which alone was done again by another process.
    for cue in ("dies-once", "hangs-once"):
        assert len(listed(marks, cue)) == 1 + PER_SHARD
        assert len(set(listed(marks, cue))) == 2
    for cue in ("calm", "good", "fine"):
        assert len(listed(marks, cue)) == PER_SHARD
    # No process did more than two shards.
    everyone = {pid for cue in shards for pid in listed(marks, cue)}
    did = {pid: sum(pid in listed(marks, cue) for cue in shards) for pid in everyone}
    assert len(everyone) >= 4 and max(did.values()) == 2
    assert "\033" not in told and "raylet" not in told
    # Also what a replaced worker told again is noted once.
    notes = Counter((n["stage"], n["shard"]) for n in RunFolder(out).journal() if "ok" in n)
    assert set(notes.values()) == {1} and len(notes) == 2 * len(shards)


def test_a_shard_that_hangs_or_kills_again_and_again_fails_with_a_reason(
    place: Place, cluster: str, tmp_path: Path
) -> None:
    shards = ["calm", "hangs", "dies", "good"]
    status, told = place.run(place.recipe(shards), tmp_path / "local")
    assert status == 0, told
    out, marks = without("edit", tmp_path / "local", tmp_path / "ray"), tmp_path / "marks"
    recipe = place.recipe(shards, marks, edit={"timeout_s": 2})
    status, told = place.run(recipe, out, "--executor", "ray", "--address", cluster)
    assert status == 0, told
    run = RunFolder(out)
    (edits,) = (folder.name for folder in out.glob("stages/edit-*"))
    ends = {
        cue: {(status, reason) for _, status, reason in run.ends(edits, shard)}
        for cue, shard in zip(shards, run.shards(), strict=True)
    }
    assert ends == {
        "calm": {("ok", "")},
        "hangs": {("failed", "took longer than 2 s, twice")},
        "dies": {("failed", "its worker died repeatedly")},
        "good": {("ok", "")},
    }
    assert not list(out.rglob("*.timeouts"))


def test_an_error_of_a_component_stops_the_run_with_its_own_words(
    place: Place, cluster: str, tmp_path: Path
) -> None:
    shards = ["calm", "stops", "good"]
    status, told = place.run(place.recipe(shards), tmp_path / "local")
    assert status == 0, told
    out, marks = without("edit", tmp_path / "local", tmp_path / "ray"), tmp_path / "marks"
    recipe = place.recipe(shards, marks)
    status, told = place.run(recipe, out, "--executor", "ray", "--address", cluster)
    assert status == 1
    assert "the weights went away" in told
    assert "Traceback" not in told and len(told.splitlines()) < 25


@pytest.mark.parametrize("asked", [{"num_cpus": 3}, {"actors": 30}, {"num_gpus": 9}])
def test_what_the_cluster_never_has_is_told_at_once(
    place: Place, cluster: str, tmp_path: Path, asked: dict[str, object]
) -> None:
    recipe = place.recipe(["calm"], edit=asked)
    status, told = place.run(recipe, tmp_path / "out", "--executor", "ray", "--address", cluster)
    assert status == 1
    assert "stage edit asks for" in told and "2 CPUs" in told
    assert not (tmp_path / "out" / "stages" / "edit").exists()


def test_one_process_with_the_drivers_environment_asks_the_language_model(
    place: Place, cluster: str, tmp_path: Path
) -> None:
    log, here = tmp_path / "log", ("--executor", "ray", "--address", cluster)
    price = {"prompt": 1.0, "completion": 10.0}
    parrot = {"use": "odd-parrot", "log": str(log), "price": price}
    shards = ["calm", "good", "fine", "well"]
    recipe = place.recipe(shards, planner=parrot)
    status, told = place.run(recipe, tmp_path / "local")
    assert status == 0, told
    out = without("plan", tmp_path / "local", tmp_path / "ray")
    (out / "llm.sqlite").unlink()
    log.unlink()
    of_one = (1000 * 1.0 + 20 * 10.0) / 1e6
    status, told = place.run(recipe, out, *here, "--max-cost", f"{10 * of_one:f}")
    assert status == 1 and "max-cost" in told and "Traceback" not in told
    assert 0 < len(log.read_text().splitlines()) <= 10
    status, told = place.run(recipe, out, *here)
    assert status == 0, told
    assert stored(out) == stored(tmp_path / "local")
    assert "12 of 12 records accepted" in told and "Warning" not in told
    # No question was asked twice, several were asked at once.
    asked = [line.split() for line in log.read_text().splitlines()]
    assert len(asked) == PER_SHARD * len(shards)
    assert len({pid for pid, _, _ in asked}) == 2
    assert {key for _, key, _ in asked} == {"of-the-driver"}
    assert max(int(busy) for _, _, busy in asked) == 4
    many = place.recipe(shards, planner=parrot, plan={"actors": 2})
    status, told = place.run(many, tmp_path / "many", *here)
    assert status == 2 and "resources.plan.actors" in told


# -- A cluster of this machine alone --------------------------------------------------------------


def relatives(pid: int) -> set[int]:
    """A process and all that it started, and what those started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            facts = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(facts[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> set[str]:
    """The addresses, as the kernel writes them, on which processes wait for connections."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(descriptor))
            except OSError:
                continue
    return {
        fields[1].partition(":")[0]
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:])
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets
    }


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def gone(pids: set[int], within_s: float) -> set[int]:
    """Those that are still there after so many seconds."""
    deadline = time.monotonic() + within_s
    while (left := {pid for pid in pids if is_alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def test_a_local_cluster_is_seen_by_nobody_and_leaves_nothing(place: Place, tmp_path: Path) -> None:
    out, marks = tmp_path / "ray", tmp_path / "marks"
    recipe = place.recipe(["calm", "good", "fine", "well"], marks, pause_s=0.5)
    process = place.start(recipe, out, "--executor", "ray")
    while not (marks / "calm").exists() and process.poll() is None:
        time.sleep(0.2)
    family = relatives(process.pid)
    assert len(family) > 5
    assert listening(family) <= LOOPBACK and listening(family)
    process.kill()
    process.communicate()
    # Two agents of Ray's, which hold nothing, look for it for a minute.
    names = {pid: Path(f"/proc/{pid}/cmdline") for pid in family}
    agents = {pid for pid, path in names.items() if path.exists() and b"Agent" in path.read_bytes()}
    assert len(agents) <= 2 and not gone(family - agents, within_s=20)
    status, told = place.run(recipe, out, "--executor", "ray")
    assert status == 0, told
    status, told = place.run(recipe, tmp_path / "local")
    assert status == 0, told
    assert stored(out) == stored(tmp_path / "local")
    for name in ("recipe.yaml", "stages.json"):
        assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert not gone(relatives(process.pid) - {process.pid}, within_s=5)
