"""BLIP-2 as a captioner: a frozen image encoder and a frozen language model, joined by a Q-Former.

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large
Language Models", ICML 2023. The network is the one of transformers; any checkpoint of
`Blip2ForConditionalGeneration` fits, whether its language model is OPT or Flan-T5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from reasonpix.plugin import Caption, Captioner, ModelOptions, Problem, WeightsError, hookimpl
from reasonpix.plugin.weights import choose_device, choose_dtype, pretrained

if TYPE_CHECKING:
    from PIL.Image import Image


class Blip2Options(ModelOptions):
    """What a recipe may say about the captioner."""

    model: str = Field(
        "Salesforce/blip2-opt-2.7b",
        description="Hub id, local folder, or checkpoint name such as mini/blip2",
    )
    prompt: str | None = Field(
        None, min_length=1, description="Text that the caption continues, or a question to answer"
    )
    max_new_tokens: int = Field(30, ge=1, description="Longest caption, in tokens")


class Blip2(Captioner[Blip2Options]):
    """Captions images by greedy decoding, so that a caption depends on its image alone."""

    name = "blip2"
    Options = Blip2Options

    def load(self) -> None:
        """Read processor and weights. Raises `WeightsError` when they cannot be found or read."""
        from transformers import (
            AutoImageProcessor,
            AutoTokenizer,
            Blip2ForConditionalGeneration,
            Blip2Processor,
        )

        options = self.options
        device = choose_device(options)
        # Pillow resizes alike everywhere; the default depends on whether torchvision is installed.
        images = pretrained(AutoImageProcessor, options, backend="pil")
        tokenizer = pretrained(AutoTokenizer, options)
        model = pretrained(
            Blip2ForConditionalGeneration,
            options,
            dtype=choose_dtype(options, device),
        )
        self._model: Any = model.to(device).eval()
        # Put together here: older revisions of the hub's checkpoints lack processor_config.json,
        # and their configuration does not say which token stands for the image.
        self._processor: Any = Blip2Processor(
            images, tokenizer, num_query_tokens=model.config.num_query_tokens
        )
        image_token = tokenizer.convert_tokens_to_ids(str(self._processor.image_token))
        if model.config.image_token_index is None:
            model.config.image_token_index = image_token
        if model.config.image_token_index != image_token:
            raise WeightsError(
                f"model: in {options.model!r} the tokenizer's <image> is {image_token} and the "
                f"configuration's image_token_index is {model.config.image_token_index}; "
                "the two files belong to different revisions"
            )

    def close(self) -> None:
        """Let go of the weights."""
        self._model = self._processor = None

    def caption(self, images: Sequence[Image]) -> list[Caption | Problem]:
        """One caption for each RGB image, of any size; a `Problem` where nothing was said."""
        size = self.options.batch_size
        texts = [
            text
            for start in range(0, len(images), size)
            for text in self._texts(list(images[start : start + size]))
        ]
        return [
            Caption(text=text)
            if text
            else Problem(status="rejected", reason=f"{self.name} said nothing")
            for text in texts
        ]

    def _texts(self, images: list[Image]) -> list[str]:
        import torch

        model, processor, prompt = self._model, self._processor, self.options.prompt
        # One prompt for all: nothing is padded, so neighbours in a batch cannot change a caption.
        inputs = processor(
            images=images, text=[prompt] * len(images) if prompt else None, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.options.max_new_tokens,
            )
        if model.config.use_decoder_only_language_model:
            # OPT repeats what it was given: the places of the image, </s> and the prompt.
            given = inputs["input_ids"].shape[1] if prompt else model.config.num_query_tokens + 1
            ids = ids[:, given:]
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


@hookimpl
def captioners() -> list[type[Captioner[Any]]]:
    """BLIP-2."""
    return [Blip2]
