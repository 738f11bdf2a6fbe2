"""The files that edits are written to: names, formats, and no overwriting by accident."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reasonpix.core.atomic import replace_file
from reasonpix.errors import ReasonpixError

_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True},
    ".tif": {"compression": "tiff_lzw"},
    ".tiff": {"compression": "tiff_lzw"},
    ".bmp": {},
}
"""Options of Pillow for each suffix."""


def output_paths(
    out: Path, inputs: Sequence[Path], instructions: int, seeds: Sequence[int], as_grid: bool
) -> list[Path]:
    """The file of each edit, by input, then instruction, then seed; of a grid, its one file.

    `out` is a folder, or a file if there is a single one. Edits in a folder are named
    `bee-edited.png`, or `bee-edited-2-seed7.png` if there are several instructions (numbered from
    1) and seeds. Raises `ReasonpixError` for names that clash or have an unknown format.
    """
    count = 1 if as_grid else len(inputs) * instructions * len(seeds)
    if _is_file_name(out):
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
    seed_names = [f"-seed{seed}" for seed in seeds] if len(seeds) > 1 else [""]
    return [
        out / f"{path.stem}-edited{number}{seed}.png"
        for path in inputs
        for number in numbers
        for seed in seed_names
    ]


def _is_file_name(out: Path) -> bool:
    if out.is_dir() or not out.suffix:
        return False
    suffix = out.suffix.lower()
    if suffix not in _FORMATS and suffix in Image.registered_extensions():
        raise ReasonpixError(
            f"{out}: edits are written as {', '.join(_FORMATS)}; name a file with one of these, or "
            "a folder"
        )
    return suffix in _FORMATS


def check_writable(files: Sequence[Path], inputs: Sequence[Path], overwrite: bool) -> None:
    """Create the folders of `files`.

    Raises `ReasonpixError` for an existing file unless `overwrite`, and always for an input.
    """
    for file in files:
        if os.path.lexists(file):
            if any(file.exists() and path.exists() and file.samefile(path) for path in inputs):
                raise ReasonpixError(f"{file} is an input, which is never replaced; name another")
            if not overwrite or file.is_dir():
                raise ReasonpixError(f"{file} exists; name another by --out, or give --force")
    for folder in dict.fromkeys(file.parent for file in files):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReasonpixError(f"cannot make the folder {folder}: {error.strerror}") from error


def write_image(image: Image.Image, file: Path) -> None:
    """Write an image in the format of the file's suffix, completely or not at all.

    Raises `ReasonpixError` when the disk is full or the format cannot hold the image.
    """
    buffer = io.BytesIO()
    try:
        kind = Image.registered_extensions()[file.suffix.lower()]
        image.save(buffer, kind, **_FORMATS[file.suffix.lower()])
        replace_file(file, buffer.getvalue())
    except (OSError, ValueError) as error:
        raise ReasonpixError(f"cannot write {file}: {error}") from error
