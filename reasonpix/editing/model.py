"""The editing network: h of an MLLM, through a connector, conditions an InstructPix2Pix UNet.

ReasonPix2Pix, Eq. 9: x_out = M(x_in, h). What the paper leaves open, how h enters the UNet, is the
connector's kind. Shapes: `b` examples, `t` tokens of h (ragged, so padded, with a mask), `n` tokens
that the UNet attends to, `width` of the UNet's cross-attention (768 for Stable Diffusion 1.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

Kind = Literal[
    "text_tokens", "query_resampler", "full_sequence", "clip_residual", "codebook", "identity"
]


class ConnectorConfig(BaseModel):
    """What a connector is built from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    h_width: int = Field(ge=1, description="Width of the encoder's states")
    width: int = Field(ge=1, description="Width of the UNet's cross-attention")
    tokens: int = Field(77, ge=1, description="Tokens for the UNet, where their number is fixed")
    inner: int | None = Field(None, ge=1, description="Width inside a resampler; None is `width`")
    depth: int = Field(2, ge=1, description="Layers of a resampler")
    heads: int = Field(8, ge=1, description="Attention heads of a resampler")
    groups: int = Field(
        8, ge=1, description="Choices that a codebook makes, one code of each group"
    )
    codes: int = Field(32, ge=2, description="Codes in each group of a codebook")
    dropout: float = Field(0.5, ge=0, lt=1, description="Of what a codebook reads in training")


class ConditioningTokens(NamedTuple):
    """What the UNet's cross-attention reads."""

    states: Tensor
    """(b, n, width)."""
    mask: Tensor | None
    """(b, n), True where there is a token; None where all are."""


class Connector(nn.Module):
    """Turns h into tokens for the UNet."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """From h (b, t, h_width), its mask (b, t) and CLIP's states of the instruction.

        `text` (b, tokens, width) is given to those that need it (`needs_text`) alone.
        """
        raise NotImplementedError

    needs_text = False

    looks_at = 1
    """Examples whose h it wants to see before anything is learnt."""

    def see(self, h: Tensor, mask: Tensor) -> None:
        """Look at h and mask of as many examples."""


class Identity(Connector):
    """h as it is: with CLIP text for an encoder this is InstructPix2Pix itself."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        if config.h_width != config.width:
            raise ValueError(
                f"the connector 'identity' passes states of width {config.h_width} to a UNet that "
                f"reads {config.width}; take another connector, such as text_tokens"
            )

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """All tokens, none changed."""
        return ConditioningTokens(h, None if bool(mask.all()) else mask)


def _projector(config: ConnectorConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(config.h_width),
        nn.Linear(config.h_width, config.width),
        nn.GELU(),
        nn.Linear(config.width, config.width),
    )


