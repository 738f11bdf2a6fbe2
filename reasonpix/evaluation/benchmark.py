"""Read and check a benchmark: one of `reasonpix benchmark`, or a published one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from reasonpix.core.figures import counted
from reasonpix.core.images import UndecodableImage, decode, decode_mask
from reasonpix.core.parallel import THREADS, prefetch
from reasonpix.core.text import is_text
from reasonpix.datasets.formats import open_reader
from reasonpix.datasets.pairs import shown_rows
from reasonpix.errors import InvalidBox, SourceError
from reasonpix.evaluation.benchmark_formats import (
    SESSIONS,
    DraftRow,
    ReadImage,
    magicbrush,
    own_images,
    reason_edit,
    scenarios,
    table,
)
from reasonpix.evaluation.cases import Benchmark, Case
from reasonpix.evaluation.grounder_filters import read_grounder_filters
from reasonpix.evaluation.magicbrush_captions import GLOBAL, LOCAL, MagicBrushCaptions
from reasonpix.plugin.types import Box

Kind = Annotated[str, Field(pattern=r"^\w[\w -]*$", max_length=50)]
"""A kind of instructions. It becomes the name of a folder of edits."""


class OwnImage(BaseModel):
    """An image with an instruction, without a ground truth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Path = Field(description="The file; relative to the working directory")
    instruction: str = Field(min_length=1, description="How to edit it")


class BenchmarkOptions(BaseModel):
    """The cases to evaluate on: a benchmark, or images of your own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(
        None,
        description="Output of `reasonpix benchmark`, any dataset of pairs that `reasonpix train` "
        "reads, a folder of MagicBrush or Reason-Edit, or a hub id",
    )
    images: tuple[OwnImage, ...] | None = Field(
        None,
        min_length=1,
        description="Instead of path: images with instructions, to compare edits by eye",
    )
    revision: str | None = Field(None, description="Commit or tag, for hub ids")
    split: str = Field("test", description="Split to read")
    instructions: dict[Kind, str] | None = Field(
        None,
        min_length=1,
        description="Columns of instructions by kind; by default direct and reasoning for a "
        "benchmark of reasonpix, and direct for others",
    )
    captions: Path | None = Field(
        None,
        description="Folder with MagicBrush's local_descriptions.json and "
        "global_descriptions.json, if the data have no captions",
    )
    limit: int | None = Field(
        None, ge=1, description="Read only the first cases, at most this many"
    )

    @model_validator(mode="after")
    def _path_or_images(self) -> Self:
        if (self.path is None) == (self.images is None):
            raise ValueError("name either path or images")
        return self

    @property
    def name(self) -> str:
        """For messages and the report."""
        return "images of the recipe" if self.path is None else self.path


def read_benchmark(options: BenchmarkOptions, base: Path) -> Benchmark:
    """Read all cases. Paths are relative to `base`. Images are decoded to check them, then dropped.

    Raises `SourceError` if it is not a benchmark, or with all rows that are broken.
    """
    cases: dict[str, Case] = {}
    broken: dict[str, str] = {}
    drafts, captions = _drafts(options, base)
    for row, case in prefetch(_check_row, islice(drafts, options.limit), THREADS):
        if isinstance(case, str):
            broken[row] = case
        elif case.id.lower() in cases:  # file systems may ignore case
            broken[row] = f"its id {case.id!r} is also that of {cases[case.id.lower()].row}"
        else:
            cases[case.id.lower()] = case
    if broken:
        rows = counted(len(broken), "broken row")
        raise SourceError(
            f"benchmark: {options.name}: {rows}\n{shown_rows(broken)}\nfix or remove them"
        )
    if not cases:
        raise SourceError(f"benchmark: {options.name}: it has no cases")
    notes = () if captions is None else tuple(captions.notes())
    filters = options.path and read_grounder_filters(base / Path(options.path).expanduser())
    return Benchmark(options.name, list(cases.values()), notes, filters or None)


def _drafts(
    options: BenchmarkOptions, base: Path
) -> tuple[Iterator[DraftRow], MagicBrushCaptions | None]:
    """The rows, read in the format that the benchmark has, and the descriptions beside them."""
    if options.images or options.path is None:
        _reject_options(options, "instructions", "revision", "captions")
        images = [(base / it.image.expanduser(), it.instruction) for it in options.images or ()]
        return own_images(images), None
    name, root = options.path, base / Path(options.path).expanduser()
    captions = _named_captions(base / options.captions.expanduser()) if options.captions else None
    for folder_name, folder in ((name, root), (f"{name}/{options.split}", root / options.split)):
        if (folder / SESSIONS).is_file():
            _reject_options(options, "instructions", "revision")
            captions = MagicBrushCaptions(folder) if captions is None else captions
            return magicbrush(folder_name, folder, captions), captions
    if root.is_dir() and scenarios(root):
        _reject_options(options, "instructions", "revision", "captions")
        return reason_edit(name, root), None
    rows = open_reader(name, base, options.split, options.revision)
    return table(rows, options.instructions, captions), captions


def _named_captions(folder: Path) -> MagicBrushCaptions:
    """The descriptions in a folder that the recipe names. Raises `SourceError`."""
    captions = MagicBrushCaptions(folder)
    if not captions:
        raise SourceError(
            f"benchmark.captions: {folder} is not a folder with MagicBrush's {LOCAL} or {GLOBAL}"
        )
    return captions


def _reject_options(options: BenchmarkOptions, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise SourceError(
                f"benchmark: {options.name} has its own format, in which {name} is not an option; "
                "leave it out"
            )


# -- A row ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CheckedImage:
    """An image that was decoded once. Later reads must return the same bytes."""

    row: str
    role: str
    read: ReadImage
    size: tuple[int, int]
    """Width and height in pixels."""
    sha256: str
    """Of the encoded image, in hex."""

    def data(self) -> bytes:
        """The encoded image. Raises `SourceError`."""
        try:
            data = self.read()
        except OSError as error:
            raise SourceError(f"{self.row}: {error}") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise SourceError(
                f"{self.row}: the {self.role} changed during the evaluation; start again"
            )
        return data

    def image(self) -> Image.Image:
        """RGB."""
        return decode(self.data())

    def mask(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """(height, width): what the mask marks in an image of `size`."""
        marked = Image.fromarray(decode_mask(self.data()))
        return np.asarray(marked.resize(size, Image.Resampling.NEAREST))


def _check_row(draft: DraftRow) -> tuple[str, Case | str]:
    """A row's name with its case, or with all of its problems."""
    if isinstance(draft, tuple):
        return draft
    problems: list[str] = []
    instructions = {kind: str(it) for kind, it in draft.instructions.items() if is_text(it)}
    for kind, cell in draft.instructions.items():
        if kind not in instructions and cell is not None:
            problems.append(f"its {kind} instruction is not a text: {cell!r:.80}")
    if not instructions and not problems:
        problems.append(f"no instruction: neither {' nor '.join(draft.instructions)}")
    source = _check_image(draft.row, "input image", draft.input, problems)
    truth = _check_image(draft.row, "edited image", draft.truth, problems)
    mask = _check_image(draft.row, "mask", draft.mask, problems)
    box = None
    if source and draft.box is not None:
        box = _box(draft.box, source.size, problems)
    elif source and mask:
        box = _bounding_box(mask, source.size, problems)
    if problems or not source:
        return draft.row, "; ".join(problems)
    return draft.row, Case(
        id=_file_name(draft.id),
        row=draft.row,
        read_input=source.image,
        read_truth=truth.image if truth else None,
        instructions=instructions,
        caption=_text(draft.caption) or "",
        edited_caption=_text(draft.edited_caption) or "",
        local_caption=draft.local_caption,
        target=_text(draft.target),
        box=box,
        read_mask=partial(mask.mask, source.size) if mask else None,
        groups=draft.groups,
    )


