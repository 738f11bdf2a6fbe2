"""Source `hf-dataset`: a dataset that the `datasets` library opens, of images or of pairs."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from reasonpix.core.files.folder import files_under
from reasonpix.core.files.ignored import Ignored, unread_columns, unread_file
from reasonpix.core.files.tar_index import index_tar
from reasonpix.core.text import is_text
from reasonpix.errors import SourceError
from reasonpix.generation.components.file_source import ItemTexts, file_bytes
from reasonpix.generation.components.metadata_folder import (
    metadata_files,
    mixed_column,
    open_metadata_folder,
)
from reasonpix.plugin.components import Options, Source, SourceItem
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.intended_images import domain_of_dataset
from reasonpix.plugin.types import Problem

if TYPE_CHECKING:
    import datasets


class HFDatasetOptions(Options):
    """Options of `hf-dataset`."""

    path: str = Field(
        description="Folder of parquet files, or of images with metadata.jsonl; one parquet file, "
        "saved dataset, or a hub id"
    )
    revision: str | None = Field(None, description="Commit or tag, for a hub id")
    split: str = Field("train", description="Split to read")
    image: str = Field("image", description="Column of the images")
    caption: str | None = Field(None, description="Column of captions, if there is one")
    edited_image: str | None = Field(
        None, description="Column of the edited images, of a dataset of pairs (Part I)"
    )
    edited_caption: str | None = Field(None, description="Column of the edited images' captions")
    instruction: str | None = Field(None, description="Column of the direct instructions of pairs")

    @model_validator(mode="after")
    def _columns_of_pairs(self) -> Self:
        if (self.edited_image is None) != (self.instruction is None):
            raise ValueError("a pair needs both columns, edited_image and instruction")
        if self.edited_caption is not None and self.edited_image is None:
            raise ValueError("edited_caption needs the columns edited_image and instruction too")
        return self


class HFDataset(Source[HFDatasetOptions]):
    """A Hugging Face dataset with a column of images, or columns of pairs.

    Native ids are row numbers. A pair with an empty cell gives a `Problem`.
    """

    name: ClassVar[str] = "hf-dataset"
    Options: ClassVar[type[Options]] = HFDatasetOptions

    @property
    def domain(self) -> str:
        """The domain in the card of a published dataset."""
        return domain_of_dataset(self.options.path)

    @property
    def gives_pairs(self) -> bool:
        """Whether a column of edited images is named."""
        return self.options.edited_image is not None

    @property
    def gives_captions(self) -> bool:
        """Whether the columns of captions are named."""
        options = self.options
        return options.caption is not None and (
            options.edited_image is None or options.edited_caption is not None
        )

    def load(self) -> None:
        """Open the dataset. Raises `SourceError` for a missing folder, split or column."""
        options = self.options
        data, self._ignored = open_dataset(options.path, options.split, options.revision)
        import datasets

        images = [name for name in (options.image, options.edited_image) if name]
        texts = [
            name for name in (options.caption, options.edited_caption, options.instruction) if name
        ]
        for column in images + texts:
            if mixed := mixed_column(column, self._ignored):
                raise SourceError(f"{options.path}/{mixed.problem}")
            if column not in data.column_names:
                raise SourceError(
                    f"{options.path!r} has no column {column!r}; "
                    f"it has {', '.join(data.column_names)}"
                )
        for column in texts:
            kind = getattr(data.features[column], "dtype", "other data")
            if kind not in ("string", "large_string"):
                raise SourceError(f"column {column!r} of {options.path!r} holds {kind}, not text")
        try:
            for column in images:
                data = data.cast_column(column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise SourceError(
                f"column {column!r} of {options.path!r} holds no images: {error}"
            ) from error
        self._ignored += unread_columns(
            column for column in data.column_names if column not in images + texts
        )
        self._data = data.select_columns(list(dict.fromkeys(images + texts)))

    def items(self) -> Iterator[SourceItem | tuple[str, Problem] | Ignored]:
        """All rows, in order."""
        yield from self._ignored
        for number, row in enumerate(self._data):
            try:
                item = self._item(str(number), row)
            except OSError as error:
                yield str(number), Problem(status="failed", reason=f"row {number}: {error}")
            else:
                yield item

    def _item(self, native_id: str, row: dict[str, Any]) -> SourceItem:
        options = self.options
        content = hashlib.sha256(image_bytes(row[options.image], "image")).hexdigest()
        caption = row[options.caption] if options.caption else None
        if options.edited_image is None:
            return ItemTexts(caption).item(native_id, content)
        edited = hashlib.sha256(image_bytes(row[options.edited_image], "edited image")).hexdigest()
        columns = (options.caption, options.edited_caption, options.instruction)
        for column in filter(None, columns):
            if not is_text(row[column]):
                raise OSError(f"no text in {column!r}")
        texts = ItemTexts(*(row[column] if column else None for column in columns))
        return texts.item(native_id, content, edited)

    def read(self, native_id: str) -> bytes:
        """The encoded image of a row."""
        return image_bytes(self._data[int(native_id)][self.options.image], "image")

    def read_edited(self, native_id: str) -> bytes:
        """The encoded edited image of a row."""
        return image_bytes(self._data[int(native_id)][self.options.edited_image], "edited image")


def open_dataset(
    path: str, split: str, revision: str | None = None
) -> tuple[datasets.Dataset, list[Ignored]]:
    """A split of a folder, a parquet file, a saved dataset or a hub id, and what is ignored in it.

    Raises `SourceError` if it cannot be opened or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            f"reading {path!r} needs the package datasets: pip install 'reasonpix[hub]'"
        ) from error

    from reasonpix.plugin.hub_client import check_hub_proxy, connect_hub

    connect_hub()
    folder = Path(path)
    saved = any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    try:
        if saved:
            data = datasets.load_from_disk(path)
            if not isinstance(data, datasets.DatasetDict):
                return data, []
            others = [Ignored(name, "another split") for name in data if name != split]
            return data[split], others
        if folder.is_file():
            return datasets.load_dataset("parquet", data_files=path, split=split), []
        if not folder.is_dir():
            return datasets.load_dataset(path, split=split, revision=revision), []
        listed = list(files_under(folder))
        if metadata_files([file for file in listed if not isinstance(file, Ignored)]):
            return open_metadata_folder(path, folder, split)
        ignored = _unread_files(folder, listed, split)
        return datasets.load_dataset(path, split=split), ignored
    except (OSError, ValueError, KeyError, TypeError, ImportError, tarfile.TarError) as error:
        if not saved and not folder.exists():
            check_hub_proxy()
        raise SourceError(f"path: cannot open dataset {path!r}: {error}") from error


