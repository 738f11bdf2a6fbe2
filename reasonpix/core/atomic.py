"""Atomic files, atomic folders, and locks between processes of one machine.

A draft is written beside its target under a hidden name and renamed when it is complete, so that a
reader never sees half of it, even after SIGKILL or a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reasonpix.errors import RunError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

# -- Locks ----------------------------------------------------------------------------------------


class Locked(BlockingIOError):
    """Another process holds the lock."""


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[int]:
    """Hold the lock of a file (created if missing) or an existing folder; yields its descriptor.

    The system releases the lock when the process ends, however it ends. Raises `Locked` when
    another process holds it, unless `wait` is set.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o644)
    try:
        if wait:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        elif not _try_lock(descriptor, fcntl.LOCK_EX):
            time.sleep(0.1)  # `is_locked` of another process may hold it for a moment
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                raise Locked(errno.EWOULDBLOCK, "another process holds the lock", str(path))
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                yield descriptor
                return
        raise Locked(errno.EWOULDBLOCK, "another process has just replaced it", str(path))
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file. Raises `FileNotFoundError`."""
    with path.open("rb") as file:
        return not _try_lock(file.fileno(), fcntl.LOCK_SH)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# -- Files ----------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file: afterwards it holds all of `data`, or is unchanged. Raises `RunError`."""
    with explain_os_errors(path):
        replace_file(path, data)


def replace_file(path: Path, data: bytes) -> None:
    """As `write_atomically`, but raises `OSError`."""
    draft = draft_path(path)
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
    sync_folder(path.parent)


def draft_path(path: Path) -> Path:
    """Where this thread writes a draft of `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def remove_drafts(folder: Path, min_age_s: float = 0.0) -> None:
    """Remove the drafts that killed processes left in a folder, if last written that long ago."""
    for draft in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime < min_age_s:
                continue
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- Folders --------------------------------------------------------------------------------------


@contextmanager
def atomic_dir(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `out` that is renamed to `out` on success and removed on failure.

    With `replace` an existing `out` is replaced at the end, and kept on failure. Leftovers of
    killed processes are cleaned up. Raises `FileExistsError` when `out` exists without `replace`,
    `Locked` when another process is writing it, and other `OSError`s.
    """
    out = Path(os.path.abspath(out))
    draft, old = (out.with_name(f".{out.name}.{kind}") for kind in ("tmp", "old"))

    def check_free() -> None:
        if os.path.lexists(out) and not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))

    def restore() -> None:
        if replace and old.is_dir() and not os.path.lexists(out):
            os.rename(old, out)

    check_free()
    draft.mkdir(parents=True, exist_ok=True)
    with lock(draft):
        _empty(draft)
        try:
            restore()  # a process was killed between the two renames below
            check_free()  # another process may just have finished
            yield draft
            os.sync()
            if os.path.lexists(out):
                shutil.rmtree(old, ignore_errors=True)
                os.rename(out, old)
            os.rename(draft, out)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            restore()
            raise
        sync_folder(out.parent)
        if replace:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def output_dir(out: Path, verb: str, *, replace: bool = False) -> Iterator[Path]:
    """`atomic_dir` for a folder that a user named. Raises `RunError`, also when it is a URL.

    `verb` names the action in messages, such as "publish".
    """
    if re.match(r"[\w+.-]+:/", str(out)):  # as a path, the URL s3://bucket is s3:/bucket
        raise RunError(
            f"{out} is a URL; {verb} to a folder on this machine, then copy it to the store"
        )
    try:
        with atomic_dir(out, replace=replace) as draft:
            yield draft
    except Locked as error:
        raise RunError(f"another process is {verb}ing to {out}; wait for it") from error
    except OSError as error:
        if isinstance(error, FileExistsError) and error.filename == os.path.abspath(out):
            problem, fix = "exists", f"{verb} to a new folder, or remove it first"
        elif error.errno in DISK_FULL:
            problem, fix = f"cannot be written: {error.strerror}", f"make room, then {verb} again"
        else:
            problem = f"cannot be written: {error.strerror or error}"
            fix = f"name a folder that can be written to, then {verb} again"
        raise RunError(f"{out} {problem}; {fix}") from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# -- Errors ---------------------------------------------------------------------------------------


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Raise `RunError`, which says how to fix it, for an `OSError` while writing `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            fix = "make room"
        elif isinstance(error, FileExistsError | NotADirectoryError):
            fix = "a file is in the way; name another folder"
        else:
            fix = "check that its folder exists and is writable, or name another"
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}; {fix}, then run the same "
            "command again: finished work is kept"
        ) from error
