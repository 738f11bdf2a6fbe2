"""Stages over shards on Ray: a stream of shard names through a pool of workers for each stage.

```
driver:    shard names ──▶ pool of stage 1 ──▶ pool of stage 2 ──▶ …     (ray.data)
workers:   each reads its shard from the run folder, computes it, and commits it there
progress:  an actor beside the driver, which workers report to and the driver polls
```
Only names travel through Ray. A worker that is lost, hangs, or is due for recycling ends its
process. Ray restarts the worker and resends its shard names; the worker skips shards that already
have a file.
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
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.engine.local_executor import shards_at_once
from reasonpix.generation.engine.ray_worker import ProgressActor, Stopped, Worker, WorkerSpec
from reasonpix.generation.engine.unit import UnitResult, asks_llm, component_specs
from reasonpix.generation.pipeline import Stage
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.resources import Resources
from reasonpix.generation.run_folder import RunFolder, Shard
from reasonpix.llm.ledger_sync import ledger_file

_BLOCKS = 500
"""Most blocks that a stream of shards is cut into: Ray Data takes some 7 ms per block and stage."""

_OBJECT_STORE = 100 * 2**20
"""Bytes of a local cluster's object store, which holds only names."""

_POLL_S = 0.2


@contextmanager
def open_ray_executor(
    recipe: Recipe,
    run: RunFolder,
    stages: Sequence[Stage],
    address: str | None,
    max_cost: float | None,
) -> Iterator[RayExecutor]:
    """Connect to the Ray cluster at `address`, or start one on this machine.

    The latter listens on the loopback interface only, and ends with this context. Raises `RunError`
    if the cluster cannot be reached, or lacks the resources that a stage asks for.
    """
    problems = [
        f"resources.{stage.name}.actors: only one worker may call the language model, because "
        "llm.sqlite has one writer and --max-cost one count; raise the planner's concurrency"
        for stage in stages
        if stage.resources.actors > 1 and asks_llm(stage)
    ]
    if problems:
        raise RecipeError(problems)
    with _connect(address) as ray, ExitStack() as stack:
        executor = RayExecutor(ray, recipe, run, stages, address, max_cost)
        if any(asks_llm(stage) for stage in stages):
            executor.ledger = stack.enter_context(ledger_file(run.storage))
        yield executor


