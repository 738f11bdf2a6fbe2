"""The six slots of the pipeline, as abstract classes, and what all components share.

A component is a class with an `Options` model. Its slot's method takes a batch and gives a batch
of the same length in the same order; where one item cannot be done it gives a `Problem` in that
place instead of raising. Heavy imports and weights belong into `load`. A result depends on the
item and its seed alone, never on the batch around it.

Components that load pretrained weights derive their options from `ModelOptions` and load with
`reasonpix.weights`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from reasonpix.records import (
    Box,
    Caption,
    EditPlan,
    Entity,
    Grounding,
    Problem,
    Record,
    ReplaceRequest,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


class Options(BaseModel):
    """What a recipe may say about a component. Every field has a description and a type."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    neutral: ClassVar[frozenset[str]] = frozenset()
    """Fields that never change a result; they stay out of fingerprints."""


class ModelOptions(Options):
    """Options of a component that loads pretrained weights."""

    neutral: ClassVar[frozenset[str]] = frozenset({"device", "batch_size", "cache_dir"})

    model: str = Field(description="Hub id, local folder, or checkpoint name such as mini/blip2")
    revision: str | None = Field(None, description="Commit or tag of the hub repository")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Computing precision; auto is float32 on a CPU, float16 on a GPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    batch_size: int = Field(8, ge=1, description="Items computed together")
    cache_dir: Path | None = Field(None, description="Where hub downloads are kept")


O_co = TypeVar("O_co", bound=Options, covariant=True)


class Component(ABC, Generic[O_co]):
    """What stands in a slot. `name` is the entry point's name, the word after `use:`."""

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    version: ClassVar[str] = "1"
    """Raise it when the same options give other results than before: cached results go stale."""

    def __init__(self, options: O_co) -> None:
        self.options = options

    def check(self) -> None:
        """Raise a `ReasonpixError` for what is missing and cheap to see, such as an API key.

        Called before anything is computed, so that hours of other stages are not spent in vain.
        """

    def load(self) -> None:
        """Import what is heavy and read the weights. Called once, before the first batch."""

    def close(self) -> None:
        """Give back what `load` took."""

    def identity(self) -> Mapping[str, Any]:
        """What else changes the results, beside options, version and weights (JSON values)."""
        return {}


class Captioner(Component[O_co]):
    """Says what an image shows (Part III: BLIP-2)."""

    @abstractmethod
    def caption(self, images: Sequence[Image]) -> list[Caption | Problem]:
        """One caption for each RGB image."""


class EntityExtractor(Component[O_co]):
    """Finds candidate categories in a caption (Eq. 4)."""

    @abstractmethod
    def extract(self, captions: Sequence[Caption]) -> list[tuple[Entity, ...] | Problem]:
        """The entities of each caption, in order of appearance, without repeats; may be empty."""


class Grounder(Component[O_co]):
    """Locates categories in an image (Eq. 5)."""

    @abstractmethod
    def ground(
        self, images: Sequence[Image], categories: Sequence[Sequence[str]]
    ) -> list[tuple[Grounding, ...] | Problem]:
        """For each RGB image one grounding per asked category, in the order asked.

        Boxes are XYXY in absolute pixels of the image given.
        """


class Planner(Component[O_co]):
    """Decides what is replaced by what, and words the instruction (Eq. 6)."""

    @abstractmethod
    def replace(self, requests: Sequence[ReplaceRequest]) -> list[EditPlan | Problem]:
        """One plan for each request; `selected` is one of the request's categories."""


@dataclass(frozen=True)
class EditRequest:
    """One object replacement (Eq. 7): what is in `box` of the RGB `image` becomes `target`."""

    image: Image
    box: Box
    selected: str
    target: str
    caption: str
    """Caption of the input image."""
    seed: int


class Editor(Component[O_co]):
    """Replaces an object in an image (Eq. 7: GLIGEN)."""

    @abstractmethod
    def edit(self, requests: Sequence[EditRequest]) -> list[Image | Problem]:
        """One edited RGB image for each request, of the size of its input."""


class MLLMEncoder(Component[O_co]):
    """Reads image and instruction together (Eq. 8: h = F(x_in, I))."""

    @abstractmethod
    def encode(
        self, images: Sequence[Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        """For each pair the states h, float32 (tokens, width); `tokens` may differ."""


class SourceItem(Record):
    """A row of a source: where it is, what its bytes hash to, and what is known about it."""

    native_id: str
    content: str
    """SHA-256 of the encoded image, in hex."""
    caption: str | None = None


class Source(Component[O_co]):
    """Where input images come from. Reading is by native id, in any order, from any process."""

    @abstractmethod
    def items(self) -> Iterator[SourceItem | tuple[str, Problem]]:
        """All rows in a stable order; a row that cannot be read is (native id, problem)."""

    @abstractmethod
    def read(self, native_id: str) -> bytes:
        """The encoded image (PNG, JPEG, WebP, …). Raises `OSError` when it cannot be read."""


@dataclass(frozen=True)
class EditedPair:
    """What a scorer sees of a finished edit. Both images are RGB and of one size."""

    input_image: Image
    edited_image: Image
    box: Box
    selected: str
    target: str
    instruction: str


class Scorer(Component[O_co]):
    """Measures edits, and filters by what it measured.

    `score` may run models and is stored for every record; `reject` is a view over the stored
    scores of a whole run and costs nothing. Options that only `reject` reads are `neutral`.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    """Slots of the recipe's pipeline that `score` needs, such as {"grounder"}."""

    @abstractmethod
    def score(
        self, pairs: Sequence[EditedPair], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """Named scores of each pair. `pipeline` holds the loaded components of `uses`."""

    @abstractmethod
    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """For each record of a run the reason to reject it, or None."""


SLOTS: Mapping[str, type[Component[Any]]] = {
    "source": Source,
    "captioner": Captioner,
    "extractor": EntityExtractor,
    "grounder": Grounder,
    "planner": Planner,
    "editor": Editor,
    "encoder": MLLMEncoder,
    "filter": Scorer,
}
"""The word a recipe uses for each slot."""
