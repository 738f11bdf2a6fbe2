"""CLIP embeddings of images and texts, and DINO embeddings of images.

Images are preprocessed as by the models' authors, who use torchvision on Pillow images: the shorter
side is resized, bicubic, then a square is cropped from the centre. A network always computes the
same number of rows, so that an embedding does not depend on the rest of its batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from reasonpix.errors import WeightsError
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.weights import check_weights, choose_device, choose_dtype, digest, pretrained

if TYPE_CHECKING:
    from torch import Tensor

Embedding = NDArray[np.float64]
"""(width,), a unit vector."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TOKENS = 16
"""Texts are padded to a multiple of this: captions rarely have the 77 tokens that CLIP takes."""


class EmbeddingOptions(ModelOptions):
    """Options of an embedding model."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32",
        description="Floating-point precision; auto is float32 on a CPU and float16 on a GPU",
    )
    batch_size: int = Field(16, ge=1, description="Items computed together")


class ClipOptions(EmbeddingOptions):
    """Options of the CLIP model."""

    model: str = Field(
        "openai/clip-vit-base-patch32",
        description="Hub id, local folder, or checkpoint name such as mini/clip",
    )


class DinoOptions(EmbeddingOptions):
    """Options of the DINO model."""

    model: str = Field(
        "facebook/dino-vits16",
        description="Hub id, local folder, or checkpoint name such as mini/dino",
    )


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input."""

    shorter: int
    """The shorter side after resizing, in pixels."""
    crop: int
    """Side of the square that is cropped from the centre; at most `shorter`."""
    mean: tuple[float, ...]
    """By channel, in [0, 1]."""
    std: tuple[float, ...]

    def crop_image(self, image: Image.Image) -> NDArray[np.uint8]:
        """(crop, crop, 3) of an RGB image, rounded as torchvision's Resize and CenterCrop do."""
        short, long = sorted(image.size)
        longer = int(self.shorter * long / short)
        size = (longer, self.shorter) if image.width > image.height else (self.shorter, longer)
        left, top = (round((side - self.crop) / 2) for side in size)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))


class PreprocessedImage(NamedTuple):
    """An image as a model takes it."""

    digest: bytes
    """Of the size and pixels before preprocessing: see `images.pixel_digest`."""
    pixels: NDArray[np.uint8] | None
    """(crop, crop, 3); None if its embedding is cached."""


O_co = TypeVar("O_co", bound=EmbeddingOptions, covariant=True)


class ImageModel(ABC, Generic[O_co]):
    """Embeds images, and caches embeddings on request."""

    kind: ClassVar[str]
    """The `model_type` of its config."""
    preprocessing: Preprocessing

    def __init__(self, options: O_co) -> None:
        self._recipe_options = options
        carried = registry.checkpoint(options.model)
        self.options = options.model_copy(update={"model": str(carried)} if carried else {})
        self._cache: dict[bytes, Embedding] = {}

    def fingerprint_facts(self) -> dict[str, Any]:
        """What determines its embeddings (JSON values); a folder enters by its content."""
        facts = self._recipe_options.model_dump(
            mode="json", exclude=set(self._recipe_options.fingerprint_exclude)
        )
        folder = Path(self.options.model)
        return facts | ({"model": digest(folder)} if folder.is_dir() else {})

    def check(self) -> None:
        """Raise `WeightsError` if the model cannot be found or is of another kind."""
        from transformers import AutoConfig

        check_weights(self.options)
        config = pretrained(AutoConfig, self.options)
        if config.model_type != self.kind:
            raise WeightsError(
                f"model: {self._recipe_options.model!r} is of type {config.model_type!r}, not "
                f"{self.kind!r}; name a model such as "
                f"{type(self.options).model_fields['model'].default}"
            )

    def load(self) -> None:
        """Load the weights. Raises `WeightsError`."""
        self.check()
        self._device = choose_device(self.options)
        self._dtype = choose_dtype(self.options, self._device)
        model = self._load_model().to(self._device, self._dtype)
        self._model = model.eval().requires_grad_(False)

    def close(self) -> None:
        """Free the weights and the cache."""
        self.__dict__.pop("_model", None)
        self._cache.clear()

    def preprocess(self, image: Image.Image, digest: bytes) -> PreprocessedImage:
        """The input of `embed` for an RGB image. May be called from any thread."""
        return PreprocessedImage(
            digest, None if digest in self._cache else self.preprocessing.crop_image(image)
        )

    def embed(
        self, images: Sequence[PreprocessedImage], keep: set[bytes]
    ) -> Mapping[bytes, Embedding]:
        """The embeddings by digest. Equal images are computed once; those in `keep` are cached."""
        new = {it.digest: it.pixels for it in images if it.digest not in self._cache}
        computed = dict(zip(new, self._rows(list(new.values()), self._forward), strict=True))
        self._cache |= {digest: computed[digest] for digest in keep & computed.keys()}
        return self._cache | computed

    def _rows(self, inputs: Sequence[Any], forward: Any) -> Iterator[Embedding]:
        """The normalized rows of `forward`, which always gets `batch_size` inputs."""
        import torch

        size = self.options.batch_size
        for first in range(0, len(inputs), size):
            batch = np.stack(inputs[first : first + size])
            x = torch.from_numpy(np.resize(batch, (size, *batch.shape[1:])))  # repeats rows
            with torch.inference_mode():
                rows = forward(x.to(self._device))[: len(batch)].to("cpu", torch.float64).numpy()
            with np.errstate(invalid="ignore"):  # rows of NaN
                yield from rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def _forward(self, pixels: Tensor) -> Tensor:
        """(batch, width) of uint8 images (batch, crop, crop, 3)."""
        mean, std = (
            pixels.new_tensor(it, dtype=self._dtype)
            for it in (self.preprocessing.mean, self.preprocessing.std)
        )
        normalized = (pixels.to(self._dtype) / 255 - mean) / std
        return self._features(normalized.permute(0, 3, 1, 2).contiguous())

    @abstractmethod
    def _load_model(self) -> Any:
        """The model. Sets `preprocessing`."""

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """(batch, width) of (batch, 3, crop, crop)."""


