"""Edit images with a trained model: batched, guided by image and instruction, seeded per image.

```python
model = ReasonPix2Pix.from_pretrained("runs/train/final")
edited = model(images, ["it got cold over night"] * len(images), seed=7)
```

ReasonPix2Pix, Eq. 8 and 9. The steps are those of diffusers'
`StableDiffusionInstructPix2PixPipeline`, with these differences: all noise of an edit comes from a
generator of its own; a network always sees the same number of rows, so that an edit depends neither
on its neighbours nor on how many they are; images of any size come back in that size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
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
from reasonpix.editing.checkpoint import LoadedModel, Settings, load_checkpoint, vae_scale_factor
from reasonpix.editing.model import Conditioner, ConditioningTokens
from reasonpix.editing.runtimes.base import Networks
from reasonpix.editing.runtimes.modules import torch_networks
from reasonpix.editing.runtimes.select import Runtime, choose_runtime, load_networks
from reasonpix.editing.sampler import GuidanceBranches, denoise, stacked
from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.components import MLLMEncoder, ModelOptions
from reasonpix.plugin.spec import check
from reasonpix.plugin.types import Problem
from reasonpix.plugin.weights import choose_dtype

SMALL_UNET = 50_000_000
"""Parameters up to which a CPU computes several edits faster together than one by one."""
CPU_ROWS = 4
"""How many edits that are; larger UNets see one at a time on a CPU."""
ENCODED_TOGETHER = 8
"""Image and instruction pairs that the encoder is given at once."""

Advance = Callable[[float], None]
"""Told after each step how much of an edit was done, summed over the edits of the batch."""


@dataclass(frozen=True)
class Task:
    """One edit: an image of any size and mode, what to do with it, and the seed of its noise."""

    image: Image.Image
    instruction: str
    seed: int = 0


@dataclass(frozen=True)
class _Prepared:
    """What image and instruction become before noise is drawn."""

    size: tuple[int, int]
    """Of the image as it was given."""
    source: Tensor
    """(c, h, w): the mode of the image's latents, not scaled."""
    given: ConditioningTokens
    """One row for each branch of the guidance: (branches, n, width)."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """Those of equal shape fit into one batch."""
        return (self.source.shape, self.given.states.shape, self.given.mask is None)


class ReasonPix2Pix:
    """An editing model that is ready to use: see `from_pretrained`."""

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
        """Without `networks`, PyTorch computes those of the checkpoint."""
        self.settings = checkpoint.settings
        self.device = device
        self._encoder = encoder
        self._scheduler: Any = checkpoint.scheduler
        model, vae = checkpoint.model, checkpoint.vae
        unet = model.unet
        conditioning = Conditioner(model.connector, model.null, model.text)
        for part in (conditioning, unet, vae):
            if part is not unet or unet.device.type != "meta":  # it may have no weights
                # Not by a VAE's own `to`, which warns of parts that it has none of.
                nn.Module.to(part, device, dtype).eval().requires_grad_(False)
        if model.text:
            model.text.encoder.to(device, dtype)
        self._conditioning = conditioning
        self._networks = networks or torch_networks(unet, vae)
        self.runtime = self._networks.runtime
        self._scaling_factor = float(vae.config.scaling_factor)
        self._cell = vae_scale_factor(vae)
        self._stride = self._cell * int(2 ** (len(unet.config.block_out_channels) - 1))
        """Pixels that become one cell of the UNet's coarsest level."""
        small = sum(it.numel() for it in unet.parameters()) <= SMALL_UNET
        self.rows = (
            batch_size if device.type != "cpu" else min(batch_size, CPU_ROWS) if small else 1
        )
        """Edits that are computed together; fewer ones are padded."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        cache_dir: str | Path | None = None,
        batch_size: int = 8,
        runtime: Runtime = "auto",
    ) -> ReasonPix2Pix:
        """Load what `reasonpix train` wrote, a hub id, or a name such as mini/reasonpix2pix.

        A plain InstructPix2Pix pipeline (timbrooks/instruct-pix2pix) is such a model too.
        `dtype` is the precision of UNet and VAE; the encoder computes in the one it was trained
        with. On a GPU `batch_size` edits are computed together, fewer ones padded: another size may
        move the last bits. On a CPU it is at most 4, and 1 for a UNet that is not small. `runtime`
        is as `reasonpix.editing.runtimes.select` says; an export computes in its own precision.
        Raises `WeightsError`.
        """
        options = ModelOptions(
            model=str(model),
            revision=revision,
            dtype=dtype,
            device=device,
            cache_dir=Path(cache_dir) if cache_dir else None,
            batch_size=batch_size,
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
        images: Sequence[Image.Image],
        instructions: Sequence[str] | str,
        *,
        seed: int | Sequence[int] = 0,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        resolution: int | None = None,
    ) -> list[Image.Image]:
        """The edited images, RGB, each of the size of its input, in the order given.

        Images of any mode are taken as their pixels lie; `reasonpix.core.images.decode` reads a
        file and turns it upright.
        One instruction, or one seed, stands for all images. What is None is as the model's
        settings say. Raises `ReasonpixError` for settings that make no sense and for a pair that
        cannot be edited.
        """
        if isinstance(images, Image.Image):
            raise ReasonpixError("images: give a list, such as [image]")
        if isinstance(instructions, str):
            instructions = [instructions] * len(images)
        if isinstance(seed, int):
            seed = [seed] * len(images)
        if not len(images) == len(instructions) == len(seed):
            raise ReasonpixError(
                f"{len(images)} images, {len(instructions)} instructions and {len(seed)} seeds: "
                "give one of each for every image, or a single instruction or seed for all"
            )
        settings = self.resolve(
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            num_inference_steps=num_inference_steps,
            resolution=resolution,
        )
        results: dict[int, Image.Image] = {}
        for number, edited in self.edit(map(Task, images, instructions, seed), settings):
            if isinstance(edited, Problem):
                raise ReasonpixError(f"image {number}: {edited.reason}")
            results[number] = edited
        return [results[number] for number in range(len(images))]

    def resolve(self, **changes: float | None) -> Settings:
        """The model's settings, with those `changes` that are not None. Raises `ReasonpixError`."""
        problems: list[str] = []
        given = {name: value for name, value in changes.items() if value is not None}
        settings: Settings | None = check(
            Settings,
            self.settings.model_dump() | given,
            (),
            lambda where, what: problems.append(f"{'.'.join(map(str, where))}: {what}"),
        )
        if settings is None:
            raise ReasonpixError("\n".join(problems))
        trained = int(self._scheduler.config.num_train_timesteps)
        if settings.num_inference_steps > trained:
            raise ReasonpixError(
                f"num_inference_steps: {settings.num_inference_steps} are more than the {trained} "
                "steps that the model was trained with"
            )
        try:
            # Of a copy: edits may be under way in another thread.
            deepcopy(self._scheduler).set_timesteps(settings.num_inference_steps)
        except ValueError as error:  # such as fewer than the solver's order
            raise ReasonpixError(
                f"num_inference_steps: {type(self._scheduler).__name__} cannot take "
                f"{settings.num_inference_steps}: {error}"
            ) from error
        return settings

    def edit(
        self, tasks: Iterable[Task | Problem], settings: Settings, advance: Advance | None = None
    ) -> Iterator[tuple[int, Image.Image | Problem]]:
        """Edits with the number of their task, as they get done, not in order.

        Tasks are taken as there is room for them: of a long stream only a few images are held.
        A pair that cannot be edited gives a `Problem`; one in the place of a task stays what it is.
        Raises `ReasonpixError` when memory runs out.
        """
        branches = GuidanceBranches.of(settings.guidance_scale, settings.image_guidance_scale)
        waiting: dict[tuple[Any, ...], list[tuple[int, int, _Prepared]]] = defaultdict(list)
        stream = enumerate(tasks)
        while chunk := list(islice(stream, ENCODED_TOGETHER)):
            prepared = self._prepare([task for _, task in chunk], settings, branches)
            for (number, task), ready in zip(chunk, prepared, strict=True):
                if isinstance(ready, Problem):
                    yield number, ready
                    continue
                assert isinstance(task, Task)
                group = waiting[ready.shape]
                group.append((number, task.seed, ready))
                if len(group) == self.rows:
                    yield from self._edited(waiting.pop(ready.shape), settings, branches, advance)
        for group in waiting.values():
            yield from self._edited(group, settings, branches, advance)

    def _prepare(
        self, tasks: Sequence[Task | Problem], settings: Settings, branches: GuidanceBranches
    ) -> list[_Prepared | Problem]:
        """Each pair of image and instruction once, however many seeds it comes with."""
        pairs = {_pair(task): task for task in tasks if isinstance(task, Task)}
        seen = {pair: self._seen(task, settings.resolution) for pair, task in pairs.items()}
        usable = {pair: image for pair, image in seen.items() if not isinstance(image, Problem)}
        answers = self._encoder.encode(
            [image.copy() for _, image in usable.values()], [words for _, words in usable]
        )
        ready: dict[tuple[int, str], _Prepared | Problem] = {
            pair: image for pair, image in seen.items() if isinstance(image, Problem)
        }
        for (pair, (size, image)), answer in zip(usable.items(), answers, strict=True):
            if isinstance(answer, Problem):
                ready[pair] = answer
                continue
            with torch.inference_mode():
                given = self._condition(answer, pair[1], branches)
                ready[pair] = _Prepared(size, self._encode_image(image), given)
        return [task if isinstance(task, Problem) else ready[_pair(task)] for task in tasks]

    def _seen(self, task: Task, resolution: int) -> tuple[tuple[int, int], Image.Image] | Problem:
        """The image's size, and the image as encoder and UNet see it, as they did in training."""
        if not task.instruction.strip():
            return Problem(status="failed", reason="the instruction is empty")
        try:
            image = rgb(task.image)
        except UndecodableImage as error:
            return Problem(status="failed", reason=str(error))
        return image.size, resized(image, self.working_size(image.size, resolution))

    def working_size(self, size: tuple[int, int], resolution: int) -> tuple[int, int]:
        """The size, width and height, in which the model sees an image of `size`."""
        return working_size(size, resolution, self._stride)

    def _condition(
        self, h: np.ndarray[Any, np.dtype[np.float32]], instruction: str, branches: GuidanceBranches
    ) -> ConditioningTokens:
        """States for each branch of one edit, (branches, n, width)."""
        width = self._conditioning.connector.config.h_width
        if h.shape[-1] != width:
            raise WeightsError(
                f"encoder {self._encoder.name!r} gives states of width {h.shape[-1]}, and the "
                f"model's connector reads {width}: this is not the encoder it was trained with"
            )
        states, mask = self._conditioning.branch(torch.from_numpy(h), instruction, branches.text)
        if mask is not None:
            # Instructions of other lengths shall share a batch, and padding depend on one alone.
            missing = -states.shape[1] % len(self._conditioning.null)
            states = F.pad(states, (0, 0, 0, missing))
            mask = F.pad(mask, (0, missing), value=False)
        return ConditioningTokens(states, mask)

    def _encode_image(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        encoder = self._networks.vae_encoder
        scaled = pixels.to(encoder.device, encoder.dtype) / 127.5 - 1
        return encoder.bind(pixels=scaled.contiguous())()[0].clone()

    def _decode(self, latents: Tensor) -> Image.Image:
        decoder = self._networks.vae_decoder
        unscaled = latents[None].to(decoder.device, decoder.dtype) / self._scaling_factor
        decoded = decoder.bind(latents=unscaled)()[0]
        pixels = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

    def _edited(
        self,
        group: Sequence[tuple[int, int, _Prepared]],
        settings: Settings,
        branches: GuidanceBranches,
        advance: Advance | None,
    ) -> Iterator[tuple[int, Image.Image]]:
        """The edits of at most `rows` tasks of one shape, the missing rows filled up."""
        full = [*group, *[group[0]] * (self.rows - len(group))]
        try:
            with torch.inference_mode():
                latents = denoise(
                    self._networks.unet,
                    self._scheduler,
                    [seed for _, seed, _ in full],
                    torch.stack([ready.source for *_, ready in full]),
                    stacked([ready.given for *_, ready in full]),
                    branches,
                    settings.num_inference_steps,
                    lambda share: advance(share * len(group)) if advance else None,
                )
                images = [self._decode(one) for one in latents[: len(group)]]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            height, width = (side * self._cell for side in group[0][2].source.shape[1:])
            raise ReasonpixError(
                f"memory ran out while editing {self.rows} images of {width}x{height} pixels at "
                "once; lower the batch size or the resolution"
            ) from error
        for (number, _, ready), image in zip(group, images, strict=True):
            yield number, resized(image, ready.size)


def _pair(task: Task) -> tuple[int, str]:
    return id(task.image), task.instruction


def working_size(size: tuple[int, int], resolution: int, stride: int) -> tuple[int, int]:
    """The size, width and height, in which the model sees an image: the longer side `resolution`.

    The aspect is kept as far as sides that are multiples of `stride` allow.
    """
    # Exactly, or an image that is of this size already might be given another one.
    cells = (round(Fraction(side * resolution, max(size) * stride)) for side in size)
    width, height = (max(1, count) * stride for count in cells)
    return width, height
