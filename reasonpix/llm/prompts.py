"""Prompt files: the words of a task, its answer's JSON schema, and worked examples.

```yaml
system: …          # what to do
user: …            # the question; each $placeholder of the task, and no other
repair: …          # sent once after an answer that cannot be used; $problem says why
schema: {…}        # JSON schema of the answer; an answer has its keys in the order of this one
examples:          # questions, each with the answer to give
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

from reasonpix.errors import RecipeError
from reasonpix.llm.tasks import Answer, InvalidAnswer, Request, Result, Task
from reasonpix.llm.types import Conversation, Message
from reasonpix.plugin.types import Record

_TITLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What servers take as the name of a schema."""


_TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}


class _File(Record):
    """The file as it is written."""

    system: str
    user: str
    repair: str
    answer_schema: dict[str, Any] = Field(alias="schema")
    examples: tuple[dict[str, Any], ...] = ()


class Prompt(Generic[Request, Answer, Result]):
    """The prompt of a task, checked: its examples keep the rules that they are to teach."""

    def __init__(self, task: Task[Request, Answer, Result], path: Path | None = None) -> None:
        """Read the file at `path`, or the built-in prompt.

        Raises `RecipeError` when the file cannot be read or is no prompt of this task.
        """
        self.task: Task[Request, Answer, Result] = task
        self._where = path or f"built-in prompt {task.verb!r}"
        content = self._read(path)
        self.digest = hashlib.sha256(content).hexdigest()
        """SHA-256 of the file's content, in hex: another content is another prompt."""
        try:
            content_of = yaml.safe_load(content)
            if not isinstance(content_of, dict):
                raise self._wrong(["it is no mapping with system, user, repair, schema, examples"])
            self._file = _File.model_validate(content_of)
        except yaml.YAMLError as error:
            raise self._wrong([f"not YAML: {error}"]) from error
        except ValidationError as error:
            raise self._wrong(explain(error)) from error
        problems = [
            *self._holes("user", set(_holes_of(task))),
            *self._holes("repair", {"problem"}),
            *self._schema_problems(),
        ]
        if problems:
            raise self._wrong(problems)
        turns = [Message(role="system", content=self._file.system.strip())]
        for number, example in enumerate(self._file.examples, start=1):
            turns += self._example(number, example)
        self._shared = tuple(turns)
        self.answer_schema = self._file.answer_schema

    def conversation(self, request: Request) -> Conversation:
        """The system text, the examples as turns, and the question."""
        return Conversation(
            messages=(*self._shared, self._question(request)),
            answer_schema=self.answer_schema,
            seed=request.seed,
            shared=len(self._shared),
        )

    def repaired(self, asked: Conversation, text: str, problem: InvalidAnswer) -> Conversation:
        """The conversation that asks once more after an answer that cannot be used."""
        # Servers refuse an empty turn.
        bad = Message(role="assistant", content=text or "(nothing)")
        again = Template(self._file.repair).substitute(problem=problem).strip()
        turns = (*asked.messages, bad, Message(role="user", content=again))
        return asked.model_copy(update={"messages": turns})

    @property
    def typical_length(self) -> tuple[int, int]:
        """Characters of a whole conversation, and of its answer, as far as the examples tell."""
        lengths = [len(turn.content) for turn in self._shared]
        questions, answers = lengths[1::2], lengths[2::2]
        if not answers:
            return lengths[0] + len(self._file.user), len(json.dumps(self.answer_schema))
        return sum(lengths) + sum(questions) // len(questions), sum(answers) // len(answers)

    def _read(self, path: Path | None) -> bytes:
        if path is None:
            built_in = resources.files("reasonpix.llm").joinpath(f"templates/{self.task.verb}.yaml")
            return built_in.read_bytes()
        try:
            return path.read_bytes()
        except OSError as error:
            raise self._wrong([f"cannot be read: {error.strerror}; name a prompt file"]) from error

    def _question(self, request: Request) -> Message:
        text = Template(self._file.user).substitute(self.task.holes(request))
        return Message(role="user", content=text.strip())

    def _example(self, number: int, example: dict[str, Any]) -> list[Message]:
        asked = {key: value for key, value in example.items() if key != "answer"}
        try:
            request = self.task.request.model_validate({**asked, "seed": 0})
            answer = self.task.answer.model_validate(example.get("answer"))
            self.task.read(request, answer)
        except ValidationError as error:
            lines = [f"examples: number {number}: {line}" for line in explain(error)]
            raise self._wrong(lines) from error
        except InvalidAnswer as error:
            what = f"the answer of number {number} breaks the rules it is to teach: {error}"
            raise self._wrong([f"examples: {what}"]) from error
        # What is held to a schema writes its keys in the schema's order, so the examples do too.
        fields = answer.model_dump(mode="json")
        ordered = {key: fields[key] for key in self._file.answer_schema["properties"]}
        content = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))
        return [self._question(request), Message(role="assistant", content=content)]

    def _holes(self, name: str, wanted: set[str]) -> list[str]:
        template = Template(getattr(self._file, name))
        if template.is_valid() and set(template.get_identifiers()) == wanted:
            return []
        holes = " and ".join(f"${hole}" for hole in sorted(wanted))
        return [f"{name}: use {holes}, no other placeholder, and $$ for a dollar"]

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
            return [f"schema: no JSON type {', '.join(map(repr, unknown))}"]
        wanted = ", ".join(fields)
        what = (
            "a title of letters, digits, - and _, type: object, additionalProperties: false, and "
            f"exactly the properties {wanted}, all of them required"
        )
        return [] if strict else [f"schema: give it {what}"]

    def _wrong(self, problems: list[str]) -> RecipeError:
        return RecipeError([f"prompts.{self.task.verb}: {self._where}: {p}" for p in problems])


def _holes_of(task: Task[Any, Any, Any]) -> set[str]:
    return set(task.request.model_fields) - {"seed"}


def _types_of(schema: Any) -> Iterator[str]:
    """All types that a schema names, at any depth."""
    if isinstance(schema, dict):
        named = schema.get("type")
        if isinstance(named, str | list):
            yield from [named] if isinstance(named, str) else map(str, named)
        for part in schema.values():
            yield from _types_of(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _types_of(part)


def explain(error: ValidationError) -> list[str]:
    """The problems of a validation, each with the field it is in."""
    return [
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"])))
        for item in error.errors(include_url=False, include_input=False)
    ]