class Clip(ImageModel[ClipOptions]):
    """CLIP's projected embeddings of images and texts (Radford et al., 2021)."""

    kind: ClassVar[str] = "clip"

    def close(self) -> None:
        """Free the weights and the cache."""
        super().close()
        self.__dict__.pop("_tokenizer", None)

    def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        """One for each text, truncated to the model's length."""
        tokens = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)
        ids = tokens["input_ids"]

        def length(text: int) -> int:
            return min(self._max_tokens, math.ceil(len(ids[text]) / _TOKENS) * _TOKENS)

        embeddings: dict[int, Embedding] = {}
        for padded_length, group in groupby(sorted(range(len(texts)), key=length), length):
            indices = list(group)
            # CLIP's attention is causal: padding after the end changes nothing.
            padded = [np.pad(ids[text], (0, padded_length - len(ids[text]))) for text in indices]
            embeddings |= zip(indices, self._rows(padded, self._text_features), strict=True)
        return [embeddings[text] for text in range(len(texts))]

    def _load_model(self) -> Any:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        self.preprocessing = _preprocessing(pretrained(CLIPImageProcessorPil, self.options))
        self._tokenizer = pretrained(AutoTokenizer, self.options)
        model = pretrained(CLIPModel, self.options)
        self._max_tokens: int = model.config.text_config.max_position_embeddings
        return model

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._model.get_image_features(pixels).pooler_output
        return features

    def _text_features(self, ids: Tensor) -> Tensor:
        features: Tensor = self._model.get_text_features(ids).pooler_output
        return features


def _preprocessing(processor: Any) -> Preprocessing:
    shorter, crop = processor.size.get("shortest_edge"), processor.crop_size
    sides = {crop.get("height"), crop.get("width")}
    if not shorter or len(sides) != 1 or (side := sides.pop()) > shorter:
        raise WeightsError(
            "model: its preprocessor_config.json does not resize the shortest_edge and crop a "
            f"square from the centre: size is {dict(processor.size)}, crop_size {dict(crop)}"
        )
    return Preprocessing(shorter, side, tuple(processor.image_mean), tuple(processor.image_std))


class Dino(ImageModel[DinoOptions]):
    """DINO's class token after the last layer norm (Caron et al., 2021)."""

    kind: ClassVar[str] = "vit"

    def _load_model(self) -> Any:
        from transformers import ViTModel

        model = pretrained(ViTModel, self.options, add_pooling_layer=False)
        side = model.config.image_size
        # 256 and 224 pixels, as DINO is evaluated on ImageNet; other sizes in proportion.
        self.preprocessing = Preprocessing(
            round(side * 256 / 224), side, IMAGENET_MEAN, IMAGENET_STD
        )
        return model

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._model(pixels).last_hidden_state[:, 0]
        return features
