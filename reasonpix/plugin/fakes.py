"""A fake for every slot: components that work without weights, for tests and first steps.

A recipe names them `fake-captioner`, `fake-extractor`, and so on.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field

from reasonpix.plugin.components import (
    Captioner,
    Component,
    Editor,
    EntityExtractor,
    Grounder,
    Method,
    MLLMEncoder,
    Options,
    Planner,
    Scorer,
    Source,
    SourceItem,
    SourcePair,
)
from reasonpix.plugin.edits import Edit, EditRequest, MethodRequest
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import (
    Box,
    Caption,
    Choice,
    EditPlan,
    Entity,
    Grounding,
    Problem,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

__all__ = [
    "FakeCaptioner",
    "FakeCaptionerOptions",
    "FakeEditor",
    "FakeEditorOptions",
    "FakeEncoder",
    "FakeExtractor",
    "FakeGrounder",
    "FakeMethod",
    "FakeMethodOptions",
    "FakePlanner",
    "FakePlannerOptions",
    "FakeScorer",
    "FakeSource",
    "FakeSourceOptions",
]


class FakeSourceOptions(Options):
    """Options of `fake-source`."""

    count: int = Field(4, ge=1, description="Number of images")
    caption: str | None = Field(None, description="Caption of every image")
    instruction: str | None = Field(
        None, description="Direct instruction of every image; with it the items are pairs"
    )
    edited_caption: str | None = Field(None, description="Caption of every edited image")


class FakeSource(Source[FakeSourceOptions]):
    """Plain squares of different colours; the edited ones have a hole."""

    name: ClassVar[str] = "fake-source"
    Options: ClassVar[type[Options]] = FakeSourceOptions

    def items(self) -> Iterator[SourceItem | tuple[str, Problem]]:
        """Images "0", "1", …"""
        for number in range(self.options.count):
            native_id, options = str(number), self.options
            pair = None
            if options.instruction is not None:
                pair = SourcePair(
                    content=hashlib.sha256(self.read_edited(native_id)).hexdigest(),
                    caption=options.edited_caption,
                    instruction=options.instruction,
                )
            content = hashlib.sha256(self.read(native_id)).hexdigest()
            yield SourceItem(
                native_id=native_id, content=content, caption=options.caption, pair=pair
            )

    @property
    def gives_pairs(self) -> bool:
        """With the option `instruction`."""
        return self.options.instruction is not None

    def read(self, native_id: str) -> bytes:
        """A PNG of 32x32 pixels with a darker square."""
        return _png(_square(int(native_id)))

    def read_edited(self, native_id: str) -> bytes:
        """The same with a lighter square in the middle."""
        image = _square(int(native_id))
        ImageDraw.Draw(image).rectangle((12, 12, 16, 16), fill=(240, 240, 240))
        return _png(image)


def _square(number: int) -> Image.Image:
    image = Image.new("RGB", (32, 32), (60 + number % 190, 120, 200))
    ImageDraw.Draw(image).rectangle((8, 8, 20, 20), fill=(20, 20, number % 256))
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class FakeCaptionerOptions(Options):
    """Options of `fake-captioner`."""

    caption: str = Field("a bee and a rabbit", description="Caption of every image")


class FakeCaptioner(Captioner[FakeCaptionerOptions]):
    """Gives every image the same caption."""

    name: ClassVar[str] = "fake-captioner"
    Options: ClassVar[type[Options]] = FakeCaptionerOptions

    def caption(self, images: Sequence[Image.Image]) -> list[Caption | Problem]:
        """`options.caption` for each image."""
        return [Caption(text=self.options.caption) for _ in images]


class FakeExtractor(EntityExtractor[Options]):
    """Takes the word after each article as a category."""

    name: ClassVar[str] = "fake-extractor"

    def extract(self, captions: Sequence[Caption]) -> list[tuple[Entity, ...] | Problem]:
        """ "a bee and a rabbit" gives bee and rabbit."""
        results: list[tuple[Entity, ...] | Problem] = []
        for caption in captions:
            words = caption.text.lower().replace(",", " ").split()
            nouns = [word for article, word in pairwise(words) if article in ("a", "an")]
            results.append(tuple(Entity(category=n, text=n) for n in dict.fromkeys(nouns)))
        return results


class FakeGrounder(Grounder[Options]):
    """Finds everything in the middle of the image."""

    name: ClassVar[str] = "fake-grounder"

    def ground(
        self, images: Sequence[Image.Image], categories: Sequence[Sequence[str]]
    ) -> list[tuple[Grounding, ...] | Problem]:
        """The middle quarter of each image, for every category."""
        results: list[tuple[Grounding, ...] | Problem] = []
        for image, names in zip(images, categories, strict=True):
            w, h = image.size
            box = Box(x0=w / 4, y0=h / 4, x1=3 * w / 4, y1=3 * h / 4, width=w, height=h)
            results.append(tuple(Grounding(category=c, box=box, score=1.0) for c in names))
        return results


HINTS = (
    "Something about it feels out of date.",
    "Think of how it will be a while from now.",
    "Imagine that somebody else had lived here.",
    "It was quite another day when we were there.",
    "My grandmother remembers it differently.",
)
"""The fake planner's reasoning instructions."""


