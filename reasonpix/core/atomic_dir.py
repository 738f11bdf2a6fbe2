"""Folders that appear as a whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reasonpix.core.storage import NO_ROOM
from reasonpix.errors import RunError


@contextmanager
def atomic_dir(out: Path, verb: str, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `out`, which becomes `out` when all went well, and vanishes if not.

    What an earlier process left there when it was killed is removed. With `replace` a folder that
    is there gives way at the end, and is kept where that fails. `verb` says what is done, such as
    "publish". Raises `RunError` for a URL, when `out` cannot be written, and when it exists without
    `replace`.
    """
    if re.match(r"[\w+.-]+:/", str(out)):  # as a path, the URL s3://bucket is s3:/bucket
        raise RunError(
            f"{verb} to a folder of this machine, not to {out}; name one, and copy it there"
        )
    out = Path(os.path.abspath(out))
    draft, old = (out.with_name(f".{out.name}.{what}") for what in ("tmp", "old"))

    def check_free() -> None:
        if os.path.lexists(out) and not replace:
            raise RunError(f"{out} exists; {verb} to a new folder, or remove it first")

    try:
        check_free()
        draft.mkdir(parents=True, exist_ok=True)
        lock = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _empty(draft)
            try:
                if replace and old.is_dir() and not os.path.lexists(out):
                    os.rename(old, out)  # killed between the two renames below
                check_free()  # another process may just have finished
                yield draft
                os.sync()  # complete also after a power cut
                if os.path.lexists(out):
                    shutil.rmtree(old, ignore_errors=True)
                    os.rename(out, old)
                os.rename(draft, out)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                if replace and old.is_dir() and not os.path.lexists(out):
                    os.rename(old, out)
                raise
            if replace:
                shutil.rmtree(old, ignore_errors=True)
        finally:
            os.close(lock)
    except BlockingIOError as error:
        raise RunError(f"another process is {verb}ing to {out}; wait for it") from error
    except OSError as error:
        what = error.strerror or str(error)
        mend = "make room" if error.errno in NO_ROOM else "name a folder that can be written to"
        raise RunError(f"{out} cannot be written: {what}; {mend}, then {verb} again") from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
