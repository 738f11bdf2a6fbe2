"""Images in a folder whose columns are in metadata files: the layout that `datasets` calls
ImageFolder, for images and for pairs.

```
metadata.jsonl   a line for each row: {"file_name": "a.png", "caption": …}, or, for pairs,
                 {"input_image_file_name": "a.png", "edited_image_file_name": "b.png", …}
a.png …          in the same folder, or below it
```

`<column>_file_name` is the file of an image column, and `file_name` that of the column `image`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from reasonpix.core.files.encodings import decode_text, parse_json_lines
from reasonpix.core.files.folder import files_under
from reasonpix.core.files.ignored import Ignored, unread_file
from reasonpix.core.files.splits import files_of_split
from reasonpix.errors import SourceError

if TYPE_CHECKING:
    import datasets

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

_FILE_NAME = "file_name"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def metadata_files(names: Sequence[str]) -> list[str]:
    """The metadata files among the names of a folder's files; none if it holds other tables too.

    Folders with archives are left to the `datasets` library, which unpacks them.
    """
    found = [name for name in names if PurePosixPath(name).name in METADATA]
    others = (name for name in names if name not in found)
    tables = any(PurePosixPath(name).suffix in (".parquet", ".tar", ".zip") for name in others)
    return [] if tables else found


def open_metadata_folder(
    where: str, root: Path, split: str
) -> tuple[datasets.Dataset, list[Ignored]]:
    """The rows of a split, with columns of images, and what is ignored in the folder.

    Raises `SourceError` for files that cannot be read, and if no column names images.
    """
    import datasets

    listed = list(files_under(root))
    ignored = [file for file in listed if isinstance(file, Ignored)]
    names = [file for file in listed if not isinstance(file, Ignored)]
    metadata = metadata_files(names)
    chosen = files_of_split(metadata, split)
    if not chosen:
        raise SourceError(f"{where}: no file of split {split!r}; it has {', '.join(metadata)}")
    ignored += [unread_file(name, True) for name in metadata if name not in chosen]
    places, rows = [], []
    for name in chosen:
        for place, row in _rows(where, root, name):
            places.append(place)
            rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    images = {
        column for column in columns if any(isinstance(row.get(column), _File) for row in rows)
    }
    if not images:
        raise SourceError(
            f"{where}/{chosen[0]}: no column names images; expected file_name, or columns such as "
            f"input_image_file_name; it has {', '.join(columns) or 'none'}"
        )
    used = {str(row[column]) for row in rows for column in images if row.get(column)}
    ignored += [
        Ignored(name, "a file that no row names")
        for name in names
        if name not in metadata and name not in used
    ]
    arrays: dict[str, pa.Array] = {}
    for column in columns:
        cells = [row.get(column) for row in rows]
        if column in images:
            paths = [None if cell is None else {"path": str(root / str(cell))} for cell in cells]
            arrays[column] = pa.array(paths, _IMAGE)
            continue
        try:
            arrays[column] = pa.array(cells)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            ignored.append(_mixed(column, places, cells))
    data = datasets.Dataset(pa.table(arrays))
    for column in images:
        data = data.cast_column(column, datasets.Image())
    return data, ignored


@dataclass(frozen=True, slots=True)
class MixedColumn(Ignored):
    """A column that is not read because its values have several types."""

    problem: str
    """The first row without a text, for those who need the column's texts."""


def mixed_column(column: str, ignored: Iterable[Ignored]) -> MixedColumn | None:
    """The column among what is ignored, if it is there because of its types."""
    mixed = (it for it in ignored if isinstance(it, MixedColumn) and it.name == column)
    return next(mixed, None)


def _mixed(column: str, places: Sequence[str], cells: Sequence[Any]) -> MixedColumn:
    reason = "a column with values of several types"
    rows = zip(places, cells, strict=True)
    place, cell = next((p, c) for p, c in rows if c is not None and not isinstance(c, str))
    return MixedColumn(column, reason, f"{place}: {column!r} is {_kind(cell)}, not text")


def _kind(cell: object) -> str:
    match cell:
        case bool():
            return "a truth value"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return repr(cell)


class _File(str):
    """The name of an image, relative to the dataset."""


def _rows(where: str, root: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the cells of each row; the cells of image columns are `_File`."""
    unit = "row" if name.endswith(".parquet") else "line"
    folder = PurePosixPath(name).parent
    try:
        for line, row in _cells(root / name):
            if not isinstance(row, dict):
                raise ValueError(f"line {line}: expected an object of columns, got {row!r:.80}")
            cells: dict[str, Any] = {}
            for key, cell in row.items():
                column = key
                if key == _FILE_NAME or key.endswith(f"_{_FILE_NAME}"):
                    column = key.removesuffix(_FILE_NAME).removesuffix("_") or "image"
                    cell = _image_file(folder, cell, line)
                if column in cells:
                    raise ValueError(f"line {line}: the column {column!r} is given twice")
                cells[column] = cell
            yield f"{name} {unit} {line}", cells
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"{where}/{name}: cannot be read: {error}") from error


def _image_file(folder: PurePosixPath, cell: object, line: int) -> _File | None:
    if cell is None or cell == "":
        return None
    if not isinstance(cell, str) or "\\" in cell:
        raise ValueError(f"line {line}: a file name is a text with /, not {cell!r:.80}")
    # A row must not name files of the machine that it was not published with.
    if PurePosixPath(cell).is_absolute() or ".." in PurePosixPath(cell).parts:
        raise ValueError(f"line {line}: {cell!r} is not below the folder of the metadata")
    return _File(folder / cell)


def _cells(path: Path) -> Iterator[tuple[int, Any]]:
    """The line, or row, and the cells of each row."""
    match path.suffix:
        case ".jsonl":
            yield from parse_json_lines(path.read_bytes())
        case ".csv":
            rows = csv.reader(io.StringIO(decode_text(path.read_bytes())), strict=True)
            head = next(rows, [])
            if len(set(head)) < len(head):
                raise ValueError(f"a column is given twice: {', '.join(head)}")
            for cells in rows:
                if len(cells) > len(head):
                    raise ValueError(
                        f"line {rows.line_num}: {len(cells)} cells in {len(head)} columns"
                    )
                if cells:
                    values = (cell or None for cell in cells)
                    yield rows.line_num, dict(zip(head, values, strict=False))
        case _:
            yield from enumerate(pq.read_table(path).to_pylist())
