"""Read the answer in a language model's text, which may hold more than the answer.

Models think aloud, wrap JSON in prose and fences, quote the question's form, or correct themselves.
A text that holds a valid answer is not sent back: a repair is paid for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import yaml
from pydantic import ValidationError

from reasonpix.errors import problems_of
from reasonpix.llm.tasks import AnswerT, InvalidAnswer, RequestT, ResultT, Task
from reasonpix.llm.types import Completion

_MOST_BRACES = 1000
_MOST_LENIENT_BRACES = 4
# How many opening braces are tried in a text that is JSON in parts, and in one that is not, where
# as many closing ones are tried for each: it takes longer.

_TAGS = "think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|analysis|seed:think"
_TAG = re.compile(
    rf"(?P<start><(?:{_TAGS})\b[^<>]*>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>analysis)"
    rf"|</(?:{_TAGS})\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final",
    re.IGNORECASE,
)
# DeepSeek, Qwen and many others; Mistral; Kimi; OpenThinker; the channels of gpt-oss.

_decoder = json.JSONDecoder(strict=False)  # a line break in a string does not invalidate it


def read_answer(
    task: Task[RequestT, AnswerT, ResultT], request: RequestT, completion: Completion
) -> ResultT:
    """The result of the last object in a completion that is a valid answer.

    The last, because drafts and examples precede what a model settles on. An object is valid if it
    has the task's fields and keeps its rules. Raises `InvalidAnswer`: with what is wrong with the
    last object that has the fields, otherwise with why there is none.
    """
    problem: InvalidAnswer | None = None
    for value in _objects(_without_reasoning(completion.text)):
        try:
            answer = task.answer.model_validate(value)
        except ValidationError:
            continue
        try:
            return task.read(request, answer)
        except InvalidAnswer as error:
            problem = problem or error
    raise problem or _explained(task, completion)


def _explained(task: Task[RequestT, AnswerT, ResultT], completion: Completion) -> InvalidAnswer:
    """Why there is no answer: what is wrong from the first brace to the last.

    The wording is part of the repair request, whose stored answer would not be found under another.
    """
    text = completion.text
    start, end = text.find("{"), text.rfind("}")
    if not text.lstrip().startswith("[") and 0 <= start < end:
        text = text[start : end + 1]
    try:
        task.answer.model_validate_json(text)
        problems = "there is no answer after the reasoning"
    except ValidationError as error:
        problems = "; ".join(problems_of(error))
    is_cut = completion.finish_reason == "length"
    cut = "the answer was cut off, it is too long; "
    return InvalidAnswer(cut + problems if is_cut else problems)


def _without_reasoning(text: str) -> str:
    """The text without a model's reasoning, which holds drafts of answers."""
    parts: list[str] = []
    begin, reasoning = 0, False
    for tag in _TAG.finditer(text):
        if tag["start"] is None:
            if not reasoning:
                parts.clear()  # the opening tag is part of the prompt
            begin, reasoning = tag.end(), False
        elif not reasoning:
            parts.append(text[begin : tag.start()])
            reasoning = True
    if not reasoning:  # otherwise the reasoning was cut off
        parts.append(text[begin:])
    return "\n".join(parts)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects in a text, the last first; those that are nearly JSON only after all others.

    An answer holds no object, so an object is tried before the one that contains it.
    """
    yield from _json_objects(text)
    if '\\"' in text:  # JSON within a JSON string
        yield from _json_objects(re.sub(r"\\([^u])", _unescaped, text))
    yield from _lenient_objects(text)


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    for start in _last_braces(text, _MOST_BRACES):
        try:
            yield _decoder.raw_decode(text, start)[0]
        except (RecursionError, ValueError):
            continue  # the brace belongs to prose or to a string


def _last_braces(text: str, most: int) -> Iterator[int]:
    """The places of the last opening braces, the last first."""
    start = len(text)
    while most and (start := text.rfind("{", 0, start)) >= 0:
        yield start
        most -= 1


def _unescaped(match: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t"}.get(match[1], match[1])


def _lenient_objects(text: str) -> Iterator[dict[str, Any]]:
    """Objects with single or typographic quotes, trailing commas or bare keys, as in YAML."""
    if '"' not in text:
        text = re.sub("[“”„]", '"', text)
    for start in _last_braces(text, _MOST_LENIENT_BRACES):
        for end in islice(re.finditer("}", text[start:]), _MOST_LENIENT_BRACES):
            try:
                value = yaml.safe_load(text[start : start + end.end()])
            except (yaml.YAMLError, AttributeError, RecursionError, TypeError, ValueError):
                continue  # the brace may belong to a string
            if isinstance(value, dict):
                yield value
                break
