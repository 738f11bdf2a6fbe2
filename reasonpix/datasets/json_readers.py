"""Readers of layouts with texts in JSON: WebDataset tars and InstructPix2Pix folders.

An index is in memory; images are read from their files on demand.
"""

from __future__ import annotations

import json
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from reasonpix.datasets.columns import FEATURES
from reasonpix.datasets.reader import PairReader, Texts
from reasonpix.errors import SourceError
from reasonpix.generation.components.file_source import file_bytes
from reasonpix.generation.components.instruct_pix2pix import InstructPix2Pix, InstructPix2PixOptions


class _Member(NamedTuple):
    offset: int
    size: int


class _TarRow(NamedTuple):
    file: int
    key: str
    members: Mapping[str, _Member]


class _JsonReader(PairReader):
    """Rows with texts in JSON. A column exists if a row has it, or if it is one of ours."""

    _columns: frozenset[str] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        """Our columns; any row may have more."""
        return self._columns

    @abstractmethod
    def _facts(self, row: int) -> dict[str, object]:
        """All facts of a row. Raises `OSError`, or `ValueError` for invalid JSON."""

    def require(self, columns: Sequence[str]) -> None:
        """Reads all rows if a column is not one of ours."""
        if not set(columns) - self._columns:
            return
        names = set(self._columns)
        for facts in self._all():
            if not isinstance(facts, OSError):
                names.update(facts)
        for column in columns:
            if column not in names:
                raise self.missing_column(column, names)

    def _all(self) -> Iterator[dict[str, object] | OSError]:
        for row in range(len(self)):
            try:
                yield self._facts(row)
            except OSError as error:
                yield error
            except (ValueError, RecursionError) as error:
                yield OSError(f"its JSON cannot be read: {error}")

    def texts(self, columns: Sequence[str]) -> Iterator[Texts | OSError]:
        """Row by row."""
        for facts in self._all():
            if isinstance(facts, OSError):
                yield facts
            else:
                yield {column: facts.get(column) for column in columns}


def _parse_object(text: bytes) -> dict[str, object]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


class WebDatasetReader(_JsonReader):
    """WebDataset with `<key>.input.png`, `.edited.png` and `.json` of each sample."""

    _columns = frozenset(FEATURES)

    def __init__(self, where: str, files: Sequence[Path], root: Path) -> None:
        self.where = where
        self._files = files
        self._root = root
        self._rows: list[_TarRow] = []
        for number, file in enumerate(files):
            samples: dict[str, dict[str, _Member]] = {}
            try:
                with tarfile.open(file, "r:") as tar:
                    for member in tar:
                        if member.isfile():
                            folder, _, name = member.name.rpartition("/")
                            key, _, kind = name.partition(".")
                            members = samples.setdefault(f"{folder}/{key}" if folder else key, {})
                            members[kind.partition(".")[0]] = _Member(
                                member.offset_data, member.size
                            )
            except (OSError, tarfile.TarError) as error:
                raise SourceError(
                    f"{self._file_name(number)}: not readable as an uncompressed tar file: {error}"
                ) from error
            self._rows += [_TarRow(number, key, members) for key, members in samples.items()]
        kinds = {kind for row in self._rows for kind in row.members}
        for kind in ("input", "edited", "json"):
            if self._rows and kind not in kinds:
                raise SourceError(
                    f"{where}: no member .{kind}{'' if kind == 'json' else '.png'} in any of its "
                    f"samples; they have {', '.join(sorted(kinds))}"
                )

    def _file_name(self, file: int) -> str:
        name = self._files[file].relative_to(self._root).as_posix()
        return self.where if name == Path(self.where).name else f"{self.where}/{name}"

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._rows)

    def name(self, row: int) -> str:
        """With the sample's key instead of a row number."""
        return f"{self._file_name(self._rows[row].file)} sample {self._rows[row].key}"

    def _facts(self, row: int) -> dict[str, object]:
        return _parse_object(self._member(row, "json"))

    def images(self, row: int) -> tuple[bytes, bytes]:
        """By offset in the tar file."""
        return self._member(row, "input"), self._member(row, "edited")

    def _member(self, row: int, kind: str) -> bytes:
        member = self._rows[row].members.get(kind)
        if member is None:
            raise OSError(f"has no member .{kind}")
        with self._files[self._rows[row].file].open("rb") as tar:
            tar.seek(member.offset)
            return tar.read(member.size)


# -- InstructPix2Pix ------------------------------------------------------------------------------


class InstructPix2PixReader(_JsonReader):
    """The layout of timothybrooks/instruct-pix2pix, with our `metadata.jsonl` if it exists.

    Columns are named as published: `edit`, `input` and `output` of prompt.json are edit_prompt,
    caption and edited_caption.
    """

    def __init__(self, where: str, root: Path) -> None:
        self.where = where
        self._root = root
        self._source = InstructPix2Pix(InstructPix2PixOptions(path=root, pairs=True))
        folders = self._source.folders()
        self._rows = [(folder, seed) for folder, seeds in folders for seed in seeds]
        self._published = dict(_published_rows(where, root / "metadata.jsonl"))
        own = frozenset({"edit_prompt", "caption", "edited_caption"})
        self._columns = frozenset(FEATURES) if self._published else own

    def __len__(self) -> int:
        """The number of seeds."""
        return len(self._rows)

    def name(self, row: int) -> str:
        """With folder and seed instead of a row number."""
        folder, seed = self._rows[row]
        return f"{self.where}/{folder} seed {seed}"

    def _facts(self, row: int) -> dict[str, object]:
        folder, seed = self._rows[row]
        prompt = _parse_object(self._file(f"{folder}/prompt.json"))
        return self._published.get(f"{folder}/{seed}_0.jpg", {}) | {
            "edit_prompt": prompt.get("edit"),
            "caption": prompt.get("input") or prompt.get("caption"),
            "edited_caption": prompt.get("output"),
        }

    def images(self, row: int) -> tuple[bytes, bytes]:
        """The files <seed>_0.jpg and <seed>_1.jpg."""
        folder, seed = self._rows[row]
        return self._file(f"{folder}/{seed}_0.jpg"), self._file(f"{folder}/{seed}_1.jpg")

    def _file(self, name: str) -> bytes:
        try:
            return file_bytes(self._root / name)
        except OSError as error:
            raise OSError(f"{name}: {error.strerror}") from error
        except ValueError as error:  # the name is invalid
            raise OSError(f"{name!r}: {error}") from error


def _published_rows(where: str, path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The rows that we published, by the name of the input image. Raises `SourceError`."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = _parse_object(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(
                    f"{where}/{path.name}:{number}: cannot be read: {error}"
                ) from error
            if "input_image_file_name" in row:
                yield str(row["input_image_file_name"]), row
