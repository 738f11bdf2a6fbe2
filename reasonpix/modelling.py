"""The commands for the editing model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from PIL.Image import Image

    from reasonpix.inference import Advance, Task
    from reasonpix.records import Problem


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
@click.option("--revision", help="Commit or tag of the hub repository.")
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
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Computing precision; auto is float32 on a CPU, float16 on a GPU.",
)
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
    side_by_side: bool,
    grid: bool,
) -> None:
    """Edit every IMAGE by every instruction, and print the files that are written.

    They are named after the IMAGE, such as bee-edited.png for bee.jpg, and are of its size. What is
    not said of steps, guidance and resolution is as the model was trained to be used.
    """
    from reasonpix import sheets
    from reasonpix.errors import ReasonpixError

    if grid and side_by_side:
        raise click.UsageError("--grid shows the inputs already; leave --side-by-side out")
    if not all(text.strip() for text in instructions):
        raise click.UsageError("--instruction: say what to do")
    if absent := [f"{path}: {_absence(path)}" for path in images if not path.is_file()]:
        raise ReasonpixError("\n".join(absent))
    seeds = range(seed, seed + samples)
    each = len(instructions) * samples
    files = sheets.files(out, images, len(instructions), seeds, grid)
    sheets.check_writable(files, images, force)

    from reasonpix.inference import ReasonPix2Pix
    from reasonpix.records import Problem

    editing = ReasonPix2Pix.from_pretrained(
        model, revision=revision, device=device, dtype=dtype, batch_size=batch_size
    )
    settings = editing.resolve(
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
                    done[number] = sheets.shrunk(edited)
                else:
                    if side_by_side:
                        edited = sheets.grid([[_read(path), edited]])
                    sheets.write(edited, files[number])
                    written.append(files[number])
        if done:
            rows = [
                [sheets.shrunk(_read(path)), *(done.get(i * each + n) for n in range(each))]
                for i, path in enumerate(images)
                if any(number // each == i for number in done)
            ]
            sheets.write(sheets.grid(rows), files[0])
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
    from reasonpix.images import decode

    return decode(path.read_bytes())


def _tasks(
    images: Sequence[Path], instructions: Sequence[str], seeds: Sequence[int]
) -> Iterator[Task | Problem]:
    """All edits in order; those of an image that cannot be read are problems."""
    from reasonpix.images import UndecodableImage
    from reasonpix.inference import Task
    from reasonpix.records import Problem

    for path in images:
        try:
            image = _read(path)
        except (OSError, UndecodableImage) as error:
            problem = Problem(status="failed", reason=str(error))
            yield from [problem] * (len(instructions) * len(seeds))
            continue
        for instruction in instructions:
            yield from (Task(image, instruction, seed) for seed in seeds)


@contextmanager
def _bar(edits: int) -> Iterator[Advance]:
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


COMMANDS = (edit,)
