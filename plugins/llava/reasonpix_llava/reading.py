"""Hidden states of LLaVA for pairs of image and instruction, in one forward pass.

Attention is causal, so tokens after a text cannot change its states: texts are padded on the right
without a mask, and the states of the padding are dropped.

On a CPU kernels round differently for other shapes. There a batch always has `CPU_ROWS` pairs
(missing ones are filled by repetition), padded to the same multiple of `BUCKET` tokens, so a pair's
states depend on the pair only. On a GPU a batch has up to `batch_size` pairs, which may change the
last bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging

from reasonpix.plugin import Problem, ReasonpixError, WeightsError
from reasonpix.plugin.weights import choose_device, choose_dtype, find_gguf, pretrained, unpack_gguf
from reasonpix_llava import IMAGE, INSTRUCTION

if TYPE_CHECKING:
    from PIL.Image import Image

    from reasonpix_llava import LlavaOptions

CPU_ROWS = 4
"""Batch size on a CPU, always."""

BUCKET = 16
"""On a CPU texts are padded to a multiple of this many tokens."""


def pad_to_square(image: Image, mean: Sequence[float]) -> Image:
    """The whole RGB image in the middle of a square of the processor's `mean` colour, in [0, 1].

    LLaVA-1.5's `image_aspect_ratio: pad`. CLIP's processor would cut off the sides instead.
    """
    from PIL import Image

    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Reader:
    """A loaded LLaVA. Raises `WeightsError` for other models and for parts that do not match."""

    def __init__(self, options: LlavaOptions) -> None:
        self.options = options
        self.device = choose_device(options)
        self.dtype = choose_dtype(options, self.device)
        if (
            options.dtype == "auto"
            and self.device.type == "cuda"
            and torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            self.dtype = torch.bfloat16
        # Pillow resizes the same everywhere; the default depends on torchvision being installed.
        self._images = pretrained(AutoImageProcessor, options, backend="pil")
        config = pretrained(AutoConfig, options)
        if not isinstance(config, LlavaConfig):
            raise WeightsError(
                f"model: {options.model!r} is a {config.model_type}, not a LLaVA; name a "
                "checkpoint of LlavaForConditionalGeneration"
            )
        if options.language_model is None:
            self._tokenizer = pretrained(AutoTokenizer, options)
            self._model = self._whole(config)
        else:
            source = self._language_source()
            self._tokenizer = pretrained(AutoTokenizer, source)
            self._tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
            self._model = self._joined(config, source)
        self._model = self._model.to(self.device).eval()
        self._keep_layers()
        self._image_token_id: int = self._model.config.image_token_id
        added = self._tokenizer.added_tokens_decoder
        image = added.get(self._image_token_id)
        self._image_token = image.content if image else ""
        self._controls = [
            token.content for token in added.values() if token.special or token is image
        ]
        self._check_image_tokens()

    # Weights

    def _language_source(self) -> LlavaOptions:
        """Options that name the language model as `model`."""
        assert self.options.language_model
        source = self.options.model_copy(
            update={"model": self.options.language_model, "revision": None, "variant": None}
        )
        try:
            if file := find_gguf(source):
                folder = unpack_gguf(file, self.dtype, source.cache_dir)
                source = source.model_copy(update={"model": str(folder)})
        except WeightsError as error:
            raise WeightsError(f"language_model: {error}") from error
        return source

    def _whole(self, config: LlavaConfig) -> Any:
        """Tower, projector and language model of one checkpoint."""
        model, missing = self._llava(config)
        language = [name for name in missing if ".language_model." in name]
        if language:
            raise WeightsError(
                f"model: {self.options.model!r} has no language model (it lacks {language[0]} "
                f"and {len(language) - 1} more); set language_model"
            )
        return model.model

    def _joined(self, config: LlavaConfig, source: LlavaOptions) -> Any:
        """Tower and projector of `model`, and the language model of another checkpoint."""
        language = pretrained(AutoModel, source, dtype=self.dtype)
        wanted, width = config.text_config.hidden_size, language.config.hidden_size
        if wanted != width:
            raise WeightsError(
                f"language_model: {self.options.language_model!r} has states of {width} numbers, "
                f"and the projector of {self.options.model!r} makes {wanted}; they do not match"
            )
        if language.get_input_embeddings().num_embeddings < len(self._tokenizer):
            # The row of <image> is never read: it is replaced by the image's states.
            language.resize_token_embeddings(len(self._tokenizer), mean_resizing=False)
        config.text_config.num_hidden_layers = 0  # of this checkpoint: neither read nor created
        config.image_token_index = self._tokenizer.convert_tokens_to_ids(IMAGE)
        model, _ = self._llava(config)
        model.model.language_model = language
        return model.model

    def _llava(self, config: LlavaConfig) -> tuple[Any, list[str]]:
        """Load the model; also return the names of weights that the checkpoint lacks."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # missing weights are reported here
        try:
            model, info = pretrained(
                LlavaForConditionalGeneration,
                self.options,
                config=config,
                dtype=self.dtype,
                output_loading_info=True,
            )
        finally:
            logging.set_verbosity(verbosity)
        missing = sorted(info["missing_keys"])
        vision = [name for name in missing if ".vision_tower." in name or "projector" in name]
        if vision:
            raise WeightsError(
                f"model: {self.options.model!r} lacks weights of the vision tower or the "
                f"projector: {', '.join(vision[:3])}{' …' if len(vision) > 3 else ''}"
            )
        return model, missing

    def _keep_layers(self) -> None:
        """Remove the layers above the requested one, so they are not computed."""
        language, layer = self._model.language_model, self.options.layer
        if not (hasattr(language, "layers") and hasattr(language, "norm")):
            raise WeightsError(
                f"model: {type(language).__name__} of {self.options.model!r} is not built "
                "like Llama, so its hidden states cannot be located"
            )
        count = len(language.layers)
        if not -count - 1 <= layer <= count:
            raise WeightsError(
                f"layer: {layer} is not among the hidden states of {self.options.model!r}, which "
                f"are 0 to {count}, or {-count - 1} to -1"
            )
        kept = layer % (count + 1)
        if kept < count:
            language.layers = language.layers[:kept]
            language.config.num_hidden_layers = kept
            language.norm = nn.Identity()

    def _check_image_tokens(self) -> None:
        """Count the tokens of an image. Raises `WeightsError` if the parts do not match."""
        from PIL import Image

        model = self.options.model
        if not self._image_token:
            raise WeightsError(
                f"model: the tokenizer of {model!r} lacks the image token "
                f"{self._image_token_id}, the configuration's image_token_index; "
                "the two files belong to different revisions"
            )
        try:
            # Two shapes: all images must have the same number of tokens.
            states = self.image_states([Image.new("RGB", size) for size in ((32, 24), (24, 48))])
        except (ValueError, RuntimeError) as error:
            raise WeightsError(
                f"model: image processor and vision tower of {model!r} do not match: {error}"
            ) from error
        self._image_tokens = states.shape[1]

    # Reading

    def read(
        self, images: Sequence[Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        """The states of each pair: float32 (tokens, width), in order."""
        if len(images) != len(instructions):
            raise ValueError(f"{len(images)} images and {len(instructions)} instructions")
        results: list[Any] = [self._tokens(instruction) for instruction in instructions]
        texts = {i: ids for i, ids in enumerate(results) if not isinstance(ids, Problem)}
        for batch, padded in self._batches(texts):
            states = self._forward([images[i] for i in batch], [texts[i] for i in batch], padded)
            for i, row in zip(batch, states, strict=True):
                results[i] = row
        return results

    def _tokens(self, instruction: str) -> list[int] | Problem:
        """The token ids of the prompt with `instruction`."""
        if not instruction.strip():
            return Problem(status="rejected", reason="the instruction is empty")
        for token in self._controls:  # untrusted: it must not insert an image or end the text
            instruction = instruction.replace(token, f"{token[:1]} {token[1:]}")
        before, after = (
            part.replace(INSTRUCTION, instruction) for part in self.options.prompt.split(IMAGE)
        )
        count = self._image_tokens
        ids: list[int] = self._tokenizer(f"{before}{self._image_token * count}{after}").input_ids
        if (found := ids.count(self._image_token_id)) != count:
            raise ReasonpixError(
                f"encoder llava: a prompt has {found} image tokens, and an image gives {count}"
            )
        context = getattr(self._model.language_model.config, "max_position_embeddings", None)
        if context is not None and len(ids) > context:
            return Problem(
                status="rejected",
                reason=f"the prompt has {len(ids)} tokens, and the model reads at most {context}",
            )
        return ids

    def _batches(self, texts: dict[int, list[int]]) -> Iterator[tuple[list[int], int]]:
        """Group texts into batches; yields their numbers and padded length."""
        if self.device.type != "cpu":
            order, size = sorted(texts, key=lambda i: len(texts[i])), self.options.batch_size
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                yield batch, len(texts[batch[-1]])
            return
        lengths = defaultdict[int, list[int]](list)
        for i, ids in texts.items():
            lengths[-(-len(ids) // BUCKET) * BUCKET].append(i)
        for padded, members in sorted(lengths.items()):
            for start in range(0, len(members), CPU_ROWS):
                yield members[start : start + CPU_ROWS], padded

    @torch.inference_mode()
    def _forward(
        self, images: list[Image], texts: list[list[int]], padded: int
    ) -> Iterator[NDArray[np.float32]]:
        """The states of a batch whose texts are padded to `padded` tokens."""
        rows = [*range(len(texts))]
        if self.device.type == "cpu":
            rows += [0] * (CPU_ROWS - len(rows))
        # Any token but <image> works as padding: no earlier token attends to it.
        ids = torch.zeros((len(rows), padded), dtype=torch.long)
        for row, which in zip(ids, rows, strict=True):
            row[: len(texts[which])] = torch.tensor(texts[which])
        features = self.image_states([images[which] for which in rows])
        is_image = (ids == self._image_token_id).to(self.device)
        embeddings = self._model.get_input_embeddings()(ids.to(self.device))
        embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        hidden = self._model.language_model(inputs_embeds=embeddings, use_cache=False)[0]
        states = [self._select(*pair) for pair in zip(hidden, texts, strict=False)]
        if not all(bool(np.isfinite(each).all()) for each in states):
            raise ReasonpixError(
                f"encoder llava: {self.options.model!r} computes NaN or infinity; set "
                "dtype: bfloat16 or float32"
            )
        return iter(states)

    @torch.inference_mode()
    def image_states(self, images: list[Image]) -> Tensor:
        """The projector's outputs for images: (images, tokens, width)."""
        # RGB also for grey images; the format is explicit, or a height of 1 is taken for channels.
        mean = self._images.image_mean or (0, 0, 0)
        pixels = self._images(
            images=[pad_to_square(image.convert("RGB"), mean) for image in images],
            input_data_format="channels_last",
            return_tensors="pt",
        ).pixel_values
        pixels = pixels.to(self.device, self.dtype)
        return torch.stack(list(self._model.get_image_features(pixels).pooler_output))

    def _select(self, hidden: Tensor, ids: list[int]) -> NDArray[np.float32]:
        """The requested states of a row (padded, width)."""
        start = 0
        if self.options.states == "text":
            start = len(ids) - ids[::-1].index(self._image_token_id)
        states: NDArray[np.float32] = hidden[start : len(ids)].float().cpu().numpy()
        return states
