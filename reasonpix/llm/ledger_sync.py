"""The ledger of a run folder on a remote store: a copy on this machine, brought there and back.

```
$XDG_STATE_HOME/reasonpix/<digest>/llm.sqlite   what this run, or its readers, work with
                                   synced       which version in the store it agreed with, and when
<run folder>/llm.sqlite                         a consistent snapshot, replaced as a whole
             llm.id                             which ledger it is, so that a run folder that was
                                                removed and made anew does not find the old one
```

Both sides may know answers that the other lacks: after SIGKILL the run may go on on another
machine. So copies are merged, never replaced, and merging again what was merged changes nothing.
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
from typing import Protocol
from uuid import uuid4

from reasonpix.core.remote_storage import RemoteStorage
from reasonpix.core.storage import Storage
from reasonpix.errors import RunError
from reasonpix.llm.requests import InternedStrings

_NAME = "llm.sqlite"
_ID = "llm.id"
_EVERY_S = 60.0
_ANSWER = (
    "key, verb, prompt_tokens, completion_tokens, cost, seconds, attempts, time, finish_reason, "
    "refusal, text"
)


class Store(Protocol):
    """What is asked of the storage: see `reasonpix.core.remote_storage.RemoteStorage`."""

    def read(self, name: str) -> bytes:
        """A file's content."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""

    def upload(self, file: Path, name: str) -> None:
        """Write a file of this machine."""

    def download(self, name: str, file: Path) -> None:
        """Fetch a file to this machine."""

    def version(self, name: str) -> str | None:
        """Another one whenever the file was written; None where there is none."""


@contextmanager
def writing(storage: Store, every_s: float = _EVERY_S) -> Iterator[Path]:
    """The copy for the process that holds the folder; stored every `every_s` and at the end."""
    try:
        own = storage.read(_ID)
    except FileNotFoundError:
        own = uuid4().hex.encode() + b"\n"
        storage.write(_ID, own)
    copy = _LocalReplica(storage, own)
    copy.tidy()
    copy.pull()
    ended = threading.Event()
    pushing = threading.Thread(target=_push_often, args=(copy, ended, every_s), daemon=True)
    pushing.start()
    try:
        yield copy.path
    except BaseException:
        ended.set()
        pushing.join()
        with suppress(RunError):  # what went wrong first counts; the copy here keeps all
            copy.push()
        raise
    ended.set()
    pushing.join()
    copy.push()


def _push_often(copy: _LocalReplica, ended: threading.Event, every_s: float) -> None:
    wait = every_s
    while not ended.wait(wait):
        started = time.monotonic()
        with suppress(RunError):  # the network may be away for a while
            copy.push()
        wait = max(every_s, 50 * (time.monotonic() - started))


@contextmanager
def reading(storage: Store) -> Iterator[Path]:
    """What this machine and the store know together; neither is written to."""
    try:
        copy = _LocalReplica(storage, storage.read(_ID))
    except FileNotFoundError:
        copy = _LocalReplica(
            storage, b""
        )  # no run that asked has been here; its folder may be a copy
    if copy.path.exists() and not copy.lacks():
        yield copy.path
        return
    with TemporaryDirectory(prefix="reasonpix-") as folder:
        path, stored = Path(folder) / _NAME, Path(folder) / "stored.sqlite"
        if copy.path.exists():
            with _explained(copy.path):
                _snapshot(copy.path, path)
        with suppress(FileNotFoundError):
            storage.download(_NAME, stored)
            _merge(stored, path)
        yield path


class _LocalReplica:
    """This machine's copy of the ledger `own`."""

    def __init__(self, storage: Store, own: bytes) -> None:
        self._storage = storage
        which = hashlib.sha256(str(storage).encode() + b"\0" + own).hexdigest()[:16]
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        self._folder = Path(state) / "reasonpix" / which
        self.path = self._folder / _NAME
        self._synced = self._folder / "synced"

    def tidy(self) -> None:
        """Remove the drafts of killed processes."""
        for draft in self._folder.glob("draft-*"):
            shutil.rmtree(draft, ignore_errors=True)

    def lacks(self) -> bool:
        """Whether the store has a version that this copy has not seen."""
        return self._storage.version(_NAME) not in (None, self._known()[0])

    def pull(self) -> None:
        """Take in what the store knows."""
        with _explained(self.path):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        version = self._storage.version(_NAME)
        if version in (None, self._known()[0]):
            return
        with self._draft() as stored:
            try:
                self._storage.download(_NAME, stored)
            except FileNotFoundError:
                return
            is_new = not self.path.exists()
            _merge(stored, self.path)
        # What this copy alone knows is not in the store yet.
        self._sync(version, self._stamp() if is_new else "")

    def push(self) -> None:
        """Store a snapshot, unless nothing has changed since the last one."""
        stamp = self._stamp()
        if stamp in ("", self._known()[1]):
            return
        self.pull()
        with self._draft() as snapshot:
            with _explained(self.path):
                _snapshot(self.path, snapshot)
            try:
                self._storage.upload(snapshot, _NAME)
            except RunError as error:
                raise RunError(
                    f"{error}; the answers of language models are kept in {self.path}, from where "
                    "the next run on this machine takes them"
                ) from error
        self._sync(self._storage.version(_NAME), stamp)

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        with (
            _explained(self.path),
            TemporaryDirectory(prefix="draft-", dir=self._folder) as folder,
        ):
            yield Path(folder) / _NAME

    def _stamp(self) -> str:
        """Another one after every change; "" where there is no file."""
        stats = []
        for path in (self.path, self.path.with_name(f"{_NAME}-wal")):
            with suppress(FileNotFoundError):
                if (stat := path.stat()).st_size:
                    stats.append((stat.st_mtime_ns, stat.st_size))
        return json.dumps(stats) if stats else ""

    def _known(self) -> tuple[str | None, str]:
        try:
            version, stamp = json.loads(self._synced.read_text())
            return version, stamp
        except (OSError, ValueError):
            return None, ""

    def _sync(self, version: str | None, stamp: str) -> None:
        with _explained(self._synced):
            self._synced.write_text(json.dumps([version, stamp]))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise RunError(
            f"{path} cannot be used: {error}; see that its folder is writable and has room, or set "
            "XDG_STATE_HOME to another, then run the same command again"
        ) from error


