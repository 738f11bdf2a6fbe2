"""GLIGEN as an editor: an object is replaced inside its box, the rest of the image stays.

Li et al., "GLIGEN: Open-Set Grounded Text-to-Image Generation", CVPR 2023. The UNet, the VAE and
the scheduler are those of diffusers; the sampler is our own, see `reasonpix_gligen.sampler`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from reasonpix.plugin import (
    EDITED_CAPTIONS,
    Editor,
    EditRequest,
    ModelOptions,
    Problem,
    hookimpl,
)
from reasonpix_gligen.geometry import SMALLEST_SHARE, Window, too_small

if TYPE_CHECKING:
    from PIL.Image import Image


class GligenOptions(ModelOptions):
    """What a recipe may say about the editor."""

    model: str = Field(
        "masterful/gligen-1-4-inpainting-text-box",
        description="Hub id, local folder, or checkpoint name such as mini/gligen",
    )
    batch_size: int = Field(
        8, ge=1, description="Edits computed together on a GPU; a CPU always computes 4"
    )
    num_inference_steps: int = Field(50, ge=1, description="Denoising steps")
    guidance_scale: float = Field(
        7.5, ge=0, description="Classifier-free guidance; 1 or less computes no unconditional half"
    )
    beta: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the steps with grounding tokens (GLIGEN's scheduled sampling)",
    )
    prompt: str = Field(
        "{caption}",
        description="Prompt of the whole image, of {caption} (the edited caption), {selected} "
        "and {target}; may be empty",
    )
    negative_prompt: str = Field("", description="What guidance leads away from")

    @field_validator("prompt")
    @classmethod
    def _can_be_filled(cls, prompt: str) -> str:
        try:
            prompt.format(caption="", selected="", target="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"prompt {prompt!r} may only use {{caption}}, {{selected}} and {{target}}"
            ) from error
        return prompt


class Gligen(Editor[GligenOptions]):
    """Replaces objects by grounded inpainting (Eq. 7: x' = GLIGEN(x, y_select, b_select, y'))."""

    name = "gligen"
    Options = GligenOptions

    def check(self) -> None:
        """Check that the model's scheduler can sample. Raises `WeightsError`."""
        from reasonpix.editing import read_scheduler

        read_scheduler(self.options)

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """The rules of the prompt."""
        return {"edited_captions": EDITED_CAPTIONS}

    def load(self) -> None:
        """Read the weights. Raises `WeightsError` when they cannot be found, read, or used."""
        from reasonpix_gligen.sampler import Sampler

        self._sampler: Any = Sampler(self.options)

    def close(self) -> None:
        """Let go of the weights."""
        self._sampler = None

    def edit(self, requests: Sequence[EditRequest]) -> list[Image | Problem]:
        """One edited RGB image for each request, of its input's size.

        Outside the box it equals the input, pixel for pixel. A result depends on the request and
        its seed alone. A box that the model cannot see, one of another image, and an output
        that is not finite give a `Problem`.
        """
        from reasonpix_gligen.sampler import Task

        results: list[Image | Problem | None] = [_problem(request) for request in requests]
        todo = [number for number, result in enumerate(results) if result is None]
        size = self._sampler.batch_size
        for start in range(0, len(todo), size):
            numbers = todo[start : start + size]
            chosen = [requests[number] for number in numbers]
            windows = [Window.around(request.box) for request in chosen]
            images = [request.image.convert("RGB") for request in chosen]
            squares = self._sampler.sample(
                [
                    Task(
                        window.cut(image, self._sampler.side),
                        window.shares(request.box),
                        phrase=request.target,
                        prompt=self._prompt(request),
                        seed=request.seed,
                    )
                    for request, window, image in zip(chosen, windows, images, strict=True)
                ]
            )
            for number, *pasting in zip(numbers, windows, images, squares, strict=True):
                window, image, square = pasting
                results[number] = (
                    square
                    if isinstance(square, Problem)
                    else window.paste(image, square, requests[number].box)
                )
        return [result for result in results if result is not None]

    def _prompt(self, request: EditRequest) -> str:
        return self.options.prompt.format(
            caption=request.edited_caption,
            selected=request.selected,
            target=request.target,
        )


def _problem(request: EditRequest) -> Problem | None:
    """Why the request cannot be carried out, if so."""
    box, image = request.box, request.image
    if (box.width, box.height) != image.size:
        return Problem(
            status="failed",
            reason=f"the box belongs to an image of {box.width}x{box.height} pixels, "
            f"this one has {image.width}x{image.height}",
        )
    window = Window.around(box)
    if too_small(window.shares(box)):
        return Problem(
            status="rejected",
            reason=f"a box of {box.x1 - box.x0:g}x{box.y1 - box.y0:g} pixels is under "
            f"1/{round(1 / SMALLEST_SHARE)} of the {window.size[0]}x{window.size[1]} that GLIGEN "
            "sees of the image; it would vanish",
        )
    return None


@hookimpl
def editors() -> list[type[Editor[Any]]]:
    """GLIGEN."""
    return [Gligen]
