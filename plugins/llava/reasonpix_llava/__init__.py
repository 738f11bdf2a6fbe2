"""Encoders of image and instruction (Eq. 8): LLaVA, and CLIP's text encoder for comparison.

- `llava`: hidden states of a vision-language model that reads both. Liu et al., "Visual
  Instruction Tuning", NeurIPS 2023. Any checkpoint of transformers'
  `LlavaForConditionalGeneration` works.
- `clip-text`: the text encoder of a diffusers pipeline, which reads only the instruction, as in
  InstructPix2Pix (Brooks et al., CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from reasonpix.plugin import MLLMEncoder, ModelOptions, Problem, hookimpl

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

IMAGE, INSTRUCTION = "<image>", "{instruction}"
"""Placeholders in a prompt for the image tokens and the instruction."""


class LlavaOptions(ModelOptions):
    """Options of `llava`."""

    weights: ClassVar[tuple[str, ...]] = ("model", "language_model")

    model: str = Field(
        "llava-hf/llava-1.5-7b-hf",
        description="Hub id, local folder, or checkpoint name such as mini/llava",
    )
    language_model: str | None = Field(
        None,
        min_length=1,
        description="Hub id, folder, GGUF file or checkpoint name (mini/smollm2) of the language "
        "model, where `model` holds vision tower and projector only",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Computing precision; auto is float32 on a CPU, bfloat16 on a GPU that has it, "
        "else float16",
    )
    batch_size: int = Field(
        8, ge=1, description="Pairs computed together on a GPU; a CPU always computes 4"
    )
    prompt: str = Field(
        "USER: <image>\n{instruction} ASSISTANT:",
        description="What the model reads: <image> once, {instruction} once or more often",
    )
    layer: int = Field(
        -1,
        description="Which hidden states: 0 are the embeddings, -1 those after the last layer and "
        "the final norm, -2 those after the last layer but one, and so on",
    )
    states: Literal["text", "all"] = Field(
        "text", description="States of the tokens after the image, or of all tokens"
    )

    @field_validator("prompt")
    @classmethod
    def _holds_both(cls, prompt: str) -> str:
        if prompt.count(IMAGE) != 1 or INSTRUCTION not in prompt:
            raise ValueError(
                f"prompt {prompt!r} must hold {IMAGE} exactly once, and {INSTRUCTION} at least once"
            )
        return prompt

    @model_validator(mode="after")
    def _leaves_states(self) -> Self:
        if self.states == "text" and self.prompt.endswith(IMAGE):
            raise ValueError(
                f"prompt {self.prompt!r} has no text after {IMAGE}, whose states `states: text` "
                "takes; put {instruction} there, or set states: all"
            )
        return self


class Llava(MLLMEncoder[LlavaOptions]):
    """Hidden states h of a LLaVA after one forward pass; it generates no text.

    Images that are not square are padded to a square, as in LLaVA-1.5, so it sees all of them.
    """

    name = "llava"
    version = "2"
    Options = LlavaOptions

    def load(self) -> None:
        """Read the weights. Raises `WeightsError` when they cannot be found, read, or used."""
        from reasonpix_llava.reading import Reader

        self._reader: Any = Reader(self.options)

    def close(self) -> None:
        """Release the weights."""
        self._reader = None

    def encode(
        self, images: Sequence[Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        """The states h of each pair: float32 (tokens, width).

        An instruction that is empty or too long for the model gives a `Problem`.
        """
        states: list[NDArray[np.float32] | Problem] = self._reader.read(images, instructions)
        return states


class ClipTextOptions(ModelOptions):
    """Options of `clip-text`."""

    model: str = Field(
        "timbrooks/instruct-pix2pix",
        description="Hub id or local folder of a diffusers pipeline with `text_encoder` and "
        "`tokenizer`, or checkpoint name",
    )
    batch_size: int = Field(
        8, ge=1, description="Instructions computed together on a GPU; a CPU always computes 4"
    )


class ClipText(MLLMEncoder[ClipTextOptions]):
    """The last hidden states of CLIP's text encoder, with padding; the image is ignored.

    These are the states that InstructPix2Pix and Stable Diffusion attend to, always
    `model_max_length` of them. Longer instructions are truncated, as in diffusers.
    """

    name = "clip-text"
    Options = ClipTextOptions

    def load(self) -> None:
        """Read the weights. Raises `WeightsError` when they cannot be found, read, or used."""
        from reasonpix_llava.clip_text import TextEncoder

        self._encoder: Any = TextEncoder(self.options)

    def close(self) -> None:
        """Release the weights."""
        self._encoder = None

    def encode(
        self, images: Sequence[Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        """The states of each instruction: float32 (tokenizer's `model_max_length`, width)."""
        states: list[NDArray[np.float32] | Problem] = self._encoder.encode(instructions)
        return states


@hookimpl
def encoders() -> list[type[MLLMEncoder[Any]]]:
    """LLaVA, and CLIP's text encoder."""
    return [Llava, ClipText]
