"""Connectors: how the encoder's states h become the tokens that the UNet attends to.

ReasonPix2Pix leaves this open (Eq. 9). Shapes: `b` examples, `t` tokens of h (padded, with a mask),
`n` tokens for the UNet, `width` of its cross-attention (768 for Stable Diffusion 1.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reasonpix.editing.config import ConnectorConfig, ConnectorKind


class ConditioningTokens(NamedTuple):
    """What the UNet's cross-attention reads."""

    states: Tensor
    """(b, n, width)."""
    mask: Tensor | None
    """(b, n), True for real tokens; None if none is padding."""


class Connector(nn.Module):
    """Turns h into tokens for the UNet."""

    needs_text = False
    """Whether `forward` needs CLIP's states of the instruction."""
    calibration_examples = 1
    """Examples whose h `calibrate` needs before training."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """Map h (b, t, h_width) with its mask (b, t) to tokens.

        `text`: CLIP's states of the instruction, (b, tokens, width); None unless `needs_text`.
        """
        raise NotImplementedError

    def calibrate(self, h: Tensor, mask: Tensor) -> None:
        """Set constants, such as a normalization, from h (b, t, h_width) of some examples."""


class Identity(Connector):
    """h unchanged: with CLIP text as the encoder this is InstructPix2Pix itself."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        if config.h_width != config.width:
            raise ValueError(
                f"the connector 'identity' passes states of width {config.h_width} to a UNet that "
                f"reads {config.width}; choose another connector, such as text_tokens"
            )

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """Return all t tokens unchanged."""
        return ConditioningTokens(h, None if bool(mask.all()) else mask)


class FullSequence(Connector):
    """Every state projected on its own: LayerNorm, Linear, GELU, Linear."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        self.projector = nn.Sequential(
            nn.LayerNorm(config.h_width),
            nn.Linear(config.h_width, config.width),
            nn.GELU(),
            nn.Linear(config.width, config.width),
        )

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """Return t tokens."""
        return ConditioningTokens(self.projector(h), mask)


class TextTokens(FullSequence):
    """Like `FullSequence`, padded or truncated to `tokens` (77, as in CLIP)."""

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """Return `tokens` tokens."""
        missing = self.config.tokens - h.shape[1]  # F.pad truncates if negative
        return super().forward(
            F.pad(h, (0, 0, 0, missing)), F.pad(mask, (0, missing), value=False), None
        )


class _Layer(nn.Module):
    """Cross-attention from queries to states, then a feed-forward block (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.between = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        attended, _ = self.attention(
            self.before(queries), states, states, key_padding_mask=~mask, need_weights=False
        )
        queries = queries + attended
        return queries + self.feedforward(self.between(queries))


class QueryResampler(Connector):
    """`tokens` learned queries attend to all of h (like SmartEdit's Q-Former, CVPR 2024)."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        inner = config.inner or config.width
        self.projector = nn.Sequential(
            nn.LayerNorm(config.h_width), nn.Linear(config.h_width, inner)
        )
        self.queries = nn.Parameter(torch.randn(config.tokens, inner) * 0.5)
        self.layers = nn.ModuleList(_Layer(inner, config.heads) for _ in range(config.depth))
        self.out = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, config.width))

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """Return `tokens` tokens, without padding."""
        states, queries = self.projector(h), self.queries.expand(len(h), -1, -1)
        for layer in self.layers:
            queries = layer(queries, states, mask)
        return ConditioningTokens(self.out(queries), None)


class ClipResidual(QueryResampler):
    """CLIP(I) + gate · resampled h. The gate starts at zero, so step 0 is InstructPix2Pix."""

    needs_text = True

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """Return `tokens` tokens, as many as `text` has."""
        assert text is not None, "clip_residual reads CLIP's states of the instruction"
        return ConditioningTokens(text + self.gate * super().forward(h, mask, None).states, None)


class Codebook(Connector):
    """A soft choice among learned codes in each group, from the last state and the mean of all.

    If the encoder has not understood the instruction, a projection averages all meanings, which
    the UNet has never seen; a softmax over codes picks one. The little it reads of h, with dropout,
    keeps it from memorizing the training instructions.
    """

    calibration_examples = 512
    location: Tensor
    scale: Tensor

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        inner = config.inner or config.width
        # A few dimensions of an LLM's states are orders of magnitude larger than the others.
        self.register_buffer("location", torch.zeros(2 * config.h_width))
        self.register_buffer("scale", torch.ones(2 * config.h_width))
        self.dropout = nn.Dropout(config.dropout)
        self.choose = nn.Linear(2 * config.h_width, config.groups * config.codes)
        self.words = nn.Parameter(0.1 * torch.randn(config.groups, config.codes, inner))
        self.out = nn.Linear(inner, config.tokens * config.width)

    def calibrate(self, h: Tensor, mask: Tensor) -> None:
        """Learn the location and scale of each dimension."""
        pooled = self._pool(h, mask)
        self.location.copy_(pooled.mean(0))
        self.scale.copy_(pooled.std(0, correction=0) + 1e-3)

    @staticmethod
    def _pool(h: Tensor, mask: Tensor) -> Tensor:
        """The last state and the mean, (b, 2 · h_width); float32, as float16 sums overflow."""
        h = h.float()
        weight = mask[..., None].to(h.dtype)
        last = h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]
        return torch.cat([last, (h * weight).sum(1) / weight.sum(1)], 1)

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """Return `tokens` tokens, without padding."""
        pooled = self.dropout((self._pool(h, mask) - self.location) / self.scale)
        shares = self.choose(pooled.to(h.dtype)).unflatten(1, self.words.shape[:2]).softmax(2)
        mixed = torch.einsum("bgc,gci->bi", shares, self.words)
        return ConditioningTokens(self.out(mixed).unflatten(1, (self.config.tokens, -1)), None)


CONNECTORS: dict[ConnectorKind, type[Connector]] = {
    "text_tokens": TextTokens,
    "query_resampler": QueryResampler,
    "full_sequence": FullSequence,
    "clip_residual": ClipResidual,
    "codebook": Codebook,
    "identity": Identity,
}


def build_connector(config: ConnectorConfig) -> Connector:
    """Create a connector with fresh weights. Raises `ValueError` for widths that do not fit."""
    inner = config.inner or config.width
    if config.kind in ("query_resampler", "clip_residual") and inner % config.heads:
        raise ValueError(f"{config.heads} heads do not divide the width {inner} of the connector")
    return CONNECTORS[config.kind](config)


def pad(h: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack ragged h, each (tokens, h_width), to (b, t, h_width) with its mask (b, t)."""
    longest = max(map(len, h))
    padded = torch.stack([F.pad(states, (0, 0, 0, longest - len(states))) for states in h])
    lengths = torch.tensor([len(states) for states in h], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]
