"""Where a run folder is: files that appear complete or not at all, here or on a remote store."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from reasonpix.errors import RunError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a disk that is full."""


class Storage(ABC):
    """A folder. Names are relative to it, with "/" between their parts.

    What cannot be written raises `RunError`, which says what to do; nothing written before is lost.
    """

    local: Path | None = None
    """The folder, where it is one of this machine."""

    @abstractmethod
    def __str__(self) -> str:
        """Where it is, for messages."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content. Raises `FileNotFoundError` where there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file: it then holds all of `data`, or is as it was, even after a power cut."""

    @abstractmethod
    def append(self, name: str, line: str) -> None:
        """Add a line to a file, for one writer. The last lines may be lost when it is killed."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """The finished files of a folder, by one listing; none of a folder that is not there."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """The folders in a folder."""

    @abstractmethod
    def rename(self, name: str, to: str) -> None:
        """Give a file another name, in one step."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that it holds. What is not there is removed already.

        A folder vanishes in one step, or its files do one by one; none is left half.
        """

    @abstractmethod
    def size(self, folder: str) -> int:
        """Bytes of all files in a folder."""

    @abstractmethod
    def held(self) -> AbstractContextManager[None]:
        """Hold the folder for this process, until it lets go or ends, however it does.

        Raises `RunError` when another process holds it: two would pay for the same answers.
        """

    @abstractmethod
    def holder(self) -> str | None:
        """The process that holds the folder, in words; None where none does."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove what killed processes left half-written. Only for the process that holds it."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        folder, _, own = name.rpartition("/")
        return own in self.names(folder)


def whoami() -> str:
    """This process, as another one would name it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class LocalStorage(Storage):
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._shown = root
        # Whoever changes the working folder does not move it.
        self.local = self.root = root.absolute()

    def __str__(self) -> str:
        """Its path, as it was given."""
        return str(self._shown)

    def read(self, name: str) -> bytes:
        """A file's content."""
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """By a draft that is renamed when it is on the disk."""
        write_atomically(self.root / name, data)

    def append(self, name: str, line: str) -> None:
        """Lines of one write each are never mixed up."""
        with _explained(self.root / name), (self.root / name).open("a", encoding="utf-8") as file:
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
        """And the folder is on the disk afterwards."""
        with _explained(self.root / to):
            os.replace(self.root / name, self.root / to)
            _sync((self.root / to).parent)

    def remove(self, name: str) -> None:
        """A folder gets a draft's name first, so that it is not there by halves."""
        path = self.root / name
        with _explained(path):
            if path.is_dir() and not path.is_symlink():
                draft = _draft(path)
                os.replace(path, draft)
                shutil.rmtree(draft)
            else:
                path.unlink(missing_ok=True)

    def size(self, folder: str) -> int:
        """Of the files in it, those in its folders too."""
        files = (path for path in (self.root / folder).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    @contextmanager
    def held(self) -> Iterator[None]:
        """By a lock that the system lets go of when the process ends."""
        path = self.root / "holder"
        with _explained(path):
            self.root.mkdir(parents=True, exist_ok=True)
            holder = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _locked(holder):
                time.sleep(0.1)  # somebody may be looking who holds it
                if not _locked(holder):
                    who = os.pread(holder, 200, 0).decode().strip() or "another process"
                    raise RunError(f"{self} is in use by {who}; wait for it, or stop it first")
            # The lock counts, the name is for people: on a full disk `clean` is to make room.
            with suppress(OSError):
                os.ftruncate(holder, 0)
                os.pwrite(holder, f"{whoami()}\n".encode(), 0)
            yield
            os.ftruncate(holder, 0)
        finally:
            os.close(holder)

    def holder(self) -> str | None:
        """Whoever has the lock."""
        try:
            with (self.root / "holder").open(encoding="utf-8") as holder:
                try:
                    fcntl.flock(holder, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return holder.read().strip() or "another process"
        except FileNotFoundError:
            pass
        return None

    def tidy(self) -> None:
        """Drafts are known by their names."""
        for path in (self.root / "stages", *self.root.glob("stages/*"), self.root):
            for draft in path.glob(".*.tmp"):
                if draft.is_dir():
                    shutil.rmtree(draft, ignore_errors=True)
                else:
                    draft.unlink(missing_ok=True)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or is as it was, even after a power cut.

    Raises `RunError` when it cannot.
    """
    draft = _draft(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the system refuses, in words of ours."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in NO_ROOM:
            mend = "make room"
        elif isinstance(error, FileExistsError | NotADirectoryError):
            mend = "a file is in the way; name another folder"
        else:
            mend = "see that its folder is there and writable, or name another"
        raise RunError(
            f"{path} cannot be written: {what}; {mend}, then run the same command again: "
            "what was finished is kept"
        ) from error
