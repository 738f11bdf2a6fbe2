"""What runs inside Ray's processes: a worker of one stage, and the desk where workers report."""

from __future__ import annotations

import faulthandler
import os
import pickle
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonpix.errors import ReasonpixError, RunError
from reasonpix.generation.engine.unit import Components, StageRunner, UnitResult
from reasonpix.generation.outcomes import StageEntry, source_of
from reasonpix.generation.pipeline import stages_of
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.run_folder import RunFolder, Shard
from reasonpix.llm.ledger import Ledger
from reasonpix.plugin.types import Problem

_DEATHS = 3
"""Workers that die over the same shard, one after the other, before its records are given up."""


@dataclass(frozen=True)
class Stopped:
    """What stops the run: the class of one of `reasonpix.errors`, and its message."""

    kind: type[ReasonpixError]
    message: str


class ProgressActor:
    """An actor beside the driver: workers tell it what they finished, and the driver asks it."""

    def __init__(self) -> None:
        self._told: list[UnitResult | Stopped] = []
        self._begun: Counter[tuple[str, str]] = Counter()

    def tell(self, fact: UnitResult | Stopped) -> None:
        """Keep it for the driver."""
        self._told.append(fact)

    def take(self) -> list[UnitResult | Stopped]:
        """What was told since it was last asked."""
        told, self._told = self._told, []
        return told

    def begin(self, what: str, which: str) -> int:
        """How often this was begun before and not ended: its processes died over it."""
        self._begun[what, which] += 1
        return self._begun[what, which] - 1

    def end(self, what: str, which: str) -> None:
        """It came to its end."""
        self._begun.pop((what, which), None)


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is to do, as it travels to its node."""

    where: str
    """The run folder: a path or a URL."""
    recipe: bytes
    """Pickled, so that a node that lacks a plugin can say so."""
    entries: tuple[StageEntry, ...]
    """The driver's stages up to the worker's own, which is the last."""
    todo: frozenset[str]
    folder: str
    """The driver's working folder; paths of a recipe are relative to it."""
    desk: Any
    ledger: Path | None = None
    """Where answers of language models are kept, for a stage that asks one."""
    max_cost: float | None = None
    environment: Mapping[str, str] | None = None
    """The driver's, for a stage that asks a language model: it may hold the key to it."""


