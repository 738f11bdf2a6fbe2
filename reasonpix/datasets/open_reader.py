"""Where pairs of images lie, and how a row is found in there.

Parquet files, WebDataset tars, InstructPix2Pix folders, and what the `datasets` library opens.
Images stay where they are until they are asked for; in memory is an index.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from reasonpix.datasets.reader import Rows, Texts
from reasonpix.datasets.table_readers import DatasetRows, ParquetRows
from reasonpix.datasets.writers import FEATURES
from reasonpix.errors import SourceError
from reasonpix.generation.components.file_source import file_bytes
from reasonpix.generation.components.instruct_pix2pix import InstructPix2Pix, InstructPix2PixOptions

SPLITS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
"""Words for a split in the name of a file, those that mean the same together."""


def open_rows(path: str, base: Path, split: str, revision: str | None) -> Rows:
    """The dataset at `path`: a folder or file, relative to `base`, or a hub id.

    Raises `SourceError` when it is none, or holds no image columns that are known.
    """
    place = base / Path(path).expanduser()
    if not os.path.lexists(place):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
            raise SourceError(f"{path}: no such folder or file ({place})")
        return DatasetRows(path, path, split, revision)
    if revision is not None:
        raise SourceError(f"{path}: a revision is for hub ids, and this is a folder or file")
    if place.is_file():
        if place.suffix == ".tar":
            return TarRows(path, [place], place.parent)
        return ParquetRows(path, [place], place.parent)
    if (place / "seeds.json").is_file():
        if split != "train":
            raise SourceError(f"{path}: an InstructPix2Pix folder has no splits; leave split out")
        return FolderRows(path, place)
    if any((place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return DatasetRows(path, str(place), split, None)
    if (place / "stages").is_dir():
        raise SourceError(
            f"{path}: a run, not a dataset; publish it: reasonpix publish {path} --out DIR"
        )
    for suffix, rows in ((".parquet", ParquetRows), (".tar", TarRows)):
        if files := sorted(file for file in place.rglob(f"*{suffix}") if _is_data(file, place)):
            return rows(path, _of_split(path, files, place, split), place)
    raise SourceError(
        f"{path}: holds no dataset of pairs; expected .parquet files, .tar files (WebDataset), "
        "seeds.json (InstructPix2Pix), or what save_to_disk of `datasets` writes"
    )


def _is_data(file: Path, root: Path) -> bool:
    """Hidden files are no data: file managers and version control put them there."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden


def _of_split(path: str, files: list[Path], root: Path, split: str) -> list[Path]:
    """The files whose names say the split; of files that name none, all are for training."""

    def words(file: Path) -> set[str]:
        return set(re.split(r"[/._ -]+", file.relative_to(root).as_posix()))

    same = next((set(group) for group in SPLITS if split in group), {split})
    if found := [file for file in files if words(file) & same]:
        return found
    named = {word for group in SPLITS for word in group}
    if "train" in same and not any(words(file) & named for file in files):
        return files
    shown = ", ".join(file.relative_to(root).as_posix() for file in files[:3])
    raise SourceError(f"{path}: no file of split {split!r} among its {len(files)}, such as {shown}")


# -- WebDataset -----------------------------------------------------------------------------------


class _Member(NamedTuple):
    offset: int
    size: int


class _TarRow(NamedTuple):
    file: int
    key: str
    members: Mapping[str, _Member]


class _JsonRows(Rows):
    """Rows whose words stand in JSON: a column is there when a row has it, or it is one of ours."""

    _known: frozenset[str] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        """Those that are ours; any row may have more."""
        return self._known

    @abstractmethod
    def _facts(self, row: int) -> dict[str, object]:
        """All that is known of a row. Raises `OSError`, and `ValueError` for what is no JSON."""

    def require(self, columns: Sequence[str]) -> None:
        """All rows are read only to say that a column is in none of them."""
        if not set(columns) - self._known:
            return
        known = set(self._known)
        for facts in self._all():
            if not isinstance(facts, OSError):
                known.update(facts)
        for column in columns:
            if column not in known:
                raise self.lacks(column, known)

    def _all(self) -> Iterator[dict[str, object] | OSError]:
        for row in range(len(self)):
            try:
                yield self._facts(row)
            except OSError as error:
                yield error
            except (ValueError, RecursionError) as error:
                yield OSError(f"its JSON cannot be read: {error}")

    def texts(self, columns: Sequence[str]) -> Iterator[Texts | OSError]:
        """One by one."""
        for facts in self._all():
            if isinstance(facts, OSError):
                yield facts
            else:
                yield {column: facts.get(column) for column in columns}


def _object(text: bytes) -> dict[str, object]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


