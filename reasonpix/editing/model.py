"""The editing network: h of an MLLM, through a connector, conditions an InstructPix2Pix UNet.

ReasonPix2Pix, Eq. 9: x_out = M(x_in, h). Shapes are named as in `reasonpix.editing.connectors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from reasonpix.editing.connectors import ConditioningTokens, Connector, pad


class ClipTextEncoder:
    """The frozen CLIP text encoder of a Stable Diffusion pipeline."""

    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self.encoder = encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @property
    def tokens(self) -> int:
        """Tokens of every text, 77 in Stable Diffusion."""
        return int(self.encoder.config.max_position_embeddings)

    def _tokenize(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """States after the final norm, (texts, tokens, width); longer texts are truncated."""
        ids = self._tokenize(texts).input_ids
        states: Tensor = self.encoder(ids.to(self.encoder.device)).last_hidden_state
        return states

    def text_mask(self, texts: Sequence[str]) -> Tensor:
        """Which tokens are not padding, (texts, tokens), bool."""
        mask: Tensor = self._tokenize(texts).attention_mask
        return mask.to(self.encoder.device, torch.bool)


class Conditioner(nn.Module):
    """Turns h into the UNet's conditioning, and knows the conditioning of "no instruction".

    `uncond_states` (m, width): CLIP's states of the empty text, a constant. h has seen the image,
    so dropping the instruction must replace all of h.
    """

    uncond_states: Tensor

    def __init__(
        self, connector: Connector, uncond_states: Tensor, text: ClipTextEncoder | None = None
    ) -> None:
        super().__init__()
        if connector.needs_text and text is None:
            raise ValueError(
                f"the connector {connector.config.kind!r} needs a CLIP text encoder, and the model "
                "that training starts from has none"
            )
        if connector.needs_text and text and text.tokens != connector.config.tokens:
            raise ValueError(
                f"the connector {connector.config.kind!r} has {connector.config.tokens} tokens, "
                f"and CLIP's text {text.tokens}: they are added one by one; leave `tokens` out"
            )
        self.connector = connector
        self.register_buffer("uncond_states", uncond_states)
        self.text = text

    def condition(
        self,
        h: Sequence[Tensor],
        instructions: Sequence[str],
        dropped: Sequence[bool] | None = None,
    ) -> ConditioningTokens:
        """Conditioning of b examples, from ragged h, each (tokens, h_width).

        Examples that are `dropped` get that of no instruction.
        """
        device, dtype = self.uncond_states.device, self.uncond_states.dtype
        padded, mask = pad([states.to(device, dtype) for states in h])
        text = self.text(instructions) if self.text and self.connector.needs_text else None
        conditioning: ConditioningTokens = self.connector(padded, mask, text)
        if dropped is None:
            return conditioning
        return self._drop(conditioning, torch.tensor(dropped, device=device))

    def branch(self, h: Tensor, instruction: str, with_text: Sequence[bool]) -> ConditioningTokens:
        """Conditioning of each guidance branch of one edit, with or without the instruction.

        h (tokens, h_width) passes the connector once, however many branches there are.
        """
        states, mask = self.condition([h], [instruction])
        count = len(with_text)
        conditioning = ConditioningTokens(
            states.expand(count, -1, -1), None if mask is None else mask.expand(count, -1)
        )
        return self._drop(conditioning, ~torch.tensor(with_text, device=self.uncond_states.device))

    def _drop(self, conditioning: ConditioningTokens, dropped: Tensor) -> ConditioningTokens:
        states, mask = conditioning
        count = len(self.uncond_states)
        most = max(count, states.shape[1])
        if mask is None and count != states.shape[1]:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        uncond = F.pad(self.uncond_states, (0, 0, 0, most - count)).to(states.dtype)
        states = F.pad(states, (0, 0, 0, most - states.shape[1]))
        states = torch.where(dropped[:, None, None], uncond, states)
        if mask is None:
            return ConditioningTokens(states, None)
        mask = F.pad(mask, (0, most - mask.shape[1]), value=False)
        uncond_mask = torch.arange(most, device=states.device) < count
        return ConditioningTokens(states, torch.where(dropped[:, None], uncond_mask, mask))


class EditingModel(Conditioner):
    """UNet and connector, which are trained, with the frozen text encoder."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        connector: Connector,
        uncond_states: Tensor,
        text: ClipTextEncoder | None = None,
    ) -> None:
        super().__init__(connector, uncond_states, text)
        if connector.config.width != unet.config.cross_attention_dim:
            raise ValueError(
                f"the connector gives states of width {connector.config.width} to a UNet that "
                f"reads {unet.config.cross_attention_dim}"
            )
        self.unet = unet

    def forward(
        self,
        latents: Tensor,
        image_latents: Tensor,
        timesteps: Tensor,
        conditioning: ConditioningTokens,
    ) -> Tensor:
        """Predict noise or velocity, as the scheduler's prediction type says.

        `latents` (b, 4, height/8, width/8): noisy, scaled. `image_latents`, same shape: the mode of
        the input image's latents, not scaled, or zeros for "no image". `timesteps` (b,).
        """
        predicted: Tensor = self.unet(
            torch.cat([latents, image_latents], 1),
            timesteps,
            encoder_hidden_states=conditioning.states,
            encoder_attention_mask=conditioning.mask,
        ).sample
        return predicted


def expand_input_channels(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Let a text-to-image UNet also take image latents, which it ignores at first.

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
