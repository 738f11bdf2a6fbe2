from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from PIL.Image import Image
from pydantic import BaseModel, Field

from reasonpix.plugin import Caption, Captioner, Options, Problem, hookimpl


class Emphasis(BaseModel):
    """An option of options: their JSON schema must stay in one piece."""

    mark: str = Field("!", description="What is put behind the word")
    times: int = Field(1, ge=1, description="How often")


class LoudOptions(Options):
    word: str = Field("bee", description="What every image is said to show")
    emphasis: Emphasis = Field(Emphasis(), description="How loud it is said")


class LoudCaptioner(Captioner[LoudOptions]):
    """Says what it was told to say, with emphasis."""

    name: ClassVar[str] = "loud-captioner"
    Options: ClassVar[type[Options]] = LoudOptions

    def caption(self, images: Sequence[Image]) -> list[Caption | Problem]:
        emphasis = self.options.emphasis
        text = f"a {self.options.word} {emphasis.mark * emphasis.times}"
        return [Caption(text=text) for _ in images]


@hookimpl
def captioners() -> list[type[LoudCaptioner]]:
    return [LoudCaptioner]
