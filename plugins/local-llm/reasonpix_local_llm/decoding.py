"""Writing answers in batches, each as if it were alone.

Kernels round differently for tensors of different shapes, and a last digit can decide which token
is likeliest. So on a CPU every shape depends on the conversation alone:

- Each prompt is read by itself, `(1, tokens)`. What a task's questions share (system text, worked
  examples) is read once, and its keys and values are kept.
- Answers are written `CPU_ROWS` at a time, always; spare rows repeat another. The rows of a batch
  have prompts of the same length, padded at the front to a multiple of `BUCKET`.
- Noise comes from each conversation's own generator: adding Gumbel noise to the logits and taking
  the largest is sampling from their softmax (Gumbel, 1954; Maddison et al., "A* Sampling", 2014).

On a GPU a batch has as many rows as there are conversations, up to `batch_size`, which may move
last digits.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING

import jinja2
import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from reasonpix.llm import Completion, Conversation, Message, Unavailable
from reasonpix.plugin import Problem, ReasonpixError, WeightsError
from reasonpix.plugin.weights import choose_device, choose_dtype, find_gguf, pretrained, unpack_gguf
from reasonpix_local_llm.grammar import Grammars, Matcher

if TYPE_CHECKING:
    from reasonpix_local_llm import LocalLLMOptions

CPU_ROWS = 4
"""Answers that a CPU writes together, always: for other numbers kernels round differently."""

BUCKET = 256
"""Prompts of a batch are padded to a multiple of this many tokens."""

States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer: (rows, heads, tokens, width)."""


