"""What runs in Ray's processes: the workers of a stage, and the actor that they report to."""

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

_TIMEOUTS = ".timeouts"
"""Suffix of a file beside a shard's, which counts how often the shard timed out."""

_MAX_DEATHS = 3
"""Workers that may die on the same shard in a row before its records are marked as failed."""


@dataclass(frozen=True)
class Stopped:
    """An error that stops the run: its class from `reasonpix.errors`, and its message."""

    kind: type[ReasonpixError]
    message: str


class ProgressActor:
    """An actor beside the driver: workers report what they finished, and the driver polls it."""

    def __init__(self) -> None:
        self._events: list[UnitResult | Stopped] = []
        self._attempts: Counter[tuple[str, str]] = Counter()

    def report(self, event: UnitResult | Stopped) -> None:
        """Keep an event for the driver."""
        self._events.append(event)

    def drain(self) -> list[UnitResult | Stopped]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def start_attempt(self, action: str, subject: str) -> int:
        """Count an attempt; returns how many earlier ones never ended, because a process died."""
        self._attempts[action, subject] += 1
        return self._attempts[action, subject] - 1

    def end_attempt(self, action: str, subject: str) -> None:
        """The attempt ended; forget the earlier ones."""
        self._attempts.pop((action, subject), None)


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to know, as it is sent to its node."""

    run_folder: str
    """A path or a URL."""
    recipe: bytes
    """Pickled, so that a node without one of its plugins can report that."""
    entries: tuple[StageEntry, ...]
    """The driver's stages, up to and including the worker's own."""
    todo: frozenset[str]
    working_folder: str
    """The driver's; paths of a recipe are relative to it."""
    progress: Any
    """A handle to the `ProgressActor`."""
    ledger: Path | None = None
    """The file that stores answers of language models, for a stage that calls one."""
    max_cost: float | None = None
    environment: Mapping[str, str] | None = None
    """The driver's, for a stage that calls a language model: it may hold the API key."""


