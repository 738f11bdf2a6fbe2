"""Planning by a language model: what all planners that talk to an LLM share.

`LLMPlanner` turns P_replace (Eq. 6) into a conversation and a JSON schema, reads the answer, checks
it, and asks once for a better one. A plugin implements `complete` alone. The words of the prompt
are in `prompts/replace.yaml`.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from reasonpix.errors import RecipeError
from reasonpix.records import EditPlan, Problem, Record, ReplaceRequest
from reasonpix.slots import Options, Planner
from reasonpix.words import canonical, mentions, words_of

LONGEST_INSTRUCTION = 300
"""Characters of the longest instruction that is accepted."""

LONGEST_TARGET = 4
"""Words of the longest target category that is accepted."""

_VERSION = "1"
# Raise it when messages, schema, checks or repair change: plans of the old code go stale.


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(Record):
    """What an LLM is to continue. `seed` belongs to the record: equal messages may differ."""

    messages: tuple[Message, ...]
    seed: int


class Completion(Record):
    """How an LLM continued a conversation.

    `refusal` is the model's or the provider's reason to decline, None when it answered;
    `finish_reason` is `stop`, or `length` when the answer was cut off.
    """

    text: str
    refusal: str | None = None
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ReplaceAnswer(Record):
    """Which category to replace, by which other one, and an instruction that hints at both."""

    selected: str = Field(description="The category to replace, copied from the list given")
    target: str = Field(description="The category to put in its place, a short singular noun")
    instruction: str = Field(
        description="One indirect sentence that names neither of the two categories"
    )
    selected_synonyms: tuple[str, ...] = Field(description="Other words for the selected category")
    target_synonyms: tuple[str, ...] = Field(description="Other words for the target category")


class ReplaceExample(Record):
    """A worked example in a prompt: a question and the answer to give."""

    caption: str
    categories: tuple[str, ...]
    answer: ReplaceAnswer


class ReplacePrompt(Record):
    """P_replace as a file holds it: texts with `$` placeholders, and worked examples."""

    system: str
    user: str
    repair: str
    examples: tuple[ReplaceExample, ...] = ()

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        for name, wanted in (("user", {"caption", "categories"}), ("repair", {"problem"})):
            template = Template(getattr(self, name))
            if not template.is_valid() or set(template.get_identifiers()) != wanted:
                holes = " and ".join(f"${hole}" for hole in sorted(wanted))
                raise ValueError(f"{name}: use {holes}, no other placeholder, and $$ for a dollar")
        for number, example in enumerate(self.examples, start=1):
            try:
                read_plan(example.categories, example.answer)
            except InvalidAnswer as problem:
                raise ValueError(
                    f"examples: the answer of example {number} breaks the rules it "
                    f"is to teach: {problem}"
                ) from problem
        return self

    def messages(self, caption: str, categories: Iterable[str]) -> tuple[Message, ...]:
        """The system text, the examples as turns, and the question."""
        turns = [Message(role="system", content=self.system.strip())]
        for example in self.examples:
            turns += [
                self._question(example.caption, example.categories),
                Message(role="assistant", content=example.answer.model_dump_json()),
            ]
        return (*turns, self._question(caption, categories))

    def _question(self, caption: str, categories: Iterable[str]) -> Message:
        text = Template(self.user).substitute(caption=caption, categories=", ".join(categories))
        return Message(role="user", content=text.strip())


class LLMPlannerOptions(Options):
    """Options of every planner that talks to an LLM."""

    # The path is neutral, the content behind it is not: see `LLMPlanner.identity`.
    neutral: ClassVar[frozenset[str]] = frozenset({"prompt"})

    prompt: Path | None = Field(
        None, description="A file to use in the place of the built-in prompt, in its format"
    )


class InvalidAnswer(Exception):
    """What is wrong with an LLM's answer, worded for the LLM as much as for the user."""


P_co = TypeVar("P_co", bound=LLMPlannerOptions, covariant=True)
Answer = TypeVar("Answer", bound=BaseModel)
Result = TypeVar("Result")


