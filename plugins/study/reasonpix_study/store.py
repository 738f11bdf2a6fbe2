"""A user study: workers pick the best of the methods' edits, without knowing whose they are.

```
study.sqlite        design, samples, invitations, and every answer
images/<hash>.png   inputs and edits, named by what they hold: nothing in a page tells a method
answers.csv report.json     written by `reasonpix study report`
```

The file is safe under any number of servers of one machine and threads: an answer is one
transaction, and the first one given to a sample stays.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal, Self
from urllib.parse import quote

from reasonpix.plugin import ReasonpixError
from reasonpix_study.design import Design

_VERSION = 1
_TABLES = """
CREATE TABLE design (json TEXT NOT NULL);
CREATE TABLE samples (
    place INTEGER, kind TEXT, case_id TEXT NOT NULL, instruction TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL,
    input TEXT NOT NULL, candidates TEXT NOT NULL,
    PRIMARY KEY (place, kind)
) WITHOUT ROWID;
CREATE TABLE workers (id INTEGER PRIMARY KEY, code TEXT NOT NULL UNIQUE, sheet INTEGER UNIQUE);
CREATE TABLE judgements (
    worker INTEGER REFERENCES workers, number INTEGER, place INTEGER NOT NULL, kind TEXT NOT NULL,
    shown TEXT NOT NULL, chosen TEXT, seconds REAL, time REAL,
    PRIMARY KEY (worker, number), UNIQUE (worker, place),
    FOREIGN KEY (place, kind) REFERENCES samples
) WITHOUT ROWID
"""


class StudyError(ReasonpixError):
    """The folder or file of a study is missing, damaged, or cannot be written."""


@dataclass(frozen=True)
class StudyItem:
    """A case with one kind of instruction, and what the methods made of it."""

    place: int
    """Of the case among the study's cases."""
    kind: str
    case: str
    instruction: str
    size: tuple[int, int]
    """Width and height of every image, in pixels."""
    input: str
    """Images are names of files."""
    candidates: Mapping[str, str]
    """By method."""


@dataclass(frozen=True)
class InviteCode:
    """A worker, by number, and how far they are."""

    worker: int
    code: str
    answered: int
    total: int


@dataclass(frozen=True)
class StudyTask:
    """What a worker is to judge now, as a `StudyItem` has it."""

    number: int
    """From 1 on."""
    instruction: str
    size: tuple[int, int]
    input: str
    candidates: tuple[str, ...]
    """In the order in which they are shown."""

    @property
    def images(self) -> tuple[str, ...]:
        """All of them."""
        return (self.input, *self.candidates)


@dataclass(frozen=True)
class Session:
    """Where a worker is: what they judge now and next."""

    total: int
    started: bool
    task: StudyTask | None
    """None before the start and after the end."""
    following: StudyTask | None


@dataclass(frozen=True)
class StudyAnswer:
    """One judgement."""

    worker: int
    case: str
    kind: str
    instruction: str
    shown: tuple[str, ...]
    """The methods in the order in which their edits were shown."""
    chosen: str
    seconds: float | None
    """While the page was visible; None when the browser did not tell."""
    time: float
    """Seconds since the epoch."""

    @property
    def position(self) -> int:
        """Where the chosen edit stood, from 1 on."""
        return self.shown.index(self.chosen) + 1


