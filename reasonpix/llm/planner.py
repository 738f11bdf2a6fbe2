"""Planning by a language model: what all planners that talk to an LLM share.

`LLMPlanner` words the questions (`tasks`, `prompt`), has them answered (`calling`: retries, cost,
every raw answer kept), reads the answers, and asks once for a better one. A plugin implements
`complete` alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, TypeVar

from pydantic import Field, ValidationError

from reasonpix.errors import ReasonpixError
from reasonpix.llm.dispatch import STOPPED, Dispatcher, make_dispatcher
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.prompts import Prompt, explain
from reasonpix.llm.tasks import (
    REPLACE,
    RESOLVE,
    REWRITE,
    SELECT,
    TASKS,
    Answer,
    InvalidAnswer,
    Request,
    Result,
    Task,
    quote,
)
from reasonpix.llm.types import Completion, Conversation, Price, Unavailable
from reasonpix.plugin.components import Options, Planner, PlannerTask
from reasonpix.plugin.types import (
    Choice,
    EditPlan,
    Problem,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

_VERSION = "2"
# Raise it when messages, checks or repair change: results of the old code go stale.


class LLMPlannerOptions(Options):
    """Options of every planner that talks to an LLM."""

    # The path of a prompt is neutral, its content is not: see `LLMPlanner.prompt_identity`.
    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"prompts", "price", "max_retries"})

    prompts: dict[PlannerTask, Path] = Field(
        {},
        description="Files to use in the place of built-in prompts, by rewrite (P_gen), select "
        "(P_select), replace (P_replace), resolve",
    )
    price: Price | None = Field(
        None, description="What tokens cost, such as {prompt: 0.5, completion: 1.5} per million"
    )
    max_retries: int = Field(
        6, ge=0, description="Further attempts after a lost connection or a server's error"
    )


P_co = TypeVar("P_co", bound=LLMPlannerOptions, covariant=True)


class LLMPlanner(Planner[P_co]):
    """A planner that asks a language model. A subclass says how, in `complete`.

    A refusal, and an answer that stays unusable after one repair turn, are `rejected`; what kept
    the LLM from answering is `failed`.
    """

    Options: ClassVar[type[Options]] = LLMPlannerOptions

    def __init__(self, options: P_co) -> None:
        super().__init__(options)
        self.ledger: Ledger | None = None
        """Where raw answers are kept. A run puts its own here; otherwise they are in memory."""
        self._lock = Lock()
        self._closing = Lock()
        self._closed = False
        self._dispatcher: Dispatcher | None = None
        self._memory: Ledger | None = None
        self._prompts: dict[PlannerTask, Prompt[Any, Any, Any]] = {}

    @abstractmethod
    def complete(
        self, conversations: Sequence[Conversation]
    ) -> list[Completion | Problem | Unavailable]:
        """Continue each conversation, in one attempt; the core repeats what is `Unavailable`.

        A `Problem` is final, for its conversation alone. Raise a `ReasonpixError` for what concerns
        all (a wrong key): it stops the run. Called from up to `concurrency` threads at once. One
        that takes long looks at `stopping` now and then.
        """

    def submit(self, conversations: Mapping[str, Conversation]) -> str:
        """Hand in a job, and return its id. The keys are ids to know the answers by.

        The same conversations handed in again give the id of the job that holds them already.
        """
        raise NotImplementedError

    def collect(self, job: str) -> Mapping[str, Completion | Problem | Unavailable] | None:
        """What became of a job's conversations, None while it has not ended."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        """Conversations in one call of `complete`."""
        return 1

    @property
    def jobs(self) -> bool:
        """Whether it answers by `submit` and `collect` in the place of `complete`."""
        return False

    @property
    def max_answer_tokens(self) -> int | None:
        """Most tokens that one answer can have, None when nothing bounds it."""
        return None

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What changes an answer beside the conversation (JSON values): model and sampling."""
        options = self.options
        return options.model_dump(mode="json", exclude=set(options.fingerprint_exclude))

    @property
    def stopping(self) -> bool:
        """Whether the run is ending: what `complete` has not finished may be `Unavailable` now."""
        dispatcher = self._dispatcher
        return dispatcher is not None and dispatcher.stopped

    @property
    def price(self) -> Price | None:
        """What tokens cost."""
        return self.options.price

    @property
    def max_retries(self) -> int:
        """Further attempts after one that got no answer."""
        return self.options.max_retries

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """The version of the planning code."""
        return {"planning": _VERSION}

    def prompt_identity(self, verb: PlannerTask) -> Mapping[str, Any]:
        """The SHA-256 of the prompt's content."""
        return {"prompt": self.prompt(TASKS[verb]).digest}

    def check(self) -> None:
        """Read all prompts, so that a bad file is known before the first question."""
        for task in TASKS.values():
            self.prompt(task)

    def close(self) -> None:
        """Stop asking, for good: threads that ask, or come to ask now, are told so.

        Returns when no `complete` is under way any more.
        """
        with self._lock:
            self._closed = True
        with self._closing:  # one that comes second waits for the first
            if self._dispatcher is not None:
                self._dispatcher.close()
                self._dispatcher = None
            if self._memory is not None:
                self._memory.close()
                self._memory = None

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[Rewriting | Problem]:
        """One candidate for each request (P_gen, Eq. 2)."""
        return self._ask(REWRITE, requests)

    def select(self, requests: Sequence[SelectRequest]) -> list[Choice | Problem]:
        """The best candidate of each request (P_select, Eq. 3)."""
        return self._ask(SELECT, requests)

    def replace(self, requests: Sequence[ReplaceRequest]) -> list[EditPlan | Problem]:
        """One plan for each request (P_replace, Eq. 6)."""
        nothing = Problem(status="rejected", reason="no category to choose from")
        asked = [request for request in requests if request.categories]
        answers: list[EditPlan | Problem] = self._ask(REPLACE, asked)
        plans = iter(answers)
        return [next(plans) if request.categories else nothing for request in requests]

    def resolve(self, requests: Sequence[ResolveRequest]) -> list[Choice | Problem]:
        """The option that each instruction is after, as a reader sees it."""
        return self._ask(RESOLVE, requests)

    def prompt(self, task: Task[Request, Answer, Result]) -> Prompt[Request, Answer, Result]:
        """The prompt of a task. Raises `RecipeError` when its file is none."""
        # Read once, so that the fingerprint and the questions cannot tell of different contents.
        if task.verb not in self._prompts:
            self._prompts[task.verb] = Prompt(task, self.options.prompts.get(task.verb))
        prompt: Prompt[Request, Answer, Result] = self._prompts[task.verb]
        return prompt

    def _ask(
        self, task: Task[Request, Answer, Result], requests: Sequence[Request]
    ) -> list[Result | Problem]:
        """Put the questions, read each answer, ask again once where that raises."""
        prompt = self.prompt(task)
        with self._lock:  # shards come in threads of their own
            if self._closed:
                raise ReasonpixError(STOPPED)
            if self._dispatcher is None:
                ledger = self.ledger
                if ledger is None:
                    ledger = self._memory = Ledger(None)
                self._dispatcher = make_dispatcher(self, ledger)
            dispatcher = self._dispatcher
        results: dict[int, Result | Problem] = {}
        unanswered = {i: prompt.conversation(request) for i, request in enumerate(requests)}
        for _ in range(2):
            completions = dispatcher.answers(task.verb, list(unanswered.values()))
            again: dict[int, Conversation] = {}
            for (index, asked), completion in zip(unanswered.items(), completions, strict=True):
                if isinstance(completion, Problem):
                    results[index] = completion
                    continue
                if completion.refusal is not None:
                    reason = f"refused: {quote(completion.refusal)}"
                    results[index] = Problem(status="rejected", reason=reason)
                    continue
                try:
                    results[index] = task.read(requests[index], _parse(completion, task.answer))
                except InvalidAnswer as problem:
                    reason = f"no usable answer, even after a repair: {problem}"
                    results[index] = Problem(status="rejected", reason=reason)
                    again[index] = prompt.repaired(asked, completion.text, problem)
            unanswered = again
        return [results[index] for index in range(len(requests))]


def _parse(completion: Completion, answer: type[Answer]) -> Answer:
    """The answer in a completion's text. Raises `InvalidAnswer`."""
    try:
        return answer.model_validate_json(_json_of(completion.text))
    except ValidationError as error:
        cut = "the answer was cut off, it is too long; "
        problems = "; ".join(explain(error))
        raise InvalidAnswer(
            cut + problems if completion.finish_reason == "length" else problems
        ) from error


def _json_of(text: str) -> str:
    """The JSON object in a text that may wrap it in a ``` fence or in prose."""
    start, end = text.find("{"), text.rfind("}")
    if text.lstrip().startswith("[") or start < 0 or end < start:
        return text
    return text[start : end + 1]
