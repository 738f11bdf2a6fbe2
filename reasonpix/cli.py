"""The command line: parses, calls, prints. Whatever is heavy is imported by the command itself."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from reasonpix.engine import Executor, Progress


class _Commands(click.Group):
    """Explains our own errors in one line each; `--debug` shows where they came from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from reasonpix.errors import ReasonpixError, RecipeError

            if ctx.params.get("debug") or not isinstance(error, ReasonpixError):
                raise
            click.echo(str(error), err=True)
            ctx.exit(2 if isinstance(error, RecipeError) else 1)


class _Limit(click.ParamType[float]):
    """A number of images, or all of them."""

    name = "N|all"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if value == "all":
            return math.inf
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is no number of images, and not 'all'", param, ctx)
        return int(value)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reasonpix")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def main(debug: bool) -> None:
    """Make datasets for image editing by instructions that need reasoning."""


_run = click.argument("run")
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the recipe, such as pipeline.planner.use=lexicon.",
)


@main.command()
@click.argument("recipe")
@click.option("--out", required=True, help="The run folder: a path, or a URL such as s3://…")
@_set
@click.option(
    "--limit",
    type=_Limit(),
    help="Use only the first N images. A later call may give more, or 'all'.",
)
@click.option(
    "--target-accepted",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use no more images than it takes for N accepted samples.",
)
@click.option("--shard-size", type=click.IntRange(min=1), help="Override the recipe's shard size.")
@click.option("--retry-failed", is_flag=True, help="Compute the records anew that failed.")
@click.option("--seed", type=click.IntRange(min=0), help="Override the recipe's seed.")
@click.option(
    "--max-cost",
    type=click.FloatRange(min=0, max=1e12),
    help="Stop before LLM answers of this run cost more in all, in the currency of the recipe's "
    "prices; with a higher limit the same command goes on.",
)
@click.option("--dry-run", is_flag=True, help="Estimate calls, tokens and cost; ask nothing.")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="What does the work: this process, or Ray.",
)
@click.option(
    "--address", help="Address of a running Ray cluster; without it, one of this machine."
)
def generate(
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
    executor: Executor,
    address: str | None,
) -> None:
    """Run RECIPE (a file, or the name of a shipped one) over its images into a run folder.

    Run the same command again to go on where it stopped.
    """
    from reasonpix import engine
    from reasonpix.recipe import load_recipe
    from reasonpix.recipes import locate

    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    if shard_size is not None:
        overrides = (*overrides, f"shard_size={shard_size}")
    checked = load_recipe(locate(recipe), overrides)
    if dry_run:
        _print_estimate(checked, out, limit, target_accepted)
        return
    _tell_of_waits(click.get_current_context().find_root().params["debug"])
    try:
        with _stoppable(), _Bars() as bars:
            run = engine.generate(
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
    except KeyboardInterrupt:
        click.echo(_STOPPED, err=True)
        sys.exit(130)
    _print_summary(run)


_STOPPED = "stopped; run the same command again to go on"


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end a run in order, the second one at once.

    At once is without the interpreter's own end, which waits for threads.
    """
    import os
    import signal

    def stop(*_: object) -> None:
        for signal_number in before:
            signal.signal(signal_number, leave)
        raise KeyboardInterrupt

    def leave(*_: object) -> None:
        os.write(2, f"\n{_STOPPED}\n".encode())
        os._exit(130)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_of_waits(debug: bool) -> None:
    """Show what the core logs, such as a job that is waited for; or everything, to find a fault."""
    import logging

    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(self.format(record), err=True)

    logger = logging.getLogger("reasonpix")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.handlers = [Echo()]


def _print_estimate(
    recipe: Any, out: str, limit: float | None, target_accepted: int | None
) -> None:
    from reasonpix.estimate import estimate
    from reasonpix.run import RunFolder
    from reasonpix.summary import spending

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

    def show(self, now: Progress) -> None:
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


def _print_summary(run: Any) -> None:
    from reasonpix.outcomes import endings
    from reasonpix.summary import position_bias, spending_lines

    ended = endings(run)
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
    click.echo(f"{ended.accepted} of {ended.total} records accepted; the run is {run}")


@main.command()
@_run
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
def publish(run: str, out: Path) -> None:
    """Publish the accepted samples of RUN as a Hugging Face dataset folder."""
    from reasonpix.publish import publish as write
    from reasonpix.run import RunFolder

    total = write(RunFolder(run), out)
    click.echo(f"{total} samples in {out}; load them with datasets.load_dataset({str(out)!r})")


@main.command()
@_run
@click.option("--limit", default=200, show_default=True, help="Pairs to show of each kind.")
def gallery(run: str, limit: int) -> None:
    """Write a page to look at RUN, and print its path."""
    from reasonpix.gallery import gallery as write
    from reasonpix.run import RunFolder

    page = write(RunFolder(run), limit)
    click.echo(page if "://" in page else Path(page).resolve())


@main.group()
def recipes() -> None:
    """List, show, copy and check recipes."""


@recipes.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from reasonpix.recipes import shipped, summary

    for name, path in shipped().items():
        click.echo(f"{name:24} {summary(path)}")


@recipes.command("show")
@click.argument("recipe")
def recipes_show(recipe: str) -> None:
    """Print RECIPE."""
    from reasonpix.recipes import locate

    click.echo(locate(recipe).read_text(encoding="utf-8"), nl=False)


@recipes.command("copy")
@click.argument("recipe")
@click.argument("to", type=click.Path(path_type=Path))
def recipes_copy(recipe: str, to: Path) -> None:
    """Copy RECIPE to the file TO, to change it."""
    from reasonpix.errors import RecipeError
    from reasonpix.recipes import locate

    if to.exists():
        raise RecipeError([f"{to} exists; name a new file"])
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(locate(recipe).read_text(encoding="utf-8"), encoding="utf-8")
    click.echo(to)


@recipes.command("check")
@click.argument("recipe")
@_set
def recipes_check(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and print it with every option spelled out."""
    from reasonpix.recipe import load_recipe
    from reasonpix.recipes import locate

    click.echo(load_recipe(locate(recipe), overrides).as_yaml(), nl=False)


@recipes.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for completion in editors."""
    import json

    from reasonpix.recipe import schema

    click.echo(json.dumps(schema(), indent=2))


@main.group()
def plugins() -> None:
    """List and describe plugins."""


@plugins.command("ls")
def plugins_ls() -> None:
    """List the installed plugins and the slots they fill."""
    from reasonpix import plugins as installed
    from reasonpix.errors import PluginError

    for name in installed.names():
        try:
            where = installed.entry(name)
            kinds = ", ".join(installed.offers(name)) or "checkpoints"
        except PluginError as error:
            click.echo(f"{name:20} broken: {error}")
        else:
            package = f"{where.dist.name} {where.dist.version}" if where.dist else ""
            click.echo(f"{name:20} {kinds:12} {package}")


@plugins.command("show")
@click.argument("name")
def plugins_show(name: str) -> None:
    """Describe plugin NAME: where it lives, and its options."""
    from reasonpix import plugins as installed

    where = installed.entry(name)
    package = f" of {where.dist.name} {where.dist.version}" if where.dist else ""
    click.echo(f"{name}: {where.value}{package}")
    for slot, component in installed.offers(name).items():
        click.echo(f"\n{slot}: {(component.__doc__ or '').strip()}\n")
        for option, field in component.Options.model_fields.items():
            default = "required" if field.is_required() else f"default {field.default!r}"
            click.echo(f"  {option}: {field.description} ({default})")


if __name__ == "__main__":
    sys.exit(main())
