"""The values that pass between the core and a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from reasonpix.plugin.types import Record


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(Record):
    """What an LLM is to continue, and the form of its answer.

    Two equal conversations with different seeds may be continued differently.
    """

    messages: tuple[Message, ...]
    answer_schema: Mapping[str, Any]
    """A JSON schema for the answer's text, strict (all properties required, no others); its `title`
    names it. An LLM that cannot be held to it may ignore it: the prompt asks for the same, and what
    comes is checked."""
    seed: int
    shared: int = 0
    """Leading messages that all questions of a task share: an LLM may compute them once."""


class Completion(Record):
    """How an LLM continued a conversation.

    `refusal` is the model's or the provider's reason to decline, None when it answered;
    `finish_reason` is `stop`, or `length` when the answer was cut off.
    """

    text: str
    refusal: str | None = None
    finish_reason: str = "stop"
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)


class Unavailable(Record):
    """An attempt that got no answer, and may get one later: the core asks again."""

    reason: str
    retry_after_s: float | None = Field(None, ge=0)
    """How long the server asks to be left alone."""
    overloaded: bool = False
    """Whether there were too many calls (429, 503): fewer are made at once."""
    may_be_charged: bool = False
    """Whether the server may have answered, and charge for it (a time-out, a lost connection)."""


class Price(Record):
    """What tokens cost, in any currency, per million."""

    prompt: float = Field(ge=0, description="Price of a million prompt tokens")
    completion: float = Field(ge=0, description="Price of a million completion tokens")

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6
