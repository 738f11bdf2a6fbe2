"""The commands for the editing model."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from reasonpix.cli import console, options
from reasonpix.cli.options import set_option
from reasonpix.errors import ReasonpixError, require_extra

if TYPE_CHECKING:
    from PIL.Image import Image

    from reasonpix.editing.pipeline import EditTask, StepCallback
    from reasonpix.editing.runtimes.names import Runtime
    from reasonpix.plugin.types import Problem
    from reasonpix.training.trainer import Progress


@click.command()
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE…"
)
@click.option(
    "--instruction",
    "instructions",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="What to do with every IMAGE. May be given several times.",
)
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="A folder that `reasonpix train` wrote, a hub id, or a name such as mini/reasonpix2pix.",
)
@options.revision_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(),
    help="A folder, by default this one; or a file, where there is one to write.",
)
@click.option("--force", is_flag=True, help="Replace files that exist. Inputs are never replaced.")
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
    help="Edits of each image and instruction, by seeds that follow one another.",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Denoising steps.")
@click.option(
    "--guidance-scale", type=float, metavar="X", help="How much the instruction counts; 1 is plain."
)
@click.option(
    "--image-guidance-scale", type=float, metavar="X", help="How much the image counts; 1 is plain."
)
@click.option(
    "--resolution",
    type=click.IntRange(min=8),
    metavar="N",
    help="Longer side in which the model sees an image, in pixels.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Edits computed together on a GPU; another number may move the last bits.",
)
@options.device_option
@options.dtype_option
@options.runtime_option("auto")
@click.option("--side-by-side", is_flag=True, help="Write each edit to the right of its input.")
@click.option(
    "--grid", is_flag=True, help="Write one sheet: in each row an input and all its edits."
)
def edit(
    images: tuple[Path, ...],
    instructions: tuple[str, ...],
    model: str,
    revision: str | None,
    out: Path,
    force: bool,
    seed: int,
    samples: int,
    steps: int | None,
    guidance_scale: float | None,
    image_guidance_scale: float | None,
    resolution: int | None,
    batch_size: int,
    device: str,
    dtype: Literal["auto", "float32", "float16", "bfloat16"],
    runtime: Runtime,
    side_by_side: bool,
    grid: bool,
) -> None:
    """Edit every IMAGE by every instruction, and print the files that are written.

    They are named after the IMAGE, such as bee-edited.png for bee.jpg, and are of its size. What is
    not said of steps, guidance and resolution is as the model was trained to be used.
    """
    from reasonpix.editing import image_grid

    if grid and side_by_side:
        raise click.UsageError("--grid shows the inputs already; leave --side-by-side out")
    if not all(text.strip() for text in instructions):
        raise click.UsageError("--instruction: say what to do")
    if absent := [f"{path}: {_absence(path)}" for path in images if not path.is_file()]:
        raise ReasonpixError("\n".join(absent))
    seeds = range(seed, seed + samples)
    each = len(instructions) * samples
    files = image_grid.files(out, images, len(instructions), seeds, grid)
    image_grid.check_writable(files, images, force)

    with require_extra("edit"):
        from reasonpix.editing.pipeline import ReasonPix2Pix
    from reasonpix.plugin.types import Problem

    editing = ReasonPix2Pix.from_pretrained(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        runtime=runtime,
    )
    settings = editing.resolve_settings(
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        num_inference_steps=steps,
        resolution=resolution,
    )
    told: dict[str, None] = {}
    done: dict[int, Image] = {}
    written: list[Path] = []
    try:
        with _bar(len(images) * each) as advance:
            tasks = _tasks(images, instructions, seeds)
            for number, edited in editing.edit(tasks, settings, advance):
                path = images[number // each]
                if isinstance(edited, Problem):
                    told[f"{path}: {edited.reason}"] = None
                elif grid:
                    done[number] = image_grid.shrunk(edited)
                else:
                    if side_by_side:
                        edited = image_grid.grid([[_read(path), edited]])
                    image_grid.write(edited, files[number])
                    written.append(files[number])
        if done:
            rows = [
                [image_grid.shrunk(_read(path)), *(done.get(i * each + n) for n in range(each))]
                for i, path in enumerate(images)
                if any(number // each == i for number in done)
            ]
            image_grid.write(image_grid.grid(rows), files[0])
            written = files
    finally:  # what is written is told, even if the next cannot be
        for line in told:
            click.echo(line, err=True)
        for file in written:
            click.echo(file)
    if told:
        sys.exit(1)


def _absence(path: Path) -> str:
    return "a folder; name the images in it" if path.is_dir() else "no such file"


def _read(path: Path) -> Image:
    from reasonpix.core.images import decode

    return decode(path.read_bytes())


def _tasks(
    images: Sequence[Path], instructions: Sequence[str], seeds: Sequence[int]
) -> Iterator[EditTask | Problem]:
    """All edits in order; those of an image that cannot be read are problems."""
    from reasonpix.core.images import UndecodableImage
    from reasonpix.editing.pipeline import EditTask
    from reasonpix.plugin.types import Problem

    for path in images:
        try:
            image = _read(path)
        except (OSError, UndecodableImage) as error:
            problem = Problem(status="failed", reason=str(error))
            yield from [problem] * (len(instructions) * len(seeds))
            continue
        for instruction in instructions:
            yield from (EditTask(image, instruction, seed) for seed in seeds)


@contextmanager
def _bar(edits: int) -> Iterator[StepCallback]:
    """A progress bar, where there is somebody to see it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.completed:.1f}/{task.total} edits"), BarColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=edits)
        yield lambda share: bar.advance(task, share)


