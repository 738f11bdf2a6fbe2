"""The values that flow through the pipeline: immutable and validated."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reasonpix.errors import InvalidBox


class Record(BaseModel):
    """A frozen value that rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Box(Record):
    """An axis-aligned box, XYXY in absolute pixels of an image of `width` x `height`.

    `x1` and `y1` are exclusive: the box of the whole image is (0, 0, width, height).
    Raises `InvalidBox` for coordinates that are not finite, swapped, empty or outside.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    width: int
    height: int

    @model_validator(mode="after")
    def _is_a_box(self) -> Self:
        if not all(map(math.isfinite, self.xyxy)):
            raise InvalidBox(f"coordinates must be finite, got {self.xyxy}")
        if self.x1 <= self.x0:
            raise InvalidBox(f"x1={self.x1} must exceed x0={self.x0}")
        if self.y1 <= self.y0:
            raise InvalidBox(f"y1={self.y1} must exceed y0={self.y0}")
        if self.x0 < 0 or self.y0 < 0 or self.x1 > self.width or self.y1 > self.height:
            raise InvalidBox(f"{self.xyxy} leaves the image of {self.width}x{self.height} pixels")
        if self.area == 0:  # underflow: iou and overlap divide by it
            raise InvalidBox(f"{self.xyxy} is too small to have an area")
        return self

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels."""
        return (self.x0, self.y0, self.x1, self.y1)

    @property
    def area(self) -> float:
        """Area in square pixels."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    @property
    def share(self) -> float:
        """Area as a share of the image's area, in (0, 1]."""
        return self.area / (self.width * self.height)

    def iou(self, other: Box) -> float:
        """Intersection over union with a box of the same image, in [0, 1]."""
        common = self._common(other)
        return common / (self.area + other.area - common)

    def overlap(self, other: Box) -> float:
        """Intersection as a share of the smaller box, in [0, 1]; 1 if one contains the other."""
        common = self._common(other)
        return min(1.0, common / min(self.area, other.area))

    def _common(self, other: Box) -> float:
        w = min(self.x1, other.x1) - max(self.x0, other.x0)
        h = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(w, 0.0) * max(h, 0.0)

    def pixels(self) -> tuple[int, int, int, int]:
        """The smallest whole-pixel box that covers this one: (x0, y0, x1, y1)."""
        return (
            math.floor(self.x0),
            math.floor(self.y0),
            math.ceil(self.x1),
            math.ceil(self.y1),
        )


class Problem(Record):
    """Why a record ends: a stage returns it in place of a result.

    `rejected`: the record is valid but unsuitable (no entity, no usable plan, filtered out).
    `failed`: something broke (unreadable image, unreachable server); a retry may succeed.
    """

    status: Literal["rejected", "failed"]
    reason: str


class Caption(Record):
    """What an image shows, in one sentence (C in the paper)."""

    text: str


class Entity(Record):
    """A candidate category (y_k in Eq. 4), such as "fire hydrant" for the text "two fire hydrants".

    `category` is the name of the kind in lower case, in the singular if it has one; `text` is the
    noun phrase as the caption has it, from its article or number on.
    """

    category: str
    text: str


class Grounding(Record):
    """Where a category is (b_k in Eq. 5). `box` is None when it was not found."""

    category: str
    box: Box | None = None
    score: Annotated[float, Field(ge=0, le=1)] = 0.0


class RewriteRequest(Record):
    """A request to P_gen (Eq. 2): one more indirect instruction for a given edit."""

    caption: str
    edited_caption: str
    instruction: str
    """The direct instruction."""
    seed: int


class Rewriting(Record):
    """A candidate for the reasoning instruction (Eq. 2).

    `revealing` are the words that, according to the planner, would give the edit away; the
    instruction should avoid them.
    """

    instruction: str
    revealing: tuple[str, ...] = ()


class SelectRequest(Record):
    """A request to P_select (Eq. 3): the best of the candidates, shown in this order."""

    caption: str
    edited_caption: str
    instruction: str
    """The direct instruction."""
    candidates: Annotated[tuple[str, ...], Field(min_length=1)]
    seed: int


class Choice(Record):
    """The chosen option of a request; `index` counts from 0."""

    index: Annotated[int, Field(ge=0)]


class ResolveRequest(Record):
    """A request to a resolver: which of the options does the instruction mean?"""

    caption: str
    instruction: str
    options: Annotated[tuple[str, ...], Field(min_length=2)]
    seed: int


class ReplaceRequest(Record):
    """A request to P_replace (Eq. 6). `seed` is the record's, so equal requests may differ."""

    caption: str
    categories: tuple[str, ...]
    seed: int


class EditPlan(Record):
    """The planner's answer (Eq. 6): replace `selected` by `target`; `instruction` asks for it.

    `synonyms` are other words for the two categories, if the planner gives any; the instruction
    should avoid them.
    """

    selected: str
    target: str
    instruction: str
    synonyms: tuple[str, ...] = ()
