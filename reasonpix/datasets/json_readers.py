"""Readers of layouts with texts in JSON: WebDataset tars and InstructPix2Pix folders.

An index is in memory; images are read from their files on demand.
"""

from __future__ import annotations

import tarfile
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from reasonpix.core.files.encodings import parse_json, parse_json_lines
from reasonpix.core.files.ignored import Ignored
from reasonpix.core.files.tar_index import Sample, TarIndex, index_tar
from reasonpix.datasets.columns import FEATURES
from reasonpix.datasets.reader import PairReader, Texts
from reasonpix.errors import SourceError
from reasonpix.generation.components.file_source import file_bytes
from reasonpix.generation.components.instruct_pix2pix import (
    PROMPT_KEYS,
    InstructPix2Pix,
    InstructPix2PixOptions,
)


class _TarRow(NamedTuple):
    file: int
    sample: Sample
    problem: str
    """Why it cannot be read; empty if it can."""


class _JsonReader(PairReader):
    """Rows with texts in JSON. A column exists if a row has it, or if it is one of ours."""

    _columns: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._seen: dict[str, None] = {}

    @property
    def columns(self) -> frozenset[str]:
        """Our columns; any row may have more."""
        return self._columns

    def text_columns(self) -> Collection[str]:
        """Those that a row has."""
        return self._seen

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
                self._seen.update(dict.fromkeys(facts))
                yield {column: facts.get(column) for column in columns}


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


_KINDS = ("input", "edited", "json")
"""The members of a sample."""


class WebDatasetReader(_JsonReader):
    """WebDataset with `<key>.input.png`, `.edited.png` and `.json` of each sample."""

    _columns = frozenset(FEATURES)

    def __init__(
        self, where: str, files: Sequence[Path], root: Path, ignored: Sequence[Ignored] = ()
    ) -> None:
        super().__init__()
        self.where = where
        self._files = files
        self._root = root
        self._rows: list[_TarRow] = []
        kinds: set[str] = set()
        for number in range(len(files)):
            index = self._index(number)
            kinds.update(kind for sample in index.samples for kind in sample.members)
            self._rows += _rows_of(number, index)
            ignored = [*ignored, *index.ignored, *_ignored_members(index)]
        self.ignored = ignored
        for kind in _KINDS:
            if kinds and kind not in kinds:
                raise SourceError(
                    f"{where}: no member .{kind}{'' if kind == 'json' else '.png'} in any of its "
                    f"samples; they have {', '.join(sorted(kinds))}"
                )

    def _index(self, number: int) -> TarIndex:
        try:
            return index_tar(self._files[number])
        except (OSError, tarfile.TarError) as error:
            raise SourceError(
                f"{self._file_name(number)}: not readable as an uncompressed tar file: {error}"
            ) from error

    def _file_name(self, file: int) -> str:
        name = self._files[file].relative_to(self._root).as_posix()
        return self.where if name == Path(self.where).name else f"{self.where}/{name}"

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._rows)

    def name(self, row: int) -> str:
        """With the sample's key instead of a row number."""
        return f"{self._file_name(self._rows[row].file)} sample {self._rows[row].sample}"

    def _facts(self, row: int) -> dict[str, object]:
        return _object(parse_json(self._member(row, "json")))

    def images(self, row: int) -> tuple[bytes, bytes]:
        """By offset in the tar file."""
        return self._member(row, "input"), self._member(row, "edited")

    def _member(self, row: int, kind: str) -> bytes:
        number, sample, problem = self._rows[row]
        if problem:
            raise OSError(problem)
        member = sample.members.get(kind)
        if member is None:
            raise OSError(f"has no member .{kind}")
        with self._files[number].open("rb") as tar:
            tar.seek(member.offset)
            return tar.read(member.size)


def _rows_of(number: int, index: TarIndex) -> Iterator[_TarRow]:
    """The samples of a file that have a member that is read.

    If a key repeats before its sample is complete, it is unclear which members belong together:
    all its samples are broken rows.
    """
    mixed = {
        sample.key
        for sample in index.samples
        if sample.key in index.repeated and not set(_KINDS) <= set(sample.members)
    }
    problem = "several samples have this key, and their members cannot be told apart"
    for sample in index.samples:
        if set(_KINDS) & set(sample.members):
            yield _TarRow(number, sample, problem if sample.key in mixed else "")


def _ignored_members(index: TarIndex) -> Iterator[Ignored]:
    for sample in index.samples:
        for kind, member in sample.members.items():
            if kind not in _KINDS:
                yield Ignored(member.name, f"a member .{kind}, which is not read")


# -- InstructPix2Pix ------------------------------------------------------------------------------


class InstructPix2PixReader(_JsonReader):
    """The layout of timothybrooks/instruct-pix2pix, with our `metadata.jsonl` if it exists.

    Columns are named as published: `edit`, `input` and `output` of prompt.json are edit_prompt,
    caption and edited_caption.
    """

    def __init__(self, where: str, root: Path) -> None:
        super().__init__()
        self.where = where
        self._root = root
        self._source = InstructPix2Pix(InstructPix2PixOptions(path=root, pairs=True))
        folders = self._source.folders()
        self.ignored = list(self._source.unnamed(folders))
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
        prompt = _object(parse_json(self._file(f"{folder}/prompt.json")))
        others = {key: value for key, value in prompt.items() if key not in PROMPT_KEYS}
        return (
            others
            | self._published.get(f"{folder}/{seed}_0.jpg", {})
            | {
                "edit_prompt": prompt.get("edit"),
                "caption": prompt.get("input") or prompt.get("caption"),
                "edited_caption": prompt.get("output"),
            }
        )

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
    try:
        for _, row in parse_json_lines(path.read_bytes()):
            facts = _object(row)
            image = facts.pop("input_image_file_name", None)
            facts.pop("edited_image_file_name", None)
            if image is not None:
                yield str(image), facts
    except (OSError, ValueError) as error:
        raise SourceError(f"{where}/{path.name}: cannot be read: {error}") from error
