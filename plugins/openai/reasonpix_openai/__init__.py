"""The planners `openai` and `gpt-3.5-turbo`: a chat model of OpenAI, or of any server that speaks
its protocol.

The paper plans with GPT-3.5-turbo (§3.2). vLLM, Ollama, llama.cpp and others answer the same
requests; `base_url` points there.
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

from reasonpix.llm import Completion, Conversation, LLMPlanner, LLMPlannerOptions, Unavailable
from reasonpix.plugin import Problem, ReasonpixError, hookimpl
from reasonpix_openai.batches import Batches
from reasonpix_openai.replies import FORMAT, Replies

if TYPE_CHECKING:
    from openai import OpenAI

OPENAI_URL = "https://api.openai.com/v1"

StructuredOutput = Literal["json_schema", "json_object", "none"]


class OpenAIOptions(LLMPlannerOptions):
    """What a recipe may say about the planner `openai`.

    `base_url` counts as part of the model: two servers may serve different weights, quantisations
    or chat templates under one name, so plans are made anew for another URL. Give a server that
    may move a host name that moves with it.
    """

    # A key that someone writes into a recipe by mistake must not be shown in the complaint.
    model_config = ConfigDict(hide_input_in_errors=True)

    fingerprint_exclude: ClassVar[frozenset[str]] = LLMPlannerOptions.fingerprint_exclude | {
        "concurrency",
        "timeout_s",
        "api_key_env",
        "batch",
    }

    model: str = Field("gpt-3.5-turbo", description="Name of the model, as the server knows it")
    base_url: str = Field(
        OPENAI_URL, description="Where the API is served, such as http://localhost:8000/v1"
    )
    api_key_env: str | None = Field(
        None,
        description="Environment variable that holds the API key, which then must be set; "
        "by default OPENAI_API_KEY, which only OpenAI's own server needs",
    )
    temperature: float | None = Field(
        1.0, ge=0, le=2, description="Sampling temperature; null leaves it to the server"
    )
    max_tokens: int | None = Field(
        400, ge=1, description="Longest answer, in tokens; null leaves it to the server"
    )
    structured_output: Literal["auto", "json_schema", "json_object", "none"] = Field(
        "auto",
        description="How the server is held to the answer's form; auto asks for json_schema, and "
        "for less where the server refuses that",
    )
    concurrency: int = Field(8, ge=1, le=256, description="Requests under way at once")
    timeout_s: float = Field(
        60.0, gt=0, description="Longest silence of the server in one attempt, in seconds"
    )
    batch: bool = Field(
        False,
        description="Use the batch endpoint: answers within 24 hours, at OpenAI for half the price",
    )

    @field_validator("base_url")
    @classmethod
    def _is_a_plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give an http:// or https:// URL, such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("give the URL alone; a key belongs into the environment (api_key_env)")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError("give the name of an environment variable that holds the key")
        return name


class GPT35TurboOptions(OpenAIOptions):
    """What a recipe may say about the planner `gpt-3.5-turbo`: as `openai`, but for the model."""

    model: Literal["gpt-3.5-turbo"] = Field("gpt-3.5-turbo", description="Nothing else")


@dataclass(frozen=True)
class _Dialect:
    """Which of the parameters that servers disagree about a server takes."""

    structured_output: StructuredOutput
    seed: bool = True
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


class OpenAIPlanner(LLMPlanner[OpenAIOptions]):
    """Plans by a chat model behind an OpenAI-compatible server.

    The API key comes from the environment and goes nowhere but into the requests.
    """

    name: ClassVar[str] = "openai"
    Options: ClassVar[type[OpenAIOptions]] = OpenAIOptions

    def __init__(self, options: OpenAIOptions) -> None:
        super().__init__(options)
        self._open = ExitStack()

    @property
    def concurrency(self) -> int:
        """Requests under way at once; a batch takes all that there is to ask."""
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
        """Read the prompts and the key. Raises a `ReasonpixError` for what is wrong with them."""
        super().check()
        self._read_key()

    def load(self) -> None:
        """Prepare clients. Raises `ReasonpixError` when the API key is missing or malformed."""
        from httpx2 import create_ssl_context

        options = self.options
        self._certificates = create_ssl_context()  # Reading them takes long, so all share them.
        self._replies = Replies(options.base_url, self._key_name, self._read_key())
        self._idle: list[OpenAI] = []
        self._batches = Batches(self._new_client(), self._replies, options.max_retries)
        wanted = options.structured_output
        self._dialect = _Dialect("json_schema" if wanted == "auto" else wanted)

    def close(self) -> None:
        """Let the requests under way finish, and close all connections."""
        super().close()
        self._open.close()

    def complete(
        self, conversations: Sequence[Conversation]
    ) -> list[Completion | Problem | Unavailable]:
        """Ask for each conversation once; again only for what the server does not understand."""
        return [self._complete_one(conversation) for conversation in conversations]

    def submit(self, conversations: Mapping[str, Conversation]) -> str:
        """Hand in a batch, or find the one that was handed in with just these requests."""
        dialect = self._dialect
        return self._batches.submit(
            {key: self._request(conversations[key], dialect) for key in sorted(conversations)}
        )

    def collect(self, job: str) -> Mapping[str, Completion | Problem | Unavailable] | None:
        """What came of the requests of a batch that has ended; what is missing came to nothing."""
        outcomes = self._batches.outcomes(job)
        if outcomes is None:
            return None
        results: dict[str, Completion | Problem | Unavailable] = {}
        dialect = self._dialect
        for outcome in outcomes:
            weaker = self._weaker(dialect, outcome.status, outcome.body)
            if weaker is not None:
                self._dialect = weaker  # for the next batch
                results[outcome.key] = self._replies.unavailable(str(outcome.body))
                continue
            try:
                results[outcome.key] = self._replies.outcome(outcome.status, outcome.body)
            except ReasonpixError as error:  # It must not take the others' answers with it.
                results[outcome.key] = Unavailable(reason=str(error))
        return results

    def _complete_one(self, conversation: Conversation) -> Completion | Problem | Unavailable:
        from httpx2 import Response
        from openai import APIConnectionError, APIStatusError

        dialect = self._dialect
        while True:
            request = self._request(conversation, dialect)
            failure: APIStatusError | APIConnectionError
            try:
                # What `chat.completions.create` does beside, such as to look through every
                # message for fields to rename, takes more time than all the rest of a call.
                with self._client() as client:
                    response = client.post("/chat/completions", cast_to=Response, body=request)
            except (APIStatusError, APIConnectionError) as error:
                failure = error
            else:
                # Remembered only once it has worked: what one record's error text seems to say
                # must not change how the others are asked.
                self._dialect = dialect
                return self._replies.read(response.content)
            # Out here an error that is raised does not carry the server's own, with its text.
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
        """A client with a connection of its own.

        Many threads at one pool of connections spend their time on its lock.
        """
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
            # The client insists on a key; servers that need none ignore it.
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
            # Some servers keep seeds in 32 bits.
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
        """What to try after the server refused a parameter; None when that is not the trouble."""
        if status not in (400, 422):
            return None
        about = str(body)
        if FORMAT.search(about):
            if self.options.structured_output != "auto":
                return None
            if dialect.structured_output == "json_schema":
                return replace(dialect, structured_output="json_object")
            if dialect.structured_output == "json_object":
                return replace(dialect, structured_output="none")
        elif "max_completion_tokens" in about and dialect.limit == "max_tokens":
            return replace(dialect, limit="max_completion_tokens")
        elif re.search(r"\bseed\b", about) and dialect.seed:
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
                    "leave api_key_env out if the server needs none"
                    if self.options.api_key_env
                    else "point base_url to a server that needs none"
                )
            )
        if not all("!" <= letter <= "~" for letter in key):
            # The HTTP client would complain too, and show the key.
            raise ReasonpixError(
                f"planner {self.name}: the environment variable {name} holds no API key: it has "
                "spaces or other characters that a key cannot have"
            )
        return key or None


class GPT35TurboPlanner(OpenAIPlanner):
    """Plans by GPT-3.5-turbo, as the paper does: `openai` with its default model."""

    name: ClassVar[str] = "gpt-3.5-turbo"
    Options: ClassVar[type[OpenAIOptions]] = GPT35TurboOptions


def _is_openai(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith("api.openai.com")


@hookimpl
def planners() -> list[type[OpenAIPlanner]]:
    """Offer the planners `openai` and `gpt-3.5-turbo`."""
    return [OpenAIPlanner, GPT35TurboPlanner]
