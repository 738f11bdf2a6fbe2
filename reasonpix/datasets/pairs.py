"""Training data: pairs of an input and an edited image, with their edit instructions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from reasonpix.core.figures import counted
from reasonpix.core.images import UndecodableImage, decode
from reasonpix.core.parallel import THREADS, Report, prefetch, quiet
from reasonpix.core.text import is_text
from reasonpix.datasets.formats import open_reader
from reasonpix.datasets.reader import PairReader, Texts
from reasonpix.datasets.views import SMALLEST_CROP, Fit, View
from reasonpix.errors import SourceError

ImagePair = tuple[Image.Image, Image.Image]
"""An input image and the edited image."""

_ROWS_IN_MESSAGE = 10


class Data(BaseModel):
    """Which pairs to train on, and how. Every row is used once with each of its instructions."""

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
        None, description="Column of plain text to align h to, such as direct_instruction"
    )
    broken: Literal["stop", "skip"] = Field(
        "stop", description="What to do with broken rows: stop before training, or skip them"
    )
    limit: int | None = Field(None, ge=1, description="Read at most this many rows")
    resolution: int = Field(256, ge=8, description="Side of the square training images, in pixels")
    flip: bool = Field(
        False,
        description="Use each pair mirrored too; breaks instructions that mention left or right",
    )
    fit: Fit = Field(
        "stretch",
        description="How an image becomes a square: `stretch` resizes the whole of it, as in "
        "InstructPix2Pix; `crop` takes its centre square, without the sides of a wide image",
    )
    crops: int = Field(
        1,
        ge=1,
        description="Views of each pair: the whole image (or its centre square), and crops chosen "
        "at random once, of at least 80 % of its sides",
    )

    @field_validator("instructions")
    @classmethod
    def _each_once(cls, columns: list[str] | None) -> list[str] | None:
        if columns and len(set(columns)) < len(columns):
            raise ValueError("a column is named twice; each row would count twice")
        return columns


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction of one pair."""

    row: str
    """The file and its row, for messages."""
    input_image: str
    """SHA-256 of the encoded image, in hex."""
    edited_image: str
    instruction: str
    column: str
    """The column of the instruction."""
    plain: str | None = None
    """The text of the column `align`, if the row has one."""