def _check_image(
    row: str, role: str, read: ReadImage | None, problems: list[str]
) -> _CheckedImage | None:
    """Decode an image if there is one; what is wrong with it is added to `problems`."""
    if read is None:
        return None
    try:
        data = read()
        width, height = decode_mask(data).shape[::-1] if role == "mask" else decode(data).size
    except OSError as error:
        problems.append(str(error))
    except UndecodableImage as error:
        problems.append(f"{role}: {error}")
    else:
        return _CheckedImage(row, role, read, (width, height), hashlib.sha256(data).hexdigest())
    return None


def _box(corners: Any, size: tuple[int, int], problems: list[str]) -> Box | None:
    try:
        x0, y0, x1, y1 = map(float, corners)
        return Box(x0=x0, y0=y0, x1=x1, y1=y1, width=size[0], height=size[1])
    except InvalidBox as error:
        problems.append(f"box: {error}")
    except (TypeError, ValueError):
        problems.append(f"box: expected four numbers, not {corners!r:.80}")
    return None


def _bounding_box(mask: _CheckedImage, size: tuple[int, int], problems: list[str]) -> Box | None:
    """The box around what a mask marks in an image of `size`; None if it marks nothing."""
    (w, h), (width, height) = mask.size, size
    # A mask that was scaled may be a pixel off by rounding.
    if abs(w * height - h * width) > max(w, h, width, height):
        problems.append(
            f"mask: {w}x{h} pixels; the image has {width}x{height}, another aspect ratio"
        )
        return None
    marked = mask.mask(size)
    if not marked.any():
        return None
    ys, xs = (np.flatnonzero(marked.any(axis=axis)) for axis in (1, 0))
    corners = {"x0": xs[0], "y0": ys[0], "x1": xs[-1] + 1, "y1": ys[-1] + 1}
    return Box(**corners, width=width, height=height)


def _text(cell: object) -> str | None:
    return str(cell) if is_text(cell) else None


def _file_name(name: str) -> str:
    """The name, made safe for a file; a hash keeps changed names unique."""
    if re.fullmatch(r"[\w-][\w.-]{0,99}", name, re.ASCII):
        return name
    short = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII).strip("-")[:80]
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
