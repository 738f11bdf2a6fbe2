"""The tasks of an LLM: P_gen, P_select and P_replace of the paper, and the resolver's.

A task defines the variables of its prompt and how an answer is validated. The prompt itself, with
the answer's JSON schema and examples, is in `templates/<task>.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from reasonpix.core.text import (
    canonical,
    closest,
    content_words,
    head_nouns,
    mentions,
    one_line,
    strip_article,
    words_of,
)
from reasonpix.plugin.components import PlannerTask
from reasonpix.plugin.types import (
    Choice,
    EditPlan,
    Record,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

MAX_INSTRUCTION_LENGTH = 300
"""Maximum number of characters of an instruction."""

MAX_TARGET_WORDS = 4
"""Maximum number of words of a target category."""

_DAMAGED = re.compile("[\ufffd\ud800-\udfff]")

RequestT = TypeVar("RequestT", RewriteRequest, SelectRequest, ReplaceRequest, ResolveRequest)
AnswerT = TypeVar("AnswerT", bound=BaseModel)
ResultT = TypeVar("ResultT")


class InvalidAnswer(Exception):
    """What is wrong with an LLM's answer, in words for the LLM and for the user.

    The text is sent in the repair turn: a change of the wording changes later answers.
    """


@dataclass(frozen=True)
class Task(Generic[RequestT, AnswerT, ResultT]):
    """One kind of request to an LLM."""

    name: PlannerTask
    request: type[RequestT]
    template_variables: Callable[[RequestT], Mapping[str, str]]
    """The value of each `$` placeholder of the prompt."""
    answer: type[AnswerT]
    read: Callable[[RequestT, AnswerT], ResultT]
    """Turn an answer into a result. Raises `InvalidAnswer` with everything that is wrong."""


# -- P_gen, Eq. 2 ---------------------------------------------------------------------------------


class RewriteAnswer(Record):
    """An indirect instruction, and the words that it must avoid."""

    revealing: tuple[str, ...]
    instruction: str


def read_rewriting(request: RewriteRequest, answer: RewriteAnswer) -> Rewriting:
    """Read a candidate from an answer. Raises `InvalidAnswer`."""
    instruction = one_line(answer.instruction)
    # A word in both captions names something that stays unchanged, so it reveals nothing.
    revealing = tuple(
        word
        for word in _names(answer.revealing)
        if not (mentions(request.caption, word) and mentions(request.edited_caption, word))
    )
    problems = _damage(answer) or _instruction_problems(instruction)
    if not problems and words_of(instruction) == words_of(request.instruction):
        problems.append("instruction repeats the direct instruction")
    if leaked := [word for word in revealing if mentions(instruction, word)]:
        words = ", ".join(map(quote, leaked))
        problems.append(f"instruction gives the edit away by what it must not use: {words}")
    if problems:
        raise InvalidAnswer("; ".join(problems))
    return Rewriting(instruction=instruction, revealing=revealing)


REWRITE = Task(
    "rewrite",
    RewriteRequest,
    lambda request: {
        "caption": one_line(request.caption),
        "edited_caption": one_line(request.edited_caption),
        "instruction": one_line(request.instruction),
    },
    RewriteAnswer,
    read_rewriting,
)


# -- P_select, Eq. 3 ------------------------------------------------------------------------------


class NumberAnswer(Record):
    """The number of the best option, from 1."""

    best: int


def _read_number(options: Sequence[str], answer: NumberAnswer) -> Choice:
    if not 1 <= answer.best <= len(options):
        raise InvalidAnswer(f"best must be a number from 1 to {len(options)}, not {answer.best}")
    return Choice(index=answer.best - 1)


def _numbered(options: Sequence[str]) -> str:
    return "\n".join(
        f"{number}. {one_line(option)}" for number, option in enumerate(options, start=1)
    )


SELECT = Task(
    "select",
    SelectRequest,
    lambda request: {
        "caption": one_line(request.caption),
        "edited_caption": one_line(request.edited_caption),
        "instruction": one_line(request.instruction),
        "candidates": _numbered(request.candidates),
    },
    NumberAnswer,
    lambda request, answer: _read_number(request.candidates, answer),
)

# -- The resolver: which option does the instruction mean? -----------------------------------------

RESOLVE = Task(
    "resolve",
    ResolveRequest,
    lambda request: {
        "caption": one_line(request.caption),
        "instruction": one_line(request.instruction),
        "options": _numbered(request.options),
    },
    NumberAnswer,
    lambda request, answer: _read_number(request.options, answer),
)

# -- P_replace, Eq. 6 -----------------------------------------------------------------------------


class ReplaceAnswer(Record):
    """Which category to replace by which, and an instruction that hints at both."""

    selected: str
    target: str
    selected_synonyms: tuple[str, ...]
    target_synonyms: tuple[str, ...]
    instruction: str


def read_plan(request: ReplaceRequest, answer: ReplaceAnswer) -> EditPlan:
    """Read a plan from an answer, with `selected` spelt as in the request.

    Raises `InvalidAnswer`.
    """
    categories = request.categories
    target, instruction = strip_article(answer.target), one_line(answer.instruction)
    synonyms = {
        "selected": _names(answer.selected_synonyms),
        "target": _names(answer.target_synonyms),
    }
    problems = _damage(answer)

    selected = closest(answer.selected, categories)
    if selected is None:
        problems.append(
            f"selected must be one of {', '.join(categories)}, not {quote(answer.selected)}"
        )
    is_list = any(separator in target for separator in ",;/|")
    if not 1 <= len(words_of(target)) <= MAX_TARGET_WORDS or is_list or not target.isprintable():
        problems.append(
            f"target must be a name of at most {MAX_TARGET_WORDS} words, not {quote(target)}"
        )
    elif (present := canonical(target, categories)) is not None:
        problems.append(f"target must not be in the picture yet, but {quote(target)} is {present}")
    elif selected is not None and (
        canonical(target, synonyms["selected"]) or canonical(selected, synonyms["target"])
    ):
        problems.append(f"target {quote(target)} is another word for {selected}")

    problems += _instruction_problems(instruction)
    for role, name in (("selected", selected or answer.selected), ("target", target)):
        names = (*head_nouns(name), *synonyms[role])
        if leaked := [word for word in names if mentions(instruction, word)]:
            problems.append(
                f"instruction gives the {role} category away by the word {quote(leaked[0])}"
            )

    if problems or selected is None:
        raise InvalidAnswer("; ".join(problems))
    others = (
        word
        for word in (*synonyms["selected"], *synonyms["target"])
        if word not in (selected, target)
    )
    return EditPlan(
        selected=selected,
        target=target,
        instruction=instruction,
        synonyms=tuple(dict.fromkeys(others)),
    )


REPLACE = Task(
    "replace",
    ReplaceRequest,
    lambda request: {
        "caption": one_line(request.caption),
        "categories": ", ".join(map(one_line, request.categories)),
    },
    ReplaceAnswer,
    read_plan,
)

TASKS: Mapping[PlannerTask, Task[Any, Any, Any]] = {
    task.name: task for task in (REWRITE, SELECT, REPLACE, RESOLVE)
}


def _names(words: Sequence[str]) -> list[str]:
    """Words with a meaning, without articles and duplicates."""
    return list(dict.fromkeys(strip_article(word) for word in words if content_words(word)))


def _damage(answer: RewriteAnswer | ReplaceAnswer) -> list[str]:
    """The fields with characters that were lost on the way, such as in another encoding."""
    fields = {name: (value,) if isinstance(value, str) else value for name, value in answer}
    return [
        f"{name} holds damaged characters"
        for name, texts in fields.items()
        if any(_DAMAGED.search(text) for text in texts)
    ]


def _instruction_problems(instruction: str) -> list[str]:
    if not words_of(instruction):
        return ["instruction is empty"]
    if len(instruction) > MAX_INSTRUCTION_LENGTH:
        return [
            f"instruction has {len(instruction)} characters, {MAX_INSTRUCTION_LENGTH} are allowed"
        ]
    if not instruction.isprintable():
        return ["instruction holds control characters"]
    return []


def quote(text: str) -> str:
    """Text of a model for a message: on one line and shortened."""
    shown = text if len(text) <= 160 else text[:160] + "…"
    return repr(shown)
