"""Batched decoding in which each answer is independent of the rest of the batch.

Kernels round differently for tensors of different shapes, and the last digit can decide which token
has the largest logit. So on a CPU every shape depends on the conversation alone:

- Each prompt is prefilled by itself, `(1, tokens)`. The prefix that all requests of a task share
  (system text, worked examples) is prefilled once, and its keys and values are cached.
- Answers are decoded in batches of exactly `CPU_ROWS`; spare rows repeat another one. The prompts
  of a batch are left-padded to the same multiple of `BUCKET`.
- Each conversation has its own generator: the argmax of logits plus Gumbel noise is a sample of
  their softmax (Gumbel, 1954; Maddison et al., "A* Sampling", 2014).

On a GPU a batch has as many rows as there are conversations, up to `batch_size`, which may change
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

from reasonpix.llm import Attempt, Completion, Conversation, Message, Unavailable
from reasonpix.plugin import Problem, ReasonpixError, WeightsError
from reasonpix.plugin.weights import choose_device, choose_dtype, find_gguf, pretrained, unpack_gguf
from reasonpix_local_llm.grammar import Grammars, Matcher

if TYPE_CHECKING:
    from reasonpix_local_llm import LocalLLMOptions

CPU_ROWS = 4
"""Batch size on a CPU, fixed because kernels round differently for other sizes."""

BUCKET = 256
"""Prompts are padded to a multiple of this many tokens."""

States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer: (rows, heads, tokens, width)."""


