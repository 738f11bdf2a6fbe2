"""A record on its way through the pipeline, and the output types of core's stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from PIL import Image

from reasonpix.core.english.captions import edited_caption
from reasonpix.core.images import decode, encode_png
from reasonpix.plugin.components import SourceItem
from reasonpix.plugin.types import Box, Caption, EditPlan, Entity, Grounding, Record, Rewriting

if TYPE_CHECKING:
    from reasonpix.plugin.stages import StageSpec

R = TypeVar("R", bound=Record)


class ImageFacts(Record):
    """Output of `read` and of `edit`: the size of the image in pixels."""

    width: int
    height: int


class Entities(Record):
    """Output of `extract`."""

    entities: tuple[Entity, ...]


class Groundings(Record):
    """Output of `ground`."""

    groundings: tuple[Grounding, ...]


class Candidates(Record):
    """Output of `rewrite`: I⁰ … Iⁿ of Eq. 2, and why the missing ones failed."""

    candidates: tuple[Rewriting, ...]
    problems: tuple[str, ...] = ()


class Selection(Record):
    """Output of `select`: the index of the chosen candidate, and how it was chosen.

    Each order lists the candidates as they were shown (equal ones once); each choice is the
    candidate chosen from it. A single candidate is chosen without asking.
    """

    chosen: int
    asked: int = 0
    """Number of orders asked. `orders` holds only those that were answered."""
    orders: tuple[tuple[int, ...], ...] = ()
    choices: tuple[int, ...] = ()

    @property
    def agreement(self) -> float:
        """Share of the orders asked in which the chosen candidate was chosen."""
        return self.choices.count(self.chosen) / self.asked if self.asked else 1.0


class Scores(Record):
    """Output of a `score` stage: values by the scorer's own names."""

    scores: dict[str, float]


@dataclass(slots=True)
class SampleImage:
    """An image of a sample: encoded, decoded, or both."""

    load: Callable[[], bytes] | None = None
    """Returns the encoded image; None until the stage that made it is stored."""
    decoded: Image.Image | None = None
    """The RGB image, while it is kept in memory."""
    is_png: bool = False
    """Whether `load` returns a PNG that we encoded."""

    def copy(self) -> Image.Image:
        """A new RGB image. Raises `UndecodableImage` and `OSError`."""
        if (decoded := self.decoded) is not None:  # another thread may release it
            return decoded.copy()
        assert self.load is not None
        return decode(self.load())

    def keep(self) -> None:
        """Keep the image decoded. Raises `UndecodableImage` and `OSError`."""
        if self.decoded is None and self.load is not None:
            self.decoded = decode(self.load())

    def release(self) -> None:
        """Drop the decoded image if it can be decoded again."""
        if self.load is not None:
            self.decoded = None


class _StageImages(Mapping[str, Image.Image]):
    def __init__(self, images: Mapping[str, SampleImage]) -> None:
        self._images = images
        self._copies: dict[str, Image.Image] = {}

    def __getitem__(self, name: str) -> Image.Image:
        if name not in self._copies:
            self._copies[name] = self._images[name].copy()
        return self._copies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._images)

    def __len__(self) -> int:
        return len(self._images)


@dataclass(slots=True)
class Sample:
    """A record in the pipeline: its images, and the outputs of the stages so far."""

    record_id: str
    item: SourceItem
    images: dict[str, SampleImage]
    """`input`, `paired` for a source of pairs, and the stages' images by `StageSpec.image`."""
    outputs: dict[str, Record] = field(default_factory=dict)
    """By the name of the stage."""

    def add(self, stage: StageSpec, output: Record, image: Image.Image | None = None) -> None:
        """Add what a stage computed."""
        self.outputs[stage.name] = output
        if stage.image is not None and image is not None:
            self.images.setdefault(stage.image, SampleImage()).decoded = image

    def add_stored(self, stage: StageSpec, output: str, image: bytes | None) -> None:
        """Add what a stage stored: its output as JSON, and its image as PNG."""
        self.outputs[stage.name] = stage.output.model_validate_json(output)
        if image is not None:
            self.add_encoded(stage, image)

    def add_encoded(self, stage: StageSpec, image: bytes) -> None:
        """Add the PNG of an image that a stage made, which then need not stay decoded."""
        if stage.image is not None:
            added = self.images.setdefault(stage.image, SampleImage())
            added.load, added.is_png = partial(bytes, image), True

    def output(self, stage: str, kind: type[R]) -> R | None:
        """The output of a stage, of its type; None if the stage has not run."""
        return cast("R | None", self.outputs.get(stage))

    @property
    def has_edit(self) -> bool:
        """Whether there is an edited image."""
        return "edited" in self.images or "paired" in self.images

    @property
    def _edited(self) -> SampleImage:
        return self.images["edited" if "edited" in self.images else "paired"]

    def image(self, name: str = "input") -> Image.Image:
        """A copy of an image, RGB. Raises `UndecodableImage` and `OSError`."""
        return self.images[name].copy()

    def edited_image(self) -> Image.Image:
        """A copy of the edited image, RGB. Raises `UndecodableImage` and `OSError`."""
        return self._edited.copy()

    def edited_png(self) -> bytes:
        """The edited image as PNG, RGB."""
        edited = self._edited
        return edited.load() if edited.is_png and edited.load else encode_png(edited.copy())

    def stage_images(self) -> Mapping[str, Image.Image]:
        """The images that stages made so far, RGB; each is copied on first access."""
        return _StageImages({k: v for k, v in self.images.items() if k not in ("input", "paired")})

    # -- Outputs of core's stages

    @property
    def caption(self) -> Caption | None:
        """What the input image shows."""
        return self.output("caption", Caption)

    @property
    def entities(self) -> tuple[Entity, ...]:
        """The candidate categories; empty before `extract`."""
        output = self.output("extract", Entities)
        return output.entities if output else ()

    @property
    def groundings(self) -> tuple[Grounding, ...]:
        """Where the categories are; empty before `ground`."""
        output = self.output("ground", Groundings)
        return output.groundings if output else ()

    @property
    def plan(self) -> EditPlan | None:
        """What is replaced by what (Parts II and III)."""
        return self.output("plan", EditPlan)

    @property
    def edited_caption(self) -> str | None:
        """What the edited image shows: the caption with the target in place of one object.

        For a source of pairs, the caption that it gives.
        """
        caption, plan = self.caption, self.plan
        if caption is None or plan is None:
            return self.item.pair.caption if self.item.pair else None
        phrase = next((it.text for it in self.entities if it.category == plan.selected), "")
        return edited_caption(
            caption.text,
            plan.selected,
            plan.target,
            phrase=phrase,
            synonyms=plan.synonyms,
            one_of_several=True,  # an edit has one box, and paints one object into it
        )

    @property
    def candidates(self) -> Candidates | None:
        """The instructions to choose from (Part I)."""
        return self.output("rewrite", Candidates)

    @property
    def selection(self) -> Selection | None:
        """Which candidate was chosen (Part I)."""
        return self.output("select", Selection)

    @property
    def instruction(self) -> str:
        """The reasoning instruction; empty before the planner."""
        if plan := self.plan:
            return plan.instruction
        if (output := self.candidates) and (selection := self.selection):
            return output.candidates[selection.chosen].instruction
        return ""

    @property
    def box(self) -> Box:
        """The box of the category that the plan selected."""
        assert self.plan is not None
        selected = self.plan.selected
        box = next(g.box for g in self.groundings if g.category == selected)
        assert box is not None
        return box