@click.command()
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder of the run. The model will be in its model/.",
)
@set_option
def train(recipe: str, out: Path, overrides: tuple[str, ...]) -> None:
    """Train an editing model as RECIPE (a file, or the name of a shipped one) says.

    Run the same command again to go on where it stopped. For several GPUs: accelerate launch -m
    reasonpix train RECIPE --out DIR
    """
    from reasonpix.generation.recipe_catalog import locate
    from reasonpix.training.recipe import load_training_recipe

    checked = load_training_recipe(locate(recipe), overrides)
    told: list[int] = []
    # Of a launcher's processes all but the first are silent, even of what went wrong for all.
    launched, main = "RANK" in os.environ, os.environ.get("RANK", "0") == "0"
    try:
        with _Training(main) as bars:

            def deferred(number: int) -> bool:
                told.append(number)
                # A launcher passes on a signal that the terminal has sent already.
                return bars.steps_taken and (launched or len(told) == 1)

            with console.graceful_shutdown(deferred):
                with require_extra("train"):
                    from reasonpix.training.trainer import train as learn

                trained = learn(checked, out, bars.show, lambda: bool(told))
    except KeyboardInterrupt as stopped:
        if main:
            click.echo(console.STOPPED, err=True)
        sys.exit(128 + (*told, *stopped.args, 2)[0])
    except ReasonpixError:
        if main:
            raise
        sys.exit(1)
    if not main:
        return
    if trained.skipped:
        row, why = trained.skipped[0]
        rows = f"{len(trained.skipped)} row{'s' * (len(trained.skipped) != 1)}"
        click.echo(f"{rows} left out, such as {row}: {why}")
    folder = shlex.quote(str(trained.model))
    click.echo(f"the model is in {folder}; edit with it:")
    click.echo(f"reasonpix edit IMAGE --instruction TEXT --model {folder}")


class _Training:
    """One progress bar for each stage, with loss, images/s and time left, where it is `shown`."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def __enter__(self) -> _Training:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        self.steps_taken = False
        self._tasks: dict[str, Any] = {}
        self._bars = Bars(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (self.shown and console.is_terminal),
            speed_estimate_period=600,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def show(self, now: Progress) -> None:
        """Draw how far training is."""
        self.steps_taken = now.stage in ("align", "train")
        facts = ""
        if now.loss is not None and now.rate is not None:
            facts = f"loss {now.loss:.4f}  {now.rate:.1f} images/s"
        if not self._tasks:
            self._bars.start()
        if now.stage not in self._tasks:
            # From where it goes on: what was done before says nothing about the time left.
            task = self._bars.add_task(now.stage, total=now.total, completed=now.done, facts=facts)
            self._tasks[now.stage] = task
        self._bars.update(self._tasks[now.stage], completed=now.done, total=now.total, facts=facts)


COMMANDS = (edit, train)
