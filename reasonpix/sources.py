"""Sources of input images: a folder, a Hugging Face dataset on disk, V3Det, InstructPix2Pix."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from reasonpix.errors import SourceError
from reasonpix.hookspecs import hookimpl
from reasonpix.records import Problem
from reasonpix.slots import Options, Source, SourceItem

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

O_co = TypeVar("O_co", bound=Options, covariant=True)


class _Files(Source[O_co]):
    """A source whose native ids are file names under a root."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder that native ids are relative to."""

    @abstractmethod
    def listing(self) -> Iterator[tuple[str, str | None]]:
        """(native id, caption) of each image, in a stable order."""

    def items(self) -> Iterator[SourceItem | tuple[str, Problem]]:
        """All files; one that cannot be read is a problem of its own."""
        for native_id, caption in self.listing():
            try:
                native_id.encode()
            except UnicodeEncodeError:
                shown = ascii(native_id)
                yield shown, Problem(status="failed", reason=f"{shown}: its name is not UTF-8")
                continue
            try:
                content = hashlib.sha256(self.read(native_id)).hexdigest()
            except OSError as error:
                yield native_id, Problem(status="failed", reason=f"{native_id}: {error.strerror}")
            else:
                yield SourceItem(native_id=native_id, content=content, caption=caption)

    def read(self, native_id: str) -> bytes:
        """The file's bytes."""
        return (self.root / native_id).read_bytes()


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

    def listing(self) -> Iterator[tuple[str, str | None]]:
        """Files with an image's suffix, sorted by relative path."""
        root = self.root
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.is_dir():
                yield path.relative_to(root).as_posix(), None


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

    def listing(self) -> Iterator[tuple[str, str | None]]:
        """`file_name` of each image, in the order of its id."""
        path = self.options.annotations
        wanted = 'expected {"images": [{"id": …, "file_name": …}, …]}'
        try:
            rows = sorted((row["id"], row["file_name"]) for row in _json(path, wanted)["images"])
            names = [PurePosixPath(file_name).as_posix() for _, file_name in rows]
        except (KeyError, TypeError) as error:
            raise SourceError(f"{path}: {wanted}, but {error!r}") from error
        for name in names:
            yield name, None


class InstructPix2PixOptions(Options):
    """Options of `instruct-pix2pix`."""

    path: Path = Field(
        description="Folder with seeds.json and <dir>/prompt.json, <dir>/<seed>_0.jpg"
    )


class InstructPix2Pix(_Files[InstructPix2PixOptions]):
    """The input images of InstructPix2Pix data, with their captions (Part II).

    Layout of timothybrooks/instruct-pix2pix: `seeds.json` is [[dir, [seed, …]], …]; `prompt.json`
    holds `input` (older files: `caption`), `edit` and `output`.
    """

    name: ClassVar[str] = "instruct-pix2pix"
    Options: ClassVar[type[Options]] = InstructPix2PixOptions

    @property
    def root(self) -> Path:
        """The folder."""
        return _folder(self.options.path, "path")

    def listing(self) -> Iterator[tuple[str, str | None]]:
        """One input image for each seed of each prompt, in the order of seeds.json."""
        wanted = "expected seeds.json as [[dir, [seed, …]], …]"
        rows = _json(self.root / "seeds.json", wanted)
        try:
            listed = [(str(folder), [str(seed) for seed in seeds]) for folder, seeds in rows]
        except (TypeError, ValueError) as error:
            raise SourceError(f"{self.root / 'seeds.json'}: {wanted}, but {error}") from error
        for folder, seeds in listed:
            path = self.root / folder / "prompt.json"
            wanted = 'expected {"input": … (or "caption"), "edit": …, "output": …}'
            prompt = _json(path, wanted)
            caption = isinstance(prompt, dict) and (prompt.get("input") or prompt.get("caption"))
            if not isinstance(caption, str):
                raise SourceError(f"{path}: {wanted}, but got {prompt!r}")
            for seed in seeds:
                yield f"{folder}/{seed}_0.jpg", caption


class HFDatasetOptions(Options):
    """Options of `hf-dataset`."""

    path: str = Field(description="Folder of parquet files or saved dataset, or a hub id")
    revision: str | None = Field(None, description="Commit or tag, for a hub id")
    split: str = Field("train", description="Split to read")
    image: str = Field("image", description="Column of the images")
    caption: str | None = Field(None, description="Column of captions, if there is one")


class HFDataset(Source[HFDatasetOptions]):
    """A Hugging Face dataset with an image column. Native ids are row numbers."""

    name: ClassVar[str] = "hf-dataset"
    Options: ClassVar[type[Options]] = HFDatasetOptions

    def load(self) -> None:
        """Open the dataset. Raises `SourceError` for a missing folder, split or column."""
        try:
            import datasets
        except ImportError as error:
            raise SourceError(
                "source hf-dataset needs the package datasets: pip install 'reasonpix[hub]'"
            ) from error

        options = self.options
        saved = Path(options.path) / "dataset_info.json"
        try:
            if saved.exists() or saved.with_name("dataset_dict.json").exists():
                data = datasets.load_from_disk(options.path)
                if isinstance(data, datasets.DatasetDict):
                    data = data[options.split]
            else:
                data = datasets.load_dataset(
                    options.path, split=options.split, revision=options.revision
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"path: cannot open dataset {options.path!r}: {error}") from error
        for column in filter(None, (options.image, options.caption)):
            if column not in data.column_names:
                raise SourceError(
                    f"{options.path!r} has no column {column!r}; "
                    f"it has {', '.join(data.column_names)}"
                )
        self._data = data.cast_column(options.image, datasets.Image(decode=False))

    def items(self) -> Iterator[SourceItem | tuple[str, Problem]]:
        """All rows, in order."""
        for number, row in enumerate(self._data):
            caption = row[self.options.caption] if self.options.caption else None
            try:
                content = hashlib.sha256(_image_bytes(row[self.options.image])).hexdigest()
            except OSError as error:
                yield str(number), Problem(status="failed", reason=f"row {number}: {error}")
            else:
                yield SourceItem(native_id=str(number), content=content, caption=caption)

    def read(self, native_id: str) -> bytes:
        """The encoded image of a row."""
        return _image_bytes(self._data[int(native_id)][self.options.image])


def _image_bytes(cell: dict[str, Any] | None) -> bytes:
    if cell is None:
        raise OSError("no image")
    return bytes(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


@hookimpl
def sources() -> list[type[Source[Any]]]:
    """The sources of this module."""
    return [ImageFolder, V3Det, InstructPix2Pix, HFDataset]
