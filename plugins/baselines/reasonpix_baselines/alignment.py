"""Which token of a caption a token of the edited caption takes its attention from.

`seq_aligner.py` of github.com/google/prompt-to-prompt. Prompts of as many words are aligned word by
word (its replacement), others by their longest common subsequence of tokens (its refinement).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """How cross-attention to the edited caption follows from that to the caption."""

    weights: Tensor
    """(tokens, tokens): how much of a caption's token goes to each of the edited caption."""
    kept: Tensor
    """(tokens,): 1 where that is used, 0 where a new token keeps its own attention."""


def align(
    caption: str, edited: str, tokenized: Callable[[str], Sequence[int]], tokens: int
) -> Alignment:
    """The alignment of two prompts, with start, end and padding, as long as `tokens`.

    `tokenized` gives a text's tokens without those.
    """
    words, edited_words = caption.split(), edited.split()
    if len(words) == len(edited_words):
        return _by_words(
            [tokenized(word) for word in words], [tokenized(word) for word in edited_words], tokens
        )
    return _by_tokens(tokenized(caption), tokenized(edited), tokens)


def _by_words(
    words: Sequence[Sequence[int]], edited: Sequence[Sequence[int]], tokens: int
) -> Alignment:
    """Each word takes the attention of the word in its place."""
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
    """Common tokens take the attention they had; padding, that of the padding in its place."""
    weights, kept = torch.zeros(tokens, tokens), torch.zeros(tokens)
    pairs = [(0, 0), *((i + 1, j + 1) for i, j in _common(old, new)), (len(old) + 1, len(new) + 1)]
    padding = ((place, place) for place in range(len(new) + 2, tokens))
    for i, j in chain(pairs, padding):
        if i < tokens and j < tokens:
            weights[i, j] = kept[j] = 1
    return Alignment(weights, kept)


def _common(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
    """Places of a longest common subsequence in both."""
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