class FullSequence(Connector):
    """Each state projected by itself: LayerNorm, Linear, GELU, Linear."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        self.projector = _projector(config)

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """As many tokens as h has."""
        return ConditioningTokens(self.projector(h), mask)


class TextTokens(FullSequence):
    """The same, padded or cut to `tokens` (77, as CLIP's)."""

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """`tokens` tokens."""
        missing = self.config.tokens - h.shape[1]
        # A negative pad cuts.
        return super().forward(
            F.pad(h, (0, 0, 0, missing)), F.pad(mask, (0, missing), value=False), None
        )


class _Layer(nn.Module):
    """Queries look at the states, then think by themselves (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.between = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        asked = self.before(queries)
        found, _ = self.attention(asked, states, states, key_padding_mask=~mask, need_weights=False)
        queries = queries + found
        return queries + self.feedforward(self.between(queries))


class QueryResampler(Connector):
    """`tokens` learned queries attend to all of h (as the Q-Former of SmartEdit, CVPR 2024)."""

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
        """`tokens` tokens, none of them padding."""
        states, queries = self.projector(h), self.queries.expand(len(h), -1, -1)
        for layer in self.layers:
            queries = layer(queries, states, mask)
        return ConditioningTokens(self.out(queries), None)


class ClipResidual(QueryResampler):
    """CLIP(I) + gate · resampled h, with a gate of zero: at step 0 exactly InstructPix2Pix."""

    needs_text = True

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """`tokens` tokens, which is how many `text` has."""
        assert text is not None, "clip_residual reads CLIP's states of the instruction"
        return ConditioningTokens(text + self.gate * super().forward(h, mask, None).states, None)


class Codebook(Connector):
    """A few soft choices among learned codes, read off the last state and the mean of all.

    Where an encoder has not understood, a projection gives something between all meanings, which
    the UNet has never seen. A softmax over codes gives one of them. It reads so little of h, and
    that with dropout, that it cannot learn the words of its training instructions by heart.
    """

    looks_at = 512
    location: Tensor
    scale: Tensor

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        inner = config.inner or config.width
        # A few dimensions of an LLM's states are many times larger than all others.
        self.register_buffer("location", torch.zeros(2 * config.h_width))
        self.register_buffer("scale", torch.ones(2 * config.h_width))
        self.dropout = nn.Dropout(config.dropout)
        self.choose = nn.Linear(2 * config.h_width, config.groups * config.codes)
        self.words = nn.Parameter(0.1 * torch.randn(config.groups, config.codes, inner))
        self.out = nn.Linear(inner, config.tokens * config.width)

    def see(self, h: Tensor, mask: Tensor) -> None:
        """Learn how large each dimension is."""
        read = self._read(h, mask)
        self.location.copy_(read.mean(0))
        self.scale.copy_(read.std(0, correction=0) + 1e-3)

    @staticmethod
    def _read(h: Tensor, mask: Tensor) -> Tensor:
        """The last state, and the mean: (b, 2 · h_width), float32: a sum of many passes float16."""
        h = h.float()
        weight = mask[..., None].to(h.dtype)
        last = h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]
        return torch.cat([last, (h * weight).sum(1) / weight.sum(1)], 1)

    def forward(self, h: Tensor, mask: Tensor, text: Tensor | None) -> ConditioningTokens:
        """`tokens` tokens, none of them padding."""
        read = self.dropout((self._read(h, mask) - self.location) / self.scale)
        chosen = self.choose(read.to(h.dtype)).unflatten(1, self.words.shape[:2]).softmax(2)
        said = torch.einsum("bgc,gci->bi", chosen, self.words)
        return ConditioningTokens(self.out(said).unflatten(1, (self.config.tokens, -1)), None)


CONNECTORS: dict[Kind, type[Connector]] = {
    "text_tokens": TextTokens,
    "query_resampler": QueryResampler,
    "full_sequence": FullSequence,
    "clip_residual": ClipResidual,
    "codebook": Codebook,
    "identity": Identity,
}


def build_connector(config: ConnectorConfig) -> Connector:
    """A fresh connector. Raises `ValueError` when its widths or heads do not go together."""
    inner = config.inner or config.width
    if config.kind in ("query_resampler", "clip_residual") and inner % config.heads:
        raise ValueError(f"{config.heads} heads do not divide the width {inner} of the connector")
    return CONNECTORS[config.kind](config)


class ClipTextEncoder:
    """The frozen CLIP text encoder of a Stable Diffusion pipeline."""

    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self.encoder = encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @property
    def tokens(self) -> int:
        """Tokens of every text, 77 in Stable Diffusion."""
        return int(self.encoder.config.max_position_embeddings)

    def _tokenized(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """States (texts, tokens, width) after the final norm; what is too long is cut."""
        ids = self._tokenized(texts).input_ids
        states: Tensor = self.encoder(ids.to(self.encoder.device)).last_hidden_state
        return states

    def is_text(self, texts: Sequence[str]) -> Tensor:
        """Which tokens are no padding, (texts, tokens)."""
        mask: Tensor = self._tokenized(texts).attention_mask
        return mask.to(self.encoder.device, torch.bool)


def pad(h: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ragged h, each (tokens, h_width), as (b, t, h_width) and its mask (b, t)."""
    longest = max(map(len, h))
    padded = torch.stack([F.pad(states, (0, 0, 0, longest - len(states))) for states in h])
    lengths = torch.tensor([len(states) for states in h], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]


class Conditioner(nn.Module):
    """What turns h into that by which the UNet is conditioned, and stands for "no instruction".

    `null` (m, width) are CLIP's states of the empty text, a constant: h has seen the image, so that
    dropping the instruction has to drop all of h.
    """

    null: Tensor

    def __init__(
        self, connector: Connector, null: Tensor, text: ClipTextEncoder | None = None
    ) -> None:
        super().__init__()
        if connector.needs_text and text is None:
            raise ValueError(
                f"the connector {connector.config.kind!r} needs the CLIP text encoder of the model "
                "that training starts from, and there is none"
            )
        if connector.needs_text and text and text.tokens != connector.config.tokens:
            raise ValueError(
                f"the connector {connector.config.kind!r} has {connector.config.tokens} tokens, "
                f"and CLIP's text {text.tokens}: they are added one by one; leave `tokens` out"
            )
        self.connector = connector
        self.register_buffer("null", null)
        self.text = text

    def condition(
        self,
        h: Sequence[Tensor],
        instructions: Sequence[str],
        dropped: Sequence[bool] | None = None,
    ) -> ConditioningTokens:
        """States for the UNet, from ragged h, each (tokens, h_width).

        Where `dropped`, they are those of no instruction.
        """
        device, dtype = self.null.device, self.null.dtype
        padded, mask = pad([states.to(device, dtype) for states in h])
        text = self.text(instructions) if self.text and self.connector.needs_text else None
        given: ConditioningTokens = self.connector(padded, mask, text)
        if dropped is None:
            return given
        return self._with_null(given, torch.tensor(dropped, device=device))

    def branch(self, h: Tensor, instruction: str, seen: Sequence[bool]) -> ConditioningTokens:
        """States of one edit for each branch of its guidance, h or, where it is not `seen`, none.

        h (tokens, h_width) goes through the connector once, however many branches there are.
        """
        states, mask = self.condition([h], [instruction])
        count = len(seen)
        given = ConditioningTokens(
            states.expand(count, -1, -1), None if mask is None else mask.expand(count, -1)
        )
        return self._with_null(given, ~torch.tensor(seen, device=self.null.device))

    def _with_null(self, given: ConditioningTokens, dropped: Tensor) -> ConditioningTokens:
        count, most = len(self.null), max(len(self.null), given.states.shape[1])
        null = F.pad(self.null, (0, 0, 0, most - count)).to(given.states.dtype)
        states = F.pad(given.states, (0, 0, 0, most - given.states.shape[1]))
        states = torch.where(dropped[:, None, None], null, states)
        if given.mask is None and count == given.states.shape[1]:
            return ConditioningTokens(states, None)
        mask = given.mask
        if mask is None:
            mask = torch.ones(given.states.shape[:2], dtype=torch.bool, device=states.device)
        mask = F.pad(mask, (0, most - mask.shape[1]), value=False)
        null_mask = torch.arange(most, device=states.device) < count
        return ConditioningTokens(states, torch.where(dropped[:, None], null_mask, mask))


class EditingModel(Conditioner):
    """UNet, connector, and the states that stand for "no instruction": all that is trained."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        connector: Connector,
        null: Tensor,
        text: ClipTextEncoder | None = None,
    ) -> None:
        super().__init__(connector, null, text)
        if connector.config.width != unet.config.cross_attention_dim:
            raise ValueError(
                f"the connector gives states of width {connector.config.width} to a UNet that "
                f"reads {unet.config.cross_attention_dim}"
            )
        self.unet = unet

    def forward(
        self, latents: Tensor, image_latents: Tensor, timesteps: Tensor, given: ConditioningTokens
    ) -> Tensor:
        """What the scheduler's prediction type says (epsilon or v), (b, 4, height/8, width/8).

        `latents` are noisy and scaled; `image_latents` are the mode of the input image's latents,
        not scaled, or zeros for "no image"; `timesteps` is (b,).
        """
        predicted: Tensor = self.unet(
            torch.cat([latents, image_latents], 1),
            timesteps,
            encoder_hidden_states=given.states,
            encoder_attention_mask=given.mask,
        ).sample
        return predicted


def expand_input_channels(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A text-to-image UNet that also takes image latents, which it ignores at first.

    The 4 additional channels of the input convolution are zero; the first 4 and the bias are
    copied (InstructPix2Pix, §3.2).
    """
    old = unet.conv_in
    new = nn.Conv2d(2 * old.in_channels, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new.to(old.weight.device, old.weight.dtype)
    unet.register_to_config(in_channels=2 * old.in_channels)
    return unet
