"""Where a run folder is stored: atomic files, on this machine or on a remote store."""

from __future__ import annotations

import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from reasonpix.core.atomic import (
    Locked,
    draft_path,
    explain_os_errors,
    is_locked,
    lock,
    remove_drafts,
    sync_folder,
    write_atomically,
)
from reasonpix.errors import RunError


class Storage(ABC):
    """A folder. Names are relative to it, with "/" between their parts.

    Failed writes raise `RunError`, which says what to do; earlier writes are never lost.
    """

    local: Path | None = None
    """The folder, if it is on this machine."""

    @abstractmethod
    def __str__(self) -> str:
        """The location, for messages."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content. Raises `FileNotFoundError`."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: it then holds all of `data`, or is unchanged."""

    @abstractmethod
    def append(self, name: str, line: str) -> None:
        """Append a line to a file that has one writer. A kill may lose the last lines."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """The names of a folder's complete files, sorted; none if the folder does not exist."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """The names of a folder's subfolders, sorted."""

    @abstractmethod
    def rename(self, name: str, to: str) -> None:
        """Rename a file atomically."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file or a folder with its content, if it exists.

        A folder vanishes atomically, or file by file; no file is ever left half removed.
        """

    @abstractmethod
    def size(self, folder: str) -> int:
        """Bytes of all files in a folder and its subfolders."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder for this process until the context, or the process, ends.

        Raises `RunError` when another process holds it: two would pay for the same answers.
        """

    @abstractmethod
    def holder(self) -> str | None:
        """The process that holds the lock, for messages; None if none does."""

    @abstractmethod
    def remove_drafts(self) -> None:
        """Remove drafts that killed processes left. The caller holds the lock."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        folder, _, own = name.rpartition("/")
        return own in self.names(folder)


def process_name() -> str:
    """This process, for messages of other processes."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class LocalStorage(Storage):
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._shown = root
        # Absolute, so that a change of the working directory does not matter.
        self.local = self.root = root.absolute()

    def __str__(self) -> str:
        """The path, as it was given."""
        return str(self._shown)

    def read(self, name: str) -> bytes:
        """A file's content."""
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `write_atomically`."""
        write_atomically(self.root / name, data)

    def append(self, name: str, line: str) -> None:
        """One write per line, so that lines of several threads never mix."""
        path = self.root / name
        with explain_os_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def names(self, folder: str) -> list[str]:
        """By one listing."""
        return sorted(e.name for e in self._entries(folder) if e.is_file() and e.name[0] != ".")

    def folders(self, folder: str) -> list[str]:
        """By one listing."""
        return sorted(e.name for e in self._entries(folder) if e.is_dir())

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def rename(self, name: str, to: str) -> None:
        """Durable: the folder is flushed afterwards."""
        target = self.root / to
        with explain_os_errors(target):
            os.replace(self.root / name, target)
            sync_folder(target.parent)

    def remove(self, name: str) -> None:
        """A folder is first renamed to a draft, so that it vanishes at once."""
        path = self.root / name
        with explain_os_errors(path):
            if path.is_dir() and not path.is_symlink():
                draft = draft_path(path)
                os.replace(path, draft)
                shutil.rmtree(draft)
            else:
                path.unlink(missing_ok=True)

    def size(self, folder: str) -> int:
        """By a walk through the folder."""
        files = (path for path in (self.root / folder).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """By the lock of the file `holder`, which names the process for people."""
        path = self.root / "holder"
        with ExitStack() as stack:
            with explain_os_errors(path):
                self.root.mkdir(parents=True, exist_ok=True)
                try:
                    descriptor = stack.enter_context(lock(path))
                except Locked as error:
                    raise RunError(
                        f"{self} is in use by {self._holder_name()}; wait for it, or stop it first"
                    ) from error
            with suppress(OSError):  # `clean` must work on a full disk
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{process_name()}\n".encode(), 0)
            yield
            os.ftruncate(descriptor, 0)

    def holder(self) -> str | None:
        """By the lock of the file `holder`."""
        try:
            return self._holder_name() if is_locked(self.root / "holder") else None
        except FileNotFoundError:
            return None

    def _holder_name(self) -> str:
        return (self.root / "holder").read_text(encoding="utf-8").strip() or "another process"

    def remove_drafts(self) -> None:
        """Those of the run folder and its stages."""
        for folder in (self.root / "stages", *self.root.glob("stages/*"), self.root):
            remove_drafts(folder)
