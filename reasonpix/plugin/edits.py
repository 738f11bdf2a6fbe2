"""Edits, as editors and methods are asked for them and as scorers see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from reasonpix.plugin.types import Box, Record

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class EditRequest:
    """One object replacement (Eq. 7): the object in `box` of the RGB `image` becomes `target`."""

    image: Image
    box: Box
    selected: str
    target: str
    caption: str
    """Caption of the input image."""
    edited_caption: str
    """What the edited image will show, in the words of the caption."""
    seed: int
    outputs: Mapping[str, Record] = field(default_factory=dict)
    """Outputs of the earlier stages by name, including those that plugins add."""
    images: Mapping[str, Image] = field(default_factory=dict)
    """Images that earlier stages made, RGB, by `StageSpec.image`."""


@dataclass(frozen=True)
class Edit:
    """An edit as a scorer sees it: images, read on first access, and texts.

    Parts II and III know `box`, `selected`, `target` and `synonyms`; Part I knows `edited_caption`,
    `direct_instruction` and, after the planner, `candidates` with their `revealing` words and
    `agreement`. Unknown values are None or empty.
    """

    read_input: Callable[[], Image]
    read_edited: Callable[[], Image]
    seed: int
    caption: str = ""
    instruction: str = ""
    """The reasoning instruction."""
    box: Box | None = None
    selected: str | None = None
    target: str | None = None
    synonyms: tuple[str, ...] = ()
    edited_caption: str | None = None
    direct_instruction: str | None = None
    candidates: tuple[str, ...] = ()
    """All instructions that P_gen wrote, including the selected one."""
    revealing: tuple[str, ...] = ()
    agreement: float | None = None
    """Share of the orders shown to P_select in which it chose the selected candidate."""
    outputs: Mapping[str, Record] = field(default_factory=dict)
    """Outputs of all stages by name, including those that plugins add."""
    images: Mapping[str, Image] = field(default_factory=dict)
    """Images that stages made, RGB, by `StageSpec.image`; each is read on first access."""

    @cached_property
    def input_image(self) -> Image:
        """The input image, RGB."""
        return self.read_input()

    @cached_property
    def edited_image(self) -> Image:
        """The edited image, RGB, of the input's size."""
        return self.read_edited()


@dataclass(frozen=True)
class MethodRequest:
    """A request to a method of an evaluation: edit the RGB `image` as `instruction` says."""

    image: Image
    instruction: str
    seed: int
    caption: str = ""
    """Describes the input image, for methods that start from a description."""
    edited_caption: str = ""
    """Describes the edited image; empty if that would give the answer away."""
