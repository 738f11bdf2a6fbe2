"""Merge two versions of a ledger. Merging what is already merged changes nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from reasonpix.errors import RunError
from reasonpix.llm.ledger import LEFT_OUT_TABLE
from reasonpix.llm.requests import InternedStrings

_ANSWER = (
    "key, verb, prompt_tokens, completion_tokens, cost, seconds, attempts, time, finish_reason, "
    "refusal, text"
)
_SENT = "key, verb, worst, question"


def merge_ledger(remote: Path, local: Path) -> None:
    """Add to the ledger `local` what only `remote` contains.

    Raises `RunError` if one is damaged, or if their versions differ.
    """
    with (
        closing(sqlite3.connect(remote)) as source,
        closing(sqlite3.connect(local, timeout=30, isolation_level=None)) as target,
    ):
        try:
            if not _version(source):
                return
            if not _version(target):
                source.backup(target)
                return
            if _version(source) != _version(target):
                raise RunError(
                    f"{local} and the llm.sqlite in the run folder are of different versions of "
                    "reasonpix; use the newer one on all machines"
                )
            for db in (source, target):
                db.execute(LEFT_OUT_TABLE)
            merge = _Merge(source, target)
            target.execute("BEGIN IMMEDIATE")
            merge.answers()
            merge.jobs()
            merge.lost_requests()
            target.execute("COMMIT")
        except sqlite3.Error as error:
            raise RunError(
                f"{local} cannot be merged with the llm.sqlite in the run folder: {error}; move "
                "one of them away: answers that only it has are then requested and paid for again"
            ) from error


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


class _Merge:
    """One merge of `source` into `target`."""

    def __init__(self, source: sqlite3.Connection, target: sqlite3.Connection) -> None:
        self._source, self._target = source, target
        self._source_texts, self._target_texts = InternedStrings(source), InternedStrings(target)

    def answers(self) -> None:
        """Of two answers to one request the source's stays; the cost of the other is kept."""
        rows = self._source.execute(f"SELECT question, {_ANSWER} FROM answers ORDER BY rowid")
        for question, key, *rest in rows:
            where = "WHERE key = ?"
            existing = self._target.execute(f"SELECT time FROM answers {where}", (key,)).fetchone()
            if existing == (rest[6],):
                continue
            if existing is not None:
                # Paid for on both machines. The shards were made with the answer in the store.
                self._target.execute(
                    f"INSERT INTO sent ({_SENT}) "
                    f"SELECT key, verb, coalesce(cost, 0), question FROM answers {where}",
                    (key,),
                )
                self._target.execute(f"DELETE FROM answers {where}", (key,))
                self._target.execute(f"DELETE FROM left_out {where}", (key,))
            values = (self._translated(question), key, *rest)
            self._target.execute(
                f"INSERT INTO answers (question, {_ANSWER}) VALUES ({_marks(values)})", values
            )
            left_out = self._source.execute(f"SELECT * FROM left_out {where}", (key,))
            self._target.executemany("INSERT INTO left_out VALUES (?, ?)", left_out)

    def jobs(self) -> None:
        """Open jobs of the source are open in the target, ended ones are ended."""
        jobs = self._source.execute("SELECT name, id, ended FROM jobs").fetchall()
        for name, id, ended in jobs:
            select = "SELECT id, ended FROM jobs WHERE name = ?"
            existing = self._target.execute(select, (name,)).fetchone()
            if existing is None:
                self._target.execute("INSERT INTO jobs VALUES (?, ?, ?)", (name, id, ended))
                rows = self._source.execute(f"SELECT {_SENT} FROM sent WHERE job = ?", (name,))
                for row in rows:
                    self._add_sent(row, name)
            elif ended and not existing[1]:
                self._target.execute("UPDATE jobs SET id = ?, ended = 1 WHERE name = ?", (id, name))
                self._target.execute("DELETE FROM sent WHERE job = ?", (name,))
            elif existing == (None, 0):
                self._target.execute("UPDATE jobs SET id = ? WHERE name = ?", (id, name))

    def lost_requests(self) -> None:
        """Lost requests have no identity: of equal ones, the larger number of both sides counts."""
        where = "sent WHERE job IS NULL"
        rows = self._source.execute(
            f"SELECT count(*), {_SENT} FROM {where} GROUP BY key, verb, worst"
        )
        for count, *row in rows:
            (existing,) = self._target.execute(
                f"SELECT count(*) FROM {where} AND key = ? AND verb = ? AND worst = ?", row[:3]
            ).fetchone()
            for _ in range(count - existing):
                self._add_sent(row, None)

    def _add_sent(self, row: tuple[object, ...] | list[object], job: str | None) -> None:
        *values, question = row
        values += [self._translated(str(question)), job]
        self._target.execute(f"INSERT INTO sent ({_SENT}, job) VALUES ({_marks(values)})", values)

    def _translated(self, question: str) -> str:
        """A request of the source that refers to the texts of the target."""
        return self._target_texts.write(*self._source_texts.read(question))


def _marks(values: tuple[object, ...] | list[object]) -> str:
    return ", ".join("?" * len(values))
