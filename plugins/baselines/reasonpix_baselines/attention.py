"""Prompt-to-prompt: an edited image attends where the image it came from attended.

Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", ICLR 2023, and
`AttentionControlEdit` of github.com/google/prompt-to-prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from reasonpix_baselines.alignment import Alignment

SELF_CELLS = 32**2
"""Self-attention over more cells than this is left alone, as the authors do."""


class PromptToPrompt(AttnProcessor2_0):
    """Attention of a batch of three parts: images under captions, edited ones, edited without text.

    Within `injecting` the second part attends as the first does; elsewhere it is plain attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights = self._kept = torch.empty(0)
        self._cross = self._self = False

    @contextmanager
    def injecting(
        self, alignments: Sequence[Alignment], *, in_cross: bool, in_self: bool
    ) -> Iterator[None]:
        """Meanwhile maps are handed over, in cross-attention as `alignments` of the rows say."""
        self._weights = torch.stack([one.weights for one in alignments])
        self._kept = torch.stack([one.kept for one in alignments])
        self._cross, self._self = in_cross, in_self
        try:
            yield
        finally:
            self._cross = self._self = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What `attn` gives for states (3 · rows, cells, width)."""
        crosses = encoder_hidden_states is not None
        if not (self._cross if crosses else self._self and hidden_states.shape[1] <= SELF_CELLS):
            plain: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
            return plain
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(projected)
            for projected in (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen))
        )
        maps = attn.get_attention_scores(query, key)
        before, after, without = maps.unflatten(0, (3, -1, attn.heads))
        after = self._redirected(before, after) if crosses else before
        maps = torch.stack([before, after, without]).flatten(0, 2)
        out: Tensor = attn.batch_to_head_dim(torch.bmm(maps, value))
        for layer in attn.to_out:
            out = layer(out)
        return out

    def _redirected(self, before: Tensor, after: Tensor) -> Tensor:
        """Maps (rows, heads, cells, tokens) of the edited images."""
        weights, kept = self._weights.to(before), self._kept.to(before)[:, None, None]
        return kept * torch.einsum("rhcs,rst->rhct", before, weights) + (1 - kept) * after
