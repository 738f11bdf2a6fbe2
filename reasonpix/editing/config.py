"""Configuration saved beside a model's weights: connector and sampling. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ConnectorKind = Literal[
    "text_tokens", "query_resampler", "full_sequence", "clip_residual", "codebook", "identity"
]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ConnectorOptions(_Config):
    """How h enters the UNet, which the paper leaves open."""

    kind: ConnectorKind = "text_tokens"
    tokens: int | None = Field(
        None, ge=1, description="Tokens for the UNet; by default as many as CLIP's: 77"
    )
    inner: int | None = Field(
        None, ge=1, description="Width inside a resampler or codebook; by default the UNet's"
    )
    depth: int = Field(2, ge=1, description="Layers of a resampler")
    heads: int = Field(8, ge=1, description="Attention heads of a resampler")
    groups: int = Field(8, ge=1, description="Groups of a codebook; it picks one code from each")
    codes: int = Field(32, ge=2, description="Codes in each group of a codebook")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="Dropout on a codebook's input during training"
    )


class ConnectorConfig(ConnectorOptions):
    """Everything a connector is built from; saved as `connector/config.json`."""

    kind: ConnectorKind
    tokens: int = Field(77, ge=1, description="Tokens for the UNet, where their number is fixed")
    h_width: int = Field(ge=1, description="Width of the encoder's states")
    width: int = Field(ge=1, description="Width of the UNet's cross-attention")


class SamplingOptions(_Config):
    """Denoising steps and guidance scales, as in diffusers."""

    num_inference_steps: int = Field(100, ge=1, description="Denoising steps")
    guidance_scale: float = Field(
        7.5, ge=0, allow_inf_nan=False, description="s_T: weight of the instruction"
    )
    image_guidance_scale: float = Field(
        1.5, ge=0, allow_inf_nan=False, description="s_I: weight of the input image"
    )


class SamplingSettings(SamplingOptions):
    """A model's default sampling settings; callers may override each of them."""

    resolution: int = Field(ge=8, description="Longer side at which the model works, in pixels")
