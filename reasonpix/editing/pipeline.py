"""Edit images with a trained model.

```python
model = ReasonPix2Pix.from_pretrained("runs/train/model")
edited = model([image], ["it got cold over night"], seed=7)
```

ReasonPix2Pix, Eq. 8 and 9. The steps are those of diffusers'
`StableDiffusionInstructPix2PixPipeline`, except that each edit draws its noise from a generator of
its own, networks always see the same number of rows, so an edit does not depend on the rest of its
batch, and images of any size are returned in that size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from reasonpix.core.images import UndecodableImage, resized, rgb
from reasonpix.core.memory import is_out_of_memory
from reasonpix.editing.checkpoint import LoadedModel, load_checkpoint
from reasonpix.editing.config import SamplingSettings
from reasonpix.editing.connectors import ConditioningTokens
from reasonpix.editing.decoded_images import decoded_image
from reasonpix.editing.model import Conditioner
from reasonpix.editing.pipeline_parts import unet_stride, vae_scale_factor, working_image
from reasonpix.editing.runtimes.base import Networks
from reasonpix.editing.runtimes.modules import torch_networks
from reasonpix.editing.runtimes.names import Runtime
from reasonpix.editing.runtimes.select import choose_runtime, load_networks
from reasonpix.editing.sampler import GuidanceBranches, denoise, stack_branches
from reasonpix.editing.schedulers import check_steps
from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.components import MLLMEncoder, ModelOptions
from reasonpix.plugin.spec import check
from reasonpix.plugin.types import Problem
from reasonpix.plugin.weights import choose_dtype

SMALL_UNET = 50_000_000
"""UNets of at most this many parameters are faster in batches on a CPU."""
CPU_ROWS = 4
"""Batch size of small UNets on a CPU; larger ones compute one edit at a time."""
ENCODED_TOGETHER = 8
"""Pairs of image and instruction that the encoder gets at once."""

StepCallback = Callable[[float], None]
"""Called after each step with the edits' progress: the share of one edit, summed over the batch."""


@dataclass(frozen=True)
class EditTask:
    """One edit: an image of any size and mode, the instruction, and the seed of the noise."""

    image: Image.Image
    instruction: str
    seed: int = 0

    @property
    def pair_key(self) -> tuple[int, str]:
        """Equal for tasks that differ in their seed only."""
        return id(self.image), self.instruction


