"""What passes between the core and a language model, and the interface of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import Field

from reasonpix.plugin.types import Problem, Record


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(Record):
    """The turns that an LLM continues, and the form of its answer.

    Equal conversations with different seeds may be continued differently.
    """

    messages: tuple[Message, ...]
    answer_schema: Mapping[str, Any]
    """A strict JSON schema of the answer (all properties required, no others), named by its
    `title`. An LLM without structured output may ignore it: the prompt describes the same form,
    and every answer is validated."""
    seed: int
    shared: int = 0
    """Number of leading messages that all requests of a task share, so an LLM can cache them."""


class Completion(Record):
    """An LLM's continuation of a conversation.

    `refusal` is the reason that the model or provider gave for declining, None if it answered;
    `finish_reason` is `stop`, or `length` for a truncated answer. No `prompt_tokens` means that the
    server did not report tokens: the answer then costs what it can cost at most.
    """

    text: str
    refusal: str | None = None
    finish_reason: str = "stop"
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)
    left_out: tuple[str, ...] = ()
    """Parameters that the server refused, such as `seed`: it answered a request without them."""


class Unavailable(Record):
    """An attempt without an answer. The core retries it."""

    reason: str
    retry_after_s: float | None = Field(None, ge=0)
    """How long the server asked to wait."""
    overloaded: bool = False
    """Whether there were too many calls (429, 503). Fewer calls are then made at once."""
    may_be_charged: bool = False
    """Whether the server may have answered, and may charge for it (time-out, lost connection)."""


Attempt = Completion | Problem | Unavailable
"""The result of one attempt. A `Problem` is final; an `Unavailable` is retried."""


class Price(Record):
    """Price of tokens, in any currency, per million."""

    prompt: float = Field(ge=0, description="Price of a million prompt tokens")
    completion: float = Field(ge=0, description="Price of a million completion tokens")

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of these tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class LanguageModel(Protocol):
    """What the dispatcher needs from a language model."""

    @property
    def concurrency(self) -> int:
        """Maximum number of concurrent calls of `complete`."""

    @property
    def batch_size(self) -> int:
        """Maximum number of conversations in one call of `complete`."""

    @property
    def max_retries(self) -> int:
        """How often a failed call is repeated."""

    @property
    def price(self) -> Price | None:
        """Price of its tokens, if known."""

    @property
    def max_answer_tokens(self) -> int | None:
        """Maximum completion tokens of an answer, None if unbounded."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Everything that changes an answer, such as model and temperature (JSON values)."""

    @property
    def jobs(self) -> bool:
        """Whether to call `submit` and `collect` instead of `complete`."""

    def complete(self, conversations: Sequence[Conversation], /) -> Sequence[Attempt]:
        """Attempt to continue each conversation once, in order.

        Raise a `ReasonpixError` for an error that affects all calls: it stops the run.
        """

    def submit(self, conversations: Mapping[str, Conversation], /) -> str:
        """Submit a batch job and return its id.

        Submitting the same conversations again returns the id of the existing job.
        """

    def collect(self, job_id: str, /) -> Mapping[str, Attempt] | None:
        """Results of a job by the keys given to `submit`, None while it is running."""