class TarRows(_JsonRows):
    """WebDataset: `<key>.input.png`, `.edited.png` and `.json` of each sample, as we publish it."""

    _known = frozenset(FEATURES)

    def __init__(self, where: str, files: Sequence[Path], root: Path) -> None:
        self.where = where
        self._files = files
        self._root = root
        self._rows: list[_TarRow] = []
        for number, file in enumerate(files):
            found: dict[str, dict[str, _Member]] = {}
            try:
                with tarfile.open(file, "r:") as tar:
                    for member in tar:
                        if member.isfile():
                            folder, _, name = member.name.rpartition("/")
                            key, _, kind = name.partition(".")
                            place = _Member(member.offset_data, member.size)
                            found.setdefault(f"{folder}/{key}" if folder else key, {})[
                                kind.partition(".")[0]
                            ] = place
            except (OSError, tarfile.TarError) as error:
                raise SourceError(
                    f"{self._shown(number)}: cannot be read as an uncompressed tar file: {error}"
                ) from error
            self._rows += [_TarRow(number, key, members) for key, members in found.items()]
        kinds = {kind for row in self._rows for kind in row.members}
        for kind in ("input", "edited", "json"):
            if self._rows and kind not in kinds:
                raise SourceError(
                    f"{where}: no member .{kind}{'' if kind == 'json' else '.png'} in any of its "
                    f"samples; they have {', '.join(sorted(kinds))}"
                )

    def _shown(self, file: int) -> str:
        name = self._files[file].relative_to(self._root).as_posix()
        return self.where if name == Path(self.where).name else f"{self.where}/{name}"

    def __len__(self) -> int:
        """The number of keys."""
        return len(self._rows)

    def name(self, row: int) -> str:
        """The sample's key stands for its number."""
        return f"{self._shown(self._rows[row].file)} sample {self._rows[row].key}"

    def _facts(self, row: int) -> dict[str, object]:
        return _object(self._member(row, "json"))

    def images(self, row: int) -> tuple[bytes, bytes]:
        """From where they lie in the tar."""
        return self._member(row, "input"), self._member(row, "edited")

    def _member(self, row: int, kind: str) -> bytes:
        found = self._rows[row].members.get(kind)
        if found is None:
            raise OSError(f"has no member .{kind}")
        with self._files[self._rows[row].file].open("rb") as tar:
            tar.seek(found.offset)
            return tar.read(found.size)


# -- InstructPix2Pix ------------------------------------------------------------------------------


class FolderRows(_JsonRows):
    """The layout of timothybrooks/instruct-pix2pix, with our `facts.jsonl` where it is.

    Its columns have the names of the published ones: `edit`, `input` and `output` of prompt.json
    are edit_prompt, caption and edited_caption.
    """

    def __init__(self, where: str, root: Path) -> None:
        self.where = where
        self._root = root
        self._source = InstructPix2Pix(InstructPix2PixOptions(path=root, pairs=True))
        folders = self._source.folders()
        self._rows = [(folder, seed) for folder, seeds in folders for seed in seeds]
        published = any((root / folder / "facts.jsonl").is_file() for folder, _ in folders[:1])
        own = frozenset({"edit_prompt", "caption", "edited_caption"})
        self._known = frozenset(FEATURES) if published else own

    def __len__(self) -> int:
        """The number of seeds."""
        return len(self._rows)

    def name(self, row: int) -> str:
        """The folder and the seed in it."""
        folder, seed = self._rows[row]
        return f"{self.where}/{folder} seed {seed}"

    def _facts(self, row: int) -> dict[str, object]:
        folder, seed = self._rows[row]
        prompt = _object(self._file(f"{folder}/prompt.json"))
        facts: dict[str, object] = {}
        if (self._root / folder / "facts.jsonl").is_file():
            lines = map(_object, self._file(f"{folder}/facts.jsonl").splitlines())
            facts = next((line for line in lines if str(line.get("seed")) == seed), {})
        return facts | {
            "edit_prompt": prompt.get("edit"),
            "caption": prompt.get("input") or prompt.get("caption"),
            "edited_caption": prompt.get("output"),
        }

    def images(self, row: int) -> tuple[bytes, bytes]:
        """<seed>_0.jpg and <seed>_1.jpg."""
        folder, seed = self._rows[row]
        return self._file(f"{folder}/{seed}_0.jpg"), self._file(f"{folder}/{seed}_1.jpg")

    def _file(self, name: str) -> bytes:
        try:
            return file_bytes(self._root / name)
        except OSError as error:
            raise OSError(f"{name}: {error.strerror}") from error
        except ValueError as error:  # a name that no file can have
            raise OSError(f"{name!r}: {error}") from error
