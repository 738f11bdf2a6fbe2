"""Edit image files: by every instruction and seed, written as single images or as a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from reasonpix.core.images import UndecodableImage, decode
from reasonpix.editing.image_grid import arrange_grid, shrink
from reasonpix.editing.output_files import check_writable, output_paths, write_image
from reasonpix.errors import ReasonpixError
from reasonpix.plugin.types import Problem

if TYPE_CHECKING:
    from reasonpix.editing.config import SamplingSettings
    from reasonpix.editing.pipeline import EditTask, ReasonPix2Pix, StepCallback

Layout = Literal["single", "side-by-side", "grid"]


@dataclass(frozen=True)
class FileEdits:
    """Edits by input, then instruction, then seed."""

    images: Sequence[Path]
    instructions: Sequence[str]
    seeds: Sequence[int]
    layout: Layout
    files: Sequence[Path]
    """The file of each edit; a grid has one file."""

    @property
    def per_image(self) -> int:
        """Edits of each image."""
        return len(self.instructions) * len(self.seeds)

    @property
    def count(self) -> int:
        """Edits in total."""
        return len(self.images) * self.per_image


def plan_file_edits(
    images: Sequence[Path],
    instructions: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    layout: Layout,
    overwrite: bool,
) -> FileEdits:
    """Name the output files in the folder or file `out`, and create their folders.

    Raises `ReasonpixError` for missing images, and for files that must not be overwritten.
    """
    if missing := [f"{path}: {_why_missing(path)}" for path in images if not path.is_file()]:
        raise ReasonpixError("\n".join(missing))
    files = output_paths(out, images, len(instructions), seeds, layout == "grid")
    check_writable(files, images, overwrite)
    return FileEdits(images, instructions, seeds, layout, files)


def _why_missing(path: Path) -> str:
    return "a folder; name the images in it" if path.is_dir() else "no such file"


def write_file_edits(
    plan: FileEdits,
    model: ReasonPix2Pix,
    settings: SamplingSettings,
    on_step: StepCallback,
) -> Iterator[Path | Problem]:
    """Edit and write; yield each file when it is written, and the problem of each failed edit."""
    done: dict[int, Image.Image] = {}
    for number, edited in model.edit(_tasks(plan), settings, on_step):
        path = plan.images[number // plan.per_image]
        if isinstance(edited, Problem):
            yield Problem(status=edited.status, reason=f"{path}: {edited.reason}")
        elif plan.layout == "grid":
            done[number] = shrink(edited)
        else:
            if plan.layout == "side-by-side":
                edited = arrange_grid([[_read(path), edited]])
            write_image(edited, plan.files[number])
            yield plan.files[number]
    if done:
        write_image(_grid_of(plan, done), plan.files[0])
        yield plan.files[0]


def _grid_of(plan: FileEdits, done: dict[int, Image.Image]) -> Image.Image:
    """A row for each image with at least one edit: the input, then its edits."""
    size = plan.per_image
    edits = [[done.get(i * size + n) for n in range(size)] for i in range(len(plan.images))]
    return arrange_grid(
        [
            [shrink(_read(path)), *row]
            for path, row in zip(plan.images, edits, strict=True)
            if any(row)
        ]
    )


def _read(path: Path) -> Image.Image:
    return decode(path.read_bytes())


def _tasks(plan: FileEdits) -> Iterator[EditTask | Problem]:
    """All edits in order; those of an image that cannot be read are problems."""
    from reasonpix.editing.pipeline import EditTask

    for path in plan.images:
        try:
            image = _read(path)
        except (OSError, UndecodableImage) as error:
            yield from [Problem(status="failed", reason=str(error))] * plan.per_image
            continue
        for instruction in plan.instructions:
            yield from (EditTask(image, instruction, seed) for seed in plan.seeds)
