"""The planner `local-llm`: any causal language model of transformers, in this process.

Answers are held to their JSON schema token by token, and a question's answer depends on the
question and its seed alone; how is told in `reasonpix_local_llm.decoding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from reasonpix.llm import (
    Completion,
    Conversation,
    LLMPlanner,
    LLMPlannerOptions,
    Price,
    Unavailable,
)
from reasonpix.plugin import ModelOptions, Planner, Problem, ReasonpixError, hookimpl
from reasonpix.plugin.weights import check_weights, digest, find_gguf

if TYPE_CHECKING:
    from reasonpix_local_llm.decoding import Writer


class LocalLLMOptions(ModelOptions, LLMPlannerOptions):
    """What a recipe may say about the planner `local-llm`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = (
        ModelOptions.fingerprint_exclude | LLMPlannerOptions.fingerprint_exclude
    )

    model: str = Field(description="Hub id, folder, or GGUF file")
    gguf_file: str | None = Field(
        None, description="GGUF file in the hub's repository, or in a folder that holds several"
    )
    temperature: float = Field(
        0.7, ge=0, le=5, description="Sampling temperature; 0 takes the likeliest token each time"
    )
    max_tokens: int = Field(400, ge=1, description="Longest answer, in tokens")
    constrained: bool = Field(
        True, description="Only ever write tokens that the answer's JSON schema allows"
    )
    batch_size: int = Field(
        8, ge=1, description="Answers written together on a GPU; a CPU always writes 4"
    )
    cache_dir: Path | None = Field(
        None, description="Where hub downloads and unpacked GGUF files are kept"
    )
    price: Price | None = Field(
        Price(prompt=0, completion=0),
        description="What a million tokens cost you; nothing, unless you say so",
    )


class LocalLLM(LLMPlanner[LocalLLMOptions]):
    """Plans by a causal language model in this process. It makes no calls and needs no key."""

    name = "local-llm"
    Options: ClassVar[type[LocalLLMOptions]] = LocalLLMOptions

    def __init__(self, options: LocalLLMOptions) -> None:
        super().__init__(options)
        self._writer: Writer | None = None

    @property
    def batch_size(self) -> int:
        """How many conversations `complete` is best given at once."""
        return self.options.batch_size

    @property
    def max_answer_tokens(self) -> int:
        """Tokens of the longest answer."""
        return self.options.max_tokens

    @cached_property
    def parameters(self) -> Mapping[str, Any]:
        """What changes an answer beside the conversation: weights, sampling, constraint.

        Weights on this machine enter by their content, not by where they lie.
        """
        options = self.options
        facts = options.model_dump(mode="json", exclude=set(options.fingerprint_exclude))
        model = Path(options.model)
        if model.exists():
            weights = find_gguf(options, options.gguf_file) or model
            for name in ("model", "gguf_file", "revision"):
                facts.pop(name)
            facts["weights"] = digest(weights)
        return facts

    def check(self) -> None:
        """Read the prompts and see that `model` can be there. Raises a `ReasonpixError`."""
        super().check()
        check_weights(self.options)
        if Path(self.options.model).exists():  # looking on the hub is left to `load`
            find_gguf(self.options, self.options.gguf_file)

    def load(self) -> None:
        """Read tokenizer and weights; the first time, unpack a GGUF file.

        Raises `WeightsError` when they cannot be found, read or used.
        """
        from reasonpix_local_llm.decoding import Writer

        self._writer = Writer(self.options, lambda: self.stopping)

    def close(self) -> None:
        """Stop writing, and let go of the weights."""
        super().close()
        self._writer = None

    def complete(
        self, conversations: Sequence[Conversation]
    ) -> list[Completion | Problem | Unavailable]:
        """An answer to each conversation; `rejected` where it exceeds the model's context.

        Where the run is `stopping` before it is finished, it is `Unavailable`.
        """
        if self._writer is None:
            raise ReasonpixError(f"planner {self.name}: it answers between `load` and `close` only")
        answers: list[Completion | Problem | Unavailable] = self._writer.write(conversations)
        return answers


@hookimpl
def planners() -> list[type[Planner[Any]]]:
    """A language model in this process."""
    return [LocalLLM]
