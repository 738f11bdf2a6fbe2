"""Which tokens an answer's JSON schema allows next, by llguidance."""

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

LONGEST_STRING = 300
"""Characters of a string whose schema sets no bound: a weak model would go on until it is cut."""


class Grammars:
    """Makes matchers of JSON schemas for one tokenizer.

    `vocabulary` is the width of the model's logits, `stops` are the tokens that end an answer.
    Raises `WeightsError` for a tokenizer that llguidance cannot read.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stops: Sequence[int]) -> None:
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=vocabulary, eos_token=list(stops)
            )
        except ValueError as error:
            raise WeightsError(
                f"model: llguidance cannot read its tokenizer ({error}), so answers cannot be held "
                "to a schema; set constrained: false, or choose another model"
            ) from error
        self._compiled = lru_cache(maxsize=16)(self._compile)

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """A matcher at the start of an answer.

        Raises `ReasonpixError` when the schema uses what llguidance does not know: leaving that
        out in silence would give answers that break it.
        """
        return Matcher(self._compiled(json.dumps(schema)).deep_copy())

    def _compile(self, schema: str) -> LLMatcher:
        # Without whitespace between tokens of JSON, as the worked examples are written: a weak
        # model may go on with blanks for ever, which flexible whitespace would allow.
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
                f"planner local-llm: answers cannot be held to the schema {name}: {problem}; "
                "set constrained: false"
            )
        return LLMatcher(self._tokenizer, grammar, log_level=0)


def _bounded(schema: Any) -> Any:
    """The schema with a bound on each string that may be of any length."""
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {key: _bounded(part) for key, part in schema.items()}
    free = not {"maxLength", "pattern", "format", "enum", "const"} & set(schema)
    return bounded | (
        {"maxLength": LONGEST_STRING} if free and schema.get("type") == "string" else {}
    )


class Matcher:
    """How far one answer has come in its schema."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Which tokens may come next: (vocabulary,), bool."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(packed, count=vocabulary, bitorder="little")).bool()

    def take(self, token: int) -> None:
        """Go on by an allowed token."""
        self._matcher.consume_token(token)

    @property
    def problem(self) -> str:
        """Why it cannot go on, on one line; empty when it can."""
        # After <state> comes its inner life, with times that differ from run to run.
        return " ".join(self._matcher.get_error().partition("<state>")[0].split())

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return bool(self._matcher.is_stopped())
