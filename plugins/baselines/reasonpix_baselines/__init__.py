"""Published editing methods for evaluations: InstructDiffusion, EDICT, null-text inversion.

Each follows its authors' code, with diffusers models, in batches, with noise from each request's
seed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from pydantic import Field, field_validator

from reasonpix.plugin import Method, MethodRequest, ModelOptions, Problem, hookimpl

if TYPE_CHECKING:
    from PIL.Image import Image


class BaselineOptions(ModelOptions):
    """Options of all methods of this package."""

    batch_size: int = Field(
        4, ge=1, description="Edits computed together on a GPU; on a CPU it depends on the model"
    )
    num_inference_steps: int = Field(50, ge=1, description="Denoising steps")
    resolution: int | None = Field(
        None, ge=8, description="Longer side of the model's input, in pixels; default: the UNet's"
    )


class InstructDiffusionOptions(BaselineOptions):
    """Options of `instruct-diffusion`."""

    num_inference_steps: int = Field(100, ge=1, description="Denoising steps")
    guidance_scale: float = Field(
        5.0, ge=0, allow_inf_nan=False, description="Guidance scale of the instruction"
    )
    image_guidance_scale: float = Field(
        1.25, ge=0, allow_inf_nan=False, description="Guidance scale of the image"
    )


class InversionOptions(BaselineOptions):
    """Options of methods that invert an image with its caption as the prompt."""

    model: str = Field(
        "CompVis/stable-diffusion-v1-4",
        description="Text-to-image pipeline: hub id, local folder, or mini/stable-diffusion",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32",
        description="Precision of the networks; auto is float16 on a GPU, which is less exact",
    )
    prompt: str = Field(
        "{caption}. {instruction}",
        description="Prompt of the edited image, made from {caption} and {instruction}, if a "
        "request has no edited caption",
    )

    @field_validator("prompt")
    @classmethod
    def _can_be_filled(cls, prompt: str) -> str:
        try:
            prompt.format(caption="", instruction="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"prompt {prompt!r} may only use {{caption}} and {{instruction}}"
            ) from error
        return prompt

    def target(self, request: MethodRequest) -> str:
        """The prompt of the edited image."""
        return request.edited_caption or self.prompt.format(
            caption=request.caption, instruction=request.instruction
        )


class EdictOptions(InversionOptions):
    """Options of `edict`."""

    guidance_scale: float = Field(
        3.0,
        ge=0,
        allow_inf_nan=False,
        description="Classifier-free guidance, in inversion and generation",
    )
    strength: float = Field(
        0.8, gt=0, le=1, description="Share of the steps over which an image is inverted"
    )
    mixing_weight: float = Field(
        0.93, gt=0, le=1, description="p: the weight of each of the coupled latents in its own mix"
    )


class NullTextOptions(InversionOptions):
    """Options of `null-text`."""

    guidance_scale: float = Field(7.5, ge=0, allow_inf_nan=False, description="Guidance by text")
    num_inner_steps: int = Field(
        10, ge=0, description="Maximum number of optimizer steps at each timestep"
    )
    learning_rate: float = Field(
        0.01,
        gt=0,
        description="Adam's learning rate at the first timestep; it falls to half at the last",
    )
    early_stop: float = Field(
        1e-5,
        ge=0,
        description="Stop at this error of the latents; 0.001 more at the last timestep",
    )
    cross_replace_steps: float = Field(
        0.8, ge=0, le=1, description="Share of the steps that keep the caption's cross-attention"
    )
    self_replace_steps: float = Field(
        0.5, ge=0, le=1, description="Share of the steps that keep the image's self-attention"
    )


O_co = TypeVar("O_co", bound=BaselineOptions, covariant=True)


class _Editor(Protocol):
    def edit(self, requests: Sequence[MethodRequest]) -> list[Image | Problem]: ...


class _Baseline(Method[O_co]):
    """Checks requests; an editor, which holds the weights, computes the edits."""

    _editor: _Editor | None = None

    @abstractmethod
    def _load_editor(self) -> _Editor:
        """Import heavy packages and load the weights."""

    def check(self) -> None:
        """Raise `WeightsError` if the model is not a pipeline."""
        from reasonpix.editing import check_pipeline

        check_pipeline(self.options)

    def load(self) -> None:
        """Load the weights. Raises `ReasonpixError` if they cannot be found, read or used."""
        self._editor = self._load_editor()

    def close(self) -> None:
        """Free the weights."""
        self._editor = None

    def apply(self, requests: Sequence[MethodRequest]) -> list[Image | Problem]:
        """One edited RGB image for each request, of its input's size; see `Method.apply`.

        Raises `ReasonpixError` if memory runs out.
        """
        assert self._editor is not None, "load() comes first"
        results: list[Image | Problem | None] = [self._problem(request) for request in requests]
        todo = [number for number, result in enumerate(results) if result is None]
        edited = self._editor.edit([requests[number] for number in todo])
        for number, result in zip(todo, edited, strict=True):
            results[number] = result
        return [result for result in results if result is not None]

    def _problem(self, request: MethodRequest) -> Problem | None:
        """Why the request cannot be computed, if so."""
        for field in sorted(self.requires):
            if not getattr(request, field).strip():
                return Problem(status="failed", reason=f"{self.name} needs the image's {field}")
        if not (
            request.instruction.strip() or ("caption" in self.requires and request.edited_caption)
        ):
            return Problem(status="failed", reason="the instruction is empty")
        return None


class InstructDiffusion(_Baseline[InstructDiffusionOptions]):
    """InstructDiffusion (Geng et al., CVPR 2024): edits by instruction, with its own guidance.

    `model` is its checkpoint in diffusers' InstructPix2Pix layout, or any InstructPix2Pix.
    """

    name = "instruct-diffusion"
    Options = InstructDiffusionOptions

    def _load_editor(self) -> _Editor:
        from reasonpix_baselines.instruct_diffusion import InstructDiffusionEditor

        return InstructDiffusionEditor(self.options)


class Edict(_Baseline[EdictOptions]):
    """EDICT (Wallace et al., CVPR 2023): exact inversion with one prompt, generation with another.

    Caption and edited caption are the prompts; see `InversionOptions.prompt`.
    """

    name = "edict"
    Options = EdictOptions
    requires = frozenset({"caption"})

    def _load_editor(self) -> _Editor:
        from reasonpix_baselines.edict import EdictEditor

        return EdictEditor(self.options)


class NullText(_Baseline[NullTextOptions]):
    """Null-text inversion (Mokady et al., CVPR 2023), edited by prompt-to-prompt.

    Caption and edited caption are the prompts; see `InversionOptions.prompt`.
    """

    name = "null-text"
    Options = NullTextOptions
    requires = frozenset({"caption"})

    def _load_editor(self) -> _Editor:
        from reasonpix_baselines.null_text import NullTextEditor

        return NullTextEditor(self.options)


@hookimpl
def methods() -> list[type[Method[Any]]]:
    """The three methods."""
    return [InstructDiffusion, Edict, NullText]