class LLMPlanner(Planner[P_co]):
    """A planner that asks a language model. A subclass says how, in `complete`."""

    Options: ClassVar[type[Options]] = LLMPlannerOptions

    @abstractmethod
    def complete(
        self, conversations: Sequence[Conversation], schema: Mapping[str, Any]
    ) -> list[Completion | Problem]:
        """Continue each conversation; a failure is the `Problem` of that conversation alone.

        `schema` is a JSON schema for the text of every answer, strict (all properties required,
        no others); its `title` names it. An LLM that cannot be held to it may ignore it: the
        prompt asks for the same, and what comes is checked.
        """

    def identity(self) -> Mapping[str, Any]:
        """The version of the planning code, and the SHA-256 of the prompt file's content."""
        return {"planning": _VERSION, "prompt": hashlib.sha256(self._prompt_bytes).hexdigest()}

    def replace(self, requests: Sequence[ReplaceRequest]) -> list[EditPlan | Problem]:
        """One plan for each request (Eq. 6).

        A refusal, and an answer that stays unusable after one repair turn, are `rejected`; what
        kept the LLM from answering is `failed`.
        """
        asked = [request for request in requests if request.categories]
        plans = iter(
            self._ask(
                [
                    Conversation(
                        messages=self.prompt.messages(request.caption, request.categories),
                        seed=request.seed,
                    )
                    for request in asked
                ],
                ReplaceAnswer,
                [partial(read_plan, request.categories) for request in asked],
                Template(self.prompt.repair),
            )
        )
        nothing = Problem(status="rejected", reason="no category to choose from")
        return [next(plans) if request.categories else nothing for request in requests]

    def check(self) -> None:
        """Read the prompt, so that a bad file is known before the first question."""
        _ = self.prompt

    @cached_property
    def prompt(self) -> ReplacePrompt:
        """P_replace. Raises `RecipeError` when the file is not a prompt."""
        where = self.options.prompt or "built-in prompt"
        try:
            return ReplacePrompt.model_validate(yaml.safe_load(self._prompt_bytes))
        except yaml.YAMLError as error:
            raise RecipeError([f"prompt: {where} is not YAML: {error}"]) from error
        except ValidationError as error:
            lines = _explain(error)
            raise RecipeError([f"prompt: {where}: {line}" for line in lines]) from error

    @cached_property
    def _prompt_bytes(self) -> bytes:
        # Read once, so that the fingerprint and the questions cannot tell of different contents.
        path = self.options.prompt
        if path is None:
            return resources.files("reasonpix").joinpath("prompts/replace.yaml").read_bytes()
        try:
            return path.read_bytes()
        except OSError as error:
            problem = f"prompt: cannot read {path}: {error.strerror}; name a prompt file or none"
            raise RecipeError([problem]) from error

    def _ask(
        self,
        conversations: Sequence[Conversation],
        answer: type[Answer],
        read: Sequence[Callable[[Answer], Result]],
        repair: Template,
    ) -> list[Result | Problem]:
        """Put the questions, read each answer by its `read`, ask again once where that raises."""
        schema = answer.model_json_schema()
        results: dict[int, Result | Problem] = {}
        unanswered = dict(enumerate(conversations))
        for _ in range(2):
            if not unanswered:
                break
            completions = self.complete(list(unanswered.values()), schema)
            again: dict[int, Conversation] = {}
            for (index, asked), completion in zip(unanswered.items(), completions, strict=True):
                if isinstance(completion, Problem):
                    results[index] = completion
                    continue
                if completion.refusal is not None:
                    reason = f"refused: {_quote(completion.refusal)}"
                    results[index] = Problem(status="rejected", reason=reason)
                    continue
                try:
                    results[index] = read[index](_parse(completion, answer))
                except InvalidAnswer as problem:
                    reason = f"no usable answer, even after a repair: {problem}"
                    results[index] = Problem(status="rejected", reason=reason)
                    # Servers refuse an empty turn.
                    bad = Message(role="assistant", content=completion.text or "(nothing)")
                    text = repair.substitute(problem=problem).strip()
                    turns = (*asked.messages, bad, Message(role="user", content=text))
                    again[index] = asked.model_copy(update={"messages": turns})
            unanswered = again
        return [results[index] for index in range(len(conversations))]


def _parse(completion: Completion, answer: type[Answer]) -> Answer:
    """The answer in a completion's text. Raises `InvalidAnswer`."""
    try:
        return answer.model_validate_json(_json_of(completion.text))
    except ValidationError as error:
        cut = "the answer was cut off, it is too long; "
        problems = "; ".join(_explain(error))
        raise InvalidAnswer(
            cut + problems if completion.finish_reason == "length" else problems
        ) from error


def _json_of(text: str) -> str:
    """The JSON object in a text that may wrap it in a ``` fence or in prose."""
    start, end = text.find("{"), text.rfind("}")
    if text.lstrip().startswith("[") or start < 0 or end < start:
        return text
    return text[start : end + 1]


def _explain(error: ValidationError) -> list[str]:
    """The problems of a validation, each with the field it is in."""
    return [
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"])))
        for item in error.errors(include_url=False, include_input=False)
    ]


def read_plan(categories: Sequence[str], answer: ReplaceAnswer) -> EditPlan:
    """The plan in an answer to a question about `categories`.

    `selected` becomes the category as it is written there. Raises `InvalidAnswer` that tells all
    that is wrong.
    """
    target, instruction = (" ".join(text.split()) for text in (answer.target, answer.instruction))
    synonyms = {
        "selected": [word for word in answer.selected_synonyms if words_of(word)],
        "target": [word for word in answer.target_synonyms if words_of(word)],
    }
    problems = []

    selected = canonical(answer.selected, categories)
    if selected is None:
        problems.append(
            f"selected must be one of {', '.join(categories)}, not {_quote(answer.selected)}"
        )
    if not 1 <= len(words_of(target)) <= LONGEST_TARGET or not target.isprintable():
        problems.append(
            f"target must be a name of at most {LONGEST_TARGET} words, not {_quote(target)}"
        )
    elif (present := canonical(target, categories)) is not None:
        problems.append(f"target must not be in the picture yet, but {_quote(target)} is {present}")
    elif selected is not None and (
        canonical(target, synonyms["selected"]) or canonical(selected, synonyms["target"])
    ):
        problems.append(f"target {_quote(target)} is another word for {selected}")

    if not words_of(instruction):
        problems.append("instruction is empty")
    elif len(instruction) > LONGEST_INSTRUCTION:
        problems.append(
            f"instruction has {len(instruction)} characters, {LONGEST_INSTRUCTION} are allowed"
        )
    elif not instruction.isprintable():
        problems.append("instruction holds control characters")
    for role, name in (("selected", selected or answer.selected), ("target", target)):
        # The last word of a compound gives it away as well: "butterfly" for "monarch butterfly".
        words = dict.fromkeys((name, *words_of(name)[-1:], *synonyms[role]))
        if leaked := [word for word in words if mentions(instruction, word)]:
            problems.append(
                f"instruction gives the {role} category away by the word {_quote(leaked[0])}"
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


def _quote(text: str) -> str:
    """Foreign text for a message: on one line and not endless."""
    shown = text if len(text) <= 160 else text[:160] + "…"
    return repr(shown)