class Worker:
    """One stage in a process of its own. Made by Ray, and called with batches of shard names."""

    def __init__(self, order: WorkerSpec) -> None:
        self._order = order
        self._folder = order.entries[-1].folder
        self._beginning, self._stopping = threading.Lock(), threading.Lock()
        self._ready = False
        self._first: str | None = None
        self._begun = 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do those of the shards that are still to be done; gives the batch back."""
        import ray

        desk, told = self._order.desk, None
        try:
            with self._beginning:
                if not self._ready:
                    self._begin()
            for name, rows in zip(batch["shard"].tolist(), batch["rows"].tolist(), strict=True):
                if name in self._order.todo:
                    told = desk.tell.remote(self._done(Shard(name, rows)))
        except ReasonpixError as error:
            kind = next(k for k in type(error).__mro__ if k.__module__ == ReasonpixError.__module__)
            if self._ready:
                # All threads wait for it: when one has told, this process is ended, and with it
                # the answers that are under way and paid for.
                with self._stopping:
                    self._components.stop()
            ray.get(desk.tell.remote(Stopped(kind, str(error))))
            raise
        if told is not None:
            ray.get(told)  # and with it all before
        return batch

    def _begin(self) -> None:
        """Load what the stage needs. Not in `__init__`: an error there would be Ray's, not ours."""
        import ray

        order = self._order
        with suppress(OSError):
            os.chdir(order.folder)
        os.environ.update(order.environment or {})
        stage = self._stage()
        self._resources = stage.resources
        self._run = RunFolder(order.where)
        self._finished = self._run.done(self._folder)
        self._late = self._time_outs() if self._resources.timeout_s else {}
        actor = ray.get_runtime_context().get_actor_id()
        if ray.get(order.desk.begin.remote("load", actor)) >= _DEATHS:
            raise RunError(
                f"stage {stage.name}: {_DEATHS} workers in a row died while they loaded their "
                f"component on {socket.gethostname()}; Ray's log says more; give each more memory "
                f"(memory_gb) in `resources` of the recipe, or run fewer (actors)"
            )
        ledger = Ledger(order.ledger, order.max_cost) if order.ledger else None
        source = source_of(self._run)
        # Nothing is closed in the end: a worker may end at any moment, whatever it holds.
        self._components = Components(source, ledger)
        self._work = StageRunner(self._run, stage, source, self._components)
        ray.get(order.desk.end.remote("load", actor))
        self._ready = True

    def _stage(self) -> Any:
        """The stage as this node's plugins make it. Raises `RunError` when they differ."""
        node = socket.gethostname()
        try:
            recipe: Recipe = pickle.loads(self._order.recipe)
        except (ImportError, AttributeError) as error:
            raise RunError(
                f"node {node} lacks a plugin of the recipe, or has another version of it: {error}; "
                "install the same packages on all nodes"
            ) from error
        stages = stages_of(recipe)
        for stage, entry in zip(stages, self._order.entries, strict=False):
            if stage.entry.folder != entry.folder:
                here, there = stage.entry.component, entry.component
                differing = [key for key in there | here if here.get(key) != there.get(key)]
                raise RunError(
                    f"node {node} would give other results in stage {entry.stage}: its "
                    f"{', '.join(differing) or 'version of reasonpix'} differs; install the same "
                    "packages and weights on all nodes"
                )
        return stages[len(self._order.entries) - 1]

    def _done(self, shard: Shard) -> UnitResult:
        """Do a shard, or say how it ended that a process before this one had finished."""
        if shard.name in self._finished:
            ends = Counter(status for _, status, _ in self._run.ends(self._folder, shard))
            return UnitResult(
                self._folder, shard.name, ends["ok"], ends["rejected"], ends["failed"], 0.0
            )
        if self._begun == self._resources.recycle_after:
            os._exit(0)  # a fresh process is handed this shard again
        self._begun += 1
        done = self._given_up(shard)
        if done is None:
            with self._watched(shard):
                done = self._work.do(shard)
        if shard.name in self._late:
            self._run.storage.remove(_late(self._folder, shard.name))
        self._finished.add(shard.name)
        return done

    # -- Shards that cost their worker

    def _given_up(self, shard: Shard) -> UnitResult | None:
        """The end of a shard that has hung or killed too many workers already."""
        import ray

        if self._late.get(shard.name, 0) >= 2:
            reason = f"took longer than {self._resources.timeout_s:g} s, twice"
        elif self._begun == 1 and (
            # A process that follows a dead one begins with the shard that was under way.
            ray.get(self._order.desk.begin.remote(self._folder, shard.name)) >= _DEATHS
        ):
            reason = "its worker died, again and again"
        else:
            return None
        samples = self._work.load(shard)
        known = self._run.known(self._folder, shard)
        failed = Problem(status="failed", reason=reason)
        results = [known.get(sample.record_id) or failed for sample in samples]
        return self._work.commit(shard, samples, results, 0.0)

    def _time_outs(self) -> dict[str, int]:
        """How often shards have taken too long, as the processes before this one wrote it down."""
        storage, stage = self._run.storage, f"stages/{self._folder}"
        late = {
            name.removesuffix(_LATE): int(storage.read(f"{stage}/{name}"))
            for name in storage.names(stage)
            if name.endswith(_LATE)
        }
        for name in late.keys() & self._finished:
            storage.remove(_late(self._folder, name))  # it was finished in the last moment
        return {name: times for name, times in late.items() if name not in self._finished}

    @contextmanager
    def _watched(self, shard: Shard) -> Iterator[None]:
        """End this process when the shard takes longer than the stage's `timeout_s`."""
        limit = self._resources.timeout_s
        if limit is None:
            yield
            return
        timer = threading.Timer(limit, self._time_out, [shard])
        timer.daemon = True
        timer.start()
        if self._order.ledger is None:
            # Code that never lets go of the interpreter's lock keeps the timer from running; this
            # does not need it. There is one for a process, so not where shards are in threads.
            faulthandler.dump_traceback_later(1.5 * limit + 5, exit=True, file=2)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            timer.cancel()

    def _time_out(self, shard: Shard) -> None:
        try:
            times = self._late.get(shard.name, 0) + 1
            self._run.storage.write(_late(self._folder, shard.name), str(times).encode())
        finally:
            os._exit(1)


_LATE = ".timeouts"


def _late(folder: str, shard: str) -> str:
    return f"stages/{folder}/{shard}{_LATE}"
