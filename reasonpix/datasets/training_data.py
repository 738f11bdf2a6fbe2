"""What a model was trained on, so that a benchmark can be compared with it.

`training_data.json` lies beside the weights of a checkpoint:

```
{"datasets": [{"name": "part1", "pairs": 3150, "sha256": …}, …],
 "unrecorded": ["timbrooks/instruct-pix2pix"],
 "images": ["00a1c2…", …], "instructions": […], "phrases": […]}
```

Images and texts are sorted hashes of 48 bits: 15 bytes each, and with a million of them and a
thousand cases one in 300,000 comparisons of whole benchmarks is wrong by chance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from reasonpix.core.images import UndecodableImage, decode, pixel_digest
from reasonpix.core.parallel import THREADS, prefetch
from reasonpix.core.text import is_text, one_line, words_of
from reasonpix.datasets.formats import open_reader
from reasonpix.datasets.reader import PairReader
from reasonpix.errors import SourceError, WeightsError, problems_of

FILE = "training_data.json"
"""Name of the file in a checkpoint's folder."""

_DIGITS = 12


class TrainedDataset(BaseModel):
    """A dataset, or what was used of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    pairs: int
    """Pairs of an input and an edited image; images, if it has no pairs."""
    sha256: str | None = None
    """Of the examples in order: images, instructions."""


class TrainingData(BaseModel):
    """The datasets of a model, and hashes of what they contain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: tuple[TrainedDataset, ...] = ()
    unrecorded: tuple[str, ...] = ()
    """Models from which training started, and whose own training data are not recorded."""
    images: frozenset[str] = frozenset()
    """Input and edited images, see `image_hash`."""
    instructions: frozenset[str] = frozenset()
    """See `text_hash`."""
    phrases: frozenset[str] = frozenset()
    """Texts that instructions were made of, such as the hints of the mini world's lexicon."""

    @classmethod
    def of_dataset(
        cls,
        name: str,
        pairs: int,
        images: Iterable[Image.Image] = (),
        instructions: Iterable[str] = (),
        phrases: Iterable[str] = (),
    ) -> TrainingData:
        """The contents of one dataset. Instructions that contain a phrase add nothing to it."""
        bare = cls(phrases=frozenset(map(text_hash, phrases)))
        return cls(
            datasets=(TrainedDataset(name=name, pairs=pairs),),
            images=frozenset(map(image_hash, images)),
            instructions=frozenset(
                text_hash(text) for text in instructions if not bare.has_instruction(text)
            ),
            phrases=bare.phrases,
        )

    def has_image(self, images: Iterable[str]) -> bool:
        """Whether one of the `images`, given by their hashes, is in the training data."""
        return not self.images.isdisjoint(images)

    def has_instruction(self, text: str) -> bool:
        """Whether an instruction has the words of one of them, or contains one of the phrases."""
        if text_hash(text) in self.instructions:
            return True
        if not self.phrases:
            return False
        words = words_of(text)
        ends = range(1, len(words) + 1)
        parts = (words[start:end] for end in ends for start in range(end))
        return any(text_hash(" ".join(part)) in self.phrases for part in parts)

    def __or__(self, other: Self) -> TrainingData:
        """Both together."""
        return TrainingData(
            datasets=tuple(dict.fromkeys((*self.datasets, *other.datasets))),
            unrecorded=tuple(dict.fromkeys((*self.unrecorded, *other.unrecorded))),
            images=self.images | other.images,
            instructions=self.instructions | other.instructions,
            phrases=self.phrases | other.phrases,
        )

    def write(self, folder: Path) -> None:
        """Write the file into a checkpoint's folder; the same data give the same bytes."""
        body = self.model_dump(mode="json")
        body |= {name: sorted(body[name]) for name in ("images", "instructions", "phrases")}
        text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
        (folder / FILE).write_text(f"{text}\n", encoding="utf-8")


def read_training_data(file: Path) -> TrainingData:
    """Read a checkpoint's file. Raises `WeightsError` if it is damaged."""
    try:
        return TrainingData.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        why = problems_of(error)[0] if isinstance(error, ValidationError) else error
        raise WeightsError(
            f"{file} is damaged: {why}; restore it, or remove it to make the training data unknown"
        ) from error


def image_hash(image: Image.Image) -> str:
    """Equal for RGB images of the same size and pixels, whatever file they came from."""
    return pixel_digest(image)[: _DIGITS // 2].hex()


def text_hash(text: str) -> str:
    """Equal for texts of the same words, without regard to case, accents and punctuation.

    A text without any word, such as an emoji, is compared as it is.
    """
    words = " ".join(words_of(text)) or one_line(text)
    return hashlib.sha256(words.encode()).hexdigest()[:_DIGITS]


def training_data_of_dataset(path: str) -> TrainingData:
    """The split `train` of a dataset that `reasonpix train` reads.

    Raises `SourceError` if a row cannot be read, because it could not be compared.
    """
    rows = open_reader(path, Path(), "train", None)
    rows.require([rows.instruction])
    columns = [it for it in (rows.instruction, "direct_instruction") if it in rows.columns]
    instructions: set[str] = set()
    for number, texts in enumerate(rows.texts(columns)):
        if isinstance(texts, OSError):
            raise SourceError(f"{rows.name(number)}: {texts}")
        instructions |= {text_hash(str(it)) for it in texts.values() if is_text(it)}
    images: set[str] = set()
    for hashes in prefetch(lambda number: _images(rows, number), iter(range(len(rows))), THREADS):
        images.update(hashes)
    dataset = TrainedDataset(name=dataset_name(path), pairs=len(rows))
    return TrainingData(
        datasets=(dataset,), images=frozenset(images), instructions=frozenset(instructions)
    )


def dataset_name(path: str) -> str:
    """A dataset's name without the folders of this machine; a hub id stays whole."""
    return Path(path).name if Path(path).exists() else path


def _images(rows: PairReader, number: int) -> list[str]:
    try:
        return [image_hash(decode(data)) for data in rows.images(number)]
    except (OSError, UndecodableImage) as error:
        raise SourceError(f"{rows.name(number)}: {error}; it cannot be compared") from error
