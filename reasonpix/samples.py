"""A record on its way through the pipeline, and what each stage adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from reasonpix.images import decode, encode_png
from reasonpix.records import (
    Box,
    Caption,
    EditPlan,
    Entity,
    Grounding,
    Record,
    Rewriting,
)
from reasonpix.run import Row
from reasonpix.slots import SourceItem


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


@dataclass(frozen=True)
class Sample:
    """A record on its way: what the stages so far have found out."""

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

    def image(self) -> Image.Image:
        """The input image, RGB."""
        return decode(self.load())

    def edited_image(self) -> Image.Image:
        """The edited image, RGB."""
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

    def after(self, stage: str, row: Row) -> Sample:
        """This sample with what an ok row of `stage` adds to it."""
        if stage == "caption":
            return replace(self, caption=Caption.model_validate_json(row.output))
        if stage == "extract":
            return replace(self, entities=Entities.model_validate_json(row.output).entities)
        if stage == "ground":
            return replace(self, groundings=Groundings.model_validate_json(row.output).groundings)
        if stage == "plan":
            return replace(self, plan=EditPlan.model_validate_json(row.output))
        if stage == "edit":
            assert row.image is not None
            return replace(self, load_edited=partial(bytes, row.image))
        if stage == "rewrite":
            return replace(self, candidates=Candidates.model_validate_json(row.output))
        if stage == "select":
            return replace(self, selection=Selection.model_validate_json(row.output))
        return self
