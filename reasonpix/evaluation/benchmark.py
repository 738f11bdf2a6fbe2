"""Read a benchmark: one that `reasonpix benchmark` made, or one of other people."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from reasonpix.core.images import UndecodableImage, decode, decode_mask
from reasonpix.core.parallel import THREADS, prefetch
from reasonpix.datasets.open_reader import open_rows
from reasonpix.datasets.pairs import shown_rows
from reasonpix.errors import InvalidBox, SourceError
from reasonpix.evaluation.benchmark_formats import (
    SESSIONS,
    Found,
    Read,
    magicbrush,
    reason_edit,
    scenarios,
    table,
)
from reasonpix.evaluation.cases import Benchmark, Case
from reasonpix.generation.components.sources import is_text
from reasonpix.plugin.types import Box

Kind = Annotated[str, Field(pattern=r"^\w[\w -]*$", max_length=50)]
"""Of instructions: a folder of edits has its name."""


class BenchmarkOptions(BaseModel):
    """Which cases to evaluate on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        description="What `reasonpix benchmark` wrote, any dataset of pairs that `reasonpix train` "
        "reads, a folder of MagicBrush or of Reason-Edit, or a hub id"
    )
    revision: str | None = Field(None, description="Commit or tag, for hub ids")
    split: str = Field("test", description="Split to read")
    instructions: dict[Kind, str] | None = Field(
        None,
        min_length=1,
        description="Columns of instructions by kind; by default direct and reasoning of a "
        "benchmark of ours, and direct of others",
    )
    captions: Path | None = Field(
        None, description="MagicBrush's global_descriptions.json, where the data hold no captions"
    )
    limit: int | None = Field(None, ge=1, description="Cases to read at most, from the first on")


def read_benchmark(options: BenchmarkOptions, base: Path) -> Benchmark:
    """Read all cases; relative paths are relative to `base`. Images are checked, and not kept.

    Raises `SourceError` for what is no benchmark and for broken rows, all of them at once.
    """
    cases: dict[str, Case] = {}
    broken: dict[str, str] = {}
    drafts = islice(_drafts(options, base), options.limit)
    for row, case in prefetch(_checked, drafts, THREADS):
        if isinstance(case, str):
            broken[row] = case
        elif case.id.lower() in cases:  # names of files that differ by case alone may be the same
            broken[row] = f"its id {case.id!r} is that of {cases[case.id.lower()].row} too"
        else:
            cases[case.id.lower()] = case
    if broken:
        rows = f"{len(broken)} broken row{'s' * (len(broken) != 1)}"
        raise SourceError(
            f"benchmark: {options.path}: {rows}\n{shown_rows(broken)}\nmend or remove them"
        )
    if not cases:
        raise SourceError(f"benchmark: {options.path}: holds no cases")
    return Benchmark(options.path, list(cases.values()))


def _drafts(options: BenchmarkOptions, base: Path) -> Iterator[Found]:
    """The rows, by whatever layout it is."""
    where, place = options.path, base / Path(options.path).expanduser()
    captions = base / options.captions.expanduser() if options.captions else None
    for named, folder in ((where, place), (f"{where}/{options.split}", place / options.split)):
        if (folder / SESSIONS).is_file():
            _refuse(options, "instructions", "revision")
            return magicbrush(named, folder, captions)
    if place.is_dir() and scenarios(place):
        _refuse(options, "instructions", "revision", "captions")
        return reason_edit(where, place)
    rows = open_rows(where, base, options.split, options.revision)
    return table(rows, options.instructions, captions)


