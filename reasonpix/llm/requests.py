"""Questions as the ledger keeps them: under a key, and with each of their texts stored once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from reasonpix.llm.types import Conversation, Message

_KNOWN_TEXTS = 4096

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=dict).encode


def canonical_json(value: Any) -> str:
    """JSON that is the same for equal values: sorted keys, no blanks, ASCII."""
    return _encode(value)


def request_key(parameters: Mapping[str, Any], conversation: Conversation) -> str:
    """The name of a question, 64 hex digits: another one when anything that matters differs.

    The SHA-256 of the canonical JSON of `parameters` (model and sampling), messages, schema and
    seed. Which of several samples is asked for enters through the seed: each sample has its own.
    `shared` is left out, as it only tells how to compute.
    """
    messages = [[message.role, message.content] for message in conversation.messages]
    question = [parameters, messages, conversation.answer_schema, conversation.seed]
    return hashlib.sha256(canonical_json(question).encode()).hexdigest()


class InternedStrings:
    """The table `texts` of a ledger, and questions as JSON that refers to it by number.

    Messages that questions share, schemas and parameters come again and again, and are stored
    once; what a question asks of its own stands in it.
    """

    TABLE = "CREATE TABLE texts (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, text TEXT)"

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._known: dict[str, int] = {}

    def write(self, parameters: Mapping[str, Any], conversation: Conversation) -> str:
        """The question, its texts stored."""
        return canonical_json(
            {
                "messages": [
                    [turn.role, self._id(turn.content) if n < conversation.shared else turn.content]
                    for n, turn in enumerate(conversation.messages)
                ],
                "parameters": self._id(canonical_json(parameters)),
                "schema": self._id(canonical_json(conversation.answer_schema)),
                "seed": conversation.seed,
                "shared": conversation.shared,
            }
        )

    def read(self, question: str) -> tuple[Mapping[str, Any], Conversation]:
        """The parameters and the conversation of a question that was written."""
        facts = json.loads(question)
        messages = [
            Message(role=role, content=self._text(said) if isinstance(said, int) else said)
            for role, said in facts["messages"]
        ]
        return json.loads(self._text(facts["parameters"])), Conversation(
            messages=tuple(messages),
            answer_schema=json.loads(self._text(facts["schema"])),
            seed=facts["seed"],
            shared=facts["shared"],
        )

    def forget(self) -> None:
        """What was written last is not in the file after all."""
        self._known.clear()

    def _text(self, id: int) -> str:
        (text,) = self._db.execute("SELECT text FROM texts WHERE id = ?", (id,)).fetchone()
        return str(text)

    def _id(self, text: str) -> int:
        if (known := self._known.get(text)) is not None:
            return known
        storable = text.encode(errors="replace")  # half of a surrogate pair has no UTF-8
        digest = hashlib.sha256(storable).digest()
        row = self._db.execute(
            "INSERT OR IGNORE INTO texts (hash, text) VALUES (?, ?) RETURNING id",
            (digest, storable.decode()),
        ).fetchone()
        if row is None:
            select = "SELECT id FROM texts WHERE hash = ?"
            row = self._db.execute(select, (digest,)).fetchone()
        if len(self._known) >= _KNOWN_TEXTS:
            self._known.clear()
        self._known[text] = int(row[0])
        return int(row[0])
