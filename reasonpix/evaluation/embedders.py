"""Embeddings of images and texts by CLIP, and of images by DINO, for metrics that compare them.

Images are prepared as the models' authors do it with torchvision on Pillow images: the shorter side
resized, bicubic, then a square cut from the middle. A network always computes the same number of
rows, so that an embedding does not depend, to the last bit, on what it is computed with.
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
"""(width,), of length 1."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TOKENS = 16
"""Texts are padded to a multiple of it: a caption rarely has the 77 tokens that CLIP could take."""


class EmbeddingOptions(ModelOptions):
    """Options of a model that gives embeddings."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32", description="Computing precision; auto is float32 on a CPU, float16 on a GPU"
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
class Preparation:
    """What a model sees of an image."""

    shorter: int
    """The shorter side after resizing, in pixels."""
    crop: int
    """Side of the square that is cut from the middle; not above `shorter`."""
    mean: tuple[float, ...]
    """Of the channels, in [0, 1]."""
    std: tuple[float, ...]

    def cut(self, image: Image.Image) -> NDArray[np.uint8]:
        """(crop, crop, 3) of an RGB image, rounded as torchvision's Resize and CenterCrop do."""
        short, long = sorted(image.size)
        longer = int(self.shorter * long / short)
        size = (longer, self.shorter) if image.width > image.height else (self.shorter, longer)
        left, top = (round((side - self.crop) / 2) for side in size)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))


class PreprocessedImage(NamedTuple):
    """An image as a model is given it."""

    digest: bytes
    """Of size and pixels before it was prepared: see `images.pixel_digest`."""
    cut: NDArray[np.uint8] | None
    """See `Preparation.cut`; None when its embedding is known."""


O_co = TypeVar("O_co", bound=EmbeddingOptions, covariant=True)


class ImageModel(ABC, Generic[O_co]):
    """Gives images their embeddings, and keeps those that it is told to keep."""

    kind: ClassVar[str]
    """The `model_type` of its config."""
    preparation: Preparation

    def __init__(self, options: O_co) -> None:
        self._asked = options
        carried = registry.checkpoint(options.model)
        self.options = options.model_copy(update={"model": str(carried)} if carried else {})
        self._kept: dict[bytes, Embedding] = {}

    def fingerprint_facts(self) -> dict[str, Any]:
        """What its embeddings follow from (JSON values); weights in a folder by their content."""
        facts = self._asked.model_dump(mode="json", exclude=set(self._asked.fingerprint_exclude))
        folder = Path(self.options.model)
        return facts | ({"model": digest(folder)} if folder.is_dir() else {})

    def check(self) -> None:
        """Raise `WeightsError` when the model cannot be found, or is of another kind."""
        from transformers import AutoConfig

        check_weights(self.options)
        config = pretrained(AutoConfig, self.options)
        if config.model_type != self.kind:
            raise WeightsError(
                f"model: {self._asked.model!r} is of type {config.model_type!r}, and "
                f"{self.kind!r} is needed; name a model such as "
                f"{type(self.options).model_fields['model'].default}"
            )

    def load(self) -> None:
        """Read the weights. Raises `WeightsError`."""
        self.check()
        self._device = choose_device(self.options)
        self._dtype = choose_dtype(self.options, self._device)
        model = self._read().to(self._device, self._dtype)
        self._model = model.eval().requires_grad_(False)

    def close(self) -> None:
        """Give back the weights, and forget what was kept."""
        self.__dict__.pop("_model", None)
        self._kept.clear()

    def picture(self, image: Image.Image, digest: bytes) -> PreprocessedImage:
        """What `embed` takes of an RGB image. May be called from any thread."""
        return PreprocessedImage(
            digest, None if digest in self._kept else self.preparation.cut(image)
        )

    def embed(
        self, pictures: Sequence[PreprocessedImage], keep: set[bytes]
    ) -> Mapping[bytes, Embedding]:
        """The embeddings by digest. Equal pictures are computed once, those in `keep` only ever."""
        cuts = {it.digest: it.cut for it in pictures if it.digest not in self._kept}
        found = dict(zip(cuts, self._rows(list(cuts.values()), self._forward), strict=True))
        self._kept |= {digest: found[digest] for digest in keep & found.keys()}
        return self._kept | found

    def _rows(self, inputs: Sequence[Any], forward: Any) -> Iterator[Embedding]:
        """Unit rows of `forward`, which is always given `batch_size` inputs."""
        import torch

        size = self.options.batch_size
        for first in range(0, len(inputs), size):
            some = np.stack(inputs[first : first + size])
            x = torch.from_numpy(np.resize(some, (size, *some.shape[1:])))  # repeats what it has
            with torch.inference_mode():
                rows = forward(x.to(self._device))[: len(some)].to("cpu", torch.float64).numpy()
            with np.errstate(invalid="ignore"):  # of rows that are no numbers
                yield from rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def _forward(self, cuts: Tensor) -> Tensor:
        """Rows of uint8 images, (batch, crop, crop, 3)."""
        mean, std = (
            cuts.new_tensor(it, dtype=self._dtype)
            for it in (self.preparation.mean, self.preparation.std)
        )
        pixels = (cuts.to(self._dtype) / 255 - mean) / std
        return self._features(pixels.permute(0, 3, 1, 2).contiguous())

    @abstractmethod
    def _read(self) -> Any:
        """The model; sets `preparation`."""

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """(batch, width) of (batch, 3, crop, crop)."""


