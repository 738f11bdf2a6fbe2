"""Requests to language models, their answers, and what they cost: one SQLite file.

```
answers   every raw answer under the key of its request, so that nothing is paid for twice
sent      requests in flight; those that a killed process leaves here may be charged
jobs      requests that were submitted as one batch job; the requests are in `sent`
texts     shared messages, schemas and parameters, which requests refer to by number
left_out  parameters without which an answer was given, because the server refused them
```

(The columns `verb`, `question` and `worst` hold a request's task, JSON and cost bound.)

A row of `sent` is written before the request leaves, and deleted in the transaction that stores the
answer. So after SIGKILL at any time an answer is either stored, or its request counts as lost and
is accounted for at its cost bound.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from reasonpix.errors import RunError
from reasonpix.llm.budget import Budget, Spending
from reasonpix.llm.requests import InFlight, InternedStrings, Job, Request
from reasonpix.llm.types import Completion, Conversation

_VERSION = 1
# Raise it when the tables change: other versions are refused.

_TABLES = f"""
{InternedStrings.TABLE};
CREATE TABLE answers (
    key BLOB PRIMARY KEY, verb TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, cost REAL, seconds REAL NOT NULL,
    attempts INTEGER NOT NULL, time REAL NOT NULL, finish_reason TEXT NOT NULL,
    refusal TEXT, question TEXT NOT NULL, text TEXT NOT NULL
);
CREATE TABLE jobs (name TEXT PRIMARY KEY, id TEXT, ended INTEGER NOT NULL DEFAULT 0);
CREATE TABLE sent (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL, verb TEXT NOT NULL, worst REAL NOT NULL,
    job TEXT, question TEXT NOT NULL
);
CREATE INDEX sent_in_job ON sent (job) WHERE job IS NOT NULL;
"""

LEFT_OUT_TABLE = "CREATE TABLE IF NOT EXISTS left_out (key BLOB PRIMARY KEY, names TEXT NOT NULL)"

_COMPLETION = "text, refusal, finish_reason, prompt_tokens, completion_tokens"
_LEFT_OUT = "(SELECT names FROM left_out WHERE left_out.key = answers.key)"


@dataclass(frozen=True)
class Settlement:
    """How a request ended: with an answer and its cost (None: price unknown), or without.

    Without an answer it is free unless it `may_be_charged`. `seconds` is the duration of the last
    attempt.
    """

    sent: InFlight
    completion: Completion | None = None
    cost: float | None = None
    seconds: float = 0.0
    attempts: int = 1
    may_be_charged: bool = False

    @property
    def spending(self) -> Spending:
        """What the request cost."""
        if self.completion is not None:
            return Spending(
                answers=1,
                prompt_tokens=self.completion.prompt_tokens,
                completion_tokens=self.completion.completion_tokens,
                cost=self.cost or 0.0,
                unpriced=int(self.cost is None),
                estimated=int(not self.completion.prompt_tokens),
            )
        lost = self.may_be_charged
        return Spending(lost=1, lost_cost=self.sent.cost_bound) if lost else Spending()


@dataclass(frozen=True)
class StoredAnswer:
    """An answer with its request; `time` in seconds since 1970."""

    key: str
    task: str
    parameters: Mapping[str, Any]
    conversation: Conversation
    completion: Completion
    cost: float | None
    seconds: float
    attempts: int
    time: float


class Ledger:
    """The ledger in the file `path`, or in memory if None. Thread-safe.

    `max_cost` limits the cost of all answers in the file, and of requests in flight. All methods
    raise `RunError` if the file is damaged, has another version, or cannot be written.
    """

    def __init__(self, path: Path | None, max_cost: float | None = None) -> None:
        self.path = path
        self.max_cost = max_cost
        self.budget = Budget(max_cost)
        self._lock = threading.Lock()
        with self._explained():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                ":memory:" if path is None else path,
                timeout=30,
                isolation_level=None,
                check_same_thread=False,
            )
        self._texts = InternedStrings(self._db)
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def get(self, key: str) -> Completion | None:
        """The stored answer to the request `key`."""
        with self._reading() as db:
            row = db.execute(
                f"SELECT {_COMPLETION}, {_LEFT_OUT} FROM answers WHERE key = ?",
                (bytes.fromhex(key),),
            ).fetchone()
        return None if row is None else _completion(row)

    def answers(self, task: str | None = None) -> Iterator[StoredAnswer]:
        """All answers, or those of one task, in the order in which they were stored."""
        last = 0
        while page := self._answers(
            "rowid > ? AND (? IS NULL OR verb = ?) ORDER BY rowid LIMIT 500", (last, task, task)
        ):
            yield from (answer for _, answer in page)
            last = page[-1][0]

    def answer(self, key: str) -> StoredAnswer | None:
        """The stored answer to the request `key`, with the request."""
        rows = self._answers("key = ?", (bytes.fromhex(key),))
        return rows[0][1] if rows else None

    def _answers(self, where: str, values: Sequence[Any]) -> list[tuple[int, StoredAnswer]]:
        """Answers with their row ids."""
        with self._reading() as db:
            rows = db.execute(
                f"SELECT rowid, key, verb, question, cost, seconds, attempts, time, {_COMPLETION}, "
                f"{_LEFT_OUT} FROM answers WHERE {where}",
                values,
            ).fetchall()
            requests = [self._texts.read(row[3]) for row in rows]
        return [
            (
                row[0],
                StoredAnswer(row[1].hex(), row[2], *request, _completion(row[8:]), *row[4:8]),
            )
            for row, request in zip(rows, requests, strict=True)
        ]

    def left_out(self) -> dict[str, int]:
        """Parameters that a server refused, each with the number of answers given without it."""
        with self._reading() as db:
            rows = db.execute("SELECT names FROM left_out JOIN answers USING (key)").fetchall()
        return dict(sorted(Counter(name for (names,) in rows for name in names.split()).items()))

    def spent(self) -> Spending:
        """What was spent so far, in total and by task."""
        return self.budget.spent()

    # -- Requests in flight

    def send(
        self,
        requests: Sequence[Request],
        parameters: Mapping[str, Any],
        job: str | None = None,
    ) -> list[InFlight]:
        """Record requests that are about to leave; the caller has reserved the cost of each.

        `job` is the name of the job that contains them.
        """
        in_flight = []
        # One row needs no transaction; with many threads each statement is a wait for the GIL.
        single = job is None and len(requests) == 1
        with self._reading() if single else self._writing() as db:
            if job is not None:
                db.execute("INSERT OR REPLACE INTO jobs (name) VALUES (?)", (job,))
            for request in requests:
                text = self._texts.write(parameters, request.conversation)
                row = db.execute(
                    "INSERT INTO sent (key, verb, worst, job, question) VALUES (?, ?, ?, ?, ?)",
                    (bytes.fromhex(request.key), request.task, request.cost_bound, job, text),
                ).lastrowid
                assert row is not None
                in_flight.append(InFlight(row, request.task, request.key, request.cost_bound))
        return in_flight

    def settle(self, settlements: Sequence[Settlement], job: str | None = None) -> None:
        """Store how requests ended. Answers are safe from SIGKILL when this returns.

        `job` is the name of a job that ended with them.
        """
        with self._writing() as db:
            for settlement in settlements:
                _settle(db, settlement)
            if job is not None:
                db.execute("UPDATE jobs SET ended = 1 WHERE name = ?", (job,))
                db.execute("UPDATE sent SET job = NULL WHERE job = ?", (job,))
        for settlement in settlements:
            sent = settlement.sent
            self.budget.settle(sent.task, sent.cost_bound, settlement.spending)

    # -- Jobs

    def open_jobs(self) -> list[Job]:
        """Jobs of earlier processes that have not ended.

        The requests of a job without an id count as lost until `forget`; those of other jobs are
        reserved.
        """
        jobs = []
        with self._reading() as db:
            for name, id in db.execute("SELECT name, id FROM jobs WHERE NOT ended").fetchall():
                rows = db.execute("SELECT id, verb, key, worst FROM sent WHERE job = ?", (name,))
                requests = tuple(InFlight(row[0], row[1], row[2].hex(), row[3]) for row in rows)
                jobs.append(Job(name, id, requests))
        return jobs

    def submitted(self, name: str, id: str) -> None:
        """The job `name` was accepted under `id`: a restarted run waits for it."""
        with self._writing() as db:
            db.execute("UPDATE jobs SET id = ? WHERE name = ?", (id, name))

    def forget(self, job: Job) -> None:
        """Delete a job that is about to be submitted again: its requests are not lost."""
        with self._writing() as db:
            db.execute("DELETE FROM sent WHERE job = ?", (job.name,))
            db.execute("DELETE FROM jobs WHERE name = ?", (job.name,))
        for sent in job.requests:
            self.budget.add(sent.task, Spending(lost=-1, lost_cost=-sent.cost_bound))

    # -- The file

    def _open(self) -> None:
        with self._explained():
            self._db.execute("PRAGMA journal_mode = WAL")
            # NORMAL keeps commits after a kill; only a power cut can lose the last ones.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA wal_autocheckpoint = 10000")
        with self._writing() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version == 0 and tables == 0:
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise RunError(
                    f"{self.path} is not a ledger of this version (found {version}, need "
                    f"{_VERSION}); use the version of reasonpix that wrote it, or another --out"
                )
            db.execute(LEFT_OUT_TABLE)  # not in the first ledgers of this version
            for task, *sums in db.execute(
                "SELECT verb, count(*), sum(prompt_tokens), sum(completion_tokens), "
                "total(cost), sum(cost IS NULL), sum(NOT prompt_tokens) FROM answers GROUP BY verb"
            ):
                self.budget.add(task, Spending(*sums))
            for task, open_job, cost_bound in db.execute(
                "SELECT verb, jobs.id IS NOT NULL AND NOT ended, worst "
                "FROM sent LEFT JOIN jobs ON job = name"
            ):
                if open_job:
                    self.budget.reserve_open(cost_bound)
                else:
                    self.budget.add(task, Spending(lost=1, lost_cost=cost_bound))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise  # a bug, not a problem of the file
        except (sqlite3.OperationalError, OSError) as error:
            raise RunError(
                f"{self.path} cannot be used: {error}; make sure that the file and its folder are "
                "writable, the disk has free space and no other run uses it, then run the same "
                "command again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise RunError(
                f"{self.path} is damaged: {error}; restore a backup, or move it away to start a "
                "new one: its answers are then requested and paid for again"
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            yield self._db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                self._texts.clear_cache()
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


def _settle(db: sqlite3.Connection, settlement: Settlement) -> None:
    row, completion = settlement.sent.row, settlement.completion
    if completion is None:
        if not settlement.may_be_charged:
            db.execute("DELETE FROM sent WHERE id = ?", (row,))
        return
    stored = db.execute(
        f"INSERT OR IGNORE INTO answers (key, verb, question, cost, seconds, attempts, time, "
        f"{_COMPLETION}) SELECT key, verb, question, ?, ?, ?, ?, ?, ?, ?, ?, ? "
        "FROM sent WHERE id = ?",
        (
            settlement.cost,
            settlement.seconds,
            settlement.attempts,
            time.time(),
            completion.text,
            completion.refusal,
            completion.finish_reason,
            completion.prompt_tokens,
            completion.completion_tokens,
            row,
        ),
    ).rowcount
    if stored:
        if names := " ".join(completion.left_out):
            key = bytes.fromhex(settlement.sent.key)
            db.execute("INSERT OR REPLACE INTO left_out VALUES (?, ?)", (key, names))
        db.execute("DELETE FROM sent WHERE id = ?", (row,))
    else:  # already answered, by another run or a job; the second cost stays on the account
        db.execute("UPDATE sent SET worst = ? WHERE id = ?", (settlement.cost or 0.0, row))


def _completion(row: Sequence[Any]) -> Completion:
    """The completion in the columns `_COMPLETION` and `_LEFT_OUT`."""
    *values, names = row
    fields = dict(zip(_COMPLETION.split(", "), values, strict=True))
    return Completion(**fields, left_out=tuple((names or "").split()))
