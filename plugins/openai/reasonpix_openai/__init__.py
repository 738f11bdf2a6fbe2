"""The planner `openai`: a chat model of OpenAI, or of any server that speaks its protocol.

The paper plans with GPT-3.5-turbo (§3.2). vLLM, Ollama, llama.cpp and others answer the same
requests; `base_url` points there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from reasonpix.errors import ReasonpixError
from reasonpix.hookspecs import hookimpl
from reasonpix.planning import Completion, Conversation, LLMPlanner, LLMPlannerOptions
from reasonpix.records import Problem

if TYPE_CHECKING:
    from openai import APIStatusError

OPENAI_URL = "https://api.openai.com/v1"

_NO_CHAT = "no answer of a chat API; check base_url, which usually ends in /v1"
_FORMAT = re.compile(r"response_format|json.?(schema|object)|structured.?output", re.IGNORECASE)

StructuredOutput = Literal["json_schema", "json_object", "none"]


class OpenAIOptions(LLMPlannerOptions):
    """What a recipe may say about the planner `openai`.

    `base_url` counts as part of the model: two servers may serve different weights, quantisations
    or chat templates under one name, so plans are made anew for another URL. Give a server that
    may move a host name that moves with it.
    """

    # A key that someone writes into a recipe by mistake must not be shown in the complaint.
    model_config = ConfigDict(hide_input_in_errors=True)

    neutral: ClassVar[frozenset[str]] = LLMPlannerOptions.neutral | {
        "concurrency",
        "timeout_s",
        "max_retries",
        "api_key_env",
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
    max_retries: int = Field(
        4, ge=0, description="Further attempts after a lost connection, a 429 or a server error"
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


def _is_openai(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith("api.openai.com")


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

    name = "openai"
    Options: ClassVar[type[OpenAIOptions]] = OpenAIOptions

    def __init__(self, options: OpenAIOptions) -> None:
        super().__init__(options)
        self._open = ExitStack()

    def check(self) -> None:
        """Read the prompt and the key. Raises a `ReasonpixError` for what is wrong with them."""
        super().check()
        self._read_key()

    def load(self) -> None:
        """Make the client. Raises `ReasonpixError` when the API key is missing or malformed."""
        from openai import OpenAI

        options = self.options
        self._key = self._read_key()
        client = OpenAI(
            # The client insists on a key; servers that need none ignore it.
            api_key=self._key or "none",
            base_url=options.base_url,
            timeout=options.timeout_s,
            max_retries=options.max_retries,
        )
        workers = ThreadPoolExecutor(options.concurrency, thread_name_prefix="openai")
        self._client = self._open.enter_context(client)
        self._workers = self._open.enter_context(workers)
        wanted = options.structured_output
        self._dialect = _Dialect("json_schema" if wanted == "auto" else wanted)

    def close(self) -> None:
        """Close all connections."""
        self._open.close()

    def complete(
        self, conversations: Sequence[Conversation], schema: Mapping[str, Any]
    ) -> list[Completion | Problem]:
        """Ask for each conversation, `concurrency` at once, and answer in order."""
        return list(self._workers.map(partial(self._complete_one, schema=schema), conversations))

    def _complete_one(
        self, conversation: Conversation, schema: Mapping[str, Any]
    ) -> Completion | Problem:
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        url = self.options.base_url
        dialect = self._dialect
        while True:
            request = self._request(conversation, schema, dialect)
            try:
                answer = self._client.chat.completions.create(**request)
            except APIStatusError as error:
                weaker = self._weaker(dialect, error)
                if weaker is not None:
                    dialect = weaker
                    continue
                if error.code == "content_filter":
                    return Completion(text="", refusal="content filter")
                return self._failed(f"{url}: {error.message}{self._advice(error)}")
            except APITimeoutError:
                return self._failed(f"{url}: silent for {self.options.timeout_s:g} s (timeout_s)")
            except APIConnectionError as error:
                return self._failed(f"cannot reach {url}: {error.__cause__ or error}")
            except (OpenAIError, ValueError):
                return self._failed(f"{url}: {_NO_CHAT}")
            # Remembered only once it has worked: what one record's error text seems to say must
            # not change how the others are asked.
            self._dialect = dialect
            return self._completion(answer)

    def _request(
        self, conversation: Conversation, schema: Mapping[str, Any], dialect: _Dialect
    ) -> dict[str, Any]:
        options = self.options
        request: dict[str, Any] = {
            "model": options.model,
            "messages": [message.model_dump() for message in conversation.messages],
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

    def _completion(self, answer: Any) -> Completion | Problem:
        try:
            choice, usage = answer.choices[0], answer.usage
            refusal = choice.message.refusal
            if choice.finish_reason == "content_filter":
                refusal = refusal or "content filter"
            return Completion(
                text=self._redacted(choice.message.content or ""),
                refusal=self._redacted(refusal) if refusal else None,
                finish_reason=choice.finish_reason or "stop",
                prompt_tokens=usage.prompt_tokens if usage else 0,
                completion_tokens=usage.completion_tokens if usage else 0,
            )
        # The client does not check what it is given: a web page comes as a plain string.
        except (AttributeError, LookupError, TypeError, ValueError):
            return self._failed(f"{self.options.base_url}: {_NO_CHAT}")

    def _weaker(self, dialect: _Dialect, error: APIStatusError) -> _Dialect | None:
        """What to try after the server refused a parameter; None when that is not the trouble."""
        if error.status_code not in (400, 422):
            return None
        about = str(error.body)
        if _FORMAT.search(about):
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

    def _advice(self, error: APIStatusError) -> str:
        if error.status_code == 401:
            name = self.options.api_key_env or "OPENAI_API_KEY"
            return f"; check the key in the environment variable {name}"
        if error.status_code in (400, 422) and _FORMAT.search(str(error.body)):
            return "; try another structured_output, such as auto"
        return ""

    def _read_key(self) -> str | None:
        name = self.options.api_key_env or "OPENAI_API_KEY"
        key = os.environ.get(name, "").strip()
        if not key and (self.options.api_key_env or _is_openai(self.options.base_url)):
            raise ReasonpixError(
                f"planner openai: no API key: set the environment variable {name}, or point "
                "base_url to a server that needs none"
            )
        if not all("!" <= letter <= "~" for letter in key):
            # The HTTP client would complain too, and show the key.
            raise ReasonpixError(
                f"planner openai: the environment variable {name} holds no API key: it has spaces "
                "or other characters that a key cannot have"
            )
        return key or None

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "[API key]") if self._key else text

    def _failed(self, reason: str) -> Problem:
        # OpenAI repeats a part of a wrong key: "sk-abcde***wxyz".
        reason = re.sub(r"\bsk-[\w*-]+", "[API key]", self._redacted(reason))
        return Problem(status="failed", reason=reason[:500])


@hookimpl
def planners() -> list[type[OpenAIPlanner]]:
    """Offer the planner `openai`."""
    return [OpenAIPlanner]
