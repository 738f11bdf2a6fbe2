"""What training reads: pairs of images with the instructions that lead from one to the other."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from reasonpix.core.images import UndecodableImage, decode
from reasonpix.core.parallel import THREADS, Report, prefetch, quiet
from reasonpix.core.text import is_text
from reasonpix.datasets.open_reader import open_rows
from reasonpix.datasets.reader import Rows, Texts
from reasonpix.errors import SourceError

SMALLEST_CROP = 0.8
"""The side of the smallest crop, as a share of the centre crop's: most of the edit stays in it."""

_SHOWN = 10


class Data(BaseModel):
    """Which pairs to train on, and how they are shown. Every row is used with each instruction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | list[str] = Field(
        description="Published dataset, InstructPix2Pix folder, folder of parquet files, saved "
        "dataset, or hub id; or several of them"
    )
    revision: str | None = Field(None, description="Commit or tag, for hub ids")
    split: str = Field("train", description="Split to read")
    instructions: list[str] | None = Field(
        None,
        min_length=1,
        description="Columns of instructions; by default the one that diffusers' trainer reads "
        "(edit_prompt), or MagicBrush's (instruction)",
    )
    align: str | None = Field(
        None, description="Column of plain text that h is aligned to, such as direct_instruction"
    )
    broken: Literal["stop", "skip"] = Field(
        "stop", description="What broken rows do: stop before any training, or be left out"
    )
    limit: int | None = Field(None, ge=1, description="Rows to read at most, from the first on")
    resolution: int = Field(256, ge=8, description="Side of the squares that are shown, in pixels")
    flip: bool = Field(
        False,
        description="Show each pair mirrored too; instructions that say left or right lie then",
    )
    crops: int = Field(
        1, ge=1, description="Crops of each pair: the centre, and others that are drawn once"
    )

    @field_validator("instructions")
    @classmethod
    def _each_once(cls, columns: list[str] | None) -> list[str] | None:
        if columns and len(set(columns)) < len(columns):
            raise ValueError("a column stands here twice; each row would count twice")
        return columns


@dataclass(frozen=True, slots=True)
class Example:
    """An instruction and the pair it belongs to."""

    row: str
    """The file and the row in it, for messages."""
    input_image: str
    """SHA-256 of the encoded image, in hex."""
    edited_image: str
    instruction: str
    column: str
    """Where the instruction comes from."""
    plain: str | None = None
    """The text of the column `align`, where the row has one."""


class View(NamedTuple):
    """A square of an image, the same of both images of a pair.

    Its side is `scale` times the image's shorter side; `x` and `y` in [0, 1] say where it lies in
    the room that is left, from the left and from the top.
    """

    scale: float
    x: float
    y: float
    flip: bool

    def of(self, image: Image.Image, resolution: int) -> Image.Image:
        """The square, `resolution` pixels wide and high; mirrored when `flip` is set.

        Scaled with Lanczos, as InstructPix2Pix does; a square of that size already is only cut.
        """
        side = max(1, round(self.scale * min(image.size)))
        left = int(self.x * (image.width - side))
        top = int(self.y * (image.height - side))
        box = (left, top, left + side, top + side)
        square = image.crop(box).resize((resolution, resolution), Image.Resampling.LANCZOS)
        return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else square


class Pairs:
    """Examples in memory, their images on disk. Images are read in any order, from any thread."""

    def __init__(
        self,
        data: Data,
        examples: Sequence[Example],
        places: Sequence[tuple[Rows, int]],
        skipped: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.data = data
        self.examples = examples
        self._places = places
        self._skipped = dict(skipped)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The rows that were left out, and why."""
        return list(self._skipped.items())

    @property
    def views(self) -> int:
        """How many views there are of each example."""
        return self.data.crops * (2 if self.data.flip else 1)

    def usable(self) -> list[int]:
        """The examples of rows that were not left out."""
        return [i for i, example in enumerate(self.examples) if example.row not in self._skipped]

    def skip(self, broken: Mapping[str, str]) -> None:
        """Leave rows out, or raise `SourceError` when broken rows are to stop."""
        if broken and self.data.broken == "stop":
            raise refusal(broken)
        self._skipped.update(broken)
        if not self.usable():
            raise SourceError(f"data: no row can be used\n{shown_rows(self._skipped)}")

    def images(self, example: int) -> tuple[Image.Image, Image.Image]:
        """The whole input and edited image, RGB, of the input's size.

        Raises `SourceError` that names the row.
        """
        found = self.opened(example)
        if isinstance(found, str):
            raise SourceError(f"{self.examples[example].row}: {found}")
        return found

    def opened(self, example: int) -> tuple[Image.Image, Image.Image] | str:
        """The whole input and edited image, or why they are of no use."""
        try:
            return self._decoded(example)
        except (OSError, UndecodableImage) as error:
            return str(error)

    def _decoded(self, index: int) -> tuple[Image.Image, Image.Image]:
        example = self.examples[index]
        rows, row = self._places[index]
        images = []
        told = (("input", example.input_image), ("edited", example.edited_image))
        for data, (which, content) in zip(rows.images(row), told, strict=True):
            if hashlib.sha256(data).hexdigest() != content:
                raise OSError(f"the {which} image changed since it was read; start again")
            try:
                images.append(decode(data))
            except UndecodableImage as error:
                raise UndecodableImage(f"{which} image: {error}") from error
        before, after = images
        (w, h), (other_w, other_h) = before.size, after.size
        # One scaled to the other's size may be a pixel off by rounding.
        if abs(w * other_h - h * other_w) > max(w, h, other_w, other_h):
            raise UndecodableImage(
                f"the input image has {w}x{h} pixels and the edited one {other_w}x{other_h}: "
                "not the same aspect"
            )
        if after.size != before.size:  # so that a crop is the same of both, to the pixel
            after = after.resize(before.size, Image.Resampling.LANCZOS)
        return before, after

    def geometry(self, example: int, view: int) -> View:
        """What a view shows, from 0 up to `views`: with `flip`, every other one is mirrored.

        The first crop is the centre; the others are drawn by the input image's own SHA-256.
        """
        if not 0 <= view < self.views:
            raise IndexError(f"view {view} of {self.views}")
        crop, flip = divmod(view, 2) if self.data.flip else (view, 0)
        if crop == 0:
            return View(1.0, 0.5, 0.5, bool(flip))
        drawn = hashlib.sha256(f"{self.examples[example].input_image} {crop}".encode()).digest()
        size, x, y = (int.from_bytes(drawn[i : i + 4]) / 2**32 for i in (0, 4, 8))
        return View(SMALLEST_CROP + (1 - SMALLEST_CROP) * size, x, y, bool(flip))

    def view(self, example: int, view: int) -> tuple[Image.Image, Image.Image]:
        """A view of the input image and the same of the edited one: RGB, `resolution` squared."""
        return self.cut(self.images(example), example, view)

    def cut(
        self, images: tuple[Image.Image, Image.Image], example: int, view: int
    ) -> tuple[Image.Image, Image.Image]:
        """A view of an example's `images`."""
        shown = self.geometry(example, view)
        before, after = (shown.of(image, self.data.resolution) for image in images)
        return before, after

    def check(self, report: Report = quiet) -> None:
        """Decode every pair once. Broken rows raise `SourceError`, all at once, or are left out."""
        self.skip(self._undecodable(report))

    def _undecodable(self, report: Report) -> dict[str, str]:
        first = {self.examples[i].row: i for i in reversed(self.usable())}
        order = sorted(first.values())
        broken: dict[str, str] = {}

        def trouble(example: int) -> str:
            found = self.opened(example)
            return found if isinstance(found, str) else ""  # images are not kept

        for done, why in enumerate(prefetch(trouble, iter(order), THREADS), 1):
            if why:
                broken[self.examples[order[done - 1]].row] = why
            report(done, len(order))
        return broken


