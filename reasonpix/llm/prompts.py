"""Prompt files: the text of a task, the JSON schema of its answer, and worked examples.

```yaml
system: …          # instructions to the model
user: …            # the request, with every $placeholder of the task and no others
repair: …          # sent once after an unusable answer; $problem is the reason
schema: {…}        # JSON schema of the answer; answers have their keys in this order
examples:          # requests, each with its answer
  - {…, answer: {…}}
```
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Generic

import yaml
from pydantic import Field, ValidationError

from reasonpix.errors import RecipeError, problems_of
from reasonpix.llm.tasks import AnswerT, InvalidAnswer, RequestT, ResultT, Task
from reasonpix.llm.types import Conversation, Message
from reasonpix.plugin.types import Record

_TITLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Schema names that servers accept."""

_TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}


class _File(Record):
    """The content of a prompt file."""

    system: str
    user: str
    repair: str
    answer_schema: dict[str, Any] = Field(alias="schema")
    examples: tuple[dict[str, Any], ...] = ()


class Prompt(Generic[RequestT, AnswerT, ResultT]):
    """A validated prompt of a task. Its examples follow the rules that they teach."""

    def __init__(self, task: Task[RequestT, AnswerT, ResultT], path: Path | None = None) -> None:
        """Read the file at `path`, or the built-in prompt.

        Raises `RecipeError` if the file cannot be read or is not a prompt of this task.
        """
        self.task: Task[RequestT, AnswerT, ResultT] = task
        self._origin = path or f"built-in prompt {task.name!r}"
        content = self._read(path)
        self.digest = hashlib.sha256(content).hexdigest()
        """SHA-256 of the file's content, in hex."""
        try:
            fields = yaml.safe_load(content)
            if not isinstance(fields, dict):
                raise self._error(["not a mapping with system, user, repair, schema, examples"])
            self._file = _File.model_validate(fields)
        except yaml.YAMLError as error:
            raise self._error([f"not YAML: {error}"]) from error
        except ValidationError as error:
            raise self._error(problems_of(error)) from error
        problems = [
            *self._placeholder_problems("user", _template_variables(task)),
            *self._placeholder_problems("repair", {"problem"}),
            *self._schema_problems(),
        ]
        if problems:
            raise self._error(problems)
        turns = [Message(role="system", content=self._file.system.strip())]
        for number, example in enumerate(self._file.examples, start=1):
            turns += self._example(number, example)
        self._shared = tuple(turns)
        self.answer_schema = self._file.answer_schema

    def conversation(self, request: RequestT) -> Conversation:
        """The system text, the examples as turns, and the request."""
        return Conversation(
            messages=(*self._shared, self._request(request)),
            answer_schema=self.answer_schema,
            seed=request.seed,
            shared=len(self._shared),
        )

    def repaired(
        self, conversation: Conversation, text: str, problem: InvalidAnswer
    ) -> Conversation:
        """The conversation continued with an unusable answer and the request to repair it."""
        answer = Message(
            role="assistant", content=text or "(nothing)"
        )  # servers refuse empty turns
        repair = Template(self._file.repair).substitute(problem=problem).strip()
        turns = (*conversation.messages, answer, Message(role="user", content=repair))
        return conversation.model_copy(update={"messages": turns})

    @property
    def typical_length(self) -> tuple[int, int]:
        """Characters of a conversation and of its answer, estimated from the examples."""
        lengths = [len(turn.content) for turn in self._shared]
        requests, answers = lengths[1::2], lengths[2::2]
        if not answers:
            return lengths[0] + len(self._file.user), len(json.dumps(self.answer_schema))
        return sum(lengths) + sum(requests) // len(requests), sum(answers) // len(answers)

    def _read(self, path: Path | None) -> bytes:
        if path is None:
            built_in = resources.files("reasonpix.llm").joinpath(f"templates/{self.task.name}.yaml")
            return built_in.read_bytes()
        try:
            return path.read_bytes()
        except OSError as error:
            raise self._error([f"cannot be read: {error.strerror}; name a prompt file"]) from error

    def _request(self, request: RequestT) -> Message:
        text = Template(self._file.user).substitute(self.task.template_variables(request))
        return Message(role="user", content=text.strip())

    def _example(self, number: int, example: dict[str, Any]) -> list[Message]:
        fields = {key: value for key, value in example.items() if key != "answer"}
        try:
            request = self.task.request.model_validate({**fields, "seed": 0})
            answer = self.task.answer.model_validate(example.get("answer"))
            self.task.read(request, answer)
        except ValidationError as error:
            lines = [f"examples: number {number}: {line}" for line in problems_of(error)]
            raise self._error(lines) from error
        except InvalidAnswer as error:
            problem = f"the answer of number {number} breaks the rules that it teaches: {error}"
            raise self._error([f"examples: {problem}"]) from error
        # Structured output has its keys in the schema's order, so the examples do too.
        dumped = answer.model_dump(mode="json")
        ordered = {key: dumped[key] for key in self._file.answer_schema["properties"]}
        content = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))
        return [self._request(request), Message(role="assistant", content=content)]

    def _placeholder_problems(self, field: str, names: set[str]) -> list[str]:
        template = Template(getattr(self._file, field))
        if template.is_valid() and set(template.get_identifiers()) == names:
            return []
        placeholders = " and ".join(f"${name}" for name in sorted(names))
        return [f"{field}: use {placeholders}, no other placeholder, and $$ for a dollar sign"]

    def _schema_problems(self) -> list[str]:
        schema, fields = self._file.answer_schema, list(self.task.answer.model_fields)
        strict = (
            isinstance(schema.get("title"), str)
            and _TITLE.fullmatch(schema["title"]) is not None
            and schema.get("type") == "object"
            and schema.get("additionalProperties") is False
            and isinstance(schema.get("properties"), dict)
            and set(schema["properties"]) == set(fields)
            and isinstance(schema.get("required"), list)
            and set(schema["required"]) == set(fields)
        )
        if unknown := sorted(set(_types_of(schema)) - _TYPES):
            return [f"schema: not a JSON type: {', '.join(map(repr, unknown))}"]
        if strict:
            return []
        return [
            "schema: give it a title of letters, digits, - and _, type: object, "
            "additionalProperties: false, and exactly the properties "
            f"{', '.join(fields)}, all of them required"
        ]

    def _error(self, problems: list[str]) -> RecipeError:
        return RecipeError([f"prompts.{self.task.name}: {self._origin}: {p}" for p in problems])


def _template_variables(task: Task[Any, Any, Any]) -> set[str]:
    return set(task.request.model_fields) - {"seed"}


def _types_of(schema: Any) -> Iterator[str]:
    """All `type` values in a schema, at any depth."""
    if isinstance(schema, dict):
        types = schema.get("type")
        if isinstance(types, str | list):
            yield from [types] if isinstance(types, str) else map(str, types)
        for part in schema.values():
            yield from _types_of(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _types_of(part)
