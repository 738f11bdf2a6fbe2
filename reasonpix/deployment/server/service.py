"""An editing model behind a queue, with limits and metrics: what the HTTP routes call."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO

from PIL.Image import Image
from starlette.datastructures import FormData

from reasonpix.core.images import encode_png, resized
from reasonpix.deployment.server.batcher import Batcher, Reservation
from reasonpix.deployment.server.metrics import Metrics
from reasonpix.deployment.server.openapi import ModelInfo
from reasonpix.deployment.server.request import EditFields, decode_image, validate_form
from reasonpix.errors import ReasonpixError

if TYPE_CHECKING:
    from reasonpix.editing.config import SamplingSettings
    from reasonpix.editing.pipeline import ReasonPix2Pix


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. None means the model's own value."""

    queue: int = 64
    """Edits held at once, from admission until the response is sent."""
    timeout: float = 300
    """Seconds for one edit, and again for sending its result."""
    max_bytes: int = 20 * 2**20
    max_pixels: int = 25_000_000
    max_steps: int | None = None
    max_resolution: int | None = None


class Service:
    """One model, its queue, limits and metrics. Safe to use from any thread."""

    def __init__(
        self,
        load: Callable[[], ReasonPix2Pix],
        name: str,
        *,
        limits: Limits = Limits(),
        wait: float = 0.01,
        token: str | None = None,
    ) -> None:
        self.name = name
        self.limits = limits
        self.token = token
        self.metrics = Metrics()
        self.batcher = Batcher(load, limit=limits.queue, wait=wait, observer=self.metrics)
        self.metrics.watch(self.batcher)
        # The number of threads bounds how many images are decoded at once.
        self.image_threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "images")

    @property
    def model(self) -> ReasonPix2Pix:
        """The loaded model, which admitted edits also need while the server shuts down.

        Raises `ServerBusy` while it is loading.
        """
        self.batcher.check_loaded()
        return self.batcher.model.result()

    @property
    def max_steps(self) -> int:
        """The limit set, or 100, InstructPix2Pix's own number, or the model's if that is more."""
        return self.limits.max_steps or max(100, self.model.settings.num_inference_steps)

    @property
    def max_resolution(self) -> int:
        """The limit set, or the model's own: time and memory grow with its square or faster."""
        return self.limits.max_resolution or self.model.settings.resolution

    def describe_model(self) -> ModelInfo:
        """What `/v1/model` answers. Raises `ServerBusy` while no edits can be admitted."""
        self.batcher.check_ready()
        model = self.model
        resolved = {"max_steps": self.max_steps, "max_resolution": self.max_resolution}
        return ModelInfo(
            name=self.name,
            runtime=model.runtime,
            device=str(model.device),
            settings=model.settings.model_dump(),
            limits=asdict(self.limits) | resolved,
        )

    async def edit(self, form: FormData, reservation: Reservation) -> bytes:
        """The edited image as PNG, in the size of the form's image. Closes the form.

        Raises `HTTPException` or `ReasonpixError`.
        """
        run_in_thread = asyncio.get_running_loop().run_in_executor
        try:
            upload, fields = validate_form(form, self.limits.max_bytes)
            settings = self._resolve_settings(fields)
            image, original_size = await run_in_thread(
                self.image_threads, self._load_image, upload.file, settings
            )
        finally:
            await form.close()
        from reasonpix.editing.pipeline import EditTask

        future = reservation.submit(EditTask(image, fields.instruction, fields.seed), settings)
        edited = await asyncio.wrap_future(future)
        return await run_in_thread(
            self.image_threads, lambda: encode_png(resized(edited, original_size))
        )

    def _resolve_settings(self, fields: EditFields) -> SamplingSettings:
        if fields.steps and fields.steps > self.max_steps:
            raise ReasonpixError(f"steps: {fields.steps} exceeds the limit of {self.max_steps}")
        if fields.resolution and fields.resolution > self.max_resolution:
            raise ReasonpixError(
                f"resolution: {fields.resolution} exceeds the limit of {self.max_resolution}"
            )
        return self.model.resolve_settings(
            num_inference_steps=fields.steps,
            guidance_scale=fields.guidance_scale,
            image_guidance_scale=fields.image_guidance_scale,
            resolution=fields.resolution,
        )

    def _load_image(
        self, file: BinaryIO, settings: SamplingSettings
    ) -> tuple[Image, tuple[int, int]]:
        """The image at the model's working size, so that little waits in memory; and its size."""
        image = decode_image(file.read(), self.limits.max_pixels)
        return self.model.working_image(image, settings.resolution), image.size