class Study:
    """Reads and writes the folder of a study. Raises `StudyError` for one that is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "study.sqlite"
        if not self._path.is_file():
            raise StudyError(f"{folder} is no study; make one: reasonpix study create EVALUATION")
        self._lock = Lock()
        with self._explained():
            self._db = _connect(self._path, "rw")
        try:
            with self._reading() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version != _VERSION:
                    raise StudyError(
                        f"{self._path} is no study of this version (found {version}, need "
                        f"{_VERSION}); use the version of reasonpix that made it"
                    )
                (design,) = db.execute("SELECT json FROM design").fetchone()
            self.design = Design.model_validate_json(design)
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @classmethod
    def write(
        cls, folder: Path, design: Design, samples: Iterable[StudyItem], invitations: int
    ) -> None:
        """Make the file of a new study in a folder that holds its images."""
        with closing(_connect(folder / "study.sqlite", "rwc")) as db, _transaction(db):
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {_VERSION}")
            db.execute("INSERT INTO design VALUES (?)", (design.model_dump_json(),))
            for it in samples:
                words = (it.place, it.kind, it.case, it.instruction)
                images = (*it.size, it.input, json.dumps(it.candidates))
                db.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?)", words + images)
            _invite(db, invitations)

    def image(self, name: str) -> Path:
        """The file of an image that a `StudyTask` names."""
        return self.folder / "images" / name

    # -- Workers

    def invite(self, count: int) -> None:
        """Make invitations more, with codes that cannot be guessed."""
        with self._writing() as db:
            _invite(db, count)

    def invitations(self) -> list[InviteCode]:
        """All of them in the order in which they were made."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT id, code, count(chosen) FROM workers "
                "LEFT JOIN judgements ON worker = id GROUP BY id ORDER BY id"
            ).fetchall()
        total = self.design.per_worker
        return [InviteCode(id, code, answered, total) for id, code, answered in rows]

    def worker(self, code: str) -> int | None:
        """Whose code it is. How long this takes does not tell how much of a code is right."""
        with self._reading() as db:
            rows = db.execute("SELECT id, code FROM workers").fetchall()
        given = code.encode()
        same = [id for id, known in rows if secrets.compare_digest(known.encode(), given)]
        return same[0] if same else None

    # -- Judging

    def start(self, worker: int) -> None:
        """Give a worker the next sheet. Who has one keeps it."""
        with self._writing() as db:
            (sheet,) = db.execute("SELECT sheet FROM workers WHERE id = ?", (worker,)).fetchone()
            if sheet is not None:
                return
            (sheet,) = db.execute("SELECT coalesce(max(sheet) + 1, 0) FROM workers").fetchone()
            db.execute("UPDATE workers SET sheet = ? WHERE id = ?", (sheet, worker))
            db.executemany(
                "INSERT INTO judgements (worker, number, place, kind, shown) "
                "VALUES (?, ?, ?, ?, ?)",
                [
                    (worker, number, it.case, it.kind, json.dumps(it.order))
                    for number, it in enumerate(self.design.sheet(sheet), 1)
                ],
            )

    def session(self, worker: int) -> Session:
        """Where a worker is."""
        with self._reading() as db:
            (sheet,) = db.execute("SELECT sheet FROM workers WHERE id = ?", (worker,)).fetchone()
            rows = db.execute(
                "SELECT number, instruction, width, height, input, candidates, shown "
                "FROM judgements JOIN samples USING (place, kind) "
                "WHERE worker = ? AND chosen IS NULL ORDER BY number LIMIT 2",
                (worker,),
            ).fetchall()
        tasks = [_task(*row) for row in rows]
        return Session(self.design.per_worker, sheet is not None, *(*tasks, None, None)[:2])

    def answer(self, worker: int, number: int, position: int, seconds: float | None) -> bool:
        """Store which candidate is the best; it is safe on the disk when this returns.

        Says whether it was taken: only the sample that is next is judged, so that an answer sent
        twice counts once, and the first one stays. Raises `ValueError` for a position or a time
        that cannot be.
        """
        if not 1 <= position <= len(self.design.methods):
            raise ValueError(f"there is no candidate {position}")
        if seconds is not None and not 0 <= seconds < 1e7:
            raise ValueError(f"{seconds} seconds cannot be")
        with self._writing() as db:
            taken = db.execute(
                "UPDATE judgements "
                "SET chosen = json_extract(shown, '$[' || ? || ']'), seconds = ?, time = ? "
                "WHERE worker = ? AND number = ? AND number = "
                "(SELECT min(number) FROM judgements WHERE worker = ? AND chosen IS NULL)",
                (position - 1, seconds, time.time(), worker, number, worker),
            )
        return taken.rowcount == 1

    def answers(self) -> list[StudyAnswer]:
        """All answers, by worker, in the order in which they were given."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT worker, case_id, kind, instruction, shown, chosen, seconds, time "
                "FROM judgements JOIN samples USING (place, kind) "
                "WHERE chosen IS NOT NULL ORDER BY worker, number"
            ).fetchall()
        return [
            StudyAnswer(worker, case, kind, instruction, tuple(json.loads(shown)), *rest)
            for worker, case, kind, instruction, shown, *rest in rows
        ]

    # -- The file

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StudyError(
                f"{self._path} cannot be used: {error}; see that it and its folder are writable "
                "and that the disk has room"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{self._path} is damaged: {error}; put a copy back") from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            yield self._db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db, _transaction(db):
            yield db


def _invite(db: sqlite3.Connection, count: int) -> None:
    codes = [(secrets.token_urlsafe(12),) for _ in range(count)]
    db.executemany("INSERT INTO workers (code) VALUES (?)", codes)


def _task(
    number: int, instruction: str, width: int, height: int, input: str, candidates: str, shown: str
) -> StudyTask:
    images = json.loads(candidates)
    ordered = tuple(images[method] for method in json.loads(shown))
    return StudyTask(number, instruction, (width, height), input, ordered)


def _connect(path: Path, mode: Literal["rw", "rwc"]) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}",
        uri=True,
        timeout=30,
        isolation_level=None,
        check_same_thread=False,
    )
    # Readers do not wait for writers; and a commit, at a human's pace, may well wait for the disk.
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing is in the file afterwards."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