def read_pairs(data: Data, base: Path = Path(), report: Report = quiet) -> Pairs:
    """Read the rows of `data`; relative paths are relative to `base`.

    All texts are read, and the bytes of all images are hashed; `Pairs.check` decodes them. Raises
    `SourceError` for what is no dataset or lacks a column, and for broken rows unless they are to
    be skipped: then it names all of them, those too whose images cannot be decoded.
    """
    paths = [data.path] if isinstance(data.path, str) else data.path
    datasets, problems = [], []
    for path in paths:
        try:
            rows = open_rows(path, base, data.split, data.revision)
            if not len(rows):
                raise SourceError(f"{path}: holds no rows of split {data.split!r}")
            rows.require([*_instructions(data, rows), *([data.align] if data.align else [])])
            datasets.append(rows)
        except SourceError as error:
            problems.append(str(error))
    if problems or not datasets:
        raise SourceError("\n".join(problems) or "data: path names no dataset")

    examples: list[Example] = []
    places: list[tuple[Rows, int]] = []
    broken: dict[str, str] = {}
    used: Counter[str] = Counter()
    read, total = 0, sum(map(len, datasets))
    total = min(total, data.limit or total)
    for rows in datasets:
        columns = _instructions(data, rows)
        wanted = dict.fromkeys([*columns, *([data.align] if data.align else [])])
        entries = islice(enumerate(rows.texts(list(wanted))), total - read)
        for row, found in prefetch(lambda entry: _look(data, *entry), _of(rows, entries), THREADS):
            read += 1
            name = rows.name(row)
            if isinstance(found, str):
                broken[name] = found
            else:
                used.update(example.column for example in found)
                examples += found
                places += [(rows, row)] * len(found)
            report(read, total)
    pairs = Pairs(data, examples, places)
    if broken and data.broken == "stop":
        raise refusal(broken | pairs._undecodable(report), total)
    empty = [name for name in data.instructions or [] if not used[name]]
    if examples and empty and not data.limit:
        raise SourceError(
            f"instructions: no row has text in {' or '.join(map(repr, empty))}; leave it out"
        )
    pairs.skip(broken)
    return pairs