@dataclass(frozen=True)
class Prompt:
    """A conversation in tokens, of which the first `shared` are common to all of its task."""

    tokens: tuple[int, ...]
    shared: int

    @property
    def padded(self) -> int:
        """Tokens with padding."""
        return -(-len(self.tokens) // BUCKET) * BUCKET


@dataclass
class Answer:
    """An answer that is being written. `finish` is None until it ends."""

    generator: torch.Generator
    matcher: Matcher | None
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


class _Stopping(Exception):
    """The run is stopping: what is being written is left as it is."""


class Writer:
    """A loaded causal language model. Raises `WeightsError` when it is none, or cannot chat.

    When `stopping` says that the run is, it stops too.
    """

    def __init__(
        self, options: LocalLLMOptions, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._stopping = stopping
        self.device = choose_device(options)
        dtype = choose_dtype(options, self.device)
        self.options = options
        source = options
        if file := find_gguf(options, options.gguf_file):
            folder = unpack_gguf(file, dtype, options.cache_dir)
            source = options.model_copy(update={"model": str(folder)})
        self._tokenizer = pretrained(AutoTokenizer, source)
        if not self._tokenizer.chat_template:
            # A format of our own would be as wrong for this model as any other, and nobody would
            # see why its answers are poor.
            raise WeightsError(
                f"model: {options.model!r} has no chat template, so nothing says how it is to be "
                "asked; choose a model that was trained to follow instructions, or put a "
                "chat_template.jinja into its folder"
            )
        added = self._tokenizer.added_tokens_decoder.values()
        self._control_tokens = [token.content for token in added if token.special]
        self._template = _undated(self._tokenizer.get_chat_template())
        model = pretrained(AutoModelForCausalLM, source, dtype=dtype, use_safetensors=True)
        if model._is_stateful:
            raise WeightsError(
                f"model: {options.model!r} ({model.config.model_type}) keeps a recurrent state, "
                "which cannot be shared and padded as here; choose a model of attention alone"
            )
        self._model = model.to(self.device).eval()
        # Between two layers, because to read a long prompt takes long.
        stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
        for part in (model, *(layer for stack in stacks for layer in stack)):
            part.register_forward_pre_hook(self._look_up)
        self._knows = inspect.signature(model.forward).parameters.keys()
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        """Most tokens of prompt and answer together; None where the model has no limit."""
        self._stops = self._stop_tokens()
        self._grammars = (
            Grammars(self._tokenizer, config.vocab_size, self._stops)
            if options.constrained
            else None
        )
        # Four tasks ask an LLM; a run has few of them, and a long prompt's states are large.
        self._shared_tokens = lru_cache(maxsize=16)(self._find_shared_tokens)
        self._shared_states = lru_cache(maxsize=4)(self._read_shared)

    def _stop_tokens(self) -> list[int]:
        stops = self._model.generation_config.eos_token_id
        known = stops if isinstance(stops, list) else [stops]
        found = {token for token in (*known, self._tokenizer.eos_token_id) if token is not None}
        if not found:
            raise WeightsError(
                f"model: {self.options.model!r} names no token that ends an answer; set "
                "eos_token_id in its generation_config.json"
            )
        return sorted(found)

    @torch.inference_mode()
    def write(
        self, conversations: Sequence[Conversation]
    ) -> list[Completion | Problem | Unavailable]:
        """An answer to each conversation, in their order; a `Problem` for one that is too long.

        Once the run is stopping, those that are not finished are `Unavailable`.
        """
        results: dict[int, Completion | Problem | Unavailable] = {}
        groups: dict[int, list[tuple[int, Prompt]]] = {}
        for number, conversation in enumerate(conversations):
            prompt = self.prompt(conversation)
            if problem := self._too_long(prompt):
                results[number] = problem
            else:
                groups.setdefault(prompt.padded, []).append((number, prompt))
        size = CPU_ROWS if self.device.type == "cpu" else self.options.batch_size
        for group in groups.values():
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                prompts = [prompt for _, prompt in batch]
                answers = [self._start(conversations[number]) for number, _ in batch]
                with suppress(_Stopping):
                    self._fill(prompts, answers)
                for (number, prompt), answer in zip(batch, answers, strict=True):
                    results[number] = self._completion(prompt, answer)
        return [results[number] for number in range(len(conversations))]

    # Prompts

    def prompt(self, conversation: Conversation) -> Prompt:
        """The conversation as the chat template renders it, in tokens."""
        tokens = self._tokens(conversation.messages)
        shared = self._shared_tokens(conversation.messages[: conversation.shared])
        # A template may render the last of them in another way when more turns follow. At least
        # one token must be read to have logits.
        return Prompt(tokens, min(_common(tokens, shared), len(tokens) - 1))

    def _find_shared_tokens(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """The tokens that any question after `messages` begins with.

        Found by asking two questions, because the end of a text may be cut into tokens in another
        way when text follows, and templates may treat the last turns specially.
        """
        if not messages:
            return ()
        one, other = (
            self._tokens((*messages, Message(role="user", content=text))) for text in ("a", "0")
        )
        return one[: _common(one, other)]

    def _tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        turns = [{"role": turn.role, "content": self._harmless(turn.content)} for turn in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise ReasonpixError(
                f"planner local-llm: the chat template of {self.options.model!r} refuses the "
                f"conversation: {error}"
            ) from error
        # The template writes all special tokens itself.
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _harmless(self, text: str) -> str:
        """`text` without what would be read as a control token, such as the end of a turn."""
        for token in self._control_tokens:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _too_long(self, prompt: Prompt) -> Problem | None:
        needed = len(prompt.tokens) + self.options.max_tokens
        if self.context is None or needed <= self.context:
            return None
        return Problem(
            status="rejected",
            reason=f"a prompt of {len(prompt.tokens)} tokens and an answer of up to "
            f"{self.options.max_tokens} (max_tokens) exceed the {self.context} tokens that the "
            "model can read",
        )

    # Reading

    def _read_shared(self, tokens: tuple[int, ...]) -> States:
        return self._read(tokens, [])[0]

    def _read(self, tokens: Sequence[int], before: States) -> tuple[States, torch.Tensor]:
        """States of `tokens` that follow `before`, with it, and the logits (1, vocabulary)."""
        cache = self._cache(before)
        start = before[0][0].shape[2] if before else 0
        places = torch.arange(start, start + len(tokens), device=self.device)[None]
        ids = torch.tensor([tokens], device=self.device)
        seen = torch.ones(1, start + len(tokens), dtype=torch.long, device=self.device)
        logits = self._forward(ids, cache, seen, places)
        return [(layer.keys, layer.values) for layer in cache.layers], logits

    @staticmethod
    def _cache(states: States) -> DynamicCache:
        # Made without the model's configuration: every layer keeps all tokens, those with a
        # sliding window too, which their mask observes.
        cache = DynamicCache()
        for number, (keys, values) in enumerate(states):
            cache.update(keys, values, number)
        return cache

    def _forward(
        self, ids: torch.Tensor, cache: DynamicCache, seen: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Logits after the last of `ids` (rows, tokens): (rows, vocabulary), float32 on the CPU."""
        optional = {"position_ids": places, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids,
            attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._knows},
        )
        logits: torch.Tensor = output.logits[:, -1].float().cpu()
        return logits

    def _look_up(self, *_: object) -> None:
        if self._stopping():
            raise _Stopping

    # Writing

    def _start(self, conversation: Conversation) -> Answer:
        matcher = self._grammars.matcher(conversation.answer_schema) if self._grammars else None
        return Answer(torch.Generator().manual_seed(conversation.seed % 2**64), matcher)

    def _fill(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        """Write all answers of a batch to their ends. The prompts are padded to one length."""
        read = [self._read_prompt(prompt) for prompt in prompts]
        rows = list(range(len(prompts)))
        if self.device.type == "cpu":
            rows += [0] * (CPU_ROWS - len(prompts))
        lengths = [len(prompts[row].tokens) for row in rows]
        padded = prompts[0].padded
        cache = self._cache(list(_joined([read[row][0] for row in rows], padded)))
        logits = [one for _, one in read]
        del read

        places = torch.tensor(lengths, device=self.device)[:, None]
        kept = torch.arange(padded + self.options.max_tokens, device=self.device)
        seen = (kept >= padded - places).long()
        for step in range(self.options.max_tokens):
            for answer, one in zip(answers, logits, strict=True):
                if answer.finish is None:
                    self._append(answer, one[0])
            if all(answer.finish for answer in answers):
                return
            last = torch.tensor([[answers[row].tokens[-1]] for row in rows], device=self.device)
            following = self._forward(last, cache, seen[:, : padded + step + 1], places + step)
            logits = list(following[: len(answers)].split(1))

    def _read_prompt(self, prompt: Prompt) -> tuple[States, torch.Tensor]:
        shared = prompt.tokens[: prompt.shared]
        before = self._shared_states(shared) if shared else []
        return self._read(prompt.tokens[prompt.shared :], before)

    def _append(self, answer: Answer, logits: torch.Tensor) -> None:
        """Choose the next token of one answer by its `logits` (vocabulary,), and see if it ends."""
        matcher = answer.matcher
        if matcher is not None:
            logits = logits.masked_fill(~matcher.allowed(len(logits)), -torch.inf)
        if self.options.temperature > 0:
            noise = torch.empty_like(logits).exponential_(generator=answer.generator)
            # 0 would be the noise of an endlessly likely token.
            noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().neg_()
            logits = logits / self.options.temperature + noise
        score, likeliest = logits.max(dim=0)
        token = int(likeliest)
        answer.tokens.append(token)
        if matcher is not None:
            matcher.take(token)
        if matcher is not None and matcher.problem:
            answer.finish = "problem"
        elif not score.isfinite():
            raise ReasonpixError(
                f"planner local-llm: {self.options.model!r} computes no finite numbers; set "
                "dtype: bfloat16, or float32"
            )
        elif token in self._stops or (matcher is not None and matcher.done):
            answer.finish = "stop"
        elif len(answer.tokens) == self.options.max_tokens:
            answer.finish = "length"

    def _completion(self, prompt: Prompt, answer: Answer) -> Completion | Problem | Unavailable:
        if answer.finish is None:
            return Unavailable(reason="it was stopped before its end")
        if answer.matcher is not None and answer.matcher.problem:
            reason = f"the answer cannot be held to its schema: {answer.matcher.problem}"
            return Problem(status="failed", reason=reason)
        return Completion(
            text=self._tokenizer.decode(
                answer.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            finish_reason=answer.finish,
            prompt_tokens=len(prompt.tokens),
            completion_tokens=len(answer.tokens),
        )


def _undated(template: str) -> str:
    """`template` with always the same date, or answers would depend on the day."""
    return re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
        lambda found: repr(date(2025, 1, 1).strftime(found[2])),
        template,
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _joined(rows: Sequence[States], length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The states of all rows in one batch, each padded at the front to `length` tokens."""
    for layers in zip(*rows, strict=True):
        keys, values = zip(*layers, strict=True)
        yield _stacked(keys, length), _stacked(values, length)


def _stacked(tensors: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    return torch.cat([pad(one, (0, 0, length - one.shape[2], 0)) for one in tensors])
