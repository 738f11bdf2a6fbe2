"""Opens pair datasets: finds out which format a path has, and which files belong to a split."""

from __future__ import annotations

import os
import re
from pathlib import Path

from reasonpix.core.files.folder import files_under
from reasonpix.core.files.ignored import Ignored, unread_file
from reasonpix.core.files.splits import files_of_split
from reasonpix.datasets.json_readers import InstructPix2PixReader, WebDatasetReader
from reasonpix.datasets.reader import PairReader
from reasonpix.datasets.table_readers import HubDatasetReader, ParquetReader
from reasonpix.errors import SourceError
from reasonpix.generation.components.metadata_folder import metadata_files


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
    listed = list(files_under(location))
    files = [file for file in listed if not isinstance(file, Ignored)]
    if metadata_files(files):
        return HubDatasetReader(path, str(location), split, None)
    for suffix, reader in ((".parquet", ParquetReader), (".tar", WebDatasetReader)):
        if data := [file for file in files if file.endswith(suffix)]:
            read = files_of_split(data, split)
            if not read:
                raise SourceError(
                    f"{path}: no file of split {split!r} among its {len(data)}, such as "
                    + ", ".join(data[:3])
                )
            unread = [unread_file(file, file in data) for file in files if file not in set(read)]
            ignored = [file for file in listed if isinstance(file, Ignored)] + unread
            return reader(path, [location / file for file in read], location, ignored)
    raise SourceError(
        f"{path}: not a pair dataset; expected .parquet files, .tar files (WebDataset), images "
        "with metadata.jsonl, seeds.json (InstructPix2Pix), or the output of save_to_disk of "
        "`datasets`"
    )
