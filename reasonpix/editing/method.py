"""The method that any model of this kind is: ours, InstructPix2Pix, MagicBrush."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from pydantic import Field

from reasonpix.editing.runtimes.names import Runtime
from reasonpix.plugin import registry
from reasonpix.plugin.components import Method, MethodRequest, ModelOptions
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem

if TYPE_CHECKING:
    from reasonpix.editing.pipeline import ReasonPix2Pix


class EditingModelOptions(ModelOptions):
    """Options of `editing-model`. What is left out is as the model's own settings say."""

    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps")
    guidance_scale: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="s_T: how much the instruction counts"
    )
    image_guidance_scale: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="s_I: how much the image counts"
    )
    resolution: int | None = Field(
        None, ge=8, description="Longer side that the model sees, in pixels"
    )
    runtime: Runtime = Field(
        "torch", description="What computes it: torch, or the runtime of an export beside it"
    )


class EditingModelMethod(Method[EditingModelOptions]):
    """Edits as `reasonpix edit` does, by the instruction alone.

    `model` is what `reasonpix train` wrote, or an InstructPix2Pix pipeline: MagicBrush is one.
    """

    name = "editing-model"
    Options = EditingModelOptions
    _model: ReasonPix2Pix | None = None

    def check(self) -> None:
        """See that the model is an editing model, and has what the runtime needs."""
        from reasonpix.editing.pipeline_parts import check_pipeline
        from reasonpix.editing.runtimes.select import choose_runtime

        check_pipeline(self.options)
        choose_runtime(self.options.runtime, self.options)

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """The encoder's, which the model only names, and that of the export which is used."""
        from reasonpix.editing.checkpoint import read_encoder_spec
        from reasonpix.editing.runtimes.select import read_chosen_export

        known: dict[str, Any] = {}
        if use := read_encoder_spec(self.options):
            known["encoder"] = registry.fingerprint_facts(use.slot, use.name, use.options)
        if export := read_chosen_export(self.options.runtime, self.options):
            known["export"] = export.manifest.files
        return known

    def load(self) -> None:
        """Read the weights, those of the encoder too."""
        from reasonpix.editing.pipeline import ReasonPix2Pix

        options = self.options
        self._model = ReasonPix2Pix.from_pretrained(
            options.model,
            revision=options.revision,
            device=options.device,
            dtype=options.dtype,
            cache_dir=options.cache_dir,
            batch_size=options.batch_size,
            runtime=options.runtime,
        )
        self._settings = self._model.resolve_settings(
            guidance_scale=options.guidance_scale,
            image_guidance_scale=options.image_guidance_scale,
            num_inference_steps=options.num_inference_steps,
            resolution=options.resolution,
        )

    def close(self) -> None:
        """Let the model go."""
        self._model = None

    def apply(self, requests: Sequence[MethodRequest]) -> list[Image | Problem]:
        """Captions are not looked at."""
        from reasonpix.editing.pipeline import EditTask

        assert self._model is not None, "load() comes first"
        tasks = (EditTask(it.image, it.instruction, it.seed) for it in requests)
        edited = dict(self._model.edit(tasks, self._settings))
        return [edited[number] for number in range(len(requests))]


@hookimpl
def methods() -> list[type[Method[Any]]]:
    """The method of this module."""
    return [EditingModelMethod]