class Worker:
    """One stage in a process of its own. Ray creates it, and calls it with batches of shards."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._folder = spec.entries[-1].folder
        self._load_lock, self._stop_lock = threading.Lock(), threading.Lock()
        self._is_loaded = False
        self._started = 0
        """Shards that this process has started."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compute the shards of a batch that are still to do; returns the batch."""
        import ray

        progress, last_report = self._spec.progress, None
        try:
            with self._load_lock:
                if not self._is_loaded:
                    self._load()
            for name, rows in zip(batch["shard"].tolist(), batch["rows"].tolist(), strict=True):
                if name in self._spec.todo:
                    last_report = progress.report.remote(self._compute(Shard(name, rows)))
        except ReasonpixError as error:
            kind = next(k for k in type(error).__mro__ if k.__module__ == ReasonpixError.__module__)
            if self._is_loaded:
                # All threads wait here: the first report ends this process, and with it the
                # requests that are in flight and paid for.
                with self._stop_lock:
                    self._components.stop_llm_calls()
            ray.get(progress.report.remote(Stopped(kind, str(error))))
            raise
        if last_report is not None:
            ray.get(last_report)  # and so all earlier ones
        return batch

    def _load(self) -> None:
        """Load what the stage needs. Not in `__init__`: Ray would replace our errors by its own."""
        import ray

        spec = self._spec
        with suppress(OSError):
            os.chdir(spec.working_folder)
        os.environ.update(spec.environment or {})
        stage = self._stage()
        self._resources = stage.resources
        self._run = RunFolder(spec.run_folder)
        self._finished = self._run.done(self._folder)
        self._timeouts = self._read_timeouts() if self._resources.timeout_s else {}
        actor = ray.get_runtime_context().get_actor_id()
        if ray.get(spec.progress.start_attempt.remote("load", actor)) >= _MAX_DEATHS:
            raise RunError(
                f"stage {stage.name}: {_MAX_DEATHS} workers in a row died while loading their "
                f"component on {socket.gethostname()}; see Ray's log, and in `resources` of the "
                "recipe give each worker more memory (memory_gb) or use fewer (actors)"
            )
        ledger = Ledger(spec.ledger, spec.max_cost) if spec.ledger else None
        source = source_of(self._run)
        # Nothing is ever closed: Ray may end a worker at any moment, whatever it holds.
        self._components = Components(source, ledger)
        self._runner = StageRunner(self._run, stage, source, self._components)
        ray.get(spec.progress.end_attempt.remote("load", actor))
        self._is_loaded = True

    def _stage(self) -> Any:
        """The stage according to this node's plugins. Raises `RunError` if they differ."""
        node = socket.gethostname()
        try:
            recipe: Recipe = pickle.loads(self._spec.recipe)
        except (ImportError, AttributeError) as error:
            raise RunError(
                f"node {node} lacks a plugin of the recipe or has another version of it: {error}; "
                "install the same packages on all nodes"
            ) from error
        stages = stages_of(recipe)
        for stage, entry in zip(stages, self._spec.entries, strict=False):
            if stage.entry.folder != entry.folder:
                here, there = stage.entry.component, entry.component
                differing = [key for key in there | here if here.get(key) != there.get(key)]
                raise RunError(
                    f"node {node} would give different results in stage {entry.stage}: its "
                    f"{', '.join(differing) or 'version of reasonpix'} differs; install the same "
                    "packages and weights on all nodes"
                )
        return stages[len(self._spec.entries) - 1]

    def _compute(self, shard: Shard) -> UnitResult:
        """Compute a shard, unless an earlier process has finished it."""
        if shard.name in self._finished:
            statuses = (status for _, status, _ in self._run.ends(self._folder, shard))
            return UnitResult.count(self._folder, shard, statuses)
        if self._started == self._resources.recycle_after:
            os._exit(0)  # Ray hands this shard to a fresh process
        self._started += 1
        result = self._give_up(shard)
        if result is None:
            with self._time_limit(shard):
                result = self._runner.run(shard)
        if shard.name in self._timeouts:
            self._run.storage.remove(self._timeout_file(shard.name))
        self._finished.add(shard.name)
        return result

    # -- Shards that cost their worker

    def _give_up(self, shard: Shard) -> UnitResult | None:
        """Mark the records of a shard as failed if it has hung or killed too many workers."""
        import ray

        if self._timeouts.get(shard.name, 0) >= 2:
            reason = f"took longer than {self._resources.timeout_s:g} s, twice"
        elif self._started == 1 and (
            # The successor of a dead process starts with the shard that was in progress.
            ray.get(self._spec.progress.start_attempt.remote(self._folder, shard.name))
            >= _MAX_DEATHS
        ):
            reason = "its worker died repeatedly"
        else:
            return None
        samples = self._runner.load(shard)
        stored = self._run.known(self._folder, shard)
        failed = Problem(status="failed", reason=reason)
        results = [stored.get(sample.record_id) or failed for sample in samples]
        return self._runner.commit(shard, samples, results, 0.0)

    def _read_timeouts(self) -> dict[str, int]:
        """How often each unfinished shard has timed out, as earlier processes recorded it."""
        storage, stage = self._run.storage, f"stages/{self._folder}"
        timeouts = {
            name.removesuffix(_TIMEOUTS): int(storage.read(f"{stage}/{name}"))
            for name in storage.names(stage)
            if name.endswith(_TIMEOUTS)
        }
        for name in timeouts.keys() & self._finished:  # finished at the last moment
            storage.remove(self._timeout_file(name))
        return {name: count for name, count in timeouts.items() if name not in self._finished}

    def _timeout_file(self, shard: str) -> str:
        return f"stages/{self._folder}/{shard}{_TIMEOUTS}"

    @contextmanager
    def _time_limit(self, shard: Shard) -> Iterator[None]:
        """End this process if the shard takes longer than the stage's `timeout_s`."""
        limit = self._resources.timeout_s
        if limit is None:
            yield
            return
        timer = threading.Timer(limit, self._time_out, [shard])
        timer.daemon = True
        timer.start()
        if self._spec.ledger is None:
            # Code that never releases the GIL keeps the timer from running; faulthandler needs no
            # GIL. It has one timer per process, so it is of no use where shards run in threads.
            faulthandler.dump_traceback_later(1.5 * limit + 5, exit=True, file=2)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            timer.cancel()

    def _time_out(self, shard: Shard) -> None:
        try:
            count = self._timeouts.get(shard.name, 0) + 1
            self._run.storage.write(self._timeout_file(shard.name), str(count).encode())
        finally:
            os._exit(1)
