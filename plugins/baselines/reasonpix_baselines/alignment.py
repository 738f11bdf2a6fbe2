"""Align the tokens of an edited caption with those of the caption, for cross-attention.

After `seq_aligner.py` of github.com/google/prompt-to-prompt. Prompts with the same number of words
are aligned word by word (replacement), others by their longest common subsequence of tokens
(refinement).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """How attention to the caption's tokens becomes attention to the edited caption's."""

    weights: Tensor
    """(tokens, tokens): from each token of the caption to each of the edited caption."""
    kept: Tensor
    """(tokens,): 1 for tokens that take it, 0 for new tokens, which keep their own attention."""


def align(
    caption: str, edited: str, tokenize: Callable[[str], Sequence[int]], tokens: int
) -> Alignment:
    """The alignment of two prompts of `tokens` tokens, including start, end and padding.

    `tokenize` returns a text's tokens without those.
    """
    words, edited_words = caption.split(), edited.split()
    if len(words) == len(edited_words):
        return _by_words(
            [tokenize(word) for word in words], [tokenize(word) for word in edited_words], tokens
        )
    return _by_tokens(tokenize(caption), tokenize(edited), tokens)


def _by_words(
    words: Sequence[Sequence[int]], edited: Sequence[Sequence[int]], tokens: int
) -> Alignment:
    """Each word takes the attention of the word at its position."""
    weights = torch.zeros(tokens, tokens)
    weights[0, 0] = 1
    here = there = 1
    for old, new in zip(words, edited, strict=True):
        block = weights[here : here + len(old), there : there + len(new)]
        if len(old) == len(new):
            block.fill_diagonal_(1)
        else:
            block.fill_(1 / len(new))
        here, there = here + len(old), there + len(new)
    for place in range(max(0, tokens - there)):  # the end, and the padding after it
        weights[min(here + place, tokens - 1), there + place] = 1
    return Alignment(weights, torch.ones(tokens))


def _by_tokens(old: Sequence[int], new: Sequence[int], tokens: int) -> Alignment:
    """Common tokens keep their attention; padding takes that of the padding at its position."""
    weights, kept = torch.zeros(tokens, tokens), torch.zeros(tokens)
    pairs = [(0, 0), *((i + 1, j + 1) for i, j in _common(old, new)), (len(old) + 1, len(new) + 1)]
    padding = ((place, place) for place in range(len(new) + 2, tokens))
    for i, j in chain(pairs, padding):
        if i < tokens and j < tokens:
            weights[i, j] = kept[j] = 1
    return Alignment(weights, kept)


def _common(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions of a longest common subsequence."""
    longest = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i in reversed(range(len(old))):
        for j in reversed(range(len(new))):
            longest[i][j] = (
                longest[i + 1][j + 1] + 1
                if old[i] == new[j]
                else max(longest[i + 1][j], longest[i][j + 1])
            )
    pairs, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        if old[i] == new[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
