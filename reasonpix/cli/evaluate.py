"""The commands for evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reasonpix.cli import console, options
from reasonpix.cli.options import set_option
from reasonpix.errors import require_extra

if TYPE_CHECKING:
    from reasonpix.editing.runtimes.names import Runtime
    from reasonpix.evaluation.runner import Report


@click.command()
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder of the evaluation. The report will be in it.",
)
@set_option
@options.runtime_option(None)
@click.option("--retry-failed", is_flag=True, help="Try the edits again that failed.")
@click.option(
    "--baseline",
    metavar="METHOD",
    help="The method that the others are compared with; by default the last one.",
)
def evaluate(
    recipe: str,
    out: Path,
    overrides: tuple[str, ...],
    runtime: Runtime | None,
    retry_failed: bool,
    baseline: str | None,
) -> None:
    """Evaluate methods on a benchmark as RECIPE (a file, or the name of a shipped one) says.

    Run the same command again to go on where it stopped.
    """
    from reasonpix.errors import ReasonpixError
    from reasonpix.evaluation.recipe import load_evaluation_recipe
    from reasonpix.evaluation.results import COPY
    from reasonpix.generation.recipe_catalog import locate

    checked = load_evaluation_recipe(locate(recipe), overrides)
    if runtime:
        checked = checked.computed_by(runtime)
    if baseline not in (None, COPY, *checked.methods):
        raise ReasonpixError(
            f"--baseline: the recipe has no method {baseline!r}; "
            f"there are {', '.join(checked.methods)}"
        )
    with require_extra("evaluate"):
        import matplotlib  # noqa: F401  # the report needs it, hours later

        from reasonpix.evaluation.report import write_report
        from reasonpix.evaluation.runner import evaluate as run
    try:
        with console.graceful_shutdown(), _bars() as report:
            folder = run(checked, out, report, retry_failed=retry_failed)
            written = write_report(folder, baseline)
    except KeyboardInterrupt as stopped:
        click.echo(console.STOPPED, err=True)
        sys.exit(128 + (stopped.args or (2,))[0])
    written.print()
    click.echo((out / "report.html").resolve())


@contextmanager
def _bars() -> Iterator[Report]:
    """A progress bar for each method and for measuring; without a terminal, a line each tenth."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    terminal = Console(stderr=True)
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, Any] = {}
    tenths: dict[str, int] = {}
    with Progress(
        *columns, TimeRemainingColumn(), console=terminal, disable=not terminal.is_terminal
    ) as bars:

        def report(what: str, done: int, total: int) -> None:
            if not terminal.is_terminal:
                tenth = 10 * done // max(1, total)
                if tenths.get(what) != tenth:
                    tenths[what] = tenth
                    click.echo(f"{what}: {done} of {total}", err=True)
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, completed=done)
            bars.update(tasks[what], completed=done, total=total)

        yield report


@click.command()
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", help="Rows; by default all there are."
)
@click.option(
    "--disjoint-from",
    "others",
    multiple=True,
    metavar="DATASET",
    help="A dataset that is trained on: no image and no instruction of it may be in the benchmark. "
    "May be given several times.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the choice of rows and of the templates of direct instructions.",
)
def benchmark(run: str, out: Path, count: int | None, others: tuple[str, ...], seed: int) -> None:
    """Make a benchmark of the accepted samples of RUN, a run over images to test on."""
    from reasonpix.evaluation.build_benchmark import build_benchmark
    from reasonpix.generation.run_folder import RunFolder

    built = build_benchmark(RunFolder(run), out, count=count, disjoint_from=others, seed=seed)
    for reason, rows in built.left_out.items():
        click.echo(f"{rows} left out: {reason}")
    click.echo(f"{built.rows} rows in {out}")


COMMANDS = (evaluate, benchmark)
