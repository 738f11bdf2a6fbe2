"""Stages over shards on Ray: a stream of shard names through a pool of workers for each stage.

```
driver:   shard names ──▶ pool of stage 1 ──▶ pool of stage 2 ──▶ …     (ray.data)
workers:  each reads its shard from the run folder, computes, and commits it there
desk:     an actor beside the driver: workers tell it what they finished, the driver asks it
```
Only names travel through Ray. A worker that is lost, hangs, or is due to be replaced ends as a
process; Ray starts it anew and hands it the names again that it had, of which it does those that
have no file yet.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.engine.local_executor import shards_at_once
from reasonpix.generation.engine.ray_worker import ProgressActor, Stopped, Worker, WorkerSpec
from reasonpix.generation.engine.unit import UnitResult, uses_of
from reasonpix.generation.pipeline import Stage, stages_of
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.resources import Resources
from reasonpix.generation.run_folder import RunFolder, Shard
from reasonpix.llm.planner import LLMPlanner
from reasonpix.plugin import registry

_BLOCKS = 500
"""Most pieces that a stream of shards is cut into: Ray Data takes some 7 ms a piece and stage."""

_OBJECT_STORE = 100 * 2**20
"""Bytes of a local cluster's object store; it holds names alone."""

_ASK_EVERY_S = 0.2


