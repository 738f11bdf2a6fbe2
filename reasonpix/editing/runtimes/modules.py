"""The three networks of an editing model as modules of tensors only, for computing and exporting.

| network | inputs | output |
|---|---|---|
| `unet` | `sample` (b, 2c, h, w): noisy, scaled latents and the image's latents; `timestep` (b,), float32; `encoder_hidden_states` (b, n, width); `encoder_attention_mask` (b, n), bool, or None | `prediction` (b, c, h, w) |
| `vae_encoder` | `pixels` (b, 3, H, W) in [-1, 1] | `latents` (b, c, h, w): the mode, not scaled |
| `vae_decoder` | `latents` (b, c, h, w), not scaled | `pixels` (b, 3, H, W) in [-1, 1] |
"""  # noqa: E501

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from reasonpix.editing.runtimes.base import Networks, TorchNetwork


class UNetGraph(nn.Module):
    """Tensor-only wrapper of the UNet. Accepts fractional timesteps, which some schedulers use."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`prediction`."""
        predicted: Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
        return predicted


class VaeEncoderGraph(nn.Module):
    """Tensor-only wrapper of the VAE's encoder; gives the mode of the posterior."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        """`latents`."""
        latents: Tensor = self.vae.encode(pixels).latent_dist.mode()
        return latents


class VaeDecoderGraph(nn.Module):
    """Tensor-only wrapper of the VAE's decoder."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """`pixels`."""
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return pixels


class PlainAttention:
    """An attention processor for Stable Diffusion's UNet that `torch.export` can trace.

    diffusers' own repeats the mask per head, which cannot be traced with a dynamic batch. This one
    gives the same bits.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend; (b, tokens, width) in and out. The mask (b, 1, n) is added to the scores."""
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states))
        )
        mask = None if attention_mask is None else attention_mask[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected_out: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return projected_out


def torch_networks(
    unet: UNet2DConditionModel, vae: AutoencoderKL, compiled: bool = False
) -> Networks:
    """The networks computed by PyTorch, on their device and in their precision.

    `compiled`: use `torch.compile` for the UNet, which compiles once for each new shape.
    """
    graphs: list[Any] = [UNetGraph(unet), VaeEncoderGraph(vae), VaeDecoderGraph(vae)]
    if compiled:
        graphs[0] = torch.compile(graphs[0])
    return Networks("compile" if compiled else "torch", *map(TorchNetwork, graphs))
