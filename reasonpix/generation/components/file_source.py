"""Base of sources whose items are image files under a folder."""

from __future__ import annotations

import errno
import hashlib
import stat
from abc import abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from reasonpix.core.files.encodings import parse_json
from reasonpix.core.files.folder import files_under
from reasonpix.core.files.ignored import Ignored
from reasonpix.errors import SourceError
from reasonpix.plugin.components import Options, Source, SourceItem, SourcePair
from reasonpix.plugin.intended_images import domain_of_dataset
from reasonpix.plugin.types import Problem

MAX_BYTES = 1 << 30
"""Larger files are not read: no image within the pixel limit is that large."""

O_co = TypeVar("O_co", bound=Options, covariant=True)


class ItemTexts(NamedTuple):
    """The texts of an image and, if there is an instruction, of its edit."""

    caption: str | None = None
    edited_caption: str | None = None
    instruction: str | None = None

    def item(self, native_id: str, content: str, edited_content: str | None = None) -> SourceItem:
        """The item with these texts, the SHA-256 of the image and, for pairs, of the edited one."""
        pair = None
        if self.instruction is not None and edited_content is not None:
            pair = SourcePair(
                content=edited_content, caption=self.edited_caption, instruction=self.instruction
            )
        return SourceItem(native_id=native_id, content=content, caption=self.caption, pair=pair)


class FileSource(Source[O_co]):
    """A source whose native ids are file names under a root."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder that native ids are relative to."""

    @property
    def domain(self) -> str:
        """The domain in the card of a published dataset in the root."""
        return domain_of_dataset(self.root)

    @abstractmethod
    def listing(self) -> Iterator[tuple[str, ItemTexts | Problem] | Ignored]:
        """(native id, texts) of each image, in a stable order, and what is ignored."""

    def edited(self, native_id: str) -> str:
        """The file name of a pair's edited image, relative to the root."""
        raise NotImplementedError

    def items(self) -> Iterator[SourceItem | tuple[str, Problem] | Ignored]:
        """All files; an unreadable one gives a `Problem`."""
        for listed in self.listing():
            if isinstance(listed, Ignored):
                yield listed
                continue
            native_id, texts = listed
            try:
                native_id.encode()
            except UnicodeEncodeError:
                shown = ascii(native_id)
                yield shown, Problem(status="failed", reason=f"{shown}: its name is not UTF-8")
                continue
            if isinstance(texts, Problem):
                yield native_id, texts
                continue
            try:
                content = self._content(native_id)
                edited = self._content(self.edited(native_id)) if self.gives_pairs else None
            except OSError as error:
                yield native_id, Problem(status="failed", reason=str(error))
            else:
                yield texts.item(native_id, content, edited)

    def _content(self, name: str) -> str:
        try:
            return hashlib.sha256(self.read(name)).hexdigest()
        except OSError as error:
            raise OSError(f"{name}: {error.strerror}") from error
        except ValueError as error:  # the name is invalid
            raise OSError(f"{name!r}: {error}") from error

    def read(self, native_id: str) -> bytes:
        """The file's bytes."""
        return file_bytes(self.root / native_id)

    def read_edited(self, native_id: str) -> bytes:
        """The bytes of the edited image's file."""
        return self.read(self.edited(native_id))


def file_bytes(path: Path) -> bytes:
    """A file's content. Raises `OSError`, also for pipes and devices, which may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes exceed the limit of {MAX_BYTES}")
    return path.read_bytes()


def existing_folder(path: Path, option: str) -> Path:
    """The folder that an option names. Raises `SourceError` if it does not exist."""
    if not path.is_dir():
        raise SourceError(f"{option}: no folder {str(path)!r}")
    return path


def others_under(root: Path, names: Collection[str], reason: str) -> Iterator[Ignored]:
    """The files under a folder, relative to it, that are not among `names`."""
    try:
        for file in files_under(root):
            if isinstance(file, Ignored):
                yield file
            elif file not in names:
                yield Ignored(file, reason)
    except OSError as error:  # its files may be readable by name
        yield Ignored(str(root), f"a folder that cannot be searched ({error.strerror})")


def read_json(path: Path, expected: str) -> Any:
    """Parse a JSON file. Raises a `SourceError` that says what was `expected`."""
    try:
        return parse_json(file_bytes(path))
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file; {expected}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: cannot be read: {error}; {expected}") from error


def read_json_mapping(path: Path, expected: str) -> dict[str, Any]:
    """Parse a JSON file that holds an object. Raises a `SourceError` as `read_json` does."""
    values = read_json(path, expected)
    if not isinstance(values, dict):
        raise SourceError(f"{path}: {expected}")
    return values