class Pairs:
    """Examples in memory, their images on disk. Images are read in any order, from any thread."""

    def __init__(
        self,
        data: Data,
        examples: Sequence[Example],
        locations: Sequence[tuple[PairReader, int]],
        skipped: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.data = data
        self.examples = examples
        self._locations = locations
        self._skipped = dict(skipped)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The skipped rows, and why."""
        return list(self._skipped.items())

    @property
    def views(self) -> int:
        """The number of views of each example."""
        return self.data.crops * (2 if self.data.flip else 1)

    def dataset(self, example: int) -> str:
        """The dataset of an example, as the recipe names it."""
        return self._locations[example][0].where

    def usable(self) -> list[int]:
        """The examples of rows that are not skipped."""
        return [i for i, example in enumerate(self.examples) if example.row not in self._skipped]

    def skip(self, broken: Mapping[str, str]) -> None:
        """Skip broken rows, or raise `SourceError` if `broken: stop` is set."""
        if broken and self.data.broken == "stop":
            raise refusal(broken)
        self.leave_out(broken)

    def leave_out(self, rows: Mapping[str, str]) -> None:
        """Skip rows that are not broken. Raises `SourceError` if none is left."""
        self._skipped.update(rows)
        if not self.usable():
            raise SourceError(f"data: no row can be used\n{shown_rows(self._skipped)}")

    def images(self, example: int) -> ImagePair:
        """The full input and edited image, RGB, both of the input's size.

        Raises a `SourceError` that names the row.
        """
        images = self.opened(example)
        if isinstance(images, str):
            raise SourceError(f"{self.examples[example].row}: {images}")
        return images

    def opened(self, example: int) -> ImagePair | str:
        """The full input and edited image, or why they cannot be used."""
        try:
            return self._decoded(example)
        except (OSError, UndecodableImage) as error:
            return str(error)

    def _decoded(self, index: int) -> ImagePair:
        example = self.examples[index]
        rows, row = self._locations[index]
        images = []
        digests = (("input", example.input_image), ("edited", example.edited_image))
        for data, (which, digest) in zip(rows.images(row), digests, strict=True):
            if hashlib.sha256(data).hexdigest() != digest:
                raise OSError(f"the {which} image changed since it was read; start again")
            try:
                images.append(decode(data))
            except UndecodableImage as error:
                raise UndecodableImage(f"{which} image: {error}") from error
        before, after = images
        (w, h), (other_w, other_h) = before.size, after.size
        # Rounding may make a scaled image a pixel off.
        if abs(w * other_h - h * other_w) > max(w, h, other_w, other_h):
            raise UndecodableImage(
                f"the input image has {w}x{h} pixels and the edited one {other_w}x{other_h}: "
                "their aspect ratios differ"
            )
        if after.size != before.size:  # so that crops match to the pixel
            after = after.resize(before.size, Image.Resampling.LANCZOS)
        return before, after

    def geometry(self, example: int, view: int) -> View:
        """The part that a view shows, from 0 to `views` - 1: with `flip`, every other is mirrored.

        The first is the whole image, or its centre square; the others are chosen by the input
        image's SHA-256.
        """
        if not 0 <= view < self.views:
            raise IndexError(f"view {view} of {self.views}")
        crop, flip = divmod(view, 2) if self.data.flip else (view, 0)
        if crop == 0:
            return View(self.data.fit, 1.0, 0.5, 0.5, bool(flip))
        drawn = hashlib.sha256(f"{self.examples[example].input_image} {crop}".encode()).digest()
        size, x, y = (int.from_bytes(drawn[i : i + 4]) / 2**32 for i in (0, 4, 8))
        return View(self.data.fit, SMALLEST_CROP + (1 - SMALLEST_CROP) * size, x, y, bool(flip))

    def check(
        self,
        report: Report = quiet,
        visit: Callable[[int, ImagePair], None] = lambda example, images: None,
    ) -> None:
        """Decode every pair once. Broken rows are skipped, or named in one `SourceError`.

        `visit` gets the images of the first example of each row, from several threads.
        """
        self.skip(self._undecodable(report, visit))

    def _undecodable(
        self,
        report: Report,
        visit: Callable[[int, ImagePair], None] = lambda example, images: None,
    ) -> dict[str, str]:
        first = {self.examples[i].row: i for i in reversed(self.usable())}
        order = sorted(first.values())
        broken: dict[str, str] = {}

        def problem_of(example: int) -> str:
            images = self.opened(example)
            if isinstance(images, str):
                return images
            visit(example, images)
            return ""  # images are not kept

        for done, why in enumerate(prefetch(problem_of, iter(order), THREADS), 1):
            if why:
                broken[self.examples[order[done - 1]].row] = why
            report(done, len(order))
        return broken


def read_pairs(data: Data, base: Path = Path(), report: Report = quiet) -> Pairs:
    """Read the rows of `data`; relative paths are relative to `base`.

    All texts are read and all images hashed; `Pairs.check` decodes them. Raises `SourceError` for
    an invalid dataset or a missing column and, unless `broken: skip` is set, for broken rows: it
    names all of them, including those whose images cannot be decoded.
    """
    paths = [data.path] if isinstance(data.path, str) else data.path
    datasets, problems = [], []
    for path in paths:
        try:
            rows = open_reader(path, base, data.split, data.revision)
            if not len(rows):
                raise SourceError(f"{path}: no rows in split {data.split!r}")
            rows.require([*_instructions(data, rows), *([data.align] if data.align else [])])
            datasets.append(rows)
        except SourceError as error:
            problems.append(str(error))
    if problems or not datasets:
        raise SourceError("\n".join(problems) or "data: path names no dataset")

    examples: list[Example] = []
    locations: list[tuple[PairReader, int]] = []
    broken: dict[str, str] = {}
    used: Counter[str] = Counter()
    read, total = 0, sum(map(len, datasets))
    total = min(total, data.limit or total)
    for rows in datasets:
        columns = _instructions(data, rows)
        text_columns = dict.fromkeys([*columns, *([data.align] if data.align else [])])
        entries = islice(enumerate(rows.texts(list(text_columns))), total - read)
        for row, result in prefetch(partial(_read_row, data, rows), entries, THREADS):
            read += 1
            name = rows.name(row)
            if isinstance(result, str):
                broken[name] = result
            else:
                used.update(example.column for example in result)
                examples += result
                locations += [(rows, row)] * len(result)
            report(read, total)
    for rows in datasets:
        rows.log_ignored([*_instructions(data, rows), *([data.align] if data.align else [])])
    pairs = Pairs(data, examples, locations)
    if broken and data.broken == "stop":
        raise refusal(broken | pairs._undecodable(report), total)
    empty = [name for name in data.instructions or [] if not used[name]]
    if examples and empty and not data.limit:
        raise SourceError(
            f"instructions: no row has text in {' or '.join(map(repr, empty))}; remove it"
        )
    pairs.skip(broken)
    return pairs


def _instructions(data: Data, rows: PairReader) -> list[str]:
    return data.instructions or [rows.instruction]


def _read_row(
    data: Data, rows: PairReader, entry: tuple[int, Texts | OSError]
) -> tuple[int, list[Example] | str]:
    """The row's number with its examples, or with all of its problems."""
    row, texts = entry
    problems: list[str] = []
    instructions: list[tuple[str, str]] = []
    plain: str | None = None
    if isinstance(texts, OSError):
        problems.append(str(texts))
    else:
        columns = _instructions(data, rows)
        for column in columns:
            text = texts[column]
            if is_text(text):
                instructions.append((column, str(text)))
            elif text is not None:
                problems.append(f"no text in {column!r}: {text!r:.80}")
        if not instructions and not problems:
            problems.append(f"no instruction: nothing in {' or '.join(map(repr, columns))}")
        if data.align:
            plain = str(texts[data.align]) if is_text(texts[data.align]) else None
    before = after = ""
    try:
        before, after = (hashlib.sha256(image).hexdigest() for image in rows.images(row))
    except OSError as error:
        problems.append(str(error))
    if problems:
        return row, "; ".join(dict.fromkeys(problems))
    name = rows.name(row)
    return row, [Example(name, before, after, text, column, plain) for column, text in instructions]


def refusal(broken: Mapping[str, str], total: int | None = None) -> SourceError:
    """The error for broken rows: the first ten, and how many there are."""
    return SourceError(
        f"data: {counted(len(broken), 'broken row')}{f' of {total}' if total else ''}\n"
        f"{shown_rows(broken)}\n"
        "fix or remove them, or set `broken: skip` to train on the others"
    )


def shown_rows(broken: Mapping[str, str]) -> str:
    """The first broken rows, one per line, and the number of others."""
    lines = [f"  {row}: {why}" for row, why in islice(broken.items(), _ROWS_IN_MESSAGE)]
    if len(broken) > _ROWS_IN_MESSAGE:
        lines.append(f"  … and {len(broken) - _ROWS_IN_MESSAGE} more")
    return "\n".join(lines)