def _refuse(options: BenchmarkOptions, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise SourceError(
                f"benchmark: {name} is not for {options.path}, which says it all; leave it out"
            )


# -- A row ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """An image of a row that was looked at: what it gives later must be the same."""

    row: str
    which: str
    read: Read
    content: str
    """SHA-256 of the encoded image, in hex."""

    def data(self) -> bytes:
        """The encoded image. Raises `SourceError`."""
        try:
            data = self.read()
        except OSError as error:
            raise SourceError(f"{self.row}: {error}") from error
        if hashlib.sha256(data).hexdigest() != self.content:
            what = f"the {self.which} changed since it was read"
            raise SourceError(f"{self.row}: {what}; start again")
        return data

    def image(self) -> Image.Image:
        """RGB."""
        return decode(self.data())

    def mask(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """What it marks in an image of `size`."""
        marked = Image.fromarray(decode_mask(self.data()))
        return np.asarray(marked.resize(size, Image.Resampling.NEAREST))


def _checked(found: Found) -> tuple[str, Case | str]:
    """A row's name with its case, or with all that is wrong with it."""
    if isinstance(found, tuple):
        return found
    wrong: list[str] = []
    told = {kind: str(text) for kind, text in found.instructions.items() if is_text(text)}
    for kind, text in found.instructions.items():
        if kind not in told and text is not None:
            wrong.append(f"no text as its {kind} instruction: {text!r:.80}")
    if not told and not wrong:
        wrong.append(f"no instruction: neither {' nor '.join(found.instructions)}")
    looked = {
        which: _looked(found.row, which, read, wrong)
        for which, read in (
            ("input image", found.input),
            ("edited image", found.truth),
            ("mask", found.mask),
        )
        if read
    }
    before = looked["input image"]
    mask = looked.get("mask")
    box = None
    if before and found.box is not None:
        box = _box(found.box, before[1], wrong)
    elif before and mask:
        box = _around(mask[0], mask[1], before[1], wrong)
    if wrong or not before:
        return found.row, "; ".join(wrong)
    truth = looked.get("edited image")
    return found.row, Case(
        id=_safe(found.id),
        row=found.row,
        read_input=before[0].image,
        read_truth=truth[0].image if truth else None,
        instructions=told,
        caption=_text(found.caption) or "",
        edited_caption=_text(found.edited_caption) or "",
        target=_text(found.target),
        box=box,
        read_mask=partial(mask[0].mask, before[1]) if mask else None,
        groups=found.groups,
    )


def _looked(
    row: str, which: str, read: Read, wrong: list[str]
) -> tuple[_Picture, tuple[int, int]] | None:
    """An image and its size; what makes it useless is added to `wrong`."""
    try:
        data = read()
        marked = decode_mask(data).shape[::-1] if which == "mask" else decode(data).size
    except OSError as error:
        wrong.append(str(error))
    except UndecodableImage as error:
        wrong.append(f"{which}: {error}")
    else:
        width, height = marked
        content = hashlib.sha256(data).hexdigest()
        return _Picture(row, which, read, content), (width, height)
    return None


def _box(corners: Any, size: tuple[int, int], wrong: list[str]) -> Box | None:
    try:
        x0, y0, x1, y1 = map(float, corners)
        return Box(x0=x0, y0=y0, x1=x1, y1=y1, width=size[0], height=size[1])
    except InvalidBox as error:
        wrong.append(f"box: {error}")
    except (TypeError, ValueError):
        wrong.append(f"box: no four numbers: {corners!r:.80}")
    return None


def _around(
    mask: _Picture, own: tuple[int, int], size: tuple[int, int], wrong: list[str]
) -> Box | None:
    """The box around what a mask marks in an image of `size`; None where it marks nothing."""
    (w, h), (width, height) = own, size
    # One scaled to the other's size may be a pixel off by rounding.
    if abs(w * height - h * width) > max(w, h, width, height):
        wrong.append(f"mask: {w}x{h} pixels, and the image has {width}x{height}: another aspect")
        return None
    marked = mask.mask(size)
    if not marked.any():
        return None
    ys, xs = (np.flatnonzero(marked.any(axis=axis)) for axis in (1, 0))
    corners = {"x0": xs[0], "y0": ys[0], "x1": xs[-1] + 1, "y1": ys[-1] + 1}
    return Box(**corners, width=width, height=height)


def _text(cell: object) -> str | None:
    return str(cell) if is_text(cell) else None


def _safe(name: str) -> str:
    """The name as one of a file; where that changes it, a hash keeps it apart from others."""
    if re.fullmatch(r"[\w-][\w.-]{0,99}", name, re.ASCII):
        return name
    short = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII).strip("-")[:80]
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
