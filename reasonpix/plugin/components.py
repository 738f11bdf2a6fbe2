"""The abstract classes of the slots, and the base of all components. Plugins can add slots.

A component is a class with an `Options` model. Its slot's method takes a batch and returns a batch
of the same length in the same order; for an item that cannot be processed it returns a `Problem`
instead of raising. Heavy imports and weights belong in `load`. A result depends only on the item
and its seed, never on the rest of the batch.

Components that load pretrained weights derive their options from `ModelOptions` and load with
`reasonpix.plugin.weights`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from reasonpix.core.files.ignored import Ignored
from reasonpix.plugin.edits import Edit, EditRequest, MethodRequest
from reasonpix.plugin.types import (
    Caption,
    Choice,
    EditPlan,
    Entity,
    Grounding,
    Problem,
    Record,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from reasonpix.plugin.intended_images import IntendedImages


class Options(BaseModel):
    """The options of a component in a recipe. Every field has a type and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset()
    """Fields that never change a result; they are not part of fingerprints."""


class ModelOptions(Options):
    """Options of a component that loads pretrained weights."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"device", "batch_size", "cache_dir"})

    weights: ClassVar[tuple[str, ...]] = ("model",)
    """Fields that name weights. In them a plugin's checkpoint name is replaced by its path."""

    model: str = Field(description="Hub id, local folder, or checkpoint name such as mini/blip2")
    revision: str | None = Field(None, description="Commit or tag of the hub repository")
    variant: str | None = Field(
        None,
        min_length=1,
        description="Variant of the weight files, such as fp16; by default the plain files, or the "
        "model's only variant",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Computing precision; auto is float32 on a CPU, float16 on a GPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    batch_size: int = Field(8, ge=1, description="Items computed together")
    cache_dir: Path | None = Field(None, description="Where hub downloads are kept")


O_co = TypeVar("O_co", bound=Options, covariant=True)


class Component(ABC, Generic[O_co]):
    """An implementation of a slot. `name` is the name of its entry point, the word after `use:`.

    Its methods are called one at a time (but see `concurrency`), possibly from another thread than
    `load`. The images it receives are its own copies.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    version: ClassVar[str] = "1"
    """Increase it when the same options give other results: cached results become stale."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Optional slots and added stages, such as {"mask"}, that a recipe must have for it."""

    def __init__(self, options: O_co) -> None:
        self.options = options

    @property
    def concurrency(self) -> int:
        """How many items it can process at once.

        Above 1 the slot's method may be called from several threads, with items of many shards.
        """
        return 1

    @property
    def intended_images(self) -> IntendedImages | None:
        """The only images that it is made for; by default what its weights say, or None for any.

        A run over images of another `Source.domain` warns.
        """
        if not isinstance(self.options, ModelOptions):
            return None
        from reasonpix.plugin.intended_images import read_intended_images

        named = (getattr(self.options, field) for field in self.options.weights)
        each = [self.options.model_copy(update={"model": it}) for it in named if it]
        return next(filter(None, map(read_intended_images, each)), None)

    def check(self) -> None:
        """Raise a `ReasonpixError` for what is missing and cheap to check, such as an API key.

        Called before anything is computed, so that other stages do not run for nothing.
        """

    def load(self) -> None:
        """Import heavy packages and load the weights. Called once, before the first batch."""

    def close(self) -> None:
        """Release what `load` acquired."""

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """What affects the results besides options, version and weights (JSON values)."""
        return {}


PlannerTask = Literal["rewrite", "select", "replace", "resolve"]
"""The methods of a planner."""


class Captioner(Component[O_co]):
    """Describes images (Part III: BLIP-2)."""

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
        """For each RGB image one grounding per category, in the same order.

        Boxes are XYXY in absolute pixels of the image.
        """


class Planner(Component[O_co]):
    """Rewrites instructions (Eq. 2), selects one (Eq. 3), plans replacements (Eq. 6), resolves.

    A planner may implement only some; a recipe that needs a missing one is an error.
    """

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[Rewriting | Problem]:
        """One candidate for the reasoning instruction for each request (P_gen)."""
        raise NotImplementedError

    def select(self, requests: Sequence[SelectRequest]) -> list[Choice | Problem]:
        """The best candidate of each request (P_select)."""
        raise NotImplementedError

    def replace(self, requests: Sequence[ReplaceRequest]) -> list[EditPlan | Problem]:
        """One plan for each request (P_replace); `selected` is one of the request's categories."""
        raise NotImplementedError

    def resolve(self, requests: Sequence[ResolveRequest]) -> list[Choice | Problem]:
        """The option that each instruction refers to."""
        raise NotImplementedError

    @classmethod
    def can(cls, task: PlannerTask) -> bool:
        """Whether this planner implements a task."""
        return getattr(cls, task) is not getattr(Planner, task)

    def prompt_identity(self, verb: PlannerTask) -> Mapping[str, Any]:
        """What affects the results of this task only, such as its prompt (JSON values)."""
        return {}


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
        """The states h of each pair, float32 (tokens, width); `tokens` may differ."""


class SourcePair(Record):
    """The edit of an item, from a source of pairs."""

    content: str
    """SHA-256 of the encoded edited image, in hex."""
    caption: str | None = None
    """What the edited image shows."""
    instruction: str
    """The direct instruction."""


class SourceItem(Record):
    """A row of a source: its id, the hash of its bytes, and what is known about it."""

    native_id: str
    content: str
    """SHA-256 of the encoded image, in hex."""
    caption: str | None = None
    pair: SourcePair | None = None
    """The edit, from a source of pairs."""


class Source(Component[O_co]):
    """Where input images come from. Reading is by native id, in any order, from any thread."""

    @property
    def domain(self) -> str:
        """The kind of its images, as in `IntendedImages.domain`; empty if unknown."""
        return ""

    @property
    def gives_pairs(self) -> bool:
        """Whether its items are pairs: input image, edited image and direct instruction."""
        return False

    @property
    def gives_captions(self) -> bool:
        """Whether its items may have captions, and those of pairs captions of both images."""
        return True

    @abstractmethod
    def items(self) -> Iterator[SourceItem | tuple[str, Problem] | Ignored]:
        """All rows in a stable order; an unreadable row is (native id, problem).

        Anything else, such as a text file among images, is `Ignored`: it is counted by reason and
        shown with the run.
        """

    @abstractmethod
    def read(self, native_id: str) -> bytes:
        """The encoded image (PNG, JPEG, WebP, …). Raises `OSError` when it cannot be read."""

    def read_edited(self, native_id: str) -> bytes:
        """The encoded edited image of a pair. Raises `OSError` when it cannot be read."""
        raise NotImplementedError


class Scorer(Component[O_co]):
    """Scores edits, and filters them by their scores.

    `score` may run models; its results are stored for every record. `reject` is cheap: it reads the
    stored scores of a whole run. Options that only `reject` reads are in `fingerprint_exclude`.
    """

    needs_slots: ClassVar[frozenset[str]] = frozenset()
    """Slots of the recipe's pipeline that `score` needs, such as {"grounder"}."""

    requires: ClassVar[frozenset[str]] = frozenset({"box", "selected", "target", "instruction"})
    """Which fields of `Edit`, beside the images and captions, `score` needs.

    The name of a stage that a plugin adds means its output in `Edit.outputs`. A recipe that cannot
    provide them is refused. In Part I, a scorer that needs nothing from the planner runs before it,
    so that no LLM is paid for rejected pairs.
    """

    @abstractmethod
    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """Named scores of each edit. `pipeline` holds the loaded components of `needs_slots`."""

    @abstractmethod
    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """The reason to reject each record of a run, or None."""


class Method(Component[O_co]):
    """Edits images by instructions; a row of Table 3."""

    requires: ClassVar[frozenset[str]] = frozenset()
    """The captions of `MethodRequest` that it needs, such as {"caption"}."""

    @abstractmethod
    def apply(self, requests: Sequence[MethodRequest]) -> list[Image | Problem]:
        """One edited RGB image for each request, of the size of its input."""