def _snapshot(path: Path, to: Path) -> None:
    """Copy a ledger, which others may be writing to."""
    with closing(sqlite3.connect(path, timeout=30)) as db, closing(sqlite3.connect(to)) as copy:
        db.backup(copy)


def _merge(stored: Path, into: Path) -> None:
    """Add to the ledger `into` what the one from the store knows."""
    with (
        closing(sqlite3.connect(stored)) as theirs,
        closing(sqlite3.connect(into, timeout=30, isolation_level=None)) as ours,
    ):
        try:
            if not _version(theirs):
                return
            if not _version(ours):
                theirs.backup(ours)
                return
            if _version(theirs) != _version(ours):
                raise RunError(
                    f"{into} and the {_NAME} in the run folder are of different versions of "
                    "reasonpix; use the newer one on all machines"
                )
            ours.execute("BEGIN IMMEDIATE")
            _merge_answers(theirs, ours)
            _merge_calls(theirs, ours)
            ours.execute("COMMIT")
        except sqlite3.Error as error:
            raise RunError(
                f"{into} cannot be merged with the {_NAME} in the run folder: {error}; move one of "
                "them away: what it alone holds will be asked and paid for again"
            ) from error


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


def _merge_answers(theirs: sqlite3.Connection, ours: sqlite3.Connection) -> None:
    texts, their_texts = InternedStrings(ours), InternedStrings(theirs)
    rows = theirs.execute(f"SELECT question, {_ANSWER} FROM answers ORDER BY rowid")
    for question, key, *rest in rows:
        known = ours.execute("SELECT time FROM answers WHERE key = ?", (key,)).fetchone()
        if known == (rest[6],):
            continue
        if known is not None:
            # Asked and paid for on both machines. The folder's shards were made with the answer
            # that is in the store; what the other cost stays on the account.
            ours.execute(
                "INSERT INTO sent (key, verb, worst, question) "
                "SELECT key, verb, coalesce(cost, 0), question FROM answers WHERE key = ?",
                (key,),
            )
            ours.execute("DELETE FROM answers WHERE key = ?", (key,))
        marks = ", ".join("?" * (len(rest) + 2))
        values = (texts.write(*their_texts.read(question)), key, *rest)
        ours.execute(f"INSERT INTO answers (question, {_ANSWER}) VALUES ({marks})", values)


def _merge_calls(theirs: sqlite3.Connection, ours: sqlite3.Connection) -> None:
    texts, their_texts = InternedStrings(ours), InternedStrings(theirs)

    def add(call: tuple[bytes, str, float, str], job: str | None) -> None:
        key, verb, worst, question = call
        question = texts.write(*their_texts.read(question))
        values = (key, verb, worst, job, question)
        ours.execute(
            "INSERT INTO sent (key, verb, worst, job, question) VALUES (?, ?, ?, ?, ?)", values
        )

    call = "key, verb, worst, question"
    for name, id, ended in theirs.execute("SELECT name, id, ended FROM jobs").fetchall():
        known = ours.execute("SELECT id, ended FROM jobs WHERE name = ?", (name,)).fetchone()
        if known is None:
            ours.execute("INSERT INTO jobs VALUES (?, ?, ?)", (name, id, ended))
            for row in theirs.execute(f"SELECT {call} FROM sent WHERE job = ?", (name,)):
                add(row, name)
        elif ended and not known[1]:
            ours.execute("UPDATE jobs SET id = ?, ended = 1 WHERE name = ?", (id, name))
            ours.execute("DELETE FROM sent WHERE job = ?", (name,))
        elif known[0] is None and not known[1]:
            ours.execute("UPDATE jobs SET id = ? WHERE name = ?", (id, name))
    # Calls have no names of their own: of equal ones each side has some, the larger number counts.
    lost = f"SELECT count(*), {call} FROM sent WHERE job IS NULL GROUP BY key, verb, worst"
    for count, *row in theirs.execute(lost):
        (known_count,) = ours.execute(
            "SELECT count(*) FROM sent WHERE job IS NULL AND key = ? AND verb = ? AND worst = ?",
            row[:3],
        ).fetchone()
        for _ in range(count - known_count):
            add((row[0], row[1], row[2], row[3]), None)


@contextmanager
def ledger_file(storage: Storage, *, write_back: bool = True) -> Iterator[Path]:
    """The file `llm.sqlite` of a run folder, as one of this machine.

    SQLite cannot work on a remote store: there the file is a copy in `$XDG_STATE_HOME/reasonpix`
    (`~/.local/state/reasonpix`), which is stored in the run folder every minute or so and at the
    end, however it ends except by SIGKILL; then the next run on this machine goes on with it.
    Without `write_back` nothing is stored, and there may be no file.
    """
    if isinstance(storage, RemoteStorage):
        with writing(storage) if write_back else reading(storage) as path:
            yield path
    else:
        assert storage.local is not None
        yield storage.local / "llm.sqlite"
