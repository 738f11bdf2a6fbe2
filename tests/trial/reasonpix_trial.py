"""Components that misbehave on cue: the category word in a caption says who does what.

"raises-in-<slot>" raises an exception there, "problem-in-<slot>" is answered by a `Problem`.
The option `surplus` makes the component answer too much or too little of a batch.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from reasonpix.plugin.components import (
    Captioner,
    Editor,
    EntityExtractor,
    Grounder,
    ModelOptions,
    Options,
    Planner,
    Scorer,
    Source,
    SourceItem,
)
from reasonpix.plugin.edits import Edit, EditRequest
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import (
    Box,
    Caption,
    EditPlan,
    Entity,
    Grounding,
    Problem,
    ReplaceRequest,
)


class TrialOptions(Options):
    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"pause_s"})

    surplus: int = Field(0, description="Results given beyond the batch; negative: too few")
    pause_s: float = Field(0.0, ge=0, description="Seconds each batch takes")
    variant: str = Field("", description="Changes nothing but the fingerprint and a few words")


def _answers(slot: str, options: TrialOptions, words: Sequence[str], make: Any) -> list[Any]:
    time.sleep(options.pause_s)
    answers = []
    for number, word in enumerate(words):
        if f"raises-in-{slot}" in word:
            raise ValueError(f"{slot} stumbled")
        if f"problem-in-{slot}" in word:
            answers.append(Problem(status="rejected", reason=f"{slot} declined"))
        else:
            answers.append(make(number))
    if options.surplus < 0:
        return answers[: options.surplus]
    return answers + answers[:1] * options.surplus


class TrialSourceOptions(Options):
    captions: tuple[str, ...] = Field(("a bee",), description="One image for each")


class TrialSource(Source[TrialSourceOptions]):
    """Small images of different colours; the caption is known."""

    name: ClassVar[str] = "trial-source"
    Options: ClassVar[type[Options]] = TrialSourceOptions

    def items(self) -> Iterator[SourceItem | tuple[str, Problem]]:
        for number, caption in enumerate(self.options.captions):
            if caption == "unlisted":
                yield str(number), Problem(status="failed", reason=f"{number}: source declined")
                continue
            content = hashlib.sha256(self.read(str(number))).hexdigest()
            yield SourceItem(native_id=str(number), content=content, caption=caption or None)

    def read(self, native_id: str) -> bytes:
        number = int(native_id)
        if self.options.captions[number] == "torn":
            return b"\x89PNG\r\n\x1a\n torn"
        buffer = io.BytesIO()
        Image.new("RGB", (24, 16), (number % 256, 100, 50)).save(buffer, "PNG")
        return buffer.getvalue()


class TrialCaptioner(Captioner[TrialOptions]):
    """Raises for the images whose red is in `variant`, names the red of the others."""

    name: ClassVar[str] = "trial-captioner"
    Options: ClassVar[type[Options]] = TrialOptions

    def caption(self, images: Sequence[Image.Image]) -> list[Caption | Problem]:
        reds = [str(image.getpixel((0, 0))[0]) for image in images]
        cues = [
            "raises-in-captioner" if red in self.options.variant.split() else "" for red in reds
        ]
        make = lambda i: Caption(text=f"a bee and a red{reds[i]}")  # noqa: E731
        return _answers("captioner", self.options, cues, make)


class TrialModelCaptioner(Captioner[ModelOptions]):
    """Reads the caption that its weights hold."""

    name: ClassVar[str] = "trial-model-captioner"
    Options: ClassVar[type[Options]] = ModelOptions

    def load(self) -> None:
        self.text = (Path(self.options.model) / "caption.txt").read_text().strip()

    def caption(self, images: Sequence[Image.Image]) -> list[Caption | Problem]:
        return [Caption(text=self.text) for _ in images]


class TrialExtractor(EntityExtractor[TrialOptions]):
    """Takes the word after every article."""

    name: ClassVar[str] = "trial-extractor"
    Options: ClassVar[type[Options]] = TrialOptions

    def extract(self, captions: Sequence[Caption]) -> list[tuple[Entity, ...] | Problem]:
        def make(number: int) -> tuple[Entity, ...]:
            words = captions[number].text.split()
            nouns = [noun for a, noun in pairwise(words) if a == "a"]
            return tuple(Entity(category=noun, text=noun) for noun in dict.fromkeys(nouns))

        return _answers("extractor", self.options, [c.text for c in captions], make)


class TrialGrounder(Grounder[TrialOptions]):
    """Finds all but ghosts on the left; the box of a giant leaves the image."""

    name: ClassVar[str] = "trial-grounder"
    Options: ClassVar[type[Options]] = TrialOptions

    def ground(
        self, images: Sequence[Image.Image], categories: Sequence[Sequence[str]]
    ) -> list[tuple[Grounding, ...] | Problem]:
        def found(image: Image.Image, category: str) -> Grounding:
            w, h = image.size
            if category == "ghost":
                return Grounding(category=category)
            right = 2 * w if category == "giant" else w / 2
            box = Box(x0=0, y0=0, x1=right, y1=h, width=w, height=h)
            return Grounding(category=category, box=box, score=0.9)

        def make(number: int) -> tuple[Grounding, ...]:
            return tuple(found(images[number], c) for c in categories[number])

        return _answers("grounder", self.options, [" ".join(c) for c in categories], make)


class TrialPlanner(Planner[TrialOptions]):
    """Replaces the first category; of a stray it replaces what nobody asked for."""

    name: ClassVar[str] = "trial-planner"
    Options: ClassVar[type[Options]] = TrialOptions

    def replace(self, requests: Sequence[ReplaceRequest]) -> list[EditPlan | Problem]:
        def make(number: int) -> EditPlan:
            first = requests[number].categories[0]
            return EditPlan(
                selected="unicorn" if first == "stray" else first,
                target=f"pear{requests[number].seed % 97}",
                instruction=f"Something sweet, please. {self.options.variant}",
            )

        return _answers("planner", self.options, [r.caption for r in requests], make)


class TrialEditor(Editor[TrialOptions]):
    """Fills the box with a colour of the seed; stretches stretchers and greys greys."""

    name: ClassVar[str] = "trial-editor"
    Options: ClassVar[type[Options]] = TrialOptions

    def edit(self, requests: Sequence[EditRequest]) -> list[Image.Image | Problem]:
        def make(number: int) -> Image.Image:
            request = requests[number]
            image = request.image.copy()
            image.paste((200, request.seed % 256, 0), request.box.pixels())
            if request.selected == "stretcher":
                return image.resize((image.width * 2, image.height))
            return image.convert("L") if request.selected == "grey" else image

        return _answers("editor", self.options, [r.selected for r in requests], make)


class TrialFilter(Scorer[TrialOptions]):
    """Scores the green of the edit; rejects what was named reject-me."""

    name: ClassVar[str] = "trial-filter"
    Options: ClassVar[type[Options]] = TrialOptions
    requires: ClassVar[frozenset[str]] = frozenset({"selected"})

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Any]
    ) -> list[dict[str, float] | Problem]:
        def make(number: int) -> dict[str, float]:
            green = float(edits[number].edited_image.getpixel((0, 0))[1])
            named = edits[number].selected
            return {"green": float("nan") if named == "nan" else green, "ok": named != "reject-me"}

        return _answers("filter", self.options, [edit.selected or "" for edit in edits], make)

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        return [None if score["ok"] else "it was asked for" for score in scores]


@hookimpl
def sources() -> list[type[Source[Any]]]:
    return [TrialSource]


@hookimpl
def captioners() -> list[type[Captioner[Any]]]:
    return [TrialCaptioner, TrialModelCaptioner]


@hookimpl
def extractors() -> list[type[EntityExtractor[Any]]]:
    return [TrialExtractor]


@hookimpl
def grounders() -> list[type[Grounder[Any]]]:
    return [TrialGrounder]


@hookimpl
def planners() -> list[type[Planner[Any]]]:
    return [TrialPlanner]


@hookimpl
def editors() -> list[type[Editor[Any]]]:
    return [TrialEditor]


@hookimpl
def scorers() -> list[type[Scorer[Any]]]:
    return [TrialFilter]


@hookimpl
def checkpoints() -> dict[str, Path]:
    folder = Path(__file__).parent / "checkpoints"
    return {"trial/bees": folder / "bees", "trial/rabbits": folder / "rabbits"}
