"""The frozen networks' view of a pair: h of the encoder, and the VAE's latent distributions.

The encoder is given the part of the image that a view shows as at inference, in its own aspect
ratio; the VAE gets it as a square. Features are computed per view, so flips and crops are exact,
and rounded to float16.
`OnlineFeatures` computes them each time, `CachedFeatures` once; both give the same bits, and so the
same loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from reasonpix.core.parallel import THREADS, Report, prefetch, quiet
from reasonpix.datasets.pairs import ImagePair, Pairs
from reasonpix.datasets.views import largest_change
from reasonpix.editing.pipeline_parts import working_image
from reasonpix.errors import PluginError, RunError, SourceError
from reasonpix.plugin import registry
from reasonpix.plugin.components import MLLMEncoder
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.types import Problem

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

Request = tuple[int, int]
"""The numbers of an example and of a view of it."""

VAE_IMAGES = 8
"""Batch size of the VAE, always: kernels round differently for other ones."""

VERSION = "2"
"""Increase it when views or features are computed differently; cached ones are then ignored."""


class PairView(NamedTuple):
    """A view of a pair, as the frozen networks are given it. RGB."""

    shown: Image.Image
    """The input image for the encoder: what `ReasonPix2Pix` gives it of the same image."""
    before: Image.Image
    """The input image as a square for the VAE, scaled with Lanczos, as in InstructPix2Pix."""
    after: Image.Image
    """The edited image likewise."""


class Feature(NamedTuple):
    """A view of an example as training reads it. All float16, on the CPU."""

    h: Tensor
    """States of the encoder, before the connector: (tokens, width)."""
    source: Tensor
    """Mode of the input image's latents, not scaled: (channels, s, s)."""
    mean: Tensor
    """Mean of the edited image's latents, not scaled: (channels, s, s)."""
    logvar: Tensor
    """Their log variance: (channels, s, s)."""


