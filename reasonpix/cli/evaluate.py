"""The commands for evaluation."""

from __future__ import annotations

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
    from reasonpix.evaluation.runner import PhaseProgress


@click.command("evaluate")
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the edits, the scores and the report.",
)
@set_option("seed=1")
@options.runtime_option(None)
@click.option("--retry-failed", is_flag=True, help="Retry the edits that failed.")
@click.option(
    "--reference",
    metavar="METHOD",
    help="The method to compare the others with. Default: the recipe's last one.",
)
def evaluate_command(
    recipe: str,
    out: Path,
    overrides: tuple[str, ...],
    runtime: Runtime | None,
    retry_failed: bool,
    reference: str | None,
) -> None:
    """Evaluate the methods of RECIPE (a file, or the name of a shipped recipe) on its benchmark.

    After an interruption, run the same command again to continue.
    """
    from reasonpix.errors import ReasonpixError
    from reasonpix.evaluation.recipe import load_evaluation_recipe
    from reasonpix.evaluation.results import COPY

    checked = load_evaluation_recipe(recipe, overrides)
    if runtime:
        checked = checked.with_runtime(runtime)
    if reference not in (None, COPY, *checked.methods):
        raise ReasonpixError(
            f"--reference: the recipe has no method {reference!r}; "
            f"choose one of {', '.join(checked.methods)}"
        )
    with require_extra("evaluate"):
        import matplotlib  # noqa: F401  # fail now rather than when the report is written

        from reasonpix.evaluation.report import print_tables, write_report
        from reasonpix.evaluation.runner import evaluate
    with console.exit_when_stopped(), _bars() as progress:
        folder = evaluate(checked, out, progress, retry_failed=retry_failed)
        comparison = write_report(folder, reference)
    print_tables(comparison)
    click.echo((out / "report.html").resolve())


@contextmanager
def _bars() -> Iterator[PhaseProgress]:
    """A progress bar for each phase; without a terminal, a line for each tenth of it."""
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

        def show(what: str, done: int, total: int) -> None:
            if not terminal.is_terminal:
                tenth = 10 * done // max(1, total)
                if tenths.get(what) != tenth:
                    tenths[what] = tenth
                    click.echo(f"{what}: {done} of {total}", err=True)
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, completed=done)
            bars.update(tasks[what], completed=done, total=total)

        yield show


@click.command("benchmark")
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", help="Number of rows. Default: all samples."
)
@click.option(
    "--disjoint-from",
    "training",
    multiple=True,
    metavar="DATASET|MODEL",
    help="A training dataset, or a model that records its training data: leave out samples with "
    "its images or instructions. May be repeated.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Determines the rows and the templates of the direct instructions.",
)
def benchmark_command(
    run: str, out: Path, count: int | None, training: tuple[str, ...], seed: int
) -> None:
    """Build a benchmark from the accepted samples of RUN, a run over test images."""
    from reasonpix.evaluation.benchmark_writer import build_benchmark
    from reasonpix.generation.run_folder import RunFolder

    summary = build_benchmark(RunFolder(run), out, count=count, disjoint_from=training, seed=seed)
    for reason, rows in summary.left_out.items():
        click.echo(f"{rows} left out: {reason}")
    for model, overlap in summary.overlaps.items():
        click.echo(f"warning: {overlap.sentence(model)}", err=True)
    if summary.overlaps:
        models = " ".join(f"--disjoint-from {model}" for model in summary.overlaps)
        click.echo(f"To leave such cases out: {models}", err=True)
    click.echo(f"{summary.rows} rows in {out}")


COMMANDS = (evaluate_command, benchmark_command)
