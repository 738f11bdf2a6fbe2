"""The command that makes a dataset."""

from __future__ import annotations

import math
import time
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from reasonpix.cli import console
from reasonpix.cli.options import set_option
from reasonpix.core.figures import rate

if TYPE_CHECKING:
    from reasonpix.generation.engine.engine import ExecutorName, Progress
    from reasonpix.generation.recipe import Recipe
    from reasonpix.generation.run_folder import RunFolder


class _Limit(click.ParamType[float]):
    """A number of images, or all of them."""

    name = "N|all"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if value == "all":
            return math.inf
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither a number of images nor 'all'", param, ctx)
        return int(value)


@click.command("generate")
@click.argument("recipe")
@click.option("--out", required=True, help="The run folder: a path, or a URL such as s3://…")
@set_option("seed=1 or pipeline.planner=lexicon")
@click.option(
    "--limit",
    type=_Limit(),
    help="Use only the first N images. A later call may raise N, or use 'all'.",
)
@click.option(
    "--target-accepted",
    type=click.IntRange(min=1),
    metavar="N",
    help="Process images in rounds until about N samples are accepted.",
)
@click.option("--shard-size", type=click.IntRange(min=1), help="Override the recipe's shard size.")
@click.option("--retry-failed", is_flag=True, help="Recompute the records that failed.")
@click.option("--seed", type=click.IntRange(min=0), help="Override the recipe's seed.")
@click.option(
    "--max-cost",
    type=click.FloatRange(min=0, max=1e12),
    help="Stop before the LLM answers of this run cost more than this in total, in the currency of "
    "the recipe's prices. Raise it to continue.",
)
@click.option(
    "--dry-run", is_flag=True, help="Estimate LLM calls, tokens and cost, and run nothing."
)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Run in this process, or on Ray.",
)
@click.option(
    "--address", help="Address of a running Ray cluster; by default Ray starts on this machine."
)
def generate_command(
    recipe: str,
    out: str,
    overrides: tuple[str, ...],
    limit: float | None,
    target_accepted: int | None,
    shard_size: int | None,
    retry_failed: bool,
    seed: int | None,
    max_cost: float | None,
    dry_run: bool,
    executor: ExecutorName,
    address: str | None,
) -> None:
    """Run RECIPE (a file, or the name of a shipped recipe) into a run folder.

    Run the same command again to continue an interrupted run.
    """
    if not out:
        raise click.UsageError("--out: name a folder")
    if address and executor != "ray":
        raise click.UsageError("--address needs --executor ray")
    if dry_run and retry_failed:
        raise click.UsageError("--dry-run cannot be combined with --retry-failed")
    from reasonpix.generation.engine.engine import generate
    from reasonpix.generation.recipe import load_recipe

    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    if shard_size is not None:
        overrides = (*overrides, f"shard_size={shard_size}")
    checked = load_recipe(recipe, overrides)
    if dry_run:
        _print_estimate(checked, out, limit, target_accepted)
        return
    console.show_logs(click.get_current_context().find_root().params["debug"])
    with console.exit_when_stopped(), _Bars() as bars:
        run = generate(
            checked,
            out,
            limit,
            bars.show,
            max_cost,
            target_accepted=target_accepted,
            retry_failed=retry_failed,
            executor=executor,
            address=address,
        )
    _print_summary(run, target_accepted)


def _print_estimate(
    recipe: Recipe, out: str, limit: float | None, target_accepted: int | None
) -> None:
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.generation.statistics import spending
    from reasonpix.inspection.cost_estimate import estimate_cost

    estimates = estimate_cost(recipe, out, limit, target_accepted)
    if not estimates:
        click.echo("This recipe calls no LLM, so it costs nothing.")
        return
    head = ("stage", "records", "calls", "prompt tokens", "answer tokens", "cost")
    click.echo("{:>22} {:>10} {:>9} {:>14} {:>14} {:>10}".format(*head))
    for stage in estimates:
        records = f"{'≤ ' if stage.at_most else ''}{stage.records}"
        cost = "no price" if stage.cost is None else f"{stage.cost:.4f}"
        click.echo(
            f"{stage.stage:>22} {records:>10} {stage.calls:>9} {stage.prompt_tokens:>14} "
            f"{stage.completion_tokens:>14} {cost:>10}"
        )
    basis = (
        "this run's own answers"
        if all(stage.learnt for stage in estimates)
        else "4 characters per token"
    )
    click.echo(
        f"Tokens are estimated from {basis}. Answers that need a repair are requested twice; "
        "stored answers cost nothing."
    )
    if target_accepted is not None:
        click.echo("This is the first round; more follow until the target is reached.")
    if any(stage.cost is None for stage in estimates):
        click.echo("To estimate the cost, add price: {prompt: …, completion: …} to the recipe.")
    else:
        total = sum(stage.cost or 0 for stage in estimates)
        click.echo(f"about {total:.4f} in total; --max-cost sets a hard limit")
    spent = spending(RunFolder(out))
    if paid := spent.cost + spent.lost_cost:
        click.echo(f"{paid:.4f} has already been paid and counts towards --max-cost")


class _Bars:
    """One progress bar for each stage: done, rejected, failed, shards/s, time left."""

    def __enter__(self) -> _Bars:
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
        if self._tasks:
            self._progress.stop()

    def show(self, stage: Progress) -> None:
        """Draw how far a stage is."""
        records = stage.ok + stage.rejected + stage.failed
        if not self._tasks:  # nothing is drawn before the first progress
            self._progress.start()
        if stage.stage not in self._tasks:
            task = self._progress.add_task(stage.stage, total=stage.shards, counts="")
            self._tasks[stage.stage] = (task, time.perf_counter())
        task, started = self._tasks[stage.stage]
        seconds = time.perf_counter() - started
        speed = rate(records, seconds) if records else ""
        counts = f"{stage.ok} ok {stage.rejected} rejected {stage.failed} failed {speed}"
        if stage.reused:
            counts = f"{stage.reused} shards reused  {counts}"
        self._progress.update(task, total=stage.shards, completed=stage.shards_done, counts=counts)


def _print_summary(run: RunFolder, target: int | None) -> None:
    """How many records passed each stage, why the others did not, and what was paid."""
    from reasonpix.generation.outcomes import outcome_counts
    from reasonpix.generation.statistics import position_bias, spending_lines

    counts = outcome_counts(run)
    console.print_funnel(counts)
    for (stage, status), reason in counts.examples.items():
        click.echo(f"{status} at {stage}, for example: {reason}")
    if bias := position_bias(run):
        click.echo(bias)
    for line in spending_lines(run, counts.accepted):
        click.echo(line)
    plan = run.plan()
    more = "" if plan.complete else "; the source may hold more images: --limit all"
    if target is not None and counts.accepted < target:
        why = "--limit was reached" if more else "the source has no more images"
        click.echo(f"the target of {target} accepted samples was not reached: {why}")
    if ignored := len(plan.ignored):
        click.echo(f"the source ignored {ignored}; `reasonpix status {quote(str(run))}` says what")
    click.echo(f"{counts.accepted} of {counts.total} records accepted; the run is {run}{more}")


COMMANDS = (generate_command,)