class OnlineFeatures:
    """Features computed on request.

    The encoder is loaded when first needed and gets `batch` examples at a time; `vae` stays on its
    device. `stride` is that of the UNet.
    """

    def __init__(
        self, pairs: Pairs, encoder: ComponentSpec, vae: AutoencoderKL, stride: int, batch: int = 32
    ) -> None:
        self.pairs = pairs
        self.encoder_spec = encoder
        self.vae = vae
        self.stride = stride
        self.batch = batch
        self._changes: dict[tuple[str, int], int] = {}
        self._encoder: MLLMEncoder[Any] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything in encoder and VAE that affects features."""
        spec = self.encoder_spec
        facts = registry.fingerprint_facts("encoder", spec.name, spec.options)
        return hash_of(VERSION, facts, vae_digest(self.vae))

    def compute(self, report: Report = quiet) -> None:
        """Check that every image can be decoded, see `Pairs.check`, and measure every edit."""

        def measure(example: int, images: ImagePair) -> None:
            for view in range(self.pairs.views):
                seen = self.cut(images, example, view)
                change = largest_change(seen.before, seen.after)
                self._changes[self.pairs.examples[example].row, view] = change

        self.pairs.check(report, measure)

    def change(self, example: int, view: int) -> int:
        """`largest_change` of a view, after `compute`."""
        return self._changes[self.pairs.examples[example].row, view]

    def usable(self) -> list[int]:
        """The numbers of the examples that have features."""
        return self.pairs.usable()

    def get(self, requests: Sequence[Request]) -> list[Feature]:
        """Compute the features of the requested views, in order.

        Raises `SourceError` for an image that cannot be read, and for an example that the encoder
        rejects: at this point it is too late to skip it.
        """
        views = dict(prefetch(self._view, iter(requests), THREADS))
        pairs = {self._pixel_key(*request): views[request] for request in requests}
        squares = [(seen.before, seen.after) for seen in pairs.values()]
        moments = dict(zip(pairs, self.moments(squares), strict=True))
        examples = self.pairs.examples
        texts = [examples[number].instruction for number, _ in requests]
        states = self.states([views[request].shown for request in requests], texts)
        features: list[Feature] = []
        for request, text, h in zip(requests, texts, states, strict=True):
            if isinstance(h, Problem):
                raise SourceError(
                    f"{examples[request[0]].row}: the encoder has a problem with {text!r}: "
                    f"{h.reason}; remove the row, or set cache: true, where `broken: skip` can "
                    "leave it out"
                )
            features.append(Feature(h, *moments[self._pixel_key(*request)]))
        return features

    def _view(self, request: Request) -> tuple[Request, PairView]:
        return request, self.view(*request)

    def view(self, example: int, view: int) -> PairView:
        """A view of an example. Raises a `SourceError` that names the row."""
        return self.cut(self.pairs.images(example), example, view)

    def cut(self, images: ImagePair, example: int, view: int) -> PairView:
        """A view of an example's `images`."""
        side, geometry = self.pairs.data.resolution, self.pairs.geometry(example, view)
        before, after = (geometry.of(image) for image in images)
        return PairView(
            working_image(before, side, self.stride),
            *(image.resize((side, side), Image.Resampling.LANCZOS) for image in (before, after)),
        )

    def _pixel_key(self, example: int, view: int) -> tuple[object, ...]:
        """Equal for requests with the same pixels."""
        pair = self.pairs.examples[example]
        return pair.input_image, pair.edited_image, self.pairs.geometry(example, view)

    def states(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Tensor | Problem]:
        """h of each image with its instruction: (tokens, width), float16."""
        results: list[Tensor | Problem] = []
        for first in range(0, len(texts), self.batch):
            batch = slice(first, first + self.batch)
            # Copies, as a component may modify the images it gets.
            states = self.encoder.encode([image.copy() for image in images[batch]], texts[batch])
            if len(states) != len(texts[batch]):
                raise PluginError(
                    f"encoder {self.encoder_spec.name!r} returned {len(states)} results for "
                    f"{len(texts[batch])} pairs"
                )
            results += map(_rounded, states)
        return results

    @property
    def encoder(self) -> MLLMEncoder[Any]:
        """The encoder, loaded."""
        if self._encoder is None:
            encoder = self.encoder_spec.build()
            assert isinstance(encoder, MLLMEncoder)
            encoder.load()
            self._encoder = encoder
        return self._encoder

    def close(self) -> None:
        """Release the encoder; it is loaded again when needed."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def moments(self, pairs: Sequence[ImagePair]) -> list[Tensor]:
        """For each pair source, mean and logvar as in `Feature`: (3, channels, s, s), float16.

        Raises `RunError` if the VAE computes NaN or infinity.
        """
        import torch

        images = [image for pair in pairs for image in pair]
        parameters: list[Tensor] = []
        for first in range(0, len(images), VAE_IMAGES):
            batch = images[first : first + VAE_IMAGES]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in batch]))
            x = torch.zeros(VAE_IMAGES, *pixels.shape[1:])
            x[: len(batch)] = pixels / 127.5 - 1
            with torch.no_grad():
                x = x.permute(0, 3, 1, 2).contiguous().to(self.vae.device, self.vae.dtype)
                posterior = self.vae.encode(x).latent_dist
            both = torch.stack([posterior.mean, posterior.logvar], 1)[: len(batch)]
            parameters += both.to("cpu", torch.float16)
        results = [
            torch.stack([before[0], *after])
            for before, after in zip(parameters[::2], parameters[1::2], strict=True)
        ]
        if not all(result.isfinite().all() for result in results):
            raise RunError(
                f"the VAE computes NaN or infinity in {self.vae.dtype}; load it in float32"
            )
        return results


def _rounded(h: object) -> Tensor | Problem:
    import torch

    if isinstance(h, Problem):
        return h
    if not isinstance(h, np.ndarray) or h.ndim != 2 or not h.size:
        what = f"an array of {h.shape}" if isinstance(h, np.ndarray) else type(h).__name__
        return Problem(status="failed", reason=f"the encoder returned {what}, not (tokens, width)")
    rounded = torch.from_numpy(np.ascontiguousarray(h)).to(torch.float16)
    if not rounded.isfinite().all():
        return Problem(
            status="failed", reason="the encoder returned numbers that are not finite in float16"
        )
    return rounded


def vae_digest(vae: AutoencoderKL) -> str:
    """SHA-256 of a VAE's configuration and weights, in hex."""
    import torch

    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(vae.state_dict().items()):
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        total.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def hash_of(*parts: object) -> str:
    """SHA-256 of JSON values, in hex."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
