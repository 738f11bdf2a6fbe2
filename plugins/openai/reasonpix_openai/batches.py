"""OpenAI's batch endpoint: files of requests, answered within 24 hours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from reasonpix.llm import Unavailable
from reasonpix.plugin import ReasonpixError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

    from reasonpix_openai.replies import Replies

LARGEST_FILE = 190_000_000
"""Bytes of requests in one batch; OpenAI takes 200 MB."""

MOST_REQUESTS = 50_000
"""Requests in one batch."""

_LOOKED_THROUGH = 200
# How many of the newest batches may be the one that an earlier process handed in.

_ENDED = ("completed", "expired", "cancelled")
_OF_NO_USE = ("failed", "expired", "cancelling", "cancelled")


@dataclass(frozen=True)
class Outcome:
    """The response to the request `key`."""

    key: str
    status: int
    body: Any


class Batches:
    """The batches of one account. A job is one or more of them, its id their ids with commas.

    A batch carries the SHA-256 of its keys as metadata. So one whose id was lost, because the
    process died right after handing it in, is found again and not paid for twice.
    """

    def __init__(self, client: OpenAI, replies: Replies, max_retries: int) -> None:
        # Looking and uploading can be repeated; handing in twice would be charged twice.
        self._client = client.with_options(max_retries=max_retries)
        self._once = client.with_options(max_retries=0)
        self._replies = replies
        self._fruitless: set[str] = set()
        self._refused: str | None = None

    def submit(self, requests: Mapping[str, dict[str, Any]]) -> str:
        """Hand in the requests and return the job's id. Raises `ReasonpixError`.

        That is also how it is told when the last batch was not accepted: its outcomes are none, so
        that the job ends, and the next one would not fare better.
        """
        if self._refused is not None:
            raise ReasonpixError(self._refused)
        with self._explained():
            return ",".join(self._submit(keys, content) for keys, content in _files(requests))

    def outcomes(self, job: str) -> list[Outcome] | None:
        """All responses of a job that has ended, None while it has not.

        Requests that a batch did not get to are left out, and all those of a batch that was not
        accepted, or that the server does not know any more. Raises `ReasonpixError` when the server
        does not let one look.
        """
        from openai import APIConnectionError, APIStatusError

        failure: APIStatusError | None = None
        try:
            batches = [self._retrieve(name) for name in job.split(",")]
            if any(batch and batch.status not in _ENDED for batch in batches):
                return None
            outcomes = [outcome for batch in batches if batch for outcome in self._read(batch)]
        except APIConnectionError:
            return None  # It is asked again later.
        except APIStatusError as error:
            failure = error
        if failure is not None:
            if isinstance(self._replies.error(failure.status_code, failure.body), Unavailable):
                return None
            raise ReasonpixError(self._told(failure))
        if not any(outcome.status == 200 for outcome in outcomes):
            self._fruitless.update(job.split(","))
        return outcomes

    def _submit(self, keys: Sequence[str], content: bytes) -> str:
        digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        for batch in islice(self._client.batches.list(limit=100), _LOOKED_THROUGH):
            if (batch.metadata or {}).get("reasonpix") == digest and self._is_of_use(batch):
                return batch.id
        file = self._client.files.create(file=("reasonpix.jsonl", content), purpose="batch")
        return self._once.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"reasonpix": digest},
        ).id

    def _is_of_use(self, batch: Batch) -> bool:
        """Whether it has answers, or may get some, as far as is known."""
        counts = batch.request_counts
        in_vain = batch.status == "completed" and counts is not None and not counts.completed
        return not (in_vain or batch.status in _OF_NO_USE or batch.id in self._fruitless)

    def _retrieve(self, name: str) -> Batch | None:
        from openai import NotFoundError

        try:
            batch = self._client.batches.retrieve(name)
        except NotFoundError:
            return None
        if batch.status == "failed":
            errors = batch.errors.data if batch.errors else None
            told = [f"{e.code}: {e.message} (line {e.line})" for e in (errors or [])[:5]]
            reason = f"batch {name} was not accepted: {'; '.join(told) or 'no reason given'}"
            self._refused = f"planner openai: {self._replies.said(reason)}"
            return None
        return batch

    def _read(self, batch: Batch) -> Iterator[Outcome]:
        from openai import NotFoundError

        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            try:
                content = self._client.files.content(file).content
            except NotFoundError:  # Files are kept for 30 days.
                continue
            for line in content.splitlines():
                outcome = json.loads(line)
                if response := outcome.get("response"):
                    status, body = response["status_code"], response["body"]
                    yield Outcome(outcome["custom_id"], status, body)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from openai import OpenAIError

        told = None
        try:
            yield
        # The client does not check what it is given: a web page comes as a plain string.
        except (OpenAIError, AttributeError, TypeError, ValueError) as error:
            told = self._told(error)
        if told is not None:
            raise ReasonpixError(told)

    def _told(self, error: Exception) -> str:
        reason = f"the batch endpoint cannot be used: {error}"
        return (
            f"planner openai: {self._replies.said(reason)}; run the same command again to continue"
        )


def _files(requests: Mapping[str, dict[str, Any]]) -> Iterator[tuple[list[str], bytes]]:
    """The requests as JSON lines, with their keys, in as many files as the limits ask for."""
    keys: list[str] = []
    lines: list[bytes] = []
    size = 0
    for key, body in requests.items():
        request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        line = json.dumps(request).encode() + b"\n"
        if lines and (size + len(line) > LARGEST_FILE or len(lines) == MOST_REQUESTS):
            yield keys, b"".join(lines)
            keys, lines, size = [], [], 0
        keys.append(key)
        lines.append(line)
        size += len(line)
    yield keys, b"".join(lines)
