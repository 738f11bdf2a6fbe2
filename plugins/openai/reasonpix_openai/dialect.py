"""The parameters that a server accepts; those that it refuses are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from reasonpix.llm import Conversation

StructuredOutput = Literal["json_schema", "json_object", "none"]

FORMAT = re.compile(
    r"response_format|json.?(schema|object)|structured.?output|grammar|guided", re.IGNORECASE
)
"""Matches a server's error about an unsupported response format."""

_GRAMMAR = re.compile(r"grammar|json.?schema", re.IGNORECASE)
# A server that cannot turn a schema into a grammar may call that an error of its own.


@dataclass(frozen=True)
class Dialect:
    """The variant of the protocol that a server accepts."""

    structured_output: StructuredOutput
    temperature: bool = True
    seed: bool = True
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def parameters(
        self, conversation: Conversation, temperature: float | None, max_tokens: int | None
    ) -> dict[str, Any]:
        """The parameters of a request; those that are None are left to the server."""
        parameters: dict[str, Any] = {}
        if temperature is not None and self.temperature:
            parameters["temperature"] = temperature
        if max_tokens is not None:
            parameters[self.limit] = max_tokens
        if self.seed:
            parameters["seed"] = conversation.seed % 2**31  # some servers have 32-bit seeds
        schema = conversation.answer_schema
        if self.structured_output == "json_schema":
            parameters["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": schema["title"], "strict": True, "schema": schema},
            }
        elif self.structured_output == "json_object":
            parameters["response_format"] = {"type": "json_object"}
        return parameters

    def without_refused(self, status: int, body: Any, keep_format: bool = False) -> Dialect | None:
        """The dialect to try next if the server refused a parameter, otherwise None.

        `body` is the response or its error. The limit of tokens is renamed, but never left out:
        costs would have no bound.
        """
        message = str(body)
        if status == 500 and _GRAMMAR.search(message):
            status = 400
        if status not in (400, 422, 501):
            return None
        for text in (_named(body), message):
            if FORMAT.search(text):
                if keep_format or self.structured_output == "none":
                    return None
                weaker = self.structured_output == "json_schema"
                return replace(self, structured_output="json_object" if weaker else "none")
            if "max_completion_tokens" in text and self.limit == "max_tokens":
                return replace(self, limit="max_completion_tokens")
            if re.search(r"\btemperature\b", text) and self.temperature:
                return replace(self, temperature=False)
            if re.search(r"\bseed\b", text) and self.seed:
                return replace(self, seed=False)
        return None


def left_out(wanted: Dialect, accepted: Dialect) -> tuple[str, ...]:
    """The parameters of `wanted` that `accepted` does not send."""
    names: list[str] = []
    if accepted.structured_output != wanted.structured_output:
        names.append(wanted.structured_output)
    names += [name for name in ("seed", "temperature") if not getattr(accepted, name)]
    return tuple(names)


def _named(body: Any) -> str:
    """The parameter that an error names in a field of its own, in OpenAI's form or FastAPI's."""
    fields = body if isinstance(body, Mapping) else {}
    inner = fields.get("error")
    if isinstance(inner, Mapping):
        fields = inner
    detail = fields.get("detail")
    places = (
        [item.get("loc") for item in detail if isinstance(item, Mapping)]
        if isinstance(detail, list)
        else []
    )
    return " ".join(str(name) for name in (fields.get("param"), *places) if name)