class Clip(ImageModel[ClipOptions]):
    """CLIP's projected embeddings of images and texts (Radford et al., 2021)."""

    kind: ClassVar[str] = "clip"

    def close(self) -> None:
        """Give back the weights, and forget what was kept."""
        super().close()
        self.__dict__.pop("_tokenizer", None)

    def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        """One for each text, cut to the model's length."""
        cut = self._tokenizer(list(texts), truncation=True, max_length=self._tokens)["input_ids"]

        def length(text: int) -> int:
            return min(self._tokens, math.ceil(len(cut[text]) / _TOKENS) * _TOKENS)

        found: dict[int, Embedding] = {}
        for padded, some in groupby(sorted(range(len(texts)), key=length), length):
            same = list(some)
            # What follows the end of a text is not seen by it.
            ids = [np.pad(cut[text], (0, padded - len(cut[text]))) for text in same]
            found |= zip(same, self._rows(ids, self._text_features), strict=True)
        return [found[text] for text in range(len(texts))]

    def _read(self) -> Any:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        self.preparation = _preparation(pretrained(CLIPImageProcessorPil, self.options))
        self._tokenizer = pretrained(AutoTokenizer, self.options)
        model = pretrained(CLIPModel, self.options, use_safetensors=True)
        self._tokens: int = model.config.text_config.max_position_embeddings
        return model

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._model.get_image_features(pixels).pooler_output
        return features

    def _text_features(self, ids: Tensor) -> Tensor:
        features: Tensor = self._model.get_text_features(ids).pooler_output
        return features


def _preparation(processor: Any) -> Preparation:
    shorter, crop = processor.size.get("shortest_edge"), processor.crop_size
    sides = {crop.get("height"), crop.get("width")}
    if not shorter or len(sides) != 1 or (side := sides.pop()) > shorter:
        raise WeightsError(
            "model: its preprocessor_config.json does not resize the shortest_edge and crop a "
            f"square from the centre: size is {dict(processor.size)}, crop_size {dict(crop)}"
        )
    return Preparation(shorter, side, tuple(processor.image_mean), tuple(processor.image_std))


class Dino(ImageModel[DinoOptions]):
    """DINO's class token after the last layer norm (Caron et al., 2021)."""

    kind: ClassVar[str] = "vit"

    def _read(self) -> Any:
        from transformers import ViTModel

        model = pretrained(ViTModel, self.options, use_safetensors=True, add_pooling_layer=False)
        side = model.config.image_size
        # 256 and 224 pixels, as DINO is evaluated on ImageNet; other sizes in proportion.
        self.preparation = Preparation(round(side * 256 / 224), side, IMAGENET_MEAN, IMAGENET_STD)
        return model

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._model(pixels).last_hidden_state[:, 0]
        return features