class FakePlannerOptions(Options):
    """Options of `fake-planner`."""

    target: str = Field("pear", description="Target category of every edit")


class FakePlanner(Planner[FakePlannerOptions]):
    """Replaces the first category, draws a hint by the seed, chooses alphabetically."""

    name: ClassVar[str] = "fake-planner"
    Options: ClassVar[type[Options]] = FakePlannerOptions

    def replace(self, requests: Sequence[ReplaceRequest]) -> list[EditPlan | Problem]:
        """The first category becomes `options.target`."""
        return [
            EditPlan(
                selected=request.categories[0],
                target=self.options.target,
                instruction="Something else would look better there.",
            )
            for request in requests
        ]

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[Rewriting | Problem]:
        """One of `HINTS`, drawn by the seed."""
        return [Rewriting(instruction=HINTS[request.seed % len(HINTS)]) for request in requests]

    def select(self, requests: Sequence[SelectRequest]) -> list[Choice | Problem]:
        """The alphabetically first candidate, whatever their order."""
        return [
            Choice(index=request.candidates.index(min(request.candidates))) for request in requests
        ]

    def resolve(self, requests: Sequence[ResolveRequest]) -> list[Choice | Problem]:
        """`options.target` if it is an option, or else the alphabetically first one."""
        target = self.options.target
        return [
            Choice(
                index=request.options.index(
                    target if target in request.options else min(request.options)
                )
            )
            for request in requests
        ]


class FakeEditorOptions(Options):
    """Options of `fake-editor`."""

    colour: tuple[int, int, int] = Field((200, 40, 40), description="RGB that fills the box")


class FakeEditor(Editor[FakeEditorOptions]):
    """Fills the box with one colour."""

    name: ClassVar[str] = "fake-editor"
    Options: ClassVar[type[Options]] = FakeEditorOptions

    def edit(self, requests: Sequence[EditRequest]) -> list[Image.Image | Problem]:
        """The image with its box filled."""
        results: list[Image.Image | Problem] = []
        for request in requests:
            image = request.image.copy()
            image.paste(self.options.colour, request.box.pixels())
            results.append(image)
        return results


class FakeEncoder(MLLMEncoder[Options]):
    """Derives states from hashes of the image and the words of the instruction."""

    name: ClassVar[str] = "fake-encoder"

    def encode(
        self, images: Sequence[Image.Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        """One state of width 8 for each word."""
        results: list[NDArray[np.float32] | Problem] = []
        for image, instruction in zip(images, instructions, strict=True):
            states = [
                np.frombuffer(hashlib.sha256(image.tobytes() + word.encode()).digest(), np.uint32)
                for word in instruction.split()
            ]
            results.append((np.array(states).reshape(-1, 8) / 2**32).astype(np.float32))
        return results


class FakeScorer(Scorer[Options]):
    """Scores every edit 1 and rejects none."""

    name: ClassVar[str] = "fake-scorer"
    requires: ClassVar[frozenset[str]] = frozenset()

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """`one`: 1.0."""
        return [{"one": 1.0} for _ in edits]

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """Accept all."""
        return [None for _ in scores]


class FakeMethodOptions(Options):
    """Options of `fake-method`."""

    tint: int = Field(100, ge=0, le=255, description="Red value of the shade over half the image")


class FakeMethod(Method[FakeMethodOptions]):
    """Draws a shade derived from instruction and seed; the instruction "fail" fails."""

    name: ClassVar[str] = "fake-method"
    Options: ClassVar[type[Options]] = FakeMethodOptions

    def apply(self, requests: Sequence[MethodRequest]) -> list[Image.Image | Problem]:
        """Each image with its left half covered by the shade."""
        return [self._drawn(request) for request in requests]

    def _drawn(self, request: MethodRequest) -> Image.Image | Problem:
        if request.instruction == "fail":
            return Problem(status="failed", reason="the instruction is 'fail'")
        shade = hashlib.sha256(f"{request.instruction} {request.seed}".encode()).digest()
        edited = request.image.copy()
        half = (0, 0, edited.width // 2, edited.height)
        edited.paste((self.options.tint, shade[0], shade[1]), half)
        return edited


@hookimpl
def methods() -> list[type[Method[Any]]]:
    """The fake method."""
    return [FakeMethod]


@hookimpl
def sources() -> list[type[Source[Any]]]:
    """The fake source."""
    return [FakeSource]


@hookimpl
def captioners() -> list[type[Captioner[Any]]]:
    """The fake captioner."""
    return [FakeCaptioner]


@hookimpl
def extractors() -> list[type[EntityExtractor[Any]]]:
    """The fake extractor."""
    return [FakeExtractor]


@hookimpl
def grounders() -> list[type[Grounder[Any]]]:
    """The fake grounder."""
    return [FakeGrounder]


@hookimpl
def planners() -> list[type[Planner[Any]]]:
    """The fake planner."""
    return [FakePlanner]


@hookimpl
def editors() -> list[type[Editor[Any]]]:
    """The fake editor."""
    return [FakeEditor]


@hookimpl
def encoders() -> list[type[MLLMEncoder[Any]]]:
    """The fake encoder."""
    return [FakeEncoder]


@hookimpl
def scorers() -> list[type[Scorer[Any]]]:
    """The fake scorer."""
    return [FakeScorer]
