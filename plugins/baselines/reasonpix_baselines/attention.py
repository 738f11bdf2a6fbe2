"""Prompt-to-prompt: an edited image reuses the attention maps of its source image.

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
"""Self-attention over more cells than this is not replaced, as in the authors' code."""


class PromptToPrompt(AttnProcessor2_0):
    """Attention of a batch of three parts: sources with captions, edits, edits without text.

    Within `injecting` the second part uses the first one's maps; otherwise it is plain attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights = self._kept = torch.empty(0)
        self._cross = self._self = False

    @contextmanager
    def injecting(
        self, alignments: Sequence[Alignment], *, in_cross: bool, in_self: bool
    ) -> Iterator[None]:
        """Inject the sources' maps, in cross-attention by each row's alignment."""
        self._weights = torch.stack([alignment.weights for alignment in alignments])
        self._kept = torch.stack([alignment.kept for alignment in alignments])
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
        """The output of `attn` for states (3 · rows, cells, width)."""
        crosses = encoder_hidden_states is not None
        if not (self._cross if crosses else self._self and hidden_states.shape[1] <= SELF_CELLS):
            plain: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
            return plain
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(projected)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
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
        """The edited images' maps (rows, heads, cells, tokens)."""
        weights, kept = self._weights.to(before), self._kept.to(before)[:, None, None]
        return kept * torch.einsum("rhcs,rst->rhct", before, weights) + (1 - kept) * after
