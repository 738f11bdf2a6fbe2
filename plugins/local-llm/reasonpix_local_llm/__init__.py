"""The planner `local-llm`: any causal language model of transformers, in this process.

Decoding is constrained to the answer's JSON schema, and an answer depends only on the request and
its seed, not on the batch; see `reasonpix_local_llm.decoding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from reasonpix.llm import (
    Attempt,
    Conversation,
    LLMPlanner,
    LLMPlannerOptions,
    Price,
)
from reasonpix.plugin import ModelOptions, Planner, ReasonpixError, hookimpl
from reasonpix.plugin.weights import check_weights, digest, find_gguf

if TYPE_CHECKING:
    from reasonpix_local_llm.decoding import Writer


class LocalLLMOptions(ModelOptions, LLMPlannerOptions):
    """Options of the planner `local-llm`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = (
        ModelOptions.fingerprint_exclude | LLMPlannerOptions.fingerprint_exclude
    )

    model: str = Field(description="Hub id, folder, or GGUF file")
    gguf_file: str | None = Field(
        None, description="GGUF file in the hub repository, or in a folder with several"
    )
    temperature: float = Field(
        0.7, ge=0, le=5, description="Sampling temperature; 0 for greedy decoding"
    )
    max_tokens: int = Field(400, ge=1, description="Maximum tokens of an answer")
    constrained: bool = Field(True, description="Constrain decoding to the answer's JSON schema")
    batch_size: int = Field(8, ge=1, description="Answers per batch on a GPU; always 4 on a CPU")
    cache_dir: Path | None = Field(
        None, description="Folder for hub downloads and unpacked GGUF files"
    )
    price: Price | None = Field(
        Price(prompt=0, completion=0),
        description="Price per million tokens; free by default",
    )


class LocalLLM(LLMPlanner[LocalLLMOptions]):
    """A planner with a causal language model in this process, without a server or a key."""

    name = "local-llm"
    Options: ClassVar[type[LocalLLMOptions]] = LocalLLMOptions

    def __init__(self, options: LocalLLMOptions) -> None:
        super().__init__(options)
        self._writer: Writer | None = None

    @property
    def batch_size(self) -> int:
        """The option `batch_size`."""
        return self.options.batch_size

    @property
    def max_answer_tokens(self) -> int:
        """The option `max_tokens`."""
        return self.options.max_tokens

    @cached_property
    def parameters(self) -> Mapping[str, Any]:
        """Weights, sampling and constraint; local weights by their content, not their path."""
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
        """Check the prompts and that `model` exists. Raises `ReasonpixError`."""
        super().check()
        check_weights(self.options)
        if Path(self.options.model).exists():  # the hub is searched by `load`
            find_gguf(self.options, self.options.gguf_file)

    def load(self) -> None:
        """Load tokenizer and weights, and unpack a GGUF file the first time.

        Raises `WeightsError` if they cannot be found, read or used.
        """
        from reasonpix_local_llm.decoding import Writer

        self._writer = Writer(self.options, lambda: self.stopping)

    def close(self) -> None:
        """Stop generating, and release the weights."""
        super().close()
        self._writer = None

    def complete(self, conversations: Sequence[Conversation]) -> list[Attempt]:
        """An answer to each conversation; `rejected` if it exceeds the model's context.

        Answers that are unfinished when the run is `stopping` are `Unavailable`.
        """
        if self._writer is None:
            raise ReasonpixError(f"planner {self.name}: call `load` before `complete`")
        answers: list[Attempt] = self._writer.write(conversations)
        return answers


@hookimpl
def planners() -> list[type[Planner[Any]]]:
    """Offer the planner `local-llm`."""
    return [LocalLLM]
