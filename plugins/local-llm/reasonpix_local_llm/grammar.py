"""The tokens that an answer's JSON schema allows next, computed by llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher

from reasonpix.plugin import ReasonpixError, WeightsError

MAX_STRING_LENGTH = 300
"""Limit on strings whose schema has none: a weak model would write until it is truncated."""


class Grammars:
    """Compiles JSON schemas for one tokenizer.

    `vocabulary` is the width of the model's logits, `stops` are the tokens that end an answer.
    Raises `WeightsError` if llguidance does not support the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stops: Sequence[int]) -> None:
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=vocabulary, eos_token=list(stops)
            )
        except ValueError as error:
            raise WeightsError(
                f"model: llguidance cannot read its tokenizer ({error}), so decoding cannot be "
                "constrained; set constrained: false, or choose another model"
            ) from error
        self._compiled = lru_cache(maxsize=16)(self._compile)

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """A matcher at the start of an answer.

        Raises `ReasonpixError` if the schema uses features that llguidance does not support:
        ignoring them would produce invalid answers.
        """
        return Matcher(self._compiled(json.dumps(schema)).deep_copy())

    def _compile(self, schema: str) -> LLMatcher:
        # Without whitespace, as in the worked examples: with flexible whitespace a weak model may
        # write spaces for ever.
        grammar = LLMatcher.grammar_from_json_schema(
            json.dumps(_bounded(json.loads(schema))),
            overrides={
                "whitespace_flexible": False,
                "item_separator": ",",
                "key_separator": ":",
            },
        )
        if problem := LLMatcher.validate_grammar(grammar, self._tokenizer):
            name = json.loads(schema).get("title", "of an answer")
            raise ReasonpixError(
                f"planner local-llm: decoding cannot be constrained to the schema {name}: "
                f"{problem}; set constrained: false"
            )
        return LLMatcher(self._tokenizer, grammar, log_level=0)


def _bounded(schema: Any) -> Any:
    """The schema with a limit on each string that has none."""
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {key: _bounded(part) for key, part in schema.items()}
    free = not {"maxLength", "pattern", "format", "enum", "const"} & set(schema)
    return bounded | (
        {"maxLength": MAX_STRING_LENGTH} if free and schema.get("type") == "string" else {}
    )


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Mask of the tokens that may come next: (vocabulary,), bool."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(packed, count=vocabulary, bitorder="little")).bool()

    def take(self, token: int) -> None:
        """Append an allowed token."""
        self._matcher.consume_token(token)

    @property
    def problem(self) -> str:
        """Why no token can follow, on one line; empty if one can."""
        # The text after <state> contains timings, which differ from run to run.
        return " ".join(self._matcher.get_error().partition("<state>")[0].split())

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return bool(self._matcher.is_stopped())