def _unread_files(folder: Path, listed: Sequence[str | Ignored], split: str) -> list[Ignored]:
    """What `load_dataset` does not read of a folder.

    Raises `SourceError` for a tar in which a key comes again: the library would read only the last
    sample of this key.
    """
    import datasets

    files = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    read = {os.path.realpath(file) for file in files.get(split, ())}
    others = {os.path.realpath(file) for files in files.values() for file in files}
    ignored: list[Ignored] = []
    for file in listed:
        if isinstance(file, Ignored):
            ignored.append(file)
            continue
        path = os.path.realpath(folder / file)
        if path not in read:
            ignored.append(unread_file(file, path in others))
        elif path.endswith(".tar"):
            index = index_tar(Path(path))
            if index.repeated:
                keys = ", ".join(sorted(index.repeated)[:3])
                raise SourceError(
                    f"path: {folder / file}: several samples have the same key ({keys}); rename "
                    "them, or only the last of each would be read"
                )
            ignored += index.ignored
    return ignored


def image_bytes(cell: dict[str, Any] | None, what: str) -> bytes:
    """The encoded image of a cell, or of the file that it names. Raises `OSError`."""
    if cell is None or cell["bytes"] is cell["path"] is None:
        raise OSError(f"no {what}")
    return bytes(cell["bytes"]) if cell["bytes"] is not None else file_bytes(Path(cell["path"]))


@hookimpl
def sources() -> list[type[Source[Any]]]:
    """The source of this module."""
    return [HFDataset]
