"""The folder of a study, in which workers pick the best edit without knowing the methods.

```
study.sqlite        design, samples, invitations, and every answer
images/<hash>.png   inputs and edits, named by their content, which does not reveal a method
answers.csv report.json     written by `reasonpix study report`
```

Any number of servers and threads on one machine may share the file: an answer is one transaction,
and the first answer to a sample stays.
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
    """A case with one kind of instruction, and the methods' edits."""

    place: int
    """Index of the case among the study's cases."""
    kind: str
    case: str
    instruction: str
    size: tuple[int, int]
    """Width and height of every image, in pixels."""
    input: str
    """File name of the input image."""
    candidates: Mapping[str, str]
    """By method, the file name of its edit."""


@dataclass(frozen=True)
class InviteCode:
    """The invitation of a worker, and their progress."""

    worker: int
    code: str
    answered: int
    total: int


@dataclass(frozen=True)
class StudyTask:
    """A sample as a worker judges it."""

    number: int
    """From 1 on."""
    instruction: str
    size: tuple[int, int]
    input: str
    candidates: tuple[str, ...]
    """In the order in which they are shown."""

    @property
    def images(self) -> tuple[str, ...]:
        """File names of the input and the candidates."""
        return (self.input, *self.candidates)


@dataclass(frozen=True)
class Session:
    """A worker's progress: the current task and the next one."""

    total: int
    started: bool
    task: StudyTask | None
    """None before the start and after the last answer."""
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
    """How long the page was visible; None without scripts."""
    time: float
    """Seconds since the epoch."""

    @property
    def position(self) -> int:
        """Position of the chosen edit, from 1."""
        return self.shown.index(self.chosen) + 1


class Study:
    """Reads and writes the folder of a study. Raises `StudyError` if it is not one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "study.sqlite"
        if not self._path.is_file():
            raise StudyError(
                f"{folder} is not a study; create one with `reasonpix study create EVALUATION`"
            )
        self._lock = Lock()
        with self._explained():
            self._db = _connect(self._path, "rw")
        try:
            with self._reading() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version != _VERSION:
                    raise StudyError(
                        f"{self._path} has format {version}, but this version reads {_VERSION}; "
                        "use the version of reasonpix-study that wrote it"
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
        """Write the database of a new study into the folder with its images."""
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
        """Add invitations, with codes that cannot be guessed."""
        with self._writing() as db:
            _invite(db, count)

    def invitations(self) -> list[InviteCode]:
        """All invitations, in order of creation."""
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
        matches = [id for id, it in rows if secrets.compare_digest(it.encode(), code.encode())]
        return matches[0] if matches else None

    # -- Judging

    def start(self, worker: int) -> None:
        """Assign the next sheet to a worker, unless they have one."""
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
        """A worker's progress."""
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
        """Store which candidate is best; it is on disk when this returns.

        Returns whether the answer was accepted: only the current sample can be judged, so that an
        answer sent twice counts once. Raises `ValueError` for an invalid position or time.
        """
        if not 1 <= position <= len(self.design.methods):
            raise ValueError(f"there is no candidate {position}")
        if seconds is not None and not 0 <= seconds < 1e7:
            raise ValueError(f"{seconds} is not a possible number of seconds")
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
        """All answers, by worker, in order."""
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
                f"{self._path} cannot be used: {error}; check that it and its folder are writable "
                "and that the disk is not full"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{self._path} is damaged: {error}; restore a copy") from error

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
    # WAL: readers do not wait for writers. FULL: answers are rare enough to wait for the disk.
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Commit everything, or nothing if an exception is raised."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
