"""Images of any size to latents and back, and batches of a fixed size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from reasonpix.editing import (
    CPU_ROWS,
    SMALL_UNET,
    decoded_image,
    vae_scale_factor,
    working_size,
)
from reasonpix.plugin import Problem, ReasonpixError, is_out_of_memory
from reasonpix_baselines import BaselineOptions

T = TypeVar("T")
R = TypeVar("R")


class Latents:
    """The VAE of a pipeline, and the size of its UNet's images."""

    def __init__(
        self,
        options: BaselineOptions,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        # Not the VAE's own `to`, which warns about parts that a VAE does not have.
        self._vae = nn.Module.to(vae, device, dtype).eval().requires_grad_(False)
        self._device, self._dtype = device, dtype
        self._resolution = options.resolution or int(
            unet.config.sample_size * vae_scale_factor(vae)
        )
        self._stride = vae_scale_factor(vae) * int(2 ** (len(unet.config.block_out_channels) - 1))
        self.scale = float(vae.config.scaling_factor)

    def posterior(self, image: Image.Image) -> Any:
        """The distribution (1, c, h, w) of the latents of an RGB image, not scaled."""
        size = working_size(image.size, self._resolution, self._stride)
        pixels = torch.from_numpy(np.array(_resized(image, size))).permute(2, 0, 1)[None]
        return self._vae.encode(pixels.to(self._device, self._dtype) / 127.5 - 1).latent_dist

    def image(self, latents: Tensor, size: tuple[int, int]) -> Image.Image | Problem:
        """Decode scaled latents (c, h, w) to an RGB image of `size`.

        Numbers that are not finite give a `Problem`.
        """
        decoded = self._vae.decode(latents[None].to(self._dtype) / self.scale).sample[0]
        image = decoded_image(decoded, latents)
        return image if isinstance(image, Problem) else _resized(image, size)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def rows_of(unet: UNet2DConditionModel, device: torch.device, batch_size: int) -> int:
    """The fixed number of edits in a batch: kernels round differently for other numbers.

    On a CPU it does not depend on options, so that a result does not depend on its batch. On a GPU
    it is `batch_size`, which may change the last bits.
    """
    if device.type != "cpu":
        return batch_size
    return CPU_ROWS if sum(it.numel() for it in unet.parameters()) <= SMALL_UNET else 1


def in_batches(
    items: Sequence[T],
    shape: Callable[[T], Any],
    rows: int,
    compute: Callable[[list[T]], Sequence[R]],
) -> list[R]:
    """The results, in order. `compute` gets `rows` items of one shape; the last batch is padded.

    Raises `ReasonpixError` if memory runs out.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[shape(item)].append(number)
    results: dict[int, R] = {}
    for group in groups.values():
        for start in range(0, len(group), rows):
            numbers = group[start : start + rows]
            padded = [*numbers, *numbers[:1] * (rows - len(numbers))]
            try:
                computed = compute([items[number] for number in padded])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise ReasonpixError(
                    f"memory ran out with {rows} images at once; lower batch_size or resolution"
                ) from error
            results |= dict(zip(numbers, computed, strict=False))
    return [results[number] for number in range(len(items))]
