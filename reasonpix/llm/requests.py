"""Requests as the ledger stores them: under a key, and with shared texts stored once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reasonpix.llm.types import Conversation, Message

_CACHED_TEXTS = 4096

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=dict).encode


def canonical_json(value: Any) -> str:
    """JSON that is equal for equal values: sorted keys, no spaces, ASCII."""
    return _encode(value)


def request_key(parameters: Mapping[str, Any], conversation: Conversation) -> str:
    """The key of a request and of its answer, 64 hex digits.

    The SHA-256 of the canonical JSON of `parameters` (model and sampling), messages, schema and
    seed. Several samples of one request differ in their seeds. `shared` has no influence on the
    answer and is left out.
    """
    messages = [[message.role, message.content] for message in conversation.messages]
    request = [parameters, messages, conversation.answer_schema, conversation.seed]
    return hashlib.sha256(canonical_json(request).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """A request about to be sent. `cost_bound` is the most that it can cost."""

    task: str
    key: str
    conversation: Conversation
    cost_bound: float = 0.0


@dataclass(frozen=True)
class InFlight:
    """A request in flight: a row of the table `sent`."""

    row: int
    task: str
    key: str
    cost_bound: float


@dataclass(frozen=True)
class Job:
    """Requests submitted together under `id`, which is None until the server has confirmed it."""

    name: str
    """Derived from the keys: the same requests submitted again are the same job."""
    id: str | None
    requests: tuple[InFlight, ...]


class InternedStrings:
    """The table `texts` of a ledger, and requests as JSON that refers to it by row id.

    Shared messages, schemas and parameters are repeated in many requests and stored once; messages
    that belong to one request are stored inline.
    """

    TABLE = "CREATE TABLE texts (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, text TEXT)"

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._ids: dict[str, int] = {}

    def write(self, parameters: Mapping[str, Any], conversation: Conversation) -> str:
        """Store the request's shared texts and return its JSON."""
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

    def read(self, request: str) -> tuple[Mapping[str, Any], Conversation]:
        """The parameters and the conversation of a request from `write`."""
        fields = json.loads(request)
        messages = [
            Message(role=role, content=self._text(text) if isinstance(text, int) else text)
            for role, text in fields["messages"]
        ]
        return json.loads(self._text(fields["parameters"])), Conversation(
            messages=tuple(messages),
            answer_schema=json.loads(self._text(fields["schema"])),
            seed=fields["seed"],
            shared=fields["shared"],
        )

    def clear_cache(self) -> None:
        """Forget cached row ids, because the transaction that wrote them was rolled back."""
        self._ids.clear()

    def _text(self, id: int) -> str:
        (text,) = self._db.execute("SELECT text FROM texts WHERE id = ?", (id,)).fetchone()
        return str(text)

    def _id(self, text: str) -> int:
        if (cached := self._ids.get(text)) is not None:
            return cached
        stored = text.encode(errors="replace")  # a lone surrogate has no UTF-8
        row = (hashlib.sha256(stored).digest(), stored.decode())
        self._db.execute("INSERT OR IGNORE INTO texts (hash, text) VALUES (?, ?)", row)
        (id,) = self._db.execute("SELECT id FROM texts WHERE hash = ?", row[:1]).fetchone()
        if len(self._ids) >= _CACHED_TEXTS:
            self._ids.clear()
        self._ids[text] = int(id)
        return int(id)
