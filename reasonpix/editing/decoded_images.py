"""The image that a VAE decoded, if its numbers are finite."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from reasonpix.plugin.types import Problem

NOT_FINITE = (
    "the network's output is not finite; with float16 try dtype: float32 (--dtype float32), "
    "otherwise the weights or an export of them may be damaged"
)


def decoded_image(decoded: Tensor, latents: Tensor) -> Image.Image | Problem:
    """The RGB image of a VAE's output (3, h, w), which is in [-1, 1] but for overshoots.

    A `Problem` if it or the `latents` that it was decoded from hold NaN or infinity, which would
    become black. The latents are checked too, because a quantized VAE turns NaN into numbers.
    """
    if not (torch.isfinite(latents).all() and torch.isfinite(decoded).all()):
        return Problem(status="failed", reason=NOT_FINITE)
    pixels = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
