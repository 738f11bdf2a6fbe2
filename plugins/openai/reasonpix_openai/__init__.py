"""The planners `openai` and `gpt-3.5-turbo`: chat models of OpenAI and of compatible servers.

The paper plans with GPT-3.5-turbo (§3.2). vLLM, Ollama, llama.cpp and others speak the same
protocol; set `base_url` to their address.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from reasonpix.llm import Attempt, Conversation, LLMPlanner, LLMPlannerOptions, Unavailable
from reasonpix.plugin import ReasonpixError, hookimpl
from reasonpix_openai.batches import Batches
from reasonpix_openai.replies import FORMAT, Replies

if TYPE_CHECKING:
    from openai import OpenAI

OPENAI_URL = "https://api.openai.com/v1"

StructuredOutput = Literal["json_schema", "json_object", "none"]


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


@dataclass(frozen=True)
class _Dialect:
    """The variants of the protocol that a server accepts."""

    structured_output: StructuredOutput
    seed: bool = True
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


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
        """Read the prompts and the key. Raises `ReasonpixError` if one is invalid."""
        super().check()
        self._read_key()

    def load(self) -> None:
        """Prepare clients. Raises `ReasonpixError` if the API key is missing or malformed."""
        from httpx2 import create_ssl_context

        options = self.options
        self._certificates = create_ssl_context()  # slow to read, so all clients share them
        self._replies = Replies(options.base_url, self._key_name, self._read_key())
        self._idle: list[OpenAI] = []
        self._batches = Batches(self._new_client(), self._replies, options.max_retries)
        structured_output = options.structured_output
        self._dialect = _Dialect(
            "json_schema" if structured_output == "auto" else structured_output
        )

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
            weaker = self._weaker(dialect, response.status, response.body)
            if weaker is not None:
                self._dialect = weaker  # for the next batch
                results[response.key] = self._replies.unavailable(str(response.body))
                continue
            try:
                results[response.key] = self._replies.attempt(response.status, response.body)
            except ReasonpixError as error:  # keep the answers to the other requests
                results[response.key] = Unavailable(reason=str(error))
        return results

    def _complete_one(self, conversation: Conversation) -> Attempt:
        from httpx2 import Response
        from openai import APIConnectionError, APIStatusError

        dialect = self._dialect
        while True:
            request = self._request(conversation, dialect)
            failure: APIStatusError | APIConnectionError
            try:
                # `chat.completions.create` would walk through all messages for fields to rename,
                # which takes longer than the rest of a call.
                with self._client() as client:
                    response = client.post("/chat/completions", cast_to=Response, body=request)
            except (APIStatusError, APIConnectionError) as error:
                failure = error
            else:
                # Kept only after a success: the text of one record's error must not change the
                # requests of others.
                self._dialect = dialect
                return self._replies.read(response.content)
            # Outside of `except`: errors are not chained to the server's, which may quote the key.
            if isinstance(failure, APIConnectionError):
                cause = failure.__cause__ or failure
                return self._replies.lost(cause, self.options.timeout_s)
            status, body = failure.status_code, failure.body
            weaker = self._weaker(dialect, status, body)
            if weaker is None:
                return self._replies.error(status, body, failure.response.headers)
            dialect = weaker

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

        client = OpenAI(
            # The client requires a key; servers that need none ignore it.
            api_key=self._replies.key or "none",
            base_url=self.options.base_url,
            timeout=self.options.timeout_s,
            max_retries=0,
            http_client=DefaultHttpxClient(verify=self._certificates),
        )
        return self._open.enter_context(client)

    def _request(self, conversation: Conversation, dialect: _Dialect) -> dict[str, Any]:
        options, schema = self.options, conversation.answer_schema
        request: dict[str, Any] = {
            "model": options.model,
            "messages": [{"role": m.role, "content": m.content} for m in conversation.messages],
        }
        if options.temperature is not None:
            request["temperature"] = options.temperature
        if options.max_tokens is not None:
            request[dialect.limit] = options.max_tokens
        if dialect.seed:
            # some servers have 32-bit seeds
            request["seed"] = conversation.seed % 2**31
        if dialect.structured_output == "json_schema":
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": schema["title"], "strict": True, "schema": schema},
            }
        elif dialect.structured_output == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def _weaker(self, dialect: _Dialect, status: int, body: Any) -> _Dialect | None:
        """The dialect to try next if the server refused a parameter, otherwise None."""
        if status not in (400, 422):
            return None
        message = str(body)
        if FORMAT.search(message):
            if self.options.structured_output != "auto":
                return None
            if dialect.structured_output == "json_schema":
                return replace(dialect, structured_output="json_object")
            if dialect.structured_output == "json_object":
                return replace(dialect, structured_output="none")
        elif "max_completion_tokens" in message and dialect.limit == "max_tokens":
            return replace(dialect, limit="max_completion_tokens")
        elif re.search(r"\bseed\b", message) and dialect.seed:
            return replace(dialect, seed=False)
        return None

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


def _is_openai(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith("api.openai.com")


@hookimpl
def planners() -> list[type[OpenAIPlanner]]:
    """Offer the planners `openai` and `gpt-3.5-turbo`."""
    return [OpenAIPlanner, GPT35TurboPlanner]
