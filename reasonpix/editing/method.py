"""The evaluation method `editing-model`: ReasonPix2Pix, InstructPix2Pix, MagicBrush."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from pydantic import Field

from reasonpix.editing.runtimes.names import Runtime
from reasonpix.plugin import registry
from reasonpix.plugin.components import Method, ModelOptions
from reasonpix.plugin.edits import MethodRequest
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem

if TYPE_CHECKING:
    from reasonpix.editing.pipeline import ReasonPix2Pix


class EditingModelOptions(ModelOptions):
    """Options of `editing-model`; those left out default to the model's own settings."""

    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps")
    guidance_scale: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="s_T: weight of the instruction"
    )
    image_guidance_scale: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="s_I: weight of the input image"
    )
    resolution: int | None = Field(
        None, ge=8, description="Longer side at which the model works, in pixels"
    )
    runtime: Runtime = Field(
        "torch", description="Runtime: torch, compile, or that of an export in the model's folder"
    )


class EditingModelMethod(Method[EditingModelOptions]):
    """Edits as `reasonpix edit` does, from the instruction only; captions are ignored.

    `model`: written by `reasonpix train`, or an InstructPix2Pix pipeline such as MagicBrush.
    """

    name = "editing-model"
    Options = EditingModelOptions
    _model: ReasonPix2Pix | None = None

    def check(self) -> None:
        """Check that the model is an editing model and has what the runtime needs."""
        from reasonpix.editing.pipeline_parts import check_pipeline
        from reasonpix.editing.runtimes.select import choose_runtime

        check_pipeline(self.options)
        choose_runtime(self.options.runtime, self.options)

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """The facts of the encoder, which the model only names, and of the export in use."""
        from reasonpix.editing.checkpoint import read_encoder_spec
        from reasonpix.editing.runtimes.select import read_chosen_export

        facts: dict[str, Any] = {}
        if spec := read_encoder_spec(self.options):
            facts["encoder"] = registry.fingerprint_facts(spec.slot, spec.name, spec.options)
        if export := read_chosen_export(self.options.runtime, self.options):
            facts["export"] = export.manifest.files
        return facts

    def load(self) -> None:
        """Load the model and its encoder."""
        from reasonpix.editing.pipeline import ReasonPix2Pix

        options = self.options
        self._model = ReasonPix2Pix.from_pretrained(
            options.model,
            revision=options.revision,
            variant=options.variant,
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
        """Release the model."""
        self._model = None

    def apply(self, requests: Sequence[MethodRequest]) -> list[Image | Problem]:
        """Edit each request; one that cannot be edited gives a `Problem`."""
        from reasonpix.editing.pipeline import EditTask

        assert self._model is not None, "load() comes first"
        tasks = (EditTask(each.image, each.instruction, each.seed) for each in requests)
        edited = dict(self._model.edit(tasks, self._settings))
        return [edited[number] for number in range(len(requests))]


@hookimpl
def methods() -> list[type[Method[Any]]]:
    """The method of this module."""
    return [EditingModelMethod]
