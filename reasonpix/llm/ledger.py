"""What was asked of language models, what they answered, and what it cost: one SQLite file.

```
answers   every raw answer under the key of its question: nothing is asked and paid for twice
sent      calls that left and have no answer yet; what a killed process leaves here may be charged
jobs      questions handed in together, to be fetched later; their calls are in `sent`
texts     messages, schemas and parameters, each once; questions refer to them by number
```

A row of `sent` is written before its call leaves, and goes in the transaction that stores the
answer. So after SIGKILL at any moment an answer is either stored, or its call counts as lost: paid
for at the most it can have cost.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from reasonpix.errors import RunError
from reasonpix.llm.budget import Budget, Spending
from reasonpix.llm.requests import InternedStrings
from reasonpix.llm.types import Completion, Conversation

_VERSION = 1
# Raise it when the tables change: files of the old form are refused, not misread.

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


@dataclass(frozen=True)
class Request:
    """A request about to be sent. `cost_bound` is the most that it can cost."""

    task: str
    key: str
    conversation: Conversation
    cost_bound: float = 0.0


@dataclass(frozen=True)
class InFlight:
    """A call under way: a row of the table `sent`."""

    row: int
    task: str
    key: str
    cost_bound: float


@dataclass(frozen=True)
class Settlement:
    """How a call ended: with an answer and its cost (None: price unknown), or without.

    A call without an answer is free unless it `may_be_charged`. `seconds` is how long the last
    attempt took.
    """

    sent: InFlight
    completion: Completion | None = None
    cost: float | None = None
    seconds: float = 0.0
    attempts: int = 1
    may_be_charged: bool = False


@dataclass(frozen=True)
class Job:
    """Calls handed in together under `id`; None while it is not known whether they arrived."""

    name: str
    """Follows from the keys: handing the same calls in again gives the same job."""
    id: str | None
    requests: tuple[InFlight, ...]


@dataclass(frozen=True)
class StoredAnswer:
    """A stored answer with its question; `time` in seconds since 1970."""

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
    """The ledger in the file `path`, or in memory for None; usable from several threads.

    `max_cost` bounds what was spent, in this process and before, together with what calls under way
    can cost. Raises `RunError` when the file is damaged, of another version, or cannot be written;
    every method may.
    """

    def __init__(self, path: Path | None, max_cost: float | None = None) -> None:
        self.path = path
        self.max_cost = max_cost
        self.budget = Budget(max_cost)
        self._storage = threading.Lock()
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
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._storage:
            self._db.close()

    def get(self, key: str) -> Completion | None:
        """The stored answer to the question `key`."""
        with self._reading() as db:
            row = db.execute(
                "SELECT text, refusal, finish_reason, prompt_tokens, completion_tokens "
                "FROM answers WHERE key = ?",
                (bytes.fromhex(key),),
            ).fetchone()
        return None if row is None else _completion(*row)

    def answers(self, verb: str | None = None) -> Iterator[StoredAnswer]:
        """All answers, or those to one verb, in the order they were stored."""
        last = 0
        while found := self._answers(
            "rowid > ? AND (? IS NULL OR verb = ?) ORDER BY rowid LIMIT 500", (last, verb, verb)
        ):
            yield from (answer for _, answer in found)
            last = found[-1][0]

    def answer(self, key: str) -> StoredAnswer | None:
        """The stored answer to the question `key`, with its question."""
        found = self._answers("key = ?", (bytes.fromhex(key),))
        return found[0][1] if found else None

    def _answers(self, which: str, values: Sequence[Any]) -> list[tuple[int, StoredAnswer]]:
        """Answers with the numbers of their rows."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT rowid, key, verb, question, text, refusal, finish_reason, "
                "prompt_tokens, completion_tokens, cost, seconds, attempts, time "
                f"FROM answers WHERE {which}",
                values,
            ).fetchall()
            questions = [self._texts.read(row[3]) for row in rows]
        return [
            (
                row[0],
                StoredAnswer(row[1].hex(), row[2], *question, _completion(*row[4:9]), *row[9:]),
            )
            for row, question in zip(rows, questions, strict=True)
        ]

    def spent(self) -> Spending:
        """What was spent so far, in total and by task."""
        return self.budget.spent()

    # -- Calls

    def send(
        self, calls: Sequence[Request], parameters: Mapping[str, Any], job: str | None = None
    ) -> list[InFlight]:
        """Write down calls that are about to leave, each with a reservation of its own.

        `job` is the name of the job they are handed in with.
        """
        sent = []
        # One row needs no transaction: with many threads every further statement is one more wait
        # for the interpreter.
        alone = job is None and len(calls) == 1
        with self._reading() if alone else self._writing() as db:
            if job is not None:
                db.execute("INSERT OR REPLACE INTO jobs (name) VALUES (?)", (job,))
            for call in calls:
                row = db.execute(
                    "INSERT INTO sent (key, verb, worst, job, question) VALUES (?, ?, ?, ?, ?)",
                    (
                        bytes.fromhex(call.key),
                        call.task,
                        call.cost_bound,
                        job,
                        self._texts.write(parameters, call.conversation),
                    ),
                ).lastrowid
                assert row is not None
                sent.append(InFlight(row, call.task, call.key, call.cost_bound))
        return sent

    def settle(self, ends: Sequence[Settlement], job: str | None = None) -> None:
        """Store how calls ended. What was answered is safe from SIGKILL when this returns.

        `job` is the name of a job that ended with them.
        """
        now = time.time()
        with self._writing() as db:
            for end in ends:
                stored = 0
                if (completion := end.completion) is not None:
                    stored = db.execute(
                        "INSERT OR IGNORE INTO answers SELECT key, verb, ?, ?, ?, ?, ?, ?, ?, ?, "
                        "question, ? FROM sent WHERE id = ?",
                        (
                            completion.prompt_tokens,
                            completion.completion_tokens,
                            end.cost,
                            end.seconds,
                            end.attempts,
                            now,
                            completion.finish_reason,
                            completion.refusal,
                            completion.text,
                            end.sent.row,
                        ),
                    ).rowcount
                if completion is not None and not stored:
                    # Another run or a job had answered it: what it cost twice stays on the account.
                    paid = (end.cost or 0.0, end.sent.row)
                    db.execute("UPDATE sent SET worst = ? WHERE id = ?", paid)
                elif completion is not None or not end.may_be_charged:
                    db.execute("DELETE FROM sent WHERE id = ?", (end.sent.row,))
            if job is not None:
                db.execute("UPDATE jobs SET ended = 1 WHERE name = ?", (job,))
                db.execute("UPDATE sent SET job = NULL WHERE job = ?", (job,))
        for end in ends:
            task, cost_bound = end.sent.task, end.sent.cost_bound
            if end.completion is not None:
                self.budget.answered(task, cost_bound, end.completion, end.cost)
            elif end.may_be_charged:
                self.budget.lost(task, cost_bound)
            else:
                self.budget.released(cost_bound)

    # -- Jobs

    def open_jobs(self) -> list[Job]:
        """Jobs of an earlier process that have not ended.

        The calls of one without an id count as lost, unless `forget` takes them back; those of the
        others are reserved.
        """
        jobs = []
        with self._reading() as db:
            for name, id in db.execute("SELECT name, id FROM jobs WHERE NOT ended").fetchall():
                rows = db.execute("SELECT id, verb, key, worst FROM sent WHERE job = ?", (name,))
                calls = tuple(InFlight(row[0], row[1], row[2].hex(), row[3]) for row in rows)
                jobs.append(Job(name, id, calls))
        return jobs

    def submitted(self, name: str, id: str) -> None:
        """The job `name` was accepted under `id`: a restart waits for it."""
        with self._writing() as db:
            db.execute("UPDATE jobs SET id = ? WHERE name = ?", (id, name))

    def forget(self, job: Job) -> None:
        """Its calls, which may never have arrived, are handed in again: they are not lost."""
        with self._writing() as db:
            db.execute("DELETE FROM sent WHERE job = ?", (job.name,))
            db.execute("DELETE FROM jobs WHERE name = ?", (job.name,))
        for sent in job.requests:
            self.budget.add(sent.task, Spending(lost=-1, lost_cost=-sent.cost_bound))

    # -- The file

    def _open(self) -> None:
        with self._explained():
            self._db.execute("PRAGMA journal_mode = WAL")
            # NORMAL keeps commits through a kill; only a power cut may take the last of them.
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
                    f"{self.path} is no ledger of this version (found {version}, need {_VERSION}); "
                    "use the version of reasonpix that wrote it, or another --out"
                )
            for verb, *sums in db.execute(
                "SELECT verb, count(*), sum(prompt_tokens), sum(completion_tokens), "
                "total(cost), sum(cost IS NULL) FROM answers GROUP BY verb"
            ):
                self.budget.add(verb, Spending(*sums))
            for verb, waits, worst in db.execute(
                "SELECT verb, jobs.id IS NOT NULL AND NOT ended, worst "
                "FROM sent LEFT JOIN jobs ON job = name"
            ):
                if waits:
                    self.budget.reserve_open(worst)
                else:
                    self.budget.add(verb, Spending(lost=1, lost_cost=worst))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise  # not the file's fault
        except (sqlite3.OperationalError, OSError) as error:
            raise RunError(
                f"{self.path} cannot be used: {error}; see that the file and its folder are "
                "writable, that the disk has room and that no other run uses it, then run the same "
                "command again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise RunError(
                f"{self.path} is damaged: {error}; put a copy of it back, or move it away to begin "
                "a new one: its answers will then be asked and paid for again"
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._storage, self._explained():
            yield self._db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing is in the file afterwards."""
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                self._texts.forget()
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


def _completion(
    text: str, refusal: str | None, finish_reason: str, prompt_tokens: int, completion_tokens: int
) -> Completion:
    return Completion(
        text=text,
        refusal=refusal,
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )
