"""Base of the readers of pair datasets, and the column names that they recognise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from reasonpix.core.files.ignored import Ignored, IgnoredCounts, unread_columns
from reasonpix.errors import SourceError

Texts = Mapping[str, object]
"""The requested text cells of a row, None where the row has none."""


class Columns(NamedTuple):
    """Column names of a pair dataset."""

    input: str
    instruction: str
    edited: str
    mask: str | None = None
    """Column of masks of what the edit may change, if there is one."""

    @property
    def of_images(self) -> tuple[str | None, ...]:
        """The columns of images and masks."""
        return (self.input, self.edited, self.mask)


PUBLISHED = Columns("input_image", "edit_prompt", "edited_image")

COLUMNS: Mapping[str, Columns] = {
    "reasonpix and diffusers": PUBLISHED,
    "InstructPix2Pix": Columns("original_image", "edit_prompt", "edited_image"),
    "MagicBrush": Columns("source_img", "instruction", "target_img", "mask_img"),
}
"""Recognised column names, by their origin."""


_PREFERENCES = {"prompt", "chosen", "rejected"}
"""Columns of datasets of preferences, ours and those of TRL."""


class PairReader(ABC):
    """Reads a pair dataset row by row. Images may be read in any order, from any thread."""

    where: str
    """The dataset, as the user named it."""
    instruction: str = PUBLISHED.instruction
    """Column of instructions."""
    ignored: Sequence[Ignored] = ()
    """Files and members that are not read."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @property
    @abstractmethod
    def columns(self) -> Collection[str]:
        """The column names that are known without reading all rows."""

    @abstractmethod
    def name(self, row: int) -> str:
        """File and row number, for messages. Rows are counted from 0."""

    @abstractmethod
    def require(self, columns: Sequence[str]) -> None:
        """Raise `SourceError` unless these are columns of text."""

    @abstractmethod
    def texts(self, columns: Sequence[str]) -> Iterator[Texts | OSError]:
        """The text cells of every row, in order, or why a row cannot be read."""

    @abstractmethod
    def images(self, row: int) -> tuple[bytes, bytes]:
        """The encoded input image and the edited one. Raises `OSError`."""

    @property
    def has_masks(self) -> bool:
        """Whether there is a column of masks."""
        return False

    def mask(self, row: int) -> bytes:
        """The encoded mask, see `has_masks`. Raises `OSError`."""
        raise NotImplementedError

    @abstractmethod
    def text_columns(self) -> Collection[str]:
        """The columns beside those of images and masks, once `texts` has given all rows."""

    def log_ignored(self, read: Collection[str]) -> None:
        """Write to the log what is ignored, also the columns that are not among those `read`."""
        counts = IgnoredCounts()
        counts.add(*self.ignored)
        counts.add(*unread_columns(name for name in self.text_columns() if name not in read))
        counts.log(self.where)

    def missing_column(
        self, column: str, columns: Iterable[str], where: str | None = None
    ) -> SourceError:
        """The error for a missing column, with the columns that exist."""
        return SourceError(
            f"{where or self.where}: no column {column!r}; it has {', '.join(sorted(columns))}"
        )


def image_columns(where: str, names: Sequence[str]) -> Columns:
    """The recognised image columns among `names`. Raises `SourceError`."""
    for columns in COLUMNS.values():
        if columns.input in names and columns.edited in names:
            return columns
    if _PREFERENCES.issubset(names):
        raise SourceError(
            f"{where}: a dataset of preference pairs, which has no images; expected one of the "
            "forms hf, instruct-pix2pix and webdataset (`reasonpix publish RUN --out DIR --to hf`)"
        )
    closest = max(COLUMNS.values(), key=lambda c: len({c.input, c.edited} & set(names)))
    missing = [name for name in (closest.input, closest.edited) if name not in names]
    if len(missing) == 1:
        [present] = {closest.input, closest.edited} - set(missing)
        problem = f"no column {missing[0]!r} beside {present!r}"
    else:
        pairs = (f"{c.input!r} and {c.edited!r} ({whose})" for whose, c in COLUMNS.items())
        problem = f"no columns of input and edited images, such as {', '.join(pairs)}"
    raise SourceError(f"{where}: {problem}; it has {', '.join(names) or 'none'}")