@dataclass(frozen=True)
class _PreparedPair:
    """Image and instruction as the sampler reads them."""

    size: tuple[int, int]
    """Width and height of the original image."""
    source: Tensor
    """(c, h, w): the mode of the image's latents, not scaled."""
    conditioning: ConditioningTokens
    """A row for each guidance branch: (branches, n, width)."""

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Pairs with equal keys fit into one batch."""
        states, mask = self.conditioning
        return (self.source.shape, states.shape, mask is None)


class ReasonPix2Pix:
    """An editing model, ready to use. Load one with `from_pretrained`, then call it."""

    def __init__(
        self,
        checkpoint: LoadedModel,
        encoder: MLLMEncoder[Any],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 8,
        networks: Networks | None = None,
    ) -> None:
        """Move the model to `device` and `dtype`; `encoder` must be loaded already.

        `networks` replace the checkpoint's UNet and VAE, for example by an export.
        """
        self.settings = checkpoint.settings
        self.intended_images = checkpoint.intended_images
        self.device = device
        self._encoder = encoder
        self._scheduler: Any = checkpoint.scheduler
        model, vae = checkpoint.model, checkpoint.vae
        unet = model.unet
        self._conditioner = Conditioner(model.connector, model.uncond_states, model.text)
        for part in (self._conditioner, unet, vae):
            if part is not unet or unet.device.type != "meta":  # which has no weights to move
                # Not `vae.to`, which warns about components that this VAE lacks.
                nn.Module.to(part, device, dtype).eval().requires_grad_(False)
        if model.text:
            model.text.encoder.to(device, dtype)
        self._networks = networks or torch_networks(unet, vae)
        self.runtime = self._networks.runtime
        self._scaling_factor = float(vae.config.scaling_factor)
        self._vae_scale_factor = vae_scale_factor(vae)
        self._stride = unet_stride(unet, vae)
        small = sum(weight.numel() for weight in unet.parameters()) <= SMALL_UNET
        self.rows = (
            batch_size if device.type != "cpu" else min(batch_size, CPU_ROWS) if small else 1
        )
        """Edits computed together; smaller batches are padded to as many."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        device: str = "auto",
        dtype: Literal["auto", "float32", "float16", "bfloat16"] | torch.dtype = "auto",
        cache_dir: str | Path | None = None,
        batch_size: int = 8,
        runtime: Runtime = "auto",
    ) -> ReasonPix2Pix:
        """Load an editing model.

        - `model`: a folder that `reasonpix train` wrote, a hub id, or a name such as
          mini/reasonpix2pix. A plain InstructPix2Pix pipeline (timbrooks/instruct-pix2pix) works.
        - `revision`: commit or tag of a hub id. `cache_dir`: where downloads are kept.
        - `variant`: of the weight files, such as "fp16"; see `ModelOptions`.
        - `device`: "cpu", "cuda", "cuda:1", "mps"; "auto" takes the GPU if there is one.
        - `dtype`: of UNet and VAE; "auto" is float32 on a CPU, float16 on a GPU. The encoder keeps
          the precision it was trained with.
        - `batch_size`: edits computed together on a GPU; another one may change the last bits. On a
          CPU at most 4, and 1 for a large UNet.
        - `runtime`: see `reasonpix.editing.runtimes.select`; an export has its own precision.

        Raises `WeightsError`.
        """
        if not isinstance(model, str | Path):
            raise WeightsError(f"{model!r} is not a model; give a folder, a hub id or a name")
        options = ModelOptions.model_validate(
            {
                "model": str(model),
                "revision": revision,
                "variant": variant,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "cache_dir": cache_dir,
                "batch_size": batch_size,
            }
        )
        choice = choose_runtime(runtime, options)
        checkpoint = load_checkpoint(options, unet_weights=choice.reads_weights)
        unet, vae = checkpoint.model.unet, checkpoint.vae
        networks = load_networks(choice, options.model, unet, vae)
        encoder = checkpoint.build_encoder(
            device=str(choice.device), cache_dir=options.cache_dir, batch_size=batch_size
        )
        encoder.load()
        return cls(
            checkpoint,
            encoder,
            device=choice.device,
            dtype=choose_dtype(options, choice.device),
            batch_size=batch_size,
            networks=networks,
        )

    def __call__(
        self,
        images: Sequence[Image.Image] | Image.Image,
        instructions: Sequence[str] | str,
        *,
        seed: int | Sequence[int] = 0,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        resolution: int | None = None,
    ) -> list[Image.Image]:
        """Edit images; return one RGB image per input, in order, each of its input's size.

        A single image, instruction or seed is allowed; an instruction or a seed then applies to all
        images. Images of any mode are read in the orientation in which they are stored;
        `reasonpix.core.images.decode` applies EXIF rotation. Options left at None are the model's
        `settings`. Raises `ReasonpixError` for invalid settings and for a pair that cannot be
        edited.
        """
        if isinstance(images, Image.Image):
            images = [images]
        if wrong := [type(it).__name__ for it in images if not isinstance(it, Image.Image)]:
            raise ReasonpixError(f"expected PIL images, got {wrong[0]}; use PIL.Image.open")
        if isinstance(instructions, str):
            instructions = [instructions] * len(images)
        if isinstance(seed, int):
            seed = [seed] * len(images)
        if not len(images) == len(instructions) == len(seed):
            raise ReasonpixError(
                f"{len(images)} images, {len(instructions)} instructions and {len(seed)} seeds: "
                "pass one of each per image, or a single instruction or seed for all"
            )
        settings = self.resolve_settings(
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            num_inference_steps=num_inference_steps,
            resolution=resolution,
        )
        results: dict[int, Image.Image] = {}
        for number, edited in self.edit(map(EditTask, images, instructions, seed), settings):
            if isinstance(edited, Problem):
                raise ReasonpixError(f"image {number}: {edited.reason}")
            results[number] = edited
        return [results[number] for number in range(len(images))]

    def resolve_settings(self, **overrides: float | None) -> SamplingSettings:
        """The model's settings with those `overrides` that are not None.

        Raises `ReasonpixError` for values that the model or its scheduler cannot take.
        """
        problems: list[str] = []
        changes = {name: value for name, value in overrides.items() if value is not None}
        settings: SamplingSettings | None = check(
            SamplingSettings,
            self.settings.model_dump() | changes,
            (),
            lambda where, what: problems.append(f"{'.'.join(map(str, where))}: {what}"),
        )
        if settings is None:
            raise ReasonpixError("\n".join(problems))
        check_steps(self._scheduler, settings.num_inference_steps)
        return settings

    def edit(
        self,
        tasks: Iterable[EditTask | Problem],
        settings: SamplingSettings,
        on_step: StepCallback = lambda share: None,
    ) -> Iterator[tuple[int, Image.Image | Problem]]:
        """Edit a stream of any length; yield (number of the task, result) in order of completion.

        Tasks are taken as needed, so only a few images are in memory. A pair that cannot be edited
        yields a `Problem`, and a `Problem` among the tasks is passed on. Raises `ReasonpixError`
        when memory runs out.
        """
        branches = GuidanceBranches.of(settings.guidance_scale, settings.image_guidance_scale)
        batches: dict[tuple[Any, ...], list[tuple[int, int, _PreparedPair]]] = defaultdict(list)
        stream = enumerate(tasks)
        while chunk := list(islice(stream, ENCODED_TOGETHER)):
            prepared = self._prepare([task for _, task in chunk], settings, branches)
            for (number, task), pair in zip(chunk, prepared, strict=True):
                if isinstance(pair, Problem):
                    yield number, pair
                    continue
                assert isinstance(task, EditTask)
                batch = batches[pair.batch_key]
                batch.append((number, task.seed, pair))
                if len(batch) == self.rows:
                    del batches[pair.batch_key]
                    yield from self._sample(batch, settings, branches, on_step)
        for batch in batches.values():
            yield from self._sample(batch, settings, branches, on_step)

    def _prepare(
        self,
        tasks: Sequence[EditTask | Problem],
        settings: SamplingSettings,
        branches: GuidanceBranches,
    ) -> list[_PreparedPair | Problem]:
        """Prepare each pair of image and instruction once, however many seeds it comes with."""
        pairs = {task.pair_key: task for task in tasks if isinstance(task, EditTask)}
        images = {key: self._working_image(task, settings) for key, task in pairs.items()}
        usable = {key: image for key, image in images.items() if not isinstance(image, Problem)}
        states = self._encoder.encode(
            [image.copy() for _, image in usable.values()], [text for _, text in usable]
        )
        prepared: dict[tuple[int, str], _PreparedPair | Problem] = {
            key: image for key, image in images.items() if isinstance(image, Problem)
        }
        for (key, (size, image)), h in zip(usable.items(), states, strict=True):
            if isinstance(h, Problem):
                prepared[key] = h
                continue
            with torch.inference_mode():
                conditioning = self._condition(h, key[1], branches)
                prepared[key] = _PreparedPair(size, self._encode_image(image), conditioning)
        return [task if isinstance(task, Problem) else prepared[task.pair_key] for task in tasks]

    def _working_image(
        self, task: EditTask, settings: SamplingSettings
    ) -> tuple[tuple[int, int], Image.Image] | Problem:
        """The image's original size, and the image as encoder and UNet saw it in training."""
        if not task.instruction.strip():
            return Problem(status="failed", reason="the instruction is empty")
        try:
            image = rgb(task.image)
        except UndecodableImage as error:
            return Problem(status="failed", reason=str(error))
        return image.size, self.working_image(image, settings.resolution)

    def working_image(self, image: Image.Image, resolution: int) -> Image.Image:
        """The image at the size at which the model works on it."""
        return working_image(image, resolution, self._stride)

    def _condition(
        self, h: np.ndarray[Any, np.dtype[np.float32]], instruction: str, branches: GuidanceBranches
    ) -> ConditioningTokens:
        """Conditioning of each guidance branch of one edit, (branches, n, width)."""
        width = self._conditioner.connector.config.h_width
        if h.shape[-1] != width:
            raise WeightsError(
                f"encoder {self._encoder.name!r} gives states of width {h.shape[-1]}, and the "
                f"model's connector reads {width}: this is not the encoder it was trained with"
            )
        states, mask = self._conditioner.branch(torch.from_numpy(h), instruction, branches.text)
        if mask is not None:
            # Pad to a multiple of a fixed length: instructions of different lengths can then share
            # a batch, and the padding of each depends on its own length only.
            missing = -states.shape[1] % len(self._conditioner.uncond_states)
            states = F.pad(states, (0, 0, 0, missing))
            mask = F.pad(mask, (0, missing), value=False)
        return ConditioningTokens(states, mask)

    def _encode_image(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        encoder = self._networks.vae_encoder
        scaled = pixels.to(encoder.device, encoder.dtype) / 127.5 - 1
        return encoder.bind(pixels=scaled.contiguous())()[0].clone()

    def _decode_latents(self, latents: Tensor) -> Image.Image | Problem:
        decoder = self._networks.vae_decoder
        unscaled = latents[None].to(decoder.device, decoder.dtype) / self._scaling_factor
        return decoded_image(decoder.bind(latents=unscaled)()[0], latents)

    def _sample(
        self,
        batch: Sequence[tuple[int, int, _PreparedPair]],
        settings: SamplingSettings,
        branches: GuidanceBranches,
        on_step: StepCallback,
    ) -> Iterator[tuple[int, Image.Image | Problem]]:
        """Edit at most `rows` pairs of one shape; missing rows are filled with the first."""
        full = [*batch, *[batch[0]] * (self.rows - len(batch))]
        try:
            with torch.inference_mode():
                latents = denoise(
                    self._networks.unet,
                    self._scheduler,
                    [seed for _, seed, _ in full],
                    torch.stack([pair.source for *_, pair in full]),
                    stack_branches([pair.conditioning for *_, pair in full]),
                    branches,
                    settings.num_inference_steps,
                    lambda share: on_step(share * len(batch)),
                )
                images = [self._decode_latents(row) for row in latents[: len(batch)]]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sides = batch[0][2].source.shape[1:]
            height, width = (side * self._vae_scale_factor for side in sides)
            raise ReasonpixError(
                f"memory ran out while editing {self.rows} images of {width}x{height} pixels at "
                "once; lower the batch size or the resolution"
            ) from error
        for (number, _, pair), image in zip(batch, images, strict=True):
            yield number, image if isinstance(image, Problem) else resized(image, pair.size)
