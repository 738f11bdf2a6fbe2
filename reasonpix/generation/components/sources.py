"""Sources: a folder of images, a Hugging Face dataset, V3Det, InstructPix2Pix.

The last and the Hugging Face dataset can also give pairs: the edited image, its caption and the
direct instruction beside the input image (Part I).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from pydantic import Field, model_validator

from reasonpix.errors import SourceError
from reasonpix.plugin.components import Options, Source, SourceItem, SourcePair
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

MAX_BYTES = 1 << 30
"""Files beyond this are not read: no image within the limit of pixels is as large."""

O_co = TypeVar("O_co", bound=Options, covariant=True)


class _Words(NamedTuple):
    """What is said about an image and, where there is an instruction, about its edit."""

    caption: str | None = None
    edited_caption: str | None = None
    instruction: str | None = None

    def item(self, native_id: str, content: str, edited_content: str | None) -> SourceItem:
        """With the SHA-256 of the image and, of a pair, of the edited image."""
        pair = None
        if self.instruction is not None and edited_content is not None:
            pair = SourcePair(
                content=edited_content, caption=self.edited_caption, instruction=self.instruction
            )
        return SourceItem(native_id=native_id, content=content, caption=self.caption, pair=pair)


def is_text(value: object) -> bool:
    """Whether there are words in it; JSON can hold halves of characters, which no file can."""
    return (
        isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)
    )


class _Files(Source[O_co]):
    """A source whose native ids are file names under a root."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder that native ids are relative to."""

    @abstractmethod
    def listing(self) -> Iterator[tuple[str, _Words | Problem]]:
        """(native id, what is said about it) of each image, in a stable order."""

    def edited(self, native_id: str) -> str:
        """The name of a pair's edited image, under the root."""
        raise NotImplementedError

    def items(self) -> Iterator[SourceItem | tuple[str, Problem]]:
        """All files; one that cannot be read is a problem of its own."""
        for native_id, words in self.listing():
            try:
                native_id.encode()
            except UnicodeEncodeError:
                shown = ascii(native_id)
                yield shown, Problem(status="failed", reason=f"{shown}: its name is not UTF-8")
                continue
            if isinstance(words, Problem):
                yield native_id, words
                continue
            try:
                content = self._content(native_id)
                edited = self._content(self.edited(native_id)) if self.gives_pairs else None
            except OSError as error:
                yield native_id, Problem(status="failed", reason=str(error))
            else:
                yield words.item(native_id, content, edited)

    def _content(self, name: str) -> str:
        try:
            return hashlib.sha256(self.read(name)).hexdigest()
        except OSError as error:
            raise OSError(f"{name}: {error.strerror}") from error
        except ValueError as error:  # a name that no file can have
            raise OSError(f"{name!r}: {error}") from error

    def read(self, native_id: str) -> bytes:
        """The file's bytes."""
        return file_bytes(self.root / native_id)

    def read_edited(self, native_id: str) -> bytes:
        """The bytes of the edited image's file."""
        return self.read(self.edited(native_id))


