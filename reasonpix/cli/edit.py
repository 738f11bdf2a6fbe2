"""The command `edit`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reasonpix.cli.options import EditingModelArguments, editing_model_options

if TYPE_CHECKING:
    from reasonpix.editing.pipeline import StepCallback


@click.command("edit")
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE…"
)
@click.option(
    "--instruction",
    "instructions",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="How to edit every IMAGE. May be given several times.",
)
@editing_model_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(),
    help="An output folder, by default the current one; or a file, if there is one edit.",
)
@click.option("--force", is_flag=True, help="Overwrite existing files, but never an IMAGE.")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**62),
    default=0,
    show_default=True,
    help="Seed of the noise, the same for every IMAGE.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Edits of each image and instruction, with seeds SEED, SEED+1, …",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Denoising steps.")
@click.option(
    "--guidance-scale",
    type=float,
    metavar="X",
    help="Weight of the instruction; 1 disables guidance.",
)
@click.option(
    "--image-guidance-scale",
    type=float,
    metavar="X",
    help="Weight of the input image; 1 disables guidance.",
)
@click.option(
    "--resolution",
    type=click.IntRange(min=8),
    metavar="N",
    help="Longer side at which the model works, in pixels.",
)
@click.option("--side-by-side", is_flag=True, help="Put each edit to the right of its input.")
@click.option("--grid", is_flag=True, help="Write one image: a row of input and edits per IMAGE.")
def edit_command(
    images: tuple[Path, ...],
    instructions: tuple[str, ...],
    model: EditingModelArguments,
    out: Path,
    force: bool,
    seed: int,
    samples: int,
    side_by_side: bool,
    grid: bool,
    steps: int | None,
    **scales_and_resolution: float | None,
) -> None:
    """Edit every IMAGE with every instruction, and print the files written.

    Edits are named after the IMAGE, such as bee-edited.png for bee.jpg, and have its size. Steps,
    guidance scales and resolution default to the model's own settings.
    """
    if grid and side_by_side:
        raise click.UsageError("--grid shows the inputs already; leave --side-by-side out")
    if not all(text.strip() for text in instructions):
        raise click.UsageError("--instruction: say what to do")

    from reasonpix.editing.file_edits import Layout, plan_file_edits, write_file_edits
    from reasonpix.plugin.types import Problem

    layout: Layout = "grid" if grid else "side-by-side" if side_by_side else "single"
    seeds = range(seed, seed + samples)
    plan = plan_file_edits(images, instructions, seeds, out, layout, overwrite=force)
    pipeline = model.load()
    settings = pipeline.resolve_settings(num_inference_steps=steps, **scales_and_resolution)
    problems: dict[str, None] = {}
    written: list[Path] = []
    try:
        with _progress_bar(plan.count) as on_step:
            for outcome in write_file_edits(plan, pipeline, settings, on_step):
                if isinstance(outcome, Problem):
                    problems[outcome.reason] = None
                else:
                    written.append(outcome)
    finally:  # also list the files written before an error
        for line in problems:
            click.echo(line, err=True)
        for file in written:
            click.echo(file)
    if problems:
        sys.exit(1)


@contextmanager
def _progress_bar(edits: int) -> Iterator[StepCallback]:
    """A progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.completed:.1f}/{task.total} edits"), BarColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=edits)
        yield lambda share: bar.advance(task, share)


COMMANDS = (edit_command,)
