"""Read the answer in a language model's text, which may hold more than the answer.

Models think aloud, wrap JSON in prose and fences, quote the question's form, or correct themselves.
A text that holds a valid answer is not sent back: a repair is paid for.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
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

_LEAST_BUDGET = 1_000_000
_MOST_PASSES = 8
_MOST_LENIENT_LENGTH = 5000
# How many characters are read of a text that is JSON in parts: so many, or as many as in so many
# passes over it. An object that is nearly JSON is at most so long.

_TAGS = "think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|analysis|seed:think"
_TAG = re.compile(
    rf"(?P<start><(?:{_TAGS})\b[^<>]*>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>analysis)"
    rf"|</(?:{_TAGS})\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final",
    re.IGNORECASE,
)
# DeepSeek, Qwen and many others; Mistral; Kimi; OpenThinker; the channels of gpt-oss.

_QUOTED = re.compile(r"(['\"`]).\1|“.”|‘.’|«.»|\(.\)")
# A tag between quotation marks is mentioned and does not begin or end any reasoning.

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
    is_cut = completion.finish_reason == "length"
    for value in _objects(_without_reasoning(completion.text, is_cut)):
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


def _without_reasoning(text: str, is_cut: bool) -> str:
    """The text without a model's reasoning, which holds drafts of answers."""
    parts: list[str] = []
    begin, opening = 0, None
    for tag in _tags(text):
        if tag["start"] is None:
            if opening is None:
                parts.clear()  # the opening tag is part of the prompt
            begin, opening = tag.end(), None
        elif opening is None:
            parts.append(text[begin : tag.start()])
            begin, opening = tag.end(), tag.start()
    # Reasoning that does not end was cut off. But a tag within a sentence may be mentioned.
    if opening is None or (not is_cut and re.search(r"[\w,] \Z", text[:opening][-2:])):
        parts.append(text[begin:])
    return "\n".join(parts)


def _tags(text: str) -> Iterator[re.Match[str]]:
    """The tags that begin and end reasoning, not those that are mentioned or part of an object."""
    tags = list(_TAG.finditer(text))
    ends = _object_ends(text) if tags else {}
    starts = sorted(ends)
    for tag in tags:
        before, after = text[max(0, tag.start() - 1) : tag.start()], text[tag.end() : tag.end() + 1]
        place = bisect(starts, tag.start())
        is_inside = place > 0 and tag.end() <= ends[starts[place - 1]]
        if not is_inside and not _QUOTED.fullmatch(f"{before}.{after}"):
            yield tag


def _object_ends(text: str) -> dict[int, int]:
    """Where the outermost JSON objects of a text start, and where they end."""
    budget = _Budget(text)
    ends: dict[int, int] = {}
    start = text.find("{")
    while start >= 0:
        end = budget.decoded(start)[1]
        if end is not None:
            ends[start] = end
        if budget.is_spent:
            break
        start = text.find("{", end or start + 1)
    return ends


class _Budget:
    """Decodes objects of a text until it has read too many characters or tried too many braces."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._left = max(_LEAST_BUDGET, _MOST_PASSES * len(text))
        self._per_brace = self._left // _MOST_BRACES

    @property
    def is_spent(self) -> bool:
        return self._left <= 0

    def decoded(self, start: int) -> tuple[Any, int | None]:
        """The object at a brace, and its end; no end if the brace belongs to prose or a string."""
        value, end, read = None, None, len(self._text)
        try:
            value, end = _decoder.raw_decode(self._text, start)
            read = end
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Unterminated string"):  # which was read to the end
                read = error.pos
        except (RecursionError, ValueError):
            pass
        self._left -= read - start + self._per_brace
        return value, end


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects in a text, the last first; those that are nearly JSON only after all others.

    An answer holds no object, so an object is tried before the one that contains it.
    """
    yield from _json_objects(text)
    if '\\"' in text:  # JSON within a JSON string
        yield from _json_objects(re.sub(r"\\([^u])", _unescaped, text))
    yield from _lenient_objects(text)


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    budget = _Budget(text)
    for start in _last_braces(text):
        value, end = budget.decoded(start)
        if end is not None:
            yield value
        if budget.is_spent:
            break


def _last_braces(text: str) -> Iterator[int]:
    """The places of the opening braces, the last first."""
    start = len(text)
    while (start := text.rfind("{", 0, start)) >= 0:
        yield start


def _unescaped(match: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t"}.get(match[1], match[1])


def _lenient_objects(text: str) -> Iterator[dict[str, Any]]:
    """Objects with single or typographic quotes, trailing commas or bare keys, as in YAML."""
    if '"' not in text:
        text = re.sub("[“”„]", '"', text)
    for start in islice(_last_braces(text), _MOST_LENIENT_BRACES):
        longest = text[start : start + _MOST_LENIENT_LENGTH]
        for end in islice(re.finditer("}", longest), _MOST_LENIENT_BRACES):
            try:
                value = yaml.safe_load(text[start : start + end.end()])
            except (yaml.YAMLError, AttributeError, RecursionError, TypeError, ValueError):
                continue  # the brace may belong to a string
            if isinstance(value, dict):
                yield value
                break
