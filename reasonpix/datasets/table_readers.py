"""Readers of tables: parquet files, and datasets that the `datasets` library opens."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from reasonpix.core.files.ignored import Ignored
from reasonpix.datasets.reader import PairReader, Texts, image_columns
from reasonpix.errors import SourceError
from reasonpix.generation.components.hub_dataset import image_bytes, open_dataset
from reasonpix.generation.components.metadata_folder import mixed_column

# -- Parquet --------------------------------------------------------------------------------------

_CACHED_GROUPS = 4
"""Row groups in memory: enough to read rows in order from a few threads."""


class _Group(NamedTuple):
    file: Path
    number: int


class ParquetReader(PairReader):
    """Parquet files with columns of images, as `datasets` writes them: structs of bytes and path.

    Reading an image reads its row group; ours have at most 100 rows or about 32 MB. Row groups of
    some datasets on the hub are much larger: name their hub id instead, because the `datasets`
    library keeps an indexed copy, which is faster in random order.
    """

    def __init__(
        self, where: str, files: Sequence[Path], root: Path, ignored: Sequence[Ignored] = ()
    ) -> None:
        self.where = where
        self.ignored = ignored
        self._root = root
        self._files = files
        self._groups: list[_Group] = []
        counts: list[int] = []
        self._file_starts = [0]
        for file in files:
            with self._open(file) as parquet:
                schema, metadata = parquet.schema_arrow, parquet.metadata
                columns = image_columns(self._file_name(file), schema.names)
                if file == files[0]:
                    self._columns, self._schema = columns, schema
                for name in (columns.input, columns.edited):
                    if not _may_hold_images(kind := schema.field(name).type):
                        raise SourceError(
                            f"{self._file_name(file)}: column {name!r} holds {kind}, not images"
                        )
                if columns != self._columns:
                    raise SourceError(
                        f"{self._file_name(file)} has other columns than "
                        f"{self._file_name(files[0])}: name them as two paths"
                    )
                for number in range(metadata.num_row_groups):
                    self._groups.append(_Group(file, number))
                    counts.append(metadata.row_group(number).num_rows)
                self._file_starts.append(self._file_starts[-1] + metadata.num_rows)
        self._starts = [0, *accumulate(counts)]
        self.instruction = self._columns.instruction
        self._cache: dict[tuple[int, tuple[str, ...]], Future[pa.Table]] = {}
        self._lock = threading.Lock()

    def _file_name(self, file: Path) -> str:
        name = file.relative_to(self._root).as_posix()
        return self.where if name == Path(self.where).name else f"{self.where}/{name}"

    def _open(self, file: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(
                f"{self._file_name(file)}: cannot be read as a parquet file: {error}"
            ) from error

    def __len__(self) -> int:
        """Rows of all files."""
        return self._starts[-1]

    @property
    def columns(self) -> Collection[str]:
        """The columns of the first file."""
        names: list[str] = self._schema.names
        return names

    def text_columns(self) -> Collection[str]:
        """Of the first file."""
        return [name for name in self.columns if name not in self._columns.of_images]

    def name(self, row: int) -> str:
        """With the row's number in its file."""
        file = bisect_right(self._file_starts, row) - 1
        return f"{self._file_name(self._files[file])} row {row - self._file_starts[file]}"

    def require(self, columns: Sequence[str]) -> None:
        """Checks every file."""
        for file in self._files:
            with self._open(file) as parquet:
                schema = parquet.schema_arrow
            for column in columns:
                if column not in schema.names:
                    raise self.missing_column(column, schema.names, self._file_name(file))
                if not _may_hold_text(kind := schema.field(column).type):
                    raise SourceError(
                        f"{self._file_name(file)}: column {column!r} holds {kind}, not text"
                    )

    def texts(self, columns: Sequence[str]) -> Iterator[Texts | OSError]:
        """By row groups; only these columns are read."""
        for i, group in enumerate(self._groups):
            count = self._starts[i + 1] - self._starts[i]
            try:
                table = self._read(group, columns)
            except OSError as error:
                yield from [error] * count
                continue
            for row in range(count):
                try:
                    yield {name: table.column(name)[row].as_py() for name in columns}
                except UnicodeDecodeError as error:
                    yield OSError(f"its text is not UTF-8: {error}")

    def images(self, row: int) -> tuple[bytes, bytes]:
        """From the row group, which stays in memory for the next rows."""
        before, after = self._cells(row, self._columns.input, self._columns.edited)
        return before, after

    @property
    def has_masks(self) -> bool:
        """Whether the first file has masks."""
        return self._columns.mask in self.columns

    def mask(self, row: int) -> bytes:
        """From the row group, as in `images`."""
        assert self._columns.mask is not None
        return self._cells(row, self._columns.mask)[0]

    def _cells(self, row: int, *names: str) -> list[bytes]:
        number = bisect_right(self._starts, row) - 1
        group, offset = self._group(number, names), row - self._starts[number]
        return [_cell_bytes(group.column(name)[offset].as_py(), name) for name in names]

    def _group(self, number: int, names: tuple[str, ...]) -> pa.Table:
        """Columns of a row group. The first thread reads it, others wait for it."""
        key = (number, names)
        with self._lock:
            cached = self._cache.pop(key, None)
            future = self._cache[key] = cached or Future()
            while len(self._cache) > _CACHED_GROUPS:
                self._cache.pop(next(iter(self._cache)))  # the least recently used
        if cached is None:
            try:
                future.set_result(self._read(self._groups[number], names))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _read(self, group: _Group, columns: Sequence[str]) -> pa.Table:
        try:
            with pq.ParquetFile(group.file) as parquet:
                return parquet.read_row_group(group.number, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise OSError(f"its row group cannot be read: {error}") from error


def _may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _may_hold_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _cell_bytes(cell: dict[str, Any] | bytes | None, column: str) -> bytes:
    if isinstance(cell, bytes):
        return cell
    return image_bytes(cell and {"bytes": None, "path": None, **cell}, f"image in {column!r}")


# -- Opened by `datasets` -------------------------------------------------------------------------


class HubDatasetReader(PairReader):
    """A dataset of the hub, or written by `save_to_disk`, read with the `datasets` library."""

    def __init__(self, where: str, path: str, split: str, revision: str | None) -> None:
        self.where = where
        try:
            data, self.ignored = open_dataset(path, split, revision)
        except SourceError as error:
            if path == where:
                raise SourceError(
                    f"{where}: no folder or file here, and as a hub id: {error}"
                ) from error
            raise
        import datasets

        self._columns = image_columns(where, data.column_names)
        self.instruction = self._columns.instruction
        pair = [self._columns.input, self._columns.edited]
        masks = [name for name in data.column_names if name == self._columns.mask]
        images = pair + masks
        for name in images:
            if not isinstance(data.features[name], datasets.Image):
                kind = getattr(data.features[name], "dtype", "other data")
                raise SourceError(f"{where}: column {name!r} holds {kind}, not images")
            data = data.cast_column(name, datasets.Image(decode=False))
        self._data = data
        self._images = data.select_columns(pair)
        self._masks = data.select_columns(masks)

    def __len__(self) -> int:
        """Rows of the split."""
        return len(self._data)

    @property
    def columns(self) -> Collection[str]:
        """The columns of the split."""
        names: list[str] = self._data.column_names
        return names

    def text_columns(self) -> Collection[str]:
        """Of the split."""
        return [name for name in self.columns if name not in self._columns.of_images]

    def name(self, row: int) -> str:
        """With the row's number in the split."""
        return f"{self.where} row {row}"

    def require(self, columns: Sequence[str]) -> None:
        """Checks the dataset's features."""
        for column in columns:
            if mixed := mixed_column(column, self.ignored):
                raise SourceError(f"{self.where}/{mixed.problem}")
            if column not in self._data.column_names:
                raise self.missing_column(column, self._data.column_names)
            kind = getattr(self._data.features[column], "dtype", "other data")
            if kind not in ("string", "large_string"):
                raise SourceError(f"{self.where}: column {column!r} holds {kind}, not text")

    def texts(self, columns: Sequence[str]) -> Iterator[Texts | OSError]:
        """Without reading images."""
        yield from self._data.select_columns(list(columns))

    def images(self, row: int) -> tuple[bytes, bytes]:
        """By the library's index."""
        cells = self._images[row]
        before, after = (_cell_bytes(cell, name) for name, cell in cells.items())
        return before, after

    @property
    def has_masks(self) -> bool:
        """Whether there is a column of masks."""
        return self._columns.mask in self.columns

    def mask(self, row: int) -> bytes:
        """By the library's index."""
        assert self._columns.mask is not None
        return _cell_bytes(self._masks[row][self._columns.mask], self._columns.mask)
