"""Planning by a language model: what all planners with an LLM share.

`LLMPlanner` builds the prompts (`tasks`, `prompts`), has them answered (`dispatch`: retries,
budget, every raw answer stored), validates the answers, and asks once to repair an invalid one. A
plugin implements `complete` alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from reasonpix.errors import ReasonpixError
from reasonpix.llm.answers import read_answer
from reasonpix.llm.dispatch import STOPPED, Dispatcher, make_dispatcher
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.prompts import Prompt
from reasonpix.llm.tasks import (
    REPLACE,
    RESOLVE,
    REWRITE,
    SELECT,
    TASKS,
    AnswerT,
    InvalidAnswer,
    RequestT,
    ResultT,
    Task,
    quote,
)
from reasonpix.llm.types import Attempt, Conversation, Price
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

_VERSION = "3"
# Raise it when messages, validation or repair change: it makes earlier results stale.


class LLMPlannerOptions(Options):
    """Options of every planner that talks to an LLM."""

    # A prompt enters the fingerprint by its content: see `LLMPlanner.prompt_identity`.
    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"prompts", "price", "max_retries"})

    prompts: dict[PlannerTask, Path] = Field(
        {},
        description="Files that replace built-in prompts, by task: rewrite (P_gen), select "
        "(P_select), replace (P_replace), resolve",
    )
    price: Price | None = Field(
        None, description="Price per million tokens, such as {prompt: 0.5, completion: 1.5}"
    )
    max_retries: int = Field(
        6, ge=0, description="Further attempts after a lost connection or a server error"
    )


P_co = TypeVar("P_co", bound=LLMPlannerOptions, covariant=True)


class LLMPlanner(Planner[P_co]):
    """A planner with a language model, which a subclass calls in `complete`.

    Results are `rejected` for a refusal and for an answer that is still invalid after one repair,
    and `failed` if there was no answer.
    """

    Options: ClassVar[type[Options]] = LLMPlannerOptions

    def __init__(self, options: P_co) -> None:
        super().__init__(options)
        self.ledger: Ledger | None = None
        """Where answers are stored. A run sets its own; by default they stay in memory."""
        self._lock = Lock()
        self._closing = Lock()
        self._closed = False
        self._dispatcher: Dispatcher | None = None
        self._memory: Ledger | None = None
        self._prompts: dict[PlannerTask, Prompt[Any, Any, Any]] = {}

    @abstractmethod
    def complete(self, conversations: Sequence[Conversation]) -> list[Attempt]:
        """Attempt to continue each conversation once; the core retries what is `Unavailable`.

        A `Problem` is final for its conversation. Raise a `ReasonpixError` for an error that
        affects all (a wrong key): it stops the run. Called from up to `concurrency` threads. A
        call that takes long should check `stopping` now and then.
        """

    def submit(self, conversations: Mapping[str, Conversation]) -> str:
        """Submit a batch job and return its id; the keys identify the answers.

        Submitting the same conversations again returns the id of the existing job.
        """
        raise NotImplementedError

    def collect(self, job: str) -> Mapping[str, Attempt] | None:
        """Results of a job by key, None while it is running."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        """Maximum number of conversations in one call of `complete`."""
        return 1

    @property
    def jobs(self) -> bool:
        """Whether to call `submit` and `collect` instead of `complete`."""
        return False

    @property
    def max_answer_tokens(self) -> int | None:
        """Maximum tokens of an answer, None if unbounded."""
        return None

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Everything but the conversation that changes an answer: model, sampling (JSON values)."""
        options = self.options
        return options.model_dump(mode="json", exclude=set(options.fingerprint_exclude))

    @property
    def stopping(self) -> bool:
        """Whether the run is ending; `complete` may return `Unavailable` for unfinished answers."""
        dispatcher = self._dispatcher
        return dispatcher is not None and dispatcher.stopped

    @property
    def price(self) -> Price | None:
        """The option `price`."""
        return self.options.price

    @property
    def max_retries(self) -> int:
        """The option `max_retries`."""
        return self.options.max_retries

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """The version of the planning code."""
        return {"planning": _VERSION}

    def prompt_identity(self, verb: PlannerTask) -> Mapping[str, Any]:
        """The SHA-256 of the prompt's content."""
        return {"prompt": self.prompt(TASKS[verb]).digest}

    def check(self) -> None:
        """Read all prompts, so that errors are reported before the first request."""
        for task in TASKS.values():
            self.prompt(task)

    def close(self) -> None:
        """Stop for good: callers that wait, and later ones, get a `ReasonpixError`.

        Returns when no `complete` is running any more.
        """
        with self._lock:
            self._closed = True
        with self._closing:  # a second thread waits for the first
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
        results: list[EditPlan | Problem] = self._ask(
            REPLACE, [r for r in requests if r.categories]
        )
        plans = iter(results)
        empty = Problem(status="rejected", reason="no category to choose from")
        return [next(plans) if request.categories else empty for request in requests]

    def resolve(self, requests: Sequence[ResolveRequest]) -> list[Choice | Problem]:
        """The option that a reader of each instruction would choose."""
        return self._ask(RESOLVE, requests)

    def prompt(self, task: Task[RequestT, AnswerT, ResultT]) -> Prompt[RequestT, AnswerT, ResultT]:
        """The prompt of a task. Raises `RecipeError` if its file is invalid."""
        # Read once, so that the fingerprint and the requests agree even if the file is edited.
        if task.name not in self._prompts:
            self._prompts[task.name] = Prompt(task, self.options.prompts.get(task.name))
        prompt: Prompt[RequestT, AnswerT, ResultT] = self._prompts[task.name]
        return prompt

    def _ask(
        self, task: Task[RequestT, AnswerT, ResultT], requests: Sequence[RequestT]
    ) -> list[ResultT | Problem]:
        """Send requests, validate the answers, and have invalid ones repaired once."""
        prompt = self.prompt(task)
        dispatcher = self._open_dispatcher()
        results: dict[int, ResultT | Problem] = {}
        pending = {i: prompt.conversation(request) for i, request in enumerate(requests)}
        for _ in range(2):
            completions = dispatcher.answers(task.name, list(pending.values()))
            repairs: dict[int, Conversation] = {}
            for (index, conversation), completion in zip(pending.items(), completions, strict=True):
                if isinstance(completion, Problem):
                    results[index] = completion
                    continue
                if completion.refusal is not None:
                    reason = f"refused: {quote(completion.refusal)}"
                    results[index] = Problem(status="rejected", reason=reason)
                    continue
                try:
                    results[index] = read_answer(task, requests[index], completion)
                except InvalidAnswer as problem:
                    reason = f"no usable answer, even after a repair: {problem}"
                    if completion.finish_reason == "length":
                        reason += f" (max_tokens is {self.max_answer_tokens or 'not set'})"
                    results[index] = Problem(status="rejected", reason=reason)
                    repairs[index] = prompt.repaired(conversation, completion.text, problem)
            pending = repairs
        return [results[index] for index in range(len(requests))]

    def _open_dispatcher(self) -> Dispatcher:
        with self._lock:  # shards are processed in several threads
            if self._closed:
                raise ReasonpixError(STOPPED)
            if self._dispatcher is None:
                ledger = self.ledger
                if ledger is None:
                    ledger = self._memory = Ledger(None)
                self._dispatcher = make_dispatcher(self, ledger)
            return self._dispatcher
