"""The rows of a dataset of pairs, and the names that its columns can have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from reasonpix.errors import SourceError

Texts = Mapping[str, object]
"""The cells of a row that were asked for; None where the row has none."""


class Columns(NamedTuple):
    """The names that a dataset of pairs gives its columns."""

    input: str
    instruction: str
    edited: str
    mask: str | None = None
    """Of what the edit may change, where there is one."""


PUBLISHED = Columns("input_image", "edit_prompt", "edited_image")

COLUMNS: Mapping[str, Columns] = {
    "reasonpix and diffusers": PUBLISHED,
    "InstructPix2Pix": Columns("original_image", "edit_prompt", "edited_image"),
    "MagicBrush": Columns("source_img", "instruction", "target_img", "mask_img"),
}
"""The columns that are known, by whose they are."""


class Rows(ABC):
    """The rows of a dataset of pairs. Images are read in any order, from any thread."""

    where: str
    """The dataset, as it was named."""
    instruction: str = PUBLISHED.instruction
    """The column of instructions of this layout."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @property
    @abstractmethod
    def columns(self) -> Collection[str]:
        """The names of the columns, as far as they are known without reading all rows."""

    @abstractmethod
    def name(self, row: int) -> str:
        """The file and the row in it, for messages. Rows are counted from 0."""

    @abstractmethod
    def require(self, columns: Sequence[str]) -> None:
        """Raise `SourceError` when there is no such column of text."""

    @abstractmethod
    def texts(self, columns: Sequence[str]) -> Iterator[Texts | OSError]:
        """The text of every row, in order; an error that says why a row has none."""

    @abstractmethod
    def images(self, row: int) -> tuple[bytes, bytes]:
        """The encoded input image and the edited one. Raises `OSError`."""

    @property
    def has_masks(self) -> bool:
        """Whether there is a column of masks."""
        return False

    def mask(self, row: int) -> bytes:
        """The encoded mask, where there is one. Raises `OSError`."""
        raise NotImplementedError

    def lacks(self, column: str, known: Iterable[str], where: str | None = None) -> SourceError:
        """The error that says which columns there are instead."""
        return SourceError(
            f"{where or self.where}: no column {column!r}; it has {', '.join(sorted(known))}"
        )


def image_columns(where: str, found: Sequence[str]) -> Columns:
    """The image columns among those `found`. Raises `SourceError` that says what is missing."""
    for columns in COLUMNS.values():
        if columns.input in found and columns.edited in found:
            return columns
    near = max(COLUMNS.values(), key=lambda c: len({c.input, c.edited} & set(found)))
    missing = [name for name in (near.input, near.edited) if name not in found]
    if len(missing) == 1:
        wanted = (
            f"no column {missing[0]!r} beside {({near.input, near.edited} & set(found)).pop()!r}"
        )
    else:
        pairs = (f"{c.input!r} and {c.edited!r} ({whose})" for whose, c in COLUMNS.items())
        wanted = f"no columns of input and edited images, such as {', '.join(pairs)}"
    raise SourceError(f"{where}: {wanted}; it has {', '.join(found) or 'none'}")
