"""A record on its way through the pipeline, and what each stage adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from PIL import Image

from reasonpix.core.images import decode, encode_png
from reasonpix.generation.run_folder import Row
from reasonpix.plugin.components import SourceItem
from reasonpix.plugin.types import Box, Caption, EditPlan, Entity, Grounding, Record, Rewriting


class ImageFacts(Record):
    """Output of `read`: the decoded image's size in pixels."""

    width: int
    height: int


class Entities(Record):
    """Output of `extract`."""

    entities: tuple[Entity, ...]


class Groundings(Record):
    """Output of `ground`."""

    groundings: tuple[Grounding, ...]


class Candidates(Record):
    """Output of `rewrite`: I⁰ … Iⁿ of Eq. 2, and why the others did not come."""

    candidates: tuple[Rewriting, ...]
    problems: tuple[str, ...] = ()


class Selection(Record):
    """Output of `select`: the index of the chosen candidate, and how it was chosen.

    Each order is the candidates as they were shown (equal ones once), each choice the candidate
    that was chosen of it. A single candidate is chosen unasked.
    """

    chosen: int
    asked: int = 0
    """In how many orders it was asked; the orders without an answer are not among `orders`."""
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
class Sample:
    """A record on its way: what the stages so far have found out, each by `take`."""

    record_id: str
    item: SourceItem
    load: Callable[[], bytes]
    """Gives the encoded input image."""
    caption: Caption | None = None
    entities: tuple[Entity, ...] = ()
    groundings: tuple[Grounding, ...] = ()
    plan: EditPlan | None = None
    candidates: Candidates | None = None
    selection: Selection | None = None
    load_edited: Callable[[], bytes] | None = None
    """Gives the encoded edited image; None as long as there is none."""
    decoded: Image.Image | None = None
    """The input image, RGB, where it is kept decoded."""
    edited: Image.Image | None = None
    """The edited image, RGB, where it is kept decoded."""

    @property
    def has_edit(self) -> bool:
        """Whether there is an edited image."""
        return self.edited is not None or self.load_edited is not None

    def decode(self) -> None:
        """Keep the images decoded. Raises `UndecodableImage` and `OSError` as they do."""
        if self.decoded is None:
            self.decoded = decode(self.load())
        if self.edited is None and self.load_edited is not None:
            self.edited = decode(self.load_edited())

    def image(self) -> Image.Image:
        """The input image, RGB, the caller's own."""
        decoded = self.decoded  # it may be let go of at any time
        return decode(self.load()) if decoded is None else decoded.copy()

    def edited_image(self) -> Image.Image:
        """The edited image, RGB, the caller's own."""
        if (edited := self.edited) is not None:
            return edited.copy()
        assert self.load_edited is not None
        return decode(self.load_edited())

    def edited_png(self) -> bytes:
        """The edited image as PNG, RGB."""
        if self.plan and self.load_edited:
            return self.load_edited()  # our own edits are stored so
        return encode_png(self.edited_image())

    @property
    def instruction(self) -> str:
        """The reasoning instruction, empty as long as there is none."""
        if self.plan:
            return self.plan.instruction
        if self.candidates and self.selection:
            return self.candidates.candidates[self.selection.chosen].instruction
        return ""

    @property
    def box(self) -> Box:
        """The box of the category that the plan selected."""
        assert self.plan is not None
        found = next(g.box for g in self.groundings if g.category == self.plan.selected)
        assert found is not None
        return found

    def take(self, output: Record) -> None:
        """Add what a stage found out; the facts of an image add nothing."""
        # By the class itself: whether it is an instance takes pydantic long to say.
        field = _FIELDS.get(type(output))
        if field is not None:
            value = getattr(output, field) if field in ("entities", "groundings") else output
            setattr(self, field, value)

    def take_row(self, stage: str, row: Row) -> None:
        """Add what an ok row of `stage` holds."""
        if (kind := _OUTPUTS.get(stage)) is not None:
            self.take(kind.model_validate_json(row.output))
        if row.image is not None:
            self.load_edited = partial(bytes, row.image)


_FIELDS: Mapping[type[Record], str] = {
    Caption: "caption",
    Entities: "entities",
    Groundings: "groundings",
    EditPlan: "plan",
    Candidates: "candidates",
    Selection: "selection",
}
_OUTPUTS: Mapping[str, type[Record]] = {
    "caption": Caption,
    "extract": Entities,
    "ground": Groundings,
    "plan": EditPlan,
    "rewrite": Candidates,
    "select": Selection,
}
