"""How edits are put on paper: beside their inputs, as a grid, and in which files."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reasonpix.core.atomic import replace_file
from reasonpix.errors import ReasonpixError

GAP = 8
"""White pixels between two images of a sheet."""
CELL = 512
"""Longest side of an image in a grid, in pixels."""

_SAVED: dict[str, dict[str, Any]] = {
    ".png": {},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True},
    ".tif": {"compression": "tiff_lzw"},
    ".tiff": {"compression": "tiff_lzw"},
    ".bmp": {},
}
"""Suffixes of files that edits are written to."""


def grid(rows: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
    """Rows of images on white, each centred in its place; where there is None, the place is empty.

    A column is as wide as its widest image, a row as high as its highest.
    """
    widths = [max(_size(image)[0] for image in column) for column in zip(*rows, strict=True)]
    heights = [max(_size(image)[1] for image in row) for row in rows]
    size = sum(widths) + GAP * (len(widths) - 1), sum(heights) + GAP * (len(heights) - 1)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for image, width in zip(row, widths, strict=True):
            if image:
                middle = (width - image.width) // 2, (height - image.height) // 2
                sheet.paste(image, (left + middle[0], top + middle[1]))
            left += width + GAP
        top += height + GAP
    return sheet


def _size(image: Image.Image | None) -> tuple[int, int]:
    return image.size if image else (0, 0)


def shrunk(image: Image.Image, most: int = CELL) -> Image.Image:
    """The image with sides of at most `most` pixels."""
    scale = most / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def files(
    out: Path, inputs: Sequence[Path], instructions: int, seeds: Sequence[int], as_grid: bool
) -> list[Path]:
    """Where the edits go: by input, then instruction, then seed. A grid is one file.

    `out` is a folder, or a file when one is all there is to write. In a folder they are named
    `bee-edited.png`, `bee-edited-2-seed7.png`: instructions are numbered from 1 and seeds named
    where there are several. Raises `ReasonpixError` for a name that does not serve.
    """
    count = 1 if as_grid else len(inputs) * instructions * len(seeds)
    if _means_a_file(out):
        if count > 1:
            raise ReasonpixError(
                f"{out} is one file, and there are {count} to write; name a folder, or ask for "
                "a grid"
            )
        return [out]
    if as_grid:
        return [out / "grid.png"]
    taken: dict[str, Path] = {}
    for path in inputs:
        if other := taken.get(path.stem.casefold()):
            raise ReasonpixError(
                f"{other} and {path} would both be written as {path.stem}-edited.png; "
                "edit them in two calls, into two folders"
            )
        taken[path.stem.casefold()] = path
    numbers = [f"-{number}" for number in range(1, instructions + 1)] if instructions > 1 else [""]
    named = [f"-seed{seed}" for seed in seeds] if len(seeds) > 1 else [""]
    return [
        out / f"{path.stem}-edited{number}{seed}.png"
        for path in inputs
        for number in numbers
        for seed in named
    ]


def _means_a_file(out: Path) -> bool:
    if out.is_dir() or not out.suffix:
        return False
    suffix = out.suffix.lower()
    if suffix not in _SAVED and suffix in Image.registered_extensions():
        raise ReasonpixError(
            f"{out}: edits are written as {', '.join(_SAVED)}; name a file with one of these, or "
            "a folder"
        )
    return suffix in _SAVED


def check_writable(files: Sequence[Path], inputs: Sequence[Path], force: bool) -> None:
    """Make the folders of `files`. Raises `ReasonpixError` for a file that must not be replaced.

    That is any file which exists, unless `force`; an input also then.
    """
    for file in files:
        if os.path.lexists(file):
            if any(file.exists() and path.exists() and file.samefile(path) for path in inputs):
                raise ReasonpixError(f"{file} is an input, which is never replaced; name another")
            if not force or file.is_dir():
                raise ReasonpixError(f"{file} exists; name another by --out, or give --force")
    for folder in dict.fromkeys(file.parent for file in files):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReasonpixError(f"cannot make the folder {folder}: {error.strerror}") from error


def write(image: Image.Image, file: Path) -> None:
    """Write an image in the format of the file's suffix, whole or not at all.

    Raises `ReasonpixError` when the disk is full or the format cannot hold the image.
    """
    buffer = io.BytesIO()
    try:
        kind = Image.registered_extensions()[file.suffix.lower()]
        image.save(buffer, kind, **_SAVED[file.suffix.lower()])
        replace_file(file, buffer.getvalue())
    except (OSError, ValueError) as error:
        raise ReasonpixError(f"cannot write {file}: {error}") from error