@contextmanager
def opened(
    recipe: Recipe, run: RunFolder, address: str | None, max_cost: float | None
) -> Iterator[RayExecutor]:
    """A Ray cluster to do the stages of a recipe on: the one at `address`, or one of this machine.

    The latter listens on the loopback interface alone, and ends with this. Raises `RunError` when
    there is no such cluster, or when a stage asks for what it does not have.
    """
    stages = stages_of(recipe)
    problems = [
        f"resources.{stage.name}.actors: one worker asks the language model, so that llm.sqlite "
        "has one writer and --max-cost holds; raise the planner's own concurrency instead"
        for stage in stages
        if _asks_llm(stage) and stage.resources.actors > 1
    ]
    if problems:
        raise RecipeError(problems)
    with _connected(address) as ray:
        cluster = RayExecutor(ray, recipe, run, stages, address, max_cost)
        if any(_asks_llm(stage) for stage in stages):
            from reasonpix.llm.ledger_sync import ledger_file

            with ledger_file(run.storage) as ledger:
                cluster.ledger = ledger
                yield cluster
        else:
            yield cluster


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected, and quiet: its messages are in its own logs."""
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    else:
        address = _answering(address)
    if address is None or address.startswith("127."):
        # Read when ray is imported: otherwise its processes listen to other machines, and it takes
        # another address of this machine for the loopback one.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # No call that comes too late, from a thread, starts another cluster.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its core writes to the standard error, at least that it was told to write no more.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RunError("--executor ray needs Ray: pip install 'reasonpix[ray]'") from error
    if ray.is_initialized():
        raise RunError("this process uses Ray already; call ray.shutdown() first")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What Ray has to say of workers that ended would go to the standard output all the same.
    ray._private.worker._worker_logs_enabled = False
    here: dict[str, Any] = {
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE,
    }
    try:
        with _handlers_kept(), _errors_silenced():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else here),
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = str(error).strip().partition("\n")[0]
        raise RunError(
            f"{what}; it may ask for a token (set RAY_AUTH_MODE=token), or have another Ray"
            if address
            else f"Ray does not start: {what}"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _answering(address: str) -> str:
    """The address, if something answers there: Ray itself would try for minutes."""
    if address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise RunError(
            f"{address} is no address of a Ray cluster; give the HOST:PORT of its head, or auto on "
            "one of its nodes"
        )
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise RunError(
            f"nothing answers at {address} ({error}); start the cluster there with `ray start "
            "--head`, or leave --address out to use this machine alone"
        ) from error
    return address.replace("localhost:", "127.0.0.1:")


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """What signals do is this process's affair; Ray puts handlers of its own in place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def _errors_silenced() -> Iterator[None]:
    """The standard error of this process leads nowhere, for code that is not Python either."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class RayExecutor:
    """A Ray cluster, to do stages of one run on."""

    def __init__(
        self,
        ray: Any,
        recipe: Recipe,
        run: RunFolder,
        stages: Sequence[Stage],
        address: str | None,
        max_cost: float | None,
    ) -> None:
        self._ray = ray
        self._recipe = pickle.dumps(recipe)
        local = run.storage.local
        self._where = run.where if local is None else str(local)
        self._stages = stages
        self._address = address
        self._max_cost = max_cost
        self.ledger: Path | None = None
        """Where the answers of language models are kept."""
        self._home = ray.get_runtime_context().get_node_id()
        for stage in stages:
            if not self.fit([stage]):
                raise RunError(self._lacking(stage))

    def fit(self, stages: Sequence[Stage]) -> bool:
        """Whether all workers of these stages find room at the same time."""
        free = {node["NodeID"]: dict(node["Resources"]) for node in self._nodes()}
        # Those that can be in one place alone, and the largest, choose first.
        wanted = sorted(
            (
                (_asks_llm(stage), _asked(stage.resources))
                for stage in stages
                for _ in range(stage.resources.actors)
            ),
            key=lambda worker: (worker[0], sorted(worker[1].items())),
            reverse=True,
        )
        for at_home, asked in wanted:
            nodes = [free[self._home]] if at_home else list(free.values())
            node = next((n for n in nodes if all(n.get(k, 0) >= v for k, v in asked.items())), None)
            if node is None:
                return False
            for kind, amount in asked.items():
                node[kind] = round(node.get(kind, 0) - amount, 6)
        return True

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _address_of_home(self) -> str:
        home = next(node for node in self._nodes() if node["NodeID"] == self._home)
        return str(home["NodeManagerAddress"])

    def _lacking(self, stage: Stage) -> str:
        wanted = stage.resources
        nodes = [
            f"{has.get('CPU', 0):g} processors, {has.get('GPU', 0):g} GPUs, "
            f"{has.get('memory', 0) / 1e9:.1f} GB"
            for has in (node["Resources"] for node in self._nodes())
        ]
        return (
            f"stage {stage.name} asks for {wanted.actors} x ({wanted.num_cpus:g} processors, "
            f"{wanted.num_gpus:g} GPUs, {wanted.memory_gb:g} GB), which "
            f"{self._address or 'this machine'} never has; its nodes: {'; '.join(nodes)}. "
            f"Ask for less under `resources: {{{stage.name}: …}}`, or add nodes"
        )

    def run_stages(
        self,
        stages: Sequence[Stage],
        todo: Sequence[set[str]],
        shards: Sequence[Shard],
        report: Callable[[UnitResult], None],
    ) -> None:
        """Do each stage on the shards that its `todo` names, and commit them.

        `report` is called in this thread. When anything raises, the shards at work are dropped.
        """
        ray = self._ray
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(self._home, soft=False)
        # max_restarts: should it be lost, the count of finished shards is lost, and they are not.
        desk = ray.remote(ProgressActor).options(
            num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1
        )
        desk = desk.remote()
        busy = [(stage, names) for stage, names in zip(stages, todo, strict=True) if names]
        due = [shard for shard in shards if any(shard.name in names for _, names in busy)]
        stream = self._source(due)
        for stage, names in busy:
            stream = self._through(stream, stage, names, due, desk)
        flow = _Flow(stream)
        seen: set[tuple[str, str]] = set()
        ended = False
        while not ended:
            ended = flow.wait(_ASK_EVERY_S)
            for fact in ray.get(desk.take.remote()):
                if isinstance(fact, Stopped):
                    problem = fact.message
                    raise fact.kind([problem] if fact.kind is RecipeError else problem)
                # A worker that was replaced tells again of what the one before had told.
                if (fact.stage, fact.shard) not in seen:
                    seen.add((fact.stage, fact.shard))
                    report(fact)
        if flow.error is not None:
            raise flow.error
        ray.kill(desk)

    def _source(self, due: Sequence[Shard]) -> Any:
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True
        rows = [{"shard": shard.name, "rows": shard.rows} for shard in due]
        return self._ray.data.from_items(rows, override_num_blocks=min(len(due), _BLOCKS))

    def _through(
        self,
        stream: Any,
        stage: Stage,
        todo: set[str],
        due: Sequence[Shard],
        desk: Any,
    ) -> Any:
        """The stream with a stage's pool of workers added."""
        names = [other.name for other in self._stages]
        before = self._stages[: names.index(stage.name) + 1]
        order = WorkerSpec(
            self._where,
            self._recipe,
            tuple(other.entry for other in before),
            frozenset(todo),
            os.getcwd(),
            desk,
        )
        place: dict[str, float] = {}
        threads = 1
        if _asks_llm(stage):
            order = replace(
                order, ledger=self.ledger, max_cost=self._max_cost, environment=_environment()
            )
            place[f"node:{self._address_of_home()}"] = 0.001
            threads = shards_at_once(_concurrency(stage), due)
        wanted = stage.resources
        pool = self._ray.data.ActorPoolStrategy(
            size=wanted.actors,
            # One is done while the next is on its way.
            max_tasks_in_flight_per_actor=threads + 1,
            max_concurrent_calls_per_actor=threads,
            enable_true_multi_threading=threads > 1,
        )
        return stream.map_batches(
            Worker,
            fn_constructor_args=(order,),
            batch_size=None,
            compute=pool,
            num_cpus=wanted.num_cpus,
            num_gpus=wanted.num_gpus or None,
            memory=int(wanted.memory_gb * 1e9) or None,
            resources=place or None,
        )


class _Flow:
    """A stream on its way through all pools, in a thread of its own."""

    def __init__(self, stream: Any) -> None:
        self.error: Exception | None = None
        self._stream = stream
        self._thread = threading.Thread(target=self._drain, name="stream", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _drain(self) -> None:
        try:
            self._stream.materialize()
        except Exception as error:
            self.error = error


def _asks_llm(stage: Stage) -> bool:
    return any(issubclass(registry.find(use.slot, use.name), LLMPlanner) for use in uses_of(stage))


def _concurrency(stage: Stage) -> int:
    """How many items a stage's components can have under way at once."""
    uses = uses_of(stage)
    return max(use.build().concurrency for use in uses)


def _asked(resources: Resources) -> dict[str, float]:
    """What one worker takes of a node, in Ray's words."""
    asked = {
        "CPU": resources.num_cpus,
        "GPU": resources.num_gpus,
        "memory": int(resources.memory_gb * 1e9),
    }
    return {kind: amount for kind, amount in asked.items() if amount}


def _environment() -> dict[str, str]:
    """This process's environment, without what Ray sets for each of its processes."""
    own = ("RAY_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}