@contextmanager
def _connect(address: str | None) -> Iterator[Any]:
    """The `ray` module, connected and silent; its messages are in its own logs."""
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    else:
        address = _reachable(address)
    if address is None or address.startswith("127."):
        # Read when ray is imported. Without it Ray's processes listen to other machines, and Ray
        # replaces the loopback address by another of this machine.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # A late call from a thread must not start another cluster.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise its core writes to standard error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RunError("--executor ray needs Ray: pip install 'reasonpix[ray]'") from error
    if ray.is_initialized():
        raise RunError("this process already uses Ray; call ray.shutdown() first")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Otherwise messages about ended workers still go to standard output.
    ray._private.worker._worker_logs_enabled = False
    local_options: dict[str, Any] = {
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE,
    }
    try:
        with _preserve_signal_handlers(), _silence_stderr():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else local_options),
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = str(error).strip().partition("\n")[0]
        raise RunError(
            f"{message}; the cluster may require a token (set RAY_AUTH_MODE=token) or run another "
            "version of Ray"
            if address
            else f"Ray does not start: {message}"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reachable(address: str) -> str:
    """The address, if something answers there. Ray itself would retry for minutes."""
    if address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise RunError(
            f"{address} is not the address of a Ray cluster; give HOST:PORT of its head node, or "
            "`auto` on one of its nodes"
        )
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise RunError(
            f"nothing answers at {address} ({error}); start a cluster there with `ray start "
            "--head`, or omit --address to use this machine"
        ) from error
    return address.replace("localhost:", "127.0.0.1:")


@contextmanager
def _preserve_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers of this process, which Ray replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Redirect standard error to nowhere, also for code that is not Python."""
    sys.stderr.flush()
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    os.close(devnull)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class RayExecutor:
    """Runs the stages of one run on a Ray cluster."""

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
        self._run_folder = run.where if local is None else str(local)
        self._stages = stages
        self._address = address
        self._max_cost = max_cost
        self.ledger: Path | None = None
        """The file that stores answers of language models."""
        self._driver_node = ray.get_runtime_context().get_node_id()
        for stage in stages:
            if not self.fit([stage]):
                raise RunError(self._shortage(stage))

    def fit(self, stages: Sequence[Stage]) -> bool:
        """Whether the cluster has room for all workers of these stages at the same time."""
        free = {node["NodeID"]: dict(node["Resources"]) for node in self._nodes()}
        workers = [
            (asks_llm(stage), _ray_resources(stage.resources))
            for stage in stages
            for _ in range(stage.resources.actors)
        ]
        # Workers tied to the driver's node are placed first, then the largest.
        workers.sort(key=lambda worker: (worker[0], sorted(worker[1].items())), reverse=True)
        for on_driver_node, wanted in workers:
            nodes = [free[self._driver_node]] if on_driver_node else list(free.values())
            node = next(
                (n for n in nodes if all(n.get(k, 0) >= v for k, v in wanted.items())), None
            )
            if node is None:
                return False
            for kind, amount in wanted.items():
                node[kind] = round(node.get(kind, 0) - amount, 6)
        return True

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _driver_address(self) -> str:
        node = next(node for node in self._nodes() if node["NodeID"] == self._driver_node)
        return str(node["NodeManagerAddress"])

    def _shortage(self, stage: Stage) -> str:
        wanted = stage.resources
        nodes = [
            f"{has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs, "
            f"{has.get('memory', 0) / 1e9:.1f} GB"
            for has in (node["Resources"] for node in self._nodes())
        ]
        return (
            f"stage {stage.name} asks for {wanted.actors} x ({wanted.num_cpus:g} CPUs, "
            f"{wanted.num_gpus:g} GPUs, {wanted.memory_gb:g} GB), more than "
            f"{self._address or 'this machine'} has; its nodes: {'; '.join(nodes)}. "
            f"Ask for less under `resources: {{{stage.name}: …}}`, or add nodes"
        )

    def run_stages(
        self,
        stages: Sequence[Stage],
        todo: Sequence[set[str]],
        shards: Sequence[Shard],
        report: Callable[[UnitResult], None],
    ) -> None:
        """Run each stage on the shards named in its `todo`, and commit them.

        `report` is called in this thread. On any exception the shards at work are dropped.
        """
        ray = self._ray
        on_driver_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            self._driver_node, soft=False
        )
        # max_restarts: if the actor is lost, only the count of finished shards is.
        actor_class = ray.remote(ProgressActor).options(
            num_cpus=0, scheduling_strategy=on_driver_node, max_restarts=-1, max_task_retries=-1
        )
        progress = actor_class.remote()
        busy = [(stage, names) for stage, names in zip(stages, todo, strict=True) if names]
        due = [shard for shard in shards if any(shard.name in names for _, names in busy)]
        stream = self._source(due)
        for stage, names in busy:
            stream = self._add_pool(stream, stage, names, due, progress)
        thread = _StreamThread(stream)
        reported: set[tuple[str, str]] = set()
        ended = False
        while not ended:
            ended = thread.wait(_POLL_S)
            for event in ray.get(progress.drain.remote()):
                if isinstance(event, Stopped):
                    message = event.message
                    raise event.kind([message] if event.kind is RecipeError else message)
                # A restarted worker reports again what its predecessor had reported.
                if (event.stage, event.shard) not in reported:
                    reported.add((event.stage, event.shard))
                    report(event)
        if thread.error is not None:
            raise thread.error
        ray.kill(progress)

    def _source(self, due: Sequence[Shard]) -> Any:
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True
        rows = [{"shard": shard.name, "rows": shard.rows} for shard in due]
        return self._ray.data.from_items(rows, override_num_blocks=min(len(due), _BLOCKS))

    def _add_pool(
        self,
        stream: Any,
        stage: Stage,
        todo: set[str],
        due: Sequence[Shard],
        progress: Any,
    ) -> Any:
        """The stream with a stage's pool of workers added."""
        names = [other.name for other in self._stages]
        upstream = self._stages[: names.index(stage.name) + 1]
        spec = WorkerSpec(
            self._run_folder,
            self._recipe,
            tuple(other.entry for other in upstream),
            frozenset(todo),
            os.getcwd(),
            progress,
        )
        custom: dict[str, float] = {}
        threads = 1
        if asks_llm(stage):
            spec = replace(
                spec, ledger=self.ledger, max_cost=self._max_cost, environment=_environment()
            )
            custom[f"node:{self._driver_address()}"] = 0.001
            concurrency = max(part.build().concurrency for part in component_specs(stage))
            threads = shards_at_once(concurrency, due)
        wanted = stage.resources
        pool = self._ray.data.ActorPoolStrategy(
            size=wanted.actors,
            # One is computed while the next is on its way.
            max_tasks_in_flight_per_actor=threads + 1,
            max_concurrent_calls_per_actor=threads,
            enable_true_multi_threading=threads > 1,
        )
        return stream.map_batches(
            Worker,
            fn_constructor_args=(spec,),
            batch_size=None,
            compute=pool,
            num_cpus=wanted.num_cpus,
            num_gpus=wanted.num_gpus or None,
            memory=int(wanted.memory_gb * 1e9) or None,
            resources=custom or None,
        )


class _StreamThread:
    """A thread that drives a stream through all pools."""

    def __init__(self, stream: Any) -> None:
        self.error: Exception | None = None
        self._stream = stream
        self._thread = threading.Thread(target=self._drain, name="stream", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for at most `seconds`; returns whether the stream has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _drain(self) -> None:
        try:
            self._stream.materialize()
        except Exception as error:
            self.error = error


def _ray_resources(resources: Resources) -> dict[str, float]:
    """What one worker takes of a node, by Ray's names."""
    wanted = {
        "CPU": resources.num_cpus,
        "GPU": resources.num_gpus,
        "memory": int(resources.memory_gb * 1e9),
    }
    return {kind: amount for kind, amount in wanted.items() if amount}


def _environment() -> dict[str, str]:
    """This process's environment, without what Ray sets for each of its processes."""
    set_by_ray = ("RAY_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(set_by_ray)}
