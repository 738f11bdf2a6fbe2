"""Opens pair datasets: finds out which format a path has, and which files belong to a split."""

from __future__ import annotations

import os
import re
from pathlib import Path

from reasonpix.datasets.json_readers import InstructPix2PixReader, WebDatasetReader
from reasonpix.datasets.reader import PairReader
from reasonpix.datasets.table_readers import HubDatasetReader, ParquetReader
from reasonpix.errors import SourceError

SPLITS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
"""Words for a split in file names, grouped by meaning."""


def open_reader(path: str, base: Path, split: str, revision: str | None) -> PairReader:
    """Open the dataset at `path`: a folder or file, relative to `base`, or a hub id.

    Raises `SourceError` if it is not a dataset, or has no recognised image columns.
    """
    location = base / Path(path).expanduser()
    if not os.path.lexists(location):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
            raise SourceError(f"{path}: no such folder or file ({location})")
        return HubDatasetReader(path, path, split, revision)
    if revision is not None:
        raise SourceError(f"{path}: a revision is for hub ids, and this is a folder or file")
    if location.is_file():
        if location.suffix == ".tar":
            return WebDatasetReader(path, [location], location.parent)
        return ParquetReader(path, [location], location.parent)
    if (location / "seeds.json").is_file():
        if split != "train":
            raise SourceError(f"{path}: an InstructPix2Pix folder has no splits; leave split out")
        return InstructPix2PixReader(path, location)
    if any((location / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return HubDatasetReader(path, str(location), split, None)
    if (location / "stages").is_dir():
        raise SourceError(
            f"{path}: a run, not a dataset; publish it: reasonpix publish {path} --out DIR"
        )
    for suffix, reader in ((".parquet", ParquetReader), (".tar", WebDatasetReader)):
        if files := sorted(
            file for file in location.rglob(f"*{suffix}") if _is_data(file, location)
        ):
            return reader(path, _files_of_split(path, files, location, split), location)
    raise SourceError(
        f"{path}: not a pair dataset; expected .parquet files, .tar files (WebDataset), "
        "seeds.json (InstructPix2Pix), or the output of save_to_disk of `datasets`"
    )


def _is_data(file: Path, root: Path) -> bool:
    """Whether it is not a hidden file, as file managers and version control create."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden


def _files_of_split(path: str, files: list[Path], root: Path, split: str) -> list[Path]:
    """The files whose names contain the split. Without any split in names, all are for training."""

    def words(file: Path) -> set[str]:
        return set(re.split(r"[/._ -]+", file.relative_to(root).as_posix()))

    synonyms = next((set(group) for group in SPLITS if split in group), {split})
    if matches := [file for file in files if words(file) & synonyms]:
        return matches
    all_words = {word for group in SPLITS for word in group}
    if "train" in synonyms and not any(words(file) & all_words for file in files):
        return files
    shown = ", ".join(file.relative_to(root).as_posix() for file in files[:3])
    raise SourceError(f"{path}: no file of split {split!r} among its {len(files)}, such as {shown}")
