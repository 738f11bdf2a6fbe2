"""The planners `openai` and `gpt-3.5-turbo`: chat models of OpenAI and of compatible servers.

The paper plans with GPT-3.5-turbo (§3.2). vLLM, Ollama, llama.cpp and others speak the same
protocol; set `base_url` to their address.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from reasonpix.core import http_transport, proxy_for
from reasonpix.llm import (
    Attempt,
    Completion,
    Conversation,
    LLMPlanner,
    LLMPlannerOptions,
    Unavailable,
)
from reasonpix.plugin import ReasonpixError, hookimpl
from reasonpix_openai.batches import Batches
from reasonpix_openai.dialect import Dialect, left_out
from reasonpix_openai.replies import Replies, ServerError

if TYPE_CHECKING:
    from openai import OpenAI

OPENAI_URL = "https://api.openai.com/v1"

_LOG = logging.getLogger("reasonpix.openai")

_MEANING = {
    "temperature": "answers are sampled at the server's own temperature",
    "seed": "asking again, after the stored answers are gone, may give other answers",
    "json_schema": "the form of answers is enforced less strictly, or by the prompt alone",
    "json_object": "the form of answers is enforced by the prompt alone",
}


class OpenAIOptions(LLMPlannerOptions):
    """Options of the planner `openai`.

    `base_url` is part of the model's identity: two servers may serve different weights or chat
    templates under one name, so another URL means new plans. If a server may move, use a host name
    that moves with it.
    """

    # A key that was put into a recipe by mistake must not appear in error messages.
    model_config = ConfigDict(hide_input_in_errors=True)

    fingerprint_exclude: ClassVar[frozenset[str]] = LLMPlannerOptions.fingerprint_exclude | {
        "concurrency",
        "timeout_s",
        "api_key_env",
        "batch",
    }

    model: str = Field("gpt-3.5-turbo", description="Name of the model on the server")
    base_url: str = Field(
        OPENAI_URL, description="URL of the API, such as http://localhost:8000/v1"
    )
    api_key_env: str | None = Field(
        None,
        description="Environment variable with the API key, which must then be set; the default, "
        "OPENAI_API_KEY, is required by OpenAI's own server only",
    )
    temperature: float | None = Field(
        1.0, ge=0, le=2, description="Sampling temperature; null for the server's default"
    )
    max_tokens: int | None = Field(
        400, ge=1, description="Maximum tokens of an answer; null for the server's default"
    )
    structured_output: Literal["auto", "json_schema", "json_object", "none"] = Field(
        "auto",
        description="How the server enforces the answer's form; auto tries json_schema first, then "
        "weaker forms if the server refuses it",
    )
    concurrency: int = Field(8, ge=1, le=256, description="Maximum number of concurrent requests")
    timeout_s: float = Field(
        60.0,
        gt=0,
        description="Time without a byte from the server after which an attempt fails, in seconds",
    )
    batch: bool = Field(
        False,
        description="Use the batch endpoint: answers within 24 hours, half the price at OpenAI",
    )

    @field_validator("base_url")
    @classmethod
    def _is_a_plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give an http:// or https:// URL, such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("give only the URL; put the key into the environment (api_key_env)")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError("give the name of the environment variable with the key")
        return name


class GPT35TurboOptions(OpenAIOptions):
    """Options of the planner `gpt-3.5-turbo`: those of `openai` with a fixed model."""

    model: Literal["gpt-3.5-turbo"] = Field("gpt-3.5-turbo", description="Fixed")


class OpenAIPlanner(LLMPlanner[OpenAIOptions]):
    """A planner with a chat model behind an OpenAI-compatible server.

    The API key comes from the environment and is only ever sent to `base_url`.
    """

    name: ClassVar[str] = "openai"
    Options: ClassVar[type[OpenAIOptions]] = OpenAIOptions

    def __init__(self, options: OpenAIOptions) -> None:
        super().__init__(options)
        self._open = ExitStack()

    @property
    def concurrency(self) -> int:
        """The option `concurrency`; a batch takes all pending requests."""
        return 50_000 if self.options.batch else self.options.concurrency

    @property
    def max_answer_tokens(self) -> int | None:
        """The option `max_tokens`."""
        return self.options.max_tokens

    @property
    def jobs(self) -> bool:
        """The option `batch`."""
        return self.options.batch

    def check(self) -> None:
        """Read the prompts, the key and the proxy. Raises `ReasonpixError` if one is invalid."""
        super().check()
        self._read_key()
        proxy_for(self.options.base_url)

    def load(self) -> None:
        """Prepare clients. Raises `ReasonpixError` if the API key is missing or malformed."""
        from httpx2 import create_ssl_context

        options = self.options
        self._certificates = create_ssl_context()  # slow to read, so all clients share them
        proxy = proxy_for(options.base_url)
        self._replies = Replies(
            options.base_url, self._key_name, self._read_key(), proxy.variable if proxy else None
        )
        self._idle: list[OpenAI] = []
        self._batches = Batches(self._new_client(), self._replies, options.max_retries)
        structured_output = options.structured_output
        self._wanted = self._dialect = Dialect(
            "json_schema" if structured_output == "auto" else structured_output
        )
        self._warning = Lock()
        self._warned: set[str] = set()

    def close(self) -> None:
        """Wait for requests in flight, and close all connections."""
        super().close()
        self._open.close()

    def complete(self, conversations: Sequence[Conversation]) -> list[Attempt]:
        """Send each conversation once, and again only in another dialect."""
        return [self._complete_one(conversation) for conversation in conversations]

    def submit(self, conversations: Mapping[str, Conversation]) -> str:
        """Submit a batch, or find the existing one with exactly these requests."""
        dialect = self._dialect
        return self._batches.submit(
            {key: self._request(conversations[key], dialect) for key in sorted(conversations)}
        )

    def collect(self, job: str) -> Mapping[str, Attempt] | None:
        """Results of a batch that has ended; requests without a response are missing."""
        responses = self._batches.responses(job)
        if responses is None:
            return None
        results: dict[str, Attempt] = {}
        dialect = self._dialect
        for response in responses:
            try:
                results[response.key] = self._read(
                    self._replies.attempt(response.status, response.body), dialect
                )
            except _Refused as refused:
                self._dialect = refused.dialect  # for the next batch
                results[response.key] = self._replies.unavailable(str(response.body))
            except ReasonpixError as error:  # keep the answers to the other requests
                results[response.key] = Unavailable(reason=str(error))
        return results

    def _complete_one(self, conversation: Conversation) -> Attempt:
        dialect = self._dialect
        while True:
            reply = self._post(self._request(conversation, dialect))
            try:
                outcome = self._read(reply, dialect)
            except _Refused as refused:
                dialect = refused.dialect
                continue
            if isinstance(outcome, Completion):
                # Only now: the text of one record's error must not change the requests of others.
                self._dialect = dialect
            return outcome

    def _post(self, request: dict[str, Any]) -> Attempt | ServerError:
        """Send a request once."""
        from httpx2 import Response
        from openai import APIConnectionError, APIStatusError

        failure: APIStatusError | APIConnectionError
        try:
            # `chat.completions.create` would walk through all messages for fields to rename, which
            # takes longer than the rest of a call.
            with self._client() as client:
                response = client.post("/chat/completions", cast_to=Response, body=request)
            return self._replies.read(response.content, response.charset_encoding)
        except (APIStatusError, APIConnectionError) as error:
            failure = error
        # Outside of `except`: errors are not chained to the server's, which may quote the key.
        if isinstance(failure, APIConnectionError):
            return self._replies.lost(failure.__cause__ or failure, self.options.timeout_s)
        return ServerError(failure.status_code, failure.body, failure.response.headers)

    def _read(self, reply: Attempt | ServerError, dialect: Dialect) -> Attempt:
        """The outcome of a request. Raises `_Refused` if it may succeed in another dialect."""
        if isinstance(reply, ServerError):
            other = dialect.without_refused(
                reply.status, reply.body, keep_format=self.options.structured_output != "auto"
            )
            if other is not None:
                raise _Refused(other)
            return self._replies.error(reply)
        if isinstance(reply, Completion):
            without = left_out(self._wanted, dialect)
            if without:
                self._warn(without)
            return reply.model_copy(update={"left_out": without})
        return reply

    def _warn(self, without: Sequence[str]) -> None:
        """Say once of each parameter that the server refuses it."""
        with self._warning:
            new = [name for name in without if name not in self._warned]
            self._warned.update(new)
        for name in new:
            _LOG.warning(
                "planner %s: %s does not accept %s, which is left out: %s",
                self.name,
                self.options.base_url,
                name,
                _MEANING[name],
            )

    @contextmanager
    def _client(self) -> Iterator[OpenAI]:
        """A client with its own connection; a shared pool would slow many threads by its lock."""
        try:
            client = self._idle.pop()
        except IndexError:
            client = self._new_client()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _new_client(self) -> OpenAI:
        from openai import DefaultHttpxClient, OpenAI

        url = self.options.base_url
        client = OpenAI(
            # The client requires a key; servers that need none ignore it.
            api_key=self._replies.key or "none",
            base_url=url,
            timeout=self.options.timeout_s,
            max_retries=0,
            http_client=DefaultHttpxClient(
                transport=http_transport(url, verify=self._certificates)
            ),
        )
        return self._open.enter_context(client)

    def _request(self, conversation: Conversation, dialect: Dialect) -> dict[str, Any]:
        options = self.options
        return {
            "model": options.model,
            "messages": [{"role": m.role, "content": m.content} for m in conversation.messages],
            **dialect.parameters(conversation, options.temperature, options.max_tokens),
        }

    @property
    def _key_name(self) -> str:
        return self.options.api_key_env or "OPENAI_API_KEY"

    def _read_key(self) -> str | None:
        name = self._key_name
        key = os.environ.get(name, "").strip()
        if not key and (self.options.api_key_env or _is_openai(self.options.base_url)):
            raise ReasonpixError(
                f"planner {self.name}: no API key: set the environment variable {name}, or "
                + (
                    "remove api_key_env if the server needs none"
                    if self.options.api_key_env
                    else "set base_url to a server that needs none"
                )
            )
        if not all("!" <= letter <= "~" for letter in key):
            # The HTTP client's own error would show the key.
            raise ReasonpixError(
                f"planner {self.name}: the environment variable {name} is not an API key: it "
                "contains spaces or other characters that keys cannot have"
            )
        return key or None


class GPT35TurboPlanner(OpenAIPlanner):
    """The planner of the paper: `openai` with GPT-3.5-turbo."""

    name: ClassVar[str] = "gpt-3.5-turbo"
    Options: ClassVar[type[OpenAIOptions]] = GPT35TurboOptions


class _Refused(Exception):
    """The server refused a parameter; `dialect` leaves it out."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__()
        self.dialect = dialect


def _is_openai(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith("api.openai.com")


@hookimpl
def planners() -> list[type[OpenAIPlanner]]:
    """Offer the planners `openai` and `gpt-3.5-turbo`."""
    return [OpenAIPlanner, GPT35TurboPlanner]
