"""What commands share on the console: options, progress, estimate, summary; and being stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from reasonpix.generation.engine.engine import Progress
    from reasonpix.generation.recipe import Recipe
    from reasonpix.generation.run_folder import RunFolder

STOPPED = "stopped; run the same command again to go on"
"""What is said to those who stopped a run."""

# Options that several commands have.
host_option = click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 is any of this machine.",
)
port_option = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 is any free one.",
)
revision_option = click.option("--revision", help="Commit or tag of the hub repository.")
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Computing precision; auto is float32 on a CPU, float16 on a GPU.",
)


def runtime_option(default: str | None) -> Callable[[Any], Any]:
    """The option `--runtime` of commands that compute an editing model."""
    return click.option(
        "--runtime",
        type=click.Choice(["auto", "torch", "compile", "onnx", "openvino", "tensorrt"]),
        default=default,
        show_default=default is not None,
        help="What computes the UNet; those after compile read what `reasonpix export` wrote.",
    )


@contextmanager
def graceful_shutdown(deferred: Callable[[int], bool] = lambda number: False) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end a run in order, the second one at once.

    In order is by `KeyboardInterrupt`, unless `deferred` says that the run ends by itself. At once
    is without the interpreter's own end, which waits for threads.
    """
    import os
    import signal

    def stop(number: int, _: object) -> None:
        if deferred(number):
            return
        for signal_number in before:
            signal.signal(signal_number, leave)
        raise KeyboardInterrupt(number)

    def leave(number: int, _: object) -> None:
        os.write(2, f"\n{STOPPED}\n".encode())
        os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell_of_waits(debug: bool) -> None:
    """Show what the core logs, such as a job that is waited for; or everything, to find a fault."""
    import logging

    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(self.format(record), err=True)

    logger = logging.getLogger("reasonpix")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.handlers = [Echo()]


def print_estimate(
    recipe: Recipe, out: str, limit: float | None, target_accepted: int | None
) -> None:
    """What `--dry-run` says."""
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.generation.statistics import spending
    from reasonpix.inspection.cost_estimate import estimate

    lines = estimate(recipe, out, limit, target_accepted)
    if not lines:
        click.echo("This recipe asks no LLM: nothing is paid for.")
        return
    head = ("stage", "records", "calls", "prompt tokens", "answer tokens", "cost")
    click.echo("{:>22} {:>10} {:>9} {:>14} {:>14} {:>10}".format(*head))
    for line in lines:
        records = f"{'≤ ' if line.at_most else ''}{line.records}"
        cost = "no price" if line.cost is None else f"{line.cost:.4f}"
        click.echo(
            f"{line.stage:>22} {records:>10} {line.calls:>9} {line.prompt_tokens:>14} "
            f"{line.completion_tokens:>14} {cost:>10}"
        )
    source = "this run's own answers" if all(line.learnt for line in lines) else "4 letters a token"
    click.echo(
        f"Tokens are estimated from {source}; answers that have to be repaired are asked for "
        "twice, and those that are stored already cost nothing."
    )
    if target_accepted is not None:
        click.echo("This is the first round; as many follow as the target takes.")
    if any(line.cost is None for line in lines):
        click.echo("Without a price nothing is said of cost: add price: {prompt: …, completion: …}")
    else:
        total = sum(line.cost or 0 for line in lines)
        click.echo(f"about {total:.4f} in all; --max-cost bounds it for certain")
    before = spending(RunFolder(out))
    if before.cost + before.lost_cost:
        click.echo(
            f"{before.cost + before.lost_cost:.4f} is paid already, and counts in --max-cost"
        )


class Bars:
    """One progress bar for each stage: done, rejected, failed, shards/s, time left."""

    def __enter__(self) -> Bars:
        """Itself; nothing is drawn before the first progress."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description:>22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards  {task.fields[counts]}"),
            TimeRemainingColumn(),
        )
        self._tasks: dict[str, tuple[Any, float]] = {}
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they are."""
        if self._tasks:
            self._progress.stop()

    def show(self, now: Progress) -> None:
        """Draw how far a stage is."""
        import time

        records = now.ok + now.rejected + now.failed
        if not self._tasks:
            self._progress.start()
        if now.stage not in self._tasks:
            task = self._progress.add_task(now.stage, total=now.shards, counts="")
            self._tasks[now.stage] = (task, time.perf_counter())
        task, started = self._tasks[now.stage]
        seconds = time.perf_counter() - started
        rate = f"{records / seconds:6.1f}/s" if records else ""
        counts = f"{now.ok} ok {now.rejected} rejected {now.failed} failed {rate}"
        if now.reused:
            counts = f"{now.reused} shards reused  {counts}"
        self._progress.update(task, total=now.shards, completed=now.shards_done, counts=counts)


def print_summary(run: RunFolder, target: int | None = None) -> None:
    """How many records came through each stage, why the others did not, and what was paid."""
    from reasonpix.generation.outcomes import outcome_counts
    from reasonpix.generation.statistics import position_bias, spending_lines

    ended = outcome_counts(run)
    stages = ended.stages
    click.echo(f"{'stage':>22} {'ok':>8} {'rejected':>8} {'failed':>8}")
    for stage, counts in stages:
        click.echo(f"{stage:>22} {counts['ok']:8} {counts['rejected']:8} {counts['failed']:8}")
    for (stage, status), reason in ended.examples.items():
        click.echo(f"{status} at {stage}, such as: {reason}")
    if bias := position_bias(run):
        click.echo(bias)
    for line in spending_lines(run, ended.accepted):
        click.echo(line)
    more = "" if run.plan().complete else "; the source may hold more: --limit all"
    if target is not None and ended.accepted < target:
        why = "--limit ends it" if more else "the source has no more images"
        click.echo(f"the target of {target} is not met: {why}")
    click.echo(f"{ended.accepted} of {ended.total} records accepted; the run is {run}{more}")