@dataclass(frozen=True)
class Prompt:
    """A tokenized conversation; all requests of its task share the first `shared` tokens."""

    tokens: tuple[int, ...]
    shared: int

    @property
    def padded(self) -> int:
        """Number of tokens with padding."""
        return -(-len(self.tokens) // BUCKET) * BUCKET


@dataclass
class Generation:
    """An answer during decoding. `finish` is None until it ends."""

    generator: torch.Generator
    matcher: Matcher | None
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


class _Stopping(Exception):
    """The run is stopping: unfinished answers are abandoned."""


class Writer:
    """A loaded causal language model. Raises `WeightsError` if the model is not a chat model.

    Decoding ends when `stopping()` is true.
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
            # Any default format would be wrong for this model, and poor answers would be the only
            # symptom.
            raise WeightsError(
                f"model: {options.model!r} has no chat template; choose a model that was trained "
                "to follow instructions, or put a chat_template.jinja into its folder"
            )
        added = self._tokenizer.added_tokens_decoder.values()
        self._control_tokens = [token.content for token in added if token.special]
        self._template = _undated(self._tokenizer.get_chat_template())
        model = pretrained(AutoModelForCausalLM, source, dtype=dtype)
        if model._is_stateful:
            raise WeightsError(
                f"model: {options.model!r} ({model.config.model_type}) keeps a recurrent state, "
                "which cannot be cached and padded; choose a pure attention model"
            )
        self._model = model.to(self.device).eval()
        # Checked between layers, because the prefill of a long prompt is slow.
        stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
        for part in (model, *(layer for stack in stacks for layer in stack)):
            part.register_forward_pre_hook(self._check_stopping)
        self._forward_parameters = inspect.signature(model.forward).parameters.keys()
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        """Maximum tokens of prompt and answer together; None if the model has no limit."""
        self._stops = self._stop_tokens()
        self._grammars = (
            Grammars(self._tokenizer, config.vocab_size, self._stops)
            if options.constrained
            else None
        )
        # There are four tasks, of which a run uses few; states of a long prompt are large.
        self._shared_tokens = lru_cache(maxsize=16)(self._find_shared_tokens)
        self._shared_states = lru_cache(maxsize=4)(self._read_shared)

    def _stop_tokens(self) -> list[int]:
        stops = self._model.generation_config.eos_token_id
        configured = stops if isinstance(stops, list) else [stops]
        tokens = {*configured, self._tokenizer.eos_token_id} - {None}
        if not tokens:
            raise WeightsError(
                f"model: {self.options.model!r} defines no token that ends an answer; set "
                "eos_token_id in its generation_config.json"
            )
        return sorted(tokens)

    @torch.inference_mode()
    def write(self, conversations: Sequence[Conversation]) -> list[Attempt]:
        """An answer to each conversation, in order; a `Problem` for one that is too long.

        Answers that are unfinished when the run is stopping are `Unavailable`.
        """
        results: dict[int, Attempt] = {}
        groups: dict[int, list[tuple[int, Prompt]]] = {}
        for number, conversation in enumerate(conversations):
            prompt = self.prompt(conversation)
            if problem := self._length_problem(prompt):
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
        """The conversation, rendered by the chat template and tokenized."""
        tokens = self._tokens(conversation.messages)
        shared = self._shared_tokens(conversation.messages[: conversation.shared])
        # A template may render the last shared turn differently when more turns follow. At least
        # one token must remain to compute logits.
        return Prompt(tokens, min(_common_length(tokens, shared), len(tokens) - 1))

    def _find_shared_tokens(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """The tokens that every request after `messages` begins with.

        The common prefix of two requests: a text may be tokenized differently at its end when more
        text follows, and templates may treat the last turns specially.
        """
        if not messages:
            return ()
        first, second = (
            self._tokens((*messages, Message(role="user", content=text))) for text in ("a", "0")
        )
        return first[: _common_length(first, second)]

    def _tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        turns = [{"role": turn.role, "content": self._escaped(turn.content)} for turn in messages]
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
        # The template adds all special tokens itself.
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _escaped(self, text: str) -> str:
        """Break up text that would be tokenized as a control token, such as the end of a turn."""
        for token in self._control_tokens:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _length_problem(self, prompt: Prompt) -> Problem | None:
        needed = len(prompt.tokens) + self.options.max_tokens
        if self.context is None or needed <= self.context:
            return None
        return Problem(
            status="rejected",
            reason=f"a prompt of {len(prompt.tokens)} tokens and an answer of up to "
            f"{self.options.max_tokens} (max_tokens) exceed the {self.context} tokens that the "
            "model can process",
        )

    # Reading

    def _read_shared(self, tokens: tuple[int, ...]) -> States:
        return self._read(tokens, [])[0]

    def _read(self, tokens: Sequence[int], before: States) -> tuple[States, torch.Tensor]:
        """Prefill `tokens` after `before`: the states of both, and the logits (1, vocabulary)."""
        cache = self._cache(before)
        start = before[0][0].shape[2] if before else 0
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        ids = torch.tensor([tokens], device=self.device)
        attention_mask = torch.ones(1, start + len(tokens), dtype=torch.long, device=self.device)
        logits = self._forward(ids, cache, attention_mask, positions)
        return [(layer.keys, layer.values) for layer in cache.layers], logits

    @staticmethod
    def _cache(states: States) -> DynamicCache:
        # Without the model's configuration, so that every layer keeps all tokens; the attention
        # mask implements sliding windows.
        cache = DynamicCache()
        for number, (keys, values) in enumerate(states):
            cache.update(keys, values, number)
        return cache

    def _forward(
        self,
        ids: torch.Tensor,
        cache: DynamicCache,
        attention_mask: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Logits after the last of `ids` (rows, tokens): (rows, vocabulary), float32 on the CPU."""
        optional = {"position_ids": positions, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._forward_parameters},
        )
        logits: torch.Tensor = output.logits[:, -1].float().cpu()
        return logits

    def _check_stopping(self, *_: object) -> None:
        if self._stopping():
            raise _Stopping

    # Writing

    def _start(self, conversation: Conversation) -> Generation:
        matcher = self._grammars.matcher(conversation.answer_schema) if self._grammars else None
        return Generation(torch.Generator().manual_seed(conversation.seed % 2**64), matcher)

    def _fill(self, prompts: Sequence[Prompt], answers: Sequence[Generation]) -> None:
        """Decode all answers of a batch. Their prompts have the same padded length."""
        prefilled = [self._read_prompt(prompt) for prompt in prompts]
        rows = list(range(len(prompts)))
        if self.device.type == "cpu":
            rows += [0] * (CPU_ROWS - len(prompts))
        lengths = [len(prompts[row].tokens) for row in rows]
        padded = prompts[0].padded
        cache = self._cache(list(_joined([prefilled[row][0] for row in rows], padded)))
        logits = [row_logits for _, row_logits in prefilled]
        del prefilled

        positions = torch.tensor(lengths, device=self.device)[:, None]
        columns = torch.arange(padded + self.options.max_tokens, device=self.device)
        attention_mask = (columns >= padded - positions).long()
        for step in range(self.options.max_tokens):
            for answer, row_logits in zip(answers, logits, strict=True):
                if answer.finish is None:
                    self._append(answer, row_logits[0])
            if all(answer.finish for answer in answers):
                return
            last = torch.tensor([[answers[row].tokens[-1]] for row in rows], device=self.device)
            mask = attention_mask[:, : padded + step + 1]
            following = self._forward(last, cache, mask, positions + step)
            logits = list(following[: len(answers)].split(1))

    def _read_prompt(self, prompt: Prompt) -> tuple[States, torch.Tensor]:
        shared = prompt.tokens[: prompt.shared]
        before = self._shared_states(shared) if shared else []
        return self._read(prompt.tokens[prompt.shared :], before)

    def _append(self, answer: Generation, logits: torch.Tensor) -> None:
        """Choose the next token of one answer by its `logits` (vocabulary,); check if it ends."""
        matcher = answer.matcher
        if matcher is not None:
            logits = logits.masked_fill(~matcher.allowed(len(logits)), -torch.inf)
        if self.options.temperature > 0:
            noise = torch.empty_like(logits).exponential_(generator=answer.generator)
            # 0 would become infinite noise.
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
                f"planner local-llm: {self.options.model!r} computes non-finite numbers; set "
                "dtype: bfloat16, or float32"
            )
        elif token in self._stops or (matcher is not None and matcher.done):
            answer.finish = "stop"
        elif len(answer.tokens) == self.options.max_tokens:
            answer.finish = "length"

    def _completion(self, prompt: Prompt, answer: Generation) -> Attempt:
        if answer.finish is None:
            return Unavailable(reason="stopped before it was finished")
        if answer.matcher is not None and answer.matcher.problem:
            reason = f"decoding left the answer's schema: {answer.matcher.problem}"
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
    """The template with a fixed date, so that answers do not depend on the day."""
    return re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
        lambda match: repr(date(2025, 1, 1).strftime(match[2])),
        template,
    )


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    )


def _joined(rows: Sequence[States], length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The states of all rows in one batch, left-padded to `length` tokens."""
    for layers in zip(*rows, strict=True):
        keys, values = zip(*layers, strict=True)
        yield _stacked(keys, length), _stacked(values, length)


def _stacked(tensors: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    return torch.cat([pad(tensor, (0, 0, length - tensor.shape[2], 0)) for tensor in tensors])