def file_bytes(path: Path) -> bytes:
    """A file's content. Raises `OSError`, also for pipes and devices: they may never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EINVAL, "is no regular file")
    if found.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{found.st_size} bytes exceed the limit of {MAX_BYTES}")
    return path.read_bytes()


def _folder(path: Path, option: str) -> Path:
    if not path.is_dir():
        raise SourceError(f"{option}: no folder {str(path)!r}")
    return path


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file; {what}") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}; {what}") from error


class ImageFolderOptions(Options):
    """Options of `image-folder`."""

    path: Path = Field(description="Folder of images, searched with its subfolders")


class ImageFolder(_Files[ImageFolderOptions]):
    """All images under a folder, by name; they have no captions."""

    name: ClassVar[str] = "image-folder"
    Options: ClassVar[type[Options]] = ImageFolderOptions

    @property
    def root(self) -> Path:
        """The folder."""
        return _folder(self.options.path, "path")

    def listing(self) -> Iterator[tuple[str, _Words | Problem]]:
        """Files with an image's suffix, sorted by relative path.

        Links are followed. A folder that has several names, as in a loop of links, is searched
        under the first of them.
        """
        root = str(self.root)
        searched: set[tuple[int, int]] = set()
        names = [""]
        while names:
            name = names.pop()
            path = os.path.join(root, name)
            try:
                if not os.path.isdir(path):
                    if os.path.splitext(name)[1].lower() in SUFFIXES:
                        yield name, _Words()
                    continue
                found = os.stat(path)
                if (found.st_dev, found.st_ino) not in searched:
                    searched.add((found.st_dev, found.st_ino))
                    inside = sorted(os.listdir(path), reverse=True)
                    names += [os.path.join(name, entry) for entry in inside]
            except OSError as error:
                if not name:
                    raise SourceError(f"path: {error}") from error
                yield name, Problem(status="failed", reason=f"{name}: {error.strerror}")


class V3DetOptions(Options):
    """Options of `v3det`."""

    annotations: Path = Field(description="v3det_2023_v1_train.json or _val.json")
    images: Path = Field(description='Folder that "images/<node>/…" is relative to')


class V3Det(_Files[V3DetOptions]):
    """V3Det's COCO-like JSON (https://v3det.openxlab.org.cn). Its boxes are not needed."""

    name: ClassVar[str] = "v3det"
    Options: ClassVar[type[Options]] = V3DetOptions

    @property
    def root(self) -> Path:
        """The folder of the images."""
        return _folder(self.options.images, "images")

    def listing(self) -> Iterator[tuple[str, _Words | Problem]]:
        """`file_name` of each image, in the order of its id."""
        path = self.options.annotations
        wanted = 'expected {"images": [{"id": …, "file_name": …}, …]}'
        try:
            rows = sorted((row["id"], row["file_name"]) for row in _json(path, wanted)["images"])
            names = [PurePosixPath(file_name).as_posix() for _, file_name in rows]
        except (KeyError, TypeError) as error:
            raise SourceError(f"{path}: {wanted}, but {error!r}") from error
        for name in names:
            yield name, _Words()


class InstructPix2PixOptions(Options):
    """Options of `instruct-pix2pix`."""

    path: Path = Field(
        description="Folder with seeds.json and <dir>/prompt.json, <dir>/<seed>_0.jpg"
    )
    pairs: bool = Field(
        False, description="Give the edited images <dir>/<seed>_1.jpg and instructions too (Part I)"
    )


class InstructPix2Pix(_Files[InstructPix2PixOptions]):
    """InstructPix2Pix data: its input images with their captions (Part II), or its pairs (Part I).

    Layout of timothybrooks/instruct-pix2pix: `seeds.json` is [[dir, [seed, …]], …]; `prompt.json`
    holds `input` (older files: `caption`), `edit` and `output`. Where a prompt.json is of no use,
    its images are problems, and the others go on.
    """

    name: ClassVar[str] = "instruct-pix2pix"
    Options: ClassVar[type[Options]] = InstructPix2PixOptions

    @property
    def gives_pairs(self) -> bool:
        """By the option `pairs`."""
        return self.options.pairs

    @property
    def root(self) -> Path:
        """The folder."""
        return _folder(self.options.path, "path")

    def edited(self, native_id: str) -> str:
        """<dir>/<seed>_1.jpg beside <dir>/<seed>_0.jpg."""
        return native_id.removesuffix("_0.jpg") + "_1.jpg"

    def folders(self) -> list[tuple[str, list[str]]]:
        """The (dir, seeds) of seeds.json."""
        wanted = "expected seeds.json as [[dir, [seed, …]], …]"
        rows = _json(self.root / "seeds.json", wanted)
        try:
            return [(str(folder), [str(seed) for seed in seeds]) for folder, seeds in rows]
        except (TypeError, ValueError) as error:
            raise SourceError(f"{self.root / 'seeds.json'}: {wanted}, but {error}") from error

    def listing(self) -> Iterator[tuple[str, _Words | Problem]]:
        """One input image for each seed of each prompt, in the order of seeds.json."""
        for folder, seeds in self.folders():
            words = self._prompt(folder)
            for seed in seeds:
                yield f"{folder}/{seed}_0.jpg", words

    def _prompt(self, folder: str) -> _Words | Problem:
        """The words of a folder's prompt.json; why it is of no use, by the path under the root."""
        name = f"{folder}/prompt.json"
        try:
            prompt = json.loads(file_bytes(self.root / name).decode())
        except OSError as error:
            return Problem(status="failed", reason=f"{name}: {error.strerror}")
        except (ValueError, RecursionError) as error:
            return Problem(status="failed", reason=f"{name}: cannot be read: {error}")
        found = prompt if isinstance(prompt, dict) else {}
        caption = found.get("input") or found.get("caption")
        missing = [] if is_text(caption) else ['"input" (or "caption")']
        if not self.gives_pairs:
            words = _Words(caption)
        else:
            words = _Words(caption, found.get("output"), found.get("edit"))
            missing += [f'"{key}"' for key in ("edit", "output") if not is_text(found.get(key))]
        if missing:
            reason = f"{name}: holds no text for {' and '.join(missing)}"
            return Problem(status="failed", reason=reason)
        return words


