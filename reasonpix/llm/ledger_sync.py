"""The ledger of a run folder on a remote store: a replica on this machine, synchronised both ways.

```
$XDG_STATE_HOME/reasonpix/<digest>/llm.sqlite   the replica that the run works with
                                   synced       the remote version it contains, and its own state
<run folder>/llm.sqlite                         a consistent snapshot, always replaced as a whole
             llm.id                             identifies the ledger, so that a run folder that is
                                                deleted and created again does not find the old one
```

Each side may have answers that the other lacks, because after SIGKILL a run may continue on another
machine. So they are merged (see `ledger_merge`), never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from reasonpix.core.remote_storage import RemoteStorage
from reasonpix.core.storage import Storage
from reasonpix.errors import RunError
from reasonpix.llm.ledger_merge import merge_ledger

_NAME = "llm.sqlite"
_ID = "llm.id"
_PUSH_INTERVAL_S = 60.0


@contextmanager
def ledger_file(storage: Storage, *, write_back: bool = True) -> Iterator[Path]:
    """The file `llm.sqlite` of a run folder, on this machine.

    SQLite cannot work on a remote store. For a remote run folder the file is a replica in
    `$XDG_STATE_HOME/reasonpix` (`~/.local/state/reasonpix`), which is uploaded about every minute
    and at the end; after SIGKILL the next run on this machine continues with it. Without
    `write_back` nothing is uploaded, and the file may not exist.
    """
    if isinstance(storage, RemoteStorage):
        with synced_replica(storage) if write_back else merged_copy(storage) as path:
            yield path
    else:
        assert storage.local is not None
        yield storage.local / _NAME


@contextmanager
def synced_replica(
    storage: RemoteStorage, push_interval_s: float = _PUSH_INTERVAL_S
) -> Iterator[Path]:
    """The replica, for the process that holds the folder. Uploaded now and then and at the end."""
    try:
        ledger_id = storage.read(_ID)
    except FileNotFoundError:
        ledger_id = uuid4().hex.encode() + b"\n"
        storage.write(_ID, ledger_id)
    replica = _LocalReplica(storage, ledger_id)
    replica.remove_drafts()
    replica.pull()
    ended = threading.Event()
    pushing = threading.Thread(
        target=_push_repeatedly, args=(replica, ended, push_interval_s), daemon=True
    )
    pushing.start()
    failed = True
    try:
        yield replica.path
        failed = False
    finally:
        ended.set()
        pushing.join()
        # The first error is the one to raise; the replica still has everything.
        with suppress(*[RunError] if failed else []):
            replica.push()


def _push_repeatedly(replica: _LocalReplica, ended: threading.Event, interval_s: float) -> None:
    wait_s = interval_s
    while not ended.wait(wait_s):
        started = time.monotonic()
        with suppress(RunError):  # the network may be down for a while
            replica.push()
        wait_s = max(interval_s, 50 * (time.monotonic() - started))


@contextmanager
def merged_copy(storage: RemoteStorage) -> Iterator[Path]:
    """A ledger to read, with what this machine and the store have together. Changes neither."""
    try:
        ledger_id = storage.read(_ID)
    except FileNotFoundError:  # only a copied run folder has a ledger without an id
        ledger_id = b""
    replica = _LocalReplica(storage, ledger_id)
    if replica.path.exists() and replica.remote_version() is None:
        yield replica.path
        return
    with TemporaryDirectory(prefix="reasonpix-") as folder:
        path, remote = Path(folder) / _NAME, Path(folder) / "remote.sqlite"
        if replica.path.exists():
            replica.snapshot(path)
        with suppress(FileNotFoundError):
            storage.download(_NAME, remote)
            merge_ledger(remote, path)
        yield path


class _LocalReplica:
    """This machine's replica of the ledger `ledger_id`."""

    def __init__(self, storage: RemoteStorage, ledger_id: bytes) -> None:
        self._storage = storage
        name = hashlib.sha256(str(storage).encode() + b"\0" + ledger_id).hexdigest()[:16]
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        self._folder = Path(state) / "reasonpix" / name
        self.path = self._folder / _NAME

    def remove_drafts(self) -> None:
        """Remove temporary files of killed processes."""
        for draft in self._folder.glob("draft-*"):
            shutil.rmtree(draft, ignore_errors=True)

    def remote_version(self) -> str | None:
        """The version in the store; None if it does not exist or this replica contains it."""
        version = self._storage.version(_NAME)
        return None if version == self._synced()[0] else version

    def pull(self) -> None:
        """Merge the store's version."""
        with _explained(self.path):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        version = self.remote_version()
        if version is None:
            return
        with self._draft() as remote:
            try:
                self._storage.download(_NAME, remote)
            except FileNotFoundError:
                return
            is_new = not self.path.exists()
            merge_ledger(remote, self.path)
        # An existing replica may have answers that the store lacks: "" makes `push` upload it.
        self._set_synced(version, self._stamp() if is_new else "")

    def push(self) -> None:
        """Upload a snapshot if the replica has changed since the last one."""
        stamp = self._stamp()
        if stamp in ("", self._synced()[1]):
            return
        self.pull()
        with self._draft() as draft:
            self.snapshot(draft)
            try:
                self._storage.upload(draft, _NAME)
            except RunError as error:
                raise RunError(
                    f"{error}; the answers of language models are kept in {self.path}, where the "
                    "next run on this machine finds them"
                ) from error
        self._set_synced(self._storage.version(_NAME), stamp)

    def snapshot(self, target: Path) -> None:
        """Copy the replica, which others may be writing to."""
        with (
            _explained(self.path),
            closing(sqlite3.connect(self.path, timeout=30)) as db,
            closing(sqlite3.connect(target)) as copy,
        ):
            db.backup(copy)

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        with _explained(self.path), TemporaryDirectory(prefix="draft-", dir=self._folder) as folder:
            yield Path(folder) / _NAME

    def _stamp(self) -> str:
        """Modification times and sizes of the replica's files; "" if there are none."""
        stats = []
        for path in (self.path, self.path.with_name(f"{_NAME}-wal")):
            with suppress(FileNotFoundError):
                if (stat := path.stat()).st_size:
                    stats.append((stat.st_mtime_ns, stat.st_size))
        return json.dumps(stats) if stats else ""

    def _synced(self) -> tuple[str | None, str]:
        """The store's version that was last merged or uploaded, and the stamp at that time."""
        try:
            version, stamp = json.loads((self._folder / "synced").read_text())
            return version, stamp
        except (OSError, ValueError):
            return None, ""

    def _set_synced(self, version: str | None, stamp: str) -> None:
        with _explained(self.path):
            (self._folder / "synced").write_text(json.dumps([version, stamp]))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise RunError(
            f"{path} cannot be used: {error}; make sure that its folder is writable and has free "
            "space, or set XDG_STATE_HOME to another one, then run the same command again"
        ) from error
