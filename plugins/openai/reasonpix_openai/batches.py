"""OpenAI's batch endpoint: files of requests, answered within 24 hours."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from reasonpix.llm import Unavailable
from reasonpix.plugin import ReasonpixError
from reasonpix_openai.chat_response import parse, status_of
from reasonpix_openai.replies import Replies, ServerError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

_LOG = logging.getLogger("reasonpix.openai")

MAX_FILE_BYTES = 190_000_000
"""Bytes of requests in one batch; OpenAI's limit is 200 MB."""

MAX_REQUESTS = 50_000
"""Requests in one batch."""

_SEARCHED_BATCHES = 200
# How many of the newest batches are searched for one that an earlier process submitted.

_UNSENT = ("batch_expired", "batch_cancelled")
_NOT_SENT = 0
# Errors of requests that a batch did not reach, and the status that stands for them here.

_ENDED = ("completed", "expired", "cancelled")
_USELESS = ("failed", "expired", "cancelling", "cancelled")


@dataclass(frozen=True)
class BatchResponse:
    """The response to the request `key`."""

    key: str
    status: int
    body: Any


class Batches:
    """The batches of one account. A job is one or more batches; its id is their joined ids.

    A batch carries the SHA-256 of its keys as metadata. So if the process dies right after
    submitting it, it is found again and not paid for twice.
    """

    def __init__(self, client: OpenAI, replies: Replies, max_retries: int) -> None:
        # Reads and uploads can be repeated; a second submission would be charged again.
        self._client = client.with_options(max_retries=max_retries)
        self._once = client.with_options(max_retries=0)
        self._replies = replies
        self._unanswered: set[str] = set()
        self._rejection: str | None = None

    def submit(self, requests: Mapping[str, dict[str, Any]]) -> str:
        """Submit the requests and return the job's id. Raises `ReasonpixError`.

        Also raises if the last batch was rejected, because the next one would be rejected too. (The
        rejected batch itself ends without responses.)
        """
        if self._rejection is not None:
            raise ReasonpixError(self._rejection)
        with self._explained():
            return ",".join(self._submit(keys, content) for keys, content in _files(requests))

    def responses(self, job: str) -> list[BatchResponse] | None:
        """All responses of a job, None while it is running.

        Requests that an expired batch did not reach are missing, as are all requests of a rejected
        batch and of one that the server has deleted. Raises `ReasonpixError` if the server denies
        access.
        """
        from openai import APIConnectionError, APIStatusError

        failure: APIStatusError | None = None
        try:
            batches = [self._retrieve(name) for name in job.split(",")]
            if any(batch and batch.status not in _ENDED for batch in batches):
                return None
            responses = [response for batch in batches if batch for response in self._read(batch)]
        except APIConnectionError:
            return None  # try again at the next poll
        except APIStatusError as error:
            failure = error
        if failure is not None:
            if isinstance(
                self._replies.error(ServerError(failure.status_code, failure.body)), Unavailable
            ):
                return None
            raise ReasonpixError(self._message(failure))
        if not any(response.status == 200 for response in responses):
            self._unanswered.update(job.split(","))
        return responses

    def _submit(self, keys: Sequence[str], content: bytes) -> str:
        digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        for batch in islice(self._client.batches.list(limit=100), _SEARCHED_BATCHES):
            if (batch.metadata or {}).get("reasonpix") == digest and self._is_usable(batch):
                return batch.id
        file = self._client.files.create(file=("reasonpix.jsonl", content), purpose="batch")
        return self._once.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"reasonpix": digest},
        ).id

    def _is_usable(self, batch: Batch) -> bool:
        """Whether it has answers, or may get some."""
        counts = batch.request_counts
        unanswered = batch.status == "completed" and counts is not None and not counts.completed
        return not (unanswered or batch.status in _USELESS or batch.id in self._unanswered)

    def _retrieve(self, name: str) -> Batch | None:
        from openai import NotFoundError

        try:
            batch = self._client.batches.retrieve(name)
        except NotFoundError:
            return None
        if batch.status == "failed":
            errors = batch.errors.data if batch.errors else None
            problems = [f"{e.code}: {e.message} (line {e.line})" for e in (errors or [])[:5]]
            reason = f"batch {name} was rejected: {'; '.join(problems) or 'no reason given'}"
            self._rejection = f"planner openai: {self._replies.quoted(reason)}"
            return None
        return batch

    def _read(self, batch: Batch) -> Iterator[BatchResponse]:
        from openai import NotFoundError

        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            try:
                content = self._client.files.content(file).content
            except NotFoundError:  # deleted by the server after 30 days
                continue
            lines = content.splitlines()
            responses = [response for response in map(_response, lines) if response is not None]
            if len(responses) < len(lines):
                _LOG.warning(
                    "planner openai: %d of %d lines in the results of batch %s cannot be read",
                    len(lines) - len(responses),
                    len(lines),
                    batch.id,
                )
            yield from (response for response in responses if response.status != _NOT_SENT)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from openai import OpenAIError

        message = None
        try:
            yield
        # The client does not validate responses: a web page arrives as a plain string.
        except (OpenAIError, AttributeError, TypeError, ValueError) as error:
            message = self._message(error)
        if message is not None:
            raise ReasonpixError(message)

    def _message(self, error: Exception) -> str:
        reason = f"the batch endpoint cannot be used: {error}"
        return (
            f"planner openai: {self._replies.quoted(reason)}; run the same command "
            "again to continue"
        )


def _response(line: bytes) -> BatchResponse | None:
    """The response in a line of results, None if it cannot be read."""
    try:
        entry = json.loads(line)
        key, response, error = entry["custom_id"], entry.get("response"), entry.get("error")
        if response:
            body = response["body"]
            body = parse(body.encode()) if isinstance(body, str) else body
            return BatchResponse(key, int(response.get("status_code", 200)), body)
        is_unsent = isinstance(error, dict) and error.get("code") in _UNSENT
        return BatchResponse(key, _NOT_SENT if is_unsent else status_of(error), {"error": error})
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        return None


def _files(requests: Mapping[str, dict[str, Any]]) -> Iterator[tuple[list[str], bytes]]:
    """Split the requests into files of JSON lines within the limits; yields keys and content."""
    keys: list[str] = []
    lines: list[bytes] = []
    size = 0
    for key, body in requests.items():
        request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        line = json.dumps(request).encode() + b"\n"
        if lines and (size + len(line) > MAX_FILE_BYTES or len(lines) == MAX_REQUESTS):
            yield keys, b"".join(lines)
            keys, lines, size = [], [], 0
        keys.append(key)
        lines.append(line)
        size += len(line)
    yield keys, b"".join(lines)