class HFDatasetOptions(Options):
    """Options of `hf-dataset`."""

    path: str = Field(
        description="Folder of parquet files, one parquet file, saved dataset, or a hub id"
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
    def _is_whole(self) -> Self:
        if (self.edited_image is None) != (self.instruction is None):
            raise ValueError("a pair needs both columns, edited_image and instruction")
        if self.edited_caption is not None and self.edited_image is None:
            raise ValueError("edited_caption needs the columns edited_image and instruction too")
        return self


class HFDataset(Source[HFDatasetOptions]):
    """A Hugging Face dataset with a column of images, or columns of pairs.

    Native ids are row numbers. A pair's row with an empty cell is a problem of its own.
    """

    name: ClassVar[str] = "hf-dataset"
    Options: ClassVar[type[Options]] = HFDatasetOptions

    @property
    def gives_pairs(self) -> bool:
        """Whether a column of edited images is named."""
        return self.options.edited_image is not None

    def load(self) -> None:
        """Open the dataset. Raises `SourceError` for a missing folder, split or column."""
        options = self.options
        data = open_dataset(options.path, options.split, options.revision)
        import datasets

        images = [name for name in (options.image, options.edited_image) if name]
        texts = [
            name for name in (options.caption, options.edited_caption, options.instruction) if name
        ]
        for column in images + texts:
            if column not in data.column_names:
                raise SourceError(
                    f"{options.path!r} has no column {column!r}; "
                    f"it has {', '.join(data.column_names)}"
                )
        for column in texts:
            kind = getattr(data.features[column], "dtype", "no text")
            if kind not in ("string", "large_string"):
                raise SourceError(f"column {column!r} of {options.path!r} holds {kind}, no text")
        try:
            for column in images:
                data = data.cast_column(column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise SourceError(
                f"column {column!r} of {options.path!r} holds no images: {error}"
            ) from error
        # Bytes of a column that nobody asked for are not read.
        self._data = data.select_columns(list(dict.fromkeys(images + texts)))

    def items(self) -> Iterator[SourceItem | tuple[str, Problem]]:
        """All rows, in order."""
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
            return _Words(caption).item(native_id, content, None)
        edited = hashlib.sha256(image_bytes(row[options.edited_image], "edited image")).hexdigest()
        columns = (options.caption, options.edited_caption, options.instruction)
        for column in filter(None, columns):
            if not is_text(row[column]):
                raise OSError(f"no text in {column!r}")
        words = _Words(*(row[column] if column else None for column in columns))
        return words.item(native_id, content, edited)

    def read(self, native_id: str) -> bytes:
        """The encoded image of a row."""
        return image_bytes(self._data[int(native_id)][self.options.image], "image")

    def read_edited(self, native_id: str) -> bytes:
        """The encoded edited image of a row."""
        return image_bytes(self._data[int(native_id)][self.options.edited_image], "edited image")


def open_dataset(path: str, split: str, revision: str | None = None) -> Any:
    """A split of a folder of parquet files, a parquet file, a saved dataset or a hub id.

    Raises `SourceError` when it cannot be opened, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            f"{path!r} is read with the package datasets: pip install 'reasonpix[hub]'"
        ) from error

    folder = Path(path)
    saved = any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    try:
        if saved:
            data = datasets.load_from_disk(path)
            return data[split] if isinstance(data, datasets.DatasetDict) else data
        if folder.is_file():
            return datasets.load_dataset("parquet", data_files=path, split=split)
        return datasets.load_dataset(path, split=split, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"path: cannot open dataset {path!r}: {error}") from error


def image_bytes(cell: dict[str, Any] | None, what: str) -> bytes:
    """The encoded image of a cell, or of the file that it names. Raises `OSError`."""
    if cell is None or cell["bytes"] is cell["path"] is None:
        raise OSError(f"no {what}")
    return bytes(cell["bytes"]) if cell["bytes"] is not None else file_bytes(Path(cell["path"]))


@hookimpl
def sources() -> list[type[Source[Any]]]:
    """The sources of this module."""
    return [ImageFolder, V3Det, InstructPix2Pix, HFDataset]