def _instructions(data: Data, rows: Rows) -> list[str]:
    return data.instructions or [rows.instruction]


def _of(
    rows: Rows, entries: Iterable[tuple[int, Texts | OSError]]
) -> Iterator[tuple[Rows, int, Texts | OSError]]:
    return ((rows, row, texts) for row, texts in entries)


def _look(
    data: Data, rows: Rows, row: int, texts: Texts | OSError
) -> tuple[int, list[Example] | str]:
    """The row's number with its examples, or with all that is wrong with it."""
    wrong: list[str] = []
    given: list[tuple[str, str]] = []
    plain: str | None = None
    if isinstance(texts, OSError):
        wrong.append(str(texts))
    else:
        columns = _instructions(data, rows)
        for column in columns:
            text = texts[column]
            if is_text(text):
                given.append((column, str(text)))
            elif text is not None:
                wrong.append(f"no text in {column!r}: {text!r:.80}")
        if not given and not wrong:
            wrong.append(f"no instruction: nothing in {' or '.join(map(repr, columns))}")
        if data.align:
            plain = str(texts[data.align]) if is_text(texts[data.align]) else None
    before = after = ""
    try:
        before, after = (hashlib.sha256(image).hexdigest() for image in rows.images(row))
    except OSError as error:
        wrong.append(str(error))
    if wrong:
        return row, "; ".join(dict.fromkeys(wrong))
    name = rows.name(row)
    return row, [Example(name, before, after, text, column, plain) for column, text in given]


def refusal(broken: Mapping[str, str], total: int | None = None) -> SourceError:
    """The error that tells of broken rows: the first ten, and how many there are."""
    count = f"{len(broken)} broken row{'s' * (len(broken) != 1)}"
    return SourceError(
        f"data: {count}{f' of {total}' if total else ''}\n{shown_rows(broken)}\n"
        "mend or remove them, or set `broken: skip` to train on the others"
    )


def shown_rows(broken: Mapping[str, str]) -> str:
    """The first of the broken rows, a line each, and how many more there are."""
    lines = [f"  {row}: {why}" for row, why in islice(broken.items(), _SHOWN)]
    if len(broken) > _SHOWN:
        lines.append(f"  … and {len(broken) - _SHOWN} more")
    return "\n".join(lines)
