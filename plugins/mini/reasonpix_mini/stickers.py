"""Scenes of the sticker world as a source: input images, or whole edits of them."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from reasonpix.plugin import Options, Source, SourceItem, SourcePair

from . import lexicon, world


class StickersOptions(Options):
    """Options of `stickers`."""

    split: world.Split = Field(description="train, validation or test; they share no scenes")
    count: int = Field(ge=1, description="Number of scenes")
    start: int = Field(0, ge=0, description="Index of the first scene")
    captions: bool = Field(
        False, description="Give each scene's true caption, so that no captioner is needed"
    )
    objects: int | None = Field(
        None, ge=1, le=3, description="Objects in every scene; by default one to three, by chance"
    )
    pairs: bool = Field(
        False, description="Give whole edits: one object replaced, both captions, an instruction"
    )
    unchanged: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the pairs whose edited image is the input image, whatever their "
        "captions say, as happens in InstructPix2Pix",
    )

    @model_validator(mode="after")
    def _only_pairs_stay_unchanged(self) -> Self:
        if self.unchanged and not self.pairs:
            raise ValueError("unchanged is a share of pairs: it needs pairs: true")
        return self


class Edit(NamedTuple):
    """What a pair's words say happened; the instruction is direct."""

    after: world.Scene
    instruction: str
    position: int
    """Which of the scene's objects is replaced."""


class Stickers(Source[StickersOptions]):
    """Scenes `start` to `start + count` of a split; the native id is "<split>/<index>".

    A pair replaces one object by a category of its group that is not in the scene. Which one, and
    how the instruction is worded, depends on the native id and `objects` alone.
    """

    name = "stickers"
    Options = StickersOptions

    @property
    def domain(self) -> str:
        """That of the mini checkpoints."""
        return "sticker-world"

    @property
    def gives_pairs(self) -> bool:
        """By the option `pairs`."""
        return self.options.pairs

    def items(self) -> Iterator[SourceItem]:
        """The scenes in order; contents are hashes of what `read` and `read_edited` give."""
        options = self.options
        for index in range(options.start, options.start + options.count):
            scene = world.scene(options.split, index, options.objects)
            yield SourceItem(
                native_id=f"{options.split}/{index}",
                content=_content(scene),
                caption=scene.caption if options.captions or options.pairs else None,
                pair=self._pair(scene) if options.pairs else None,
            )

    def _pair(self, scene: world.Scene) -> SourcePair:
        words = edit(scene)
        return SourcePair(
            content=_content(self._edited(scene)),
            caption=words.after.caption,
            instruction=words.instruction,
        )

    def _edited(self, scene: world.Scene) -> world.Scene:
        """What the edited image shows."""
        return scene if self.is_unchanged(scene.index) else edit(scene).after

    def is_unchanged(self, index: int) -> bool:
        """Whether an edited image still shows the scene itself: at even intervals of the index."""
        share = self.options.unchanged
        return math.floor((index + 1) * share) > math.floor(index * share)

    def read(self, native_id: str) -> bytes:
        """The scene as PNG, the same bytes every time. Raises `OSError` for an id not listed."""
        return _png(self._scene(native_id))

    def read_edited(self, native_id: str) -> bytes:
        """The edited scene as PNG, the same bytes every time, and the same errors."""
        return _png(self._edited(self._scene(native_id)))

    def _scene(self, native_id: str) -> world.Scene:
        options = self.options
        split, _, number = native_id.partition("/")
        index = int(number) if number.isdecimal() else -1
        if split != options.split or not 0 <= index - options.start < options.count:
            raise FileNotFoundError(
                f"no scene {native_id!r}; there are {options.split}/{options.start} to "
                f"{options.split}/{options.start + options.count - 1}"
            )
        return world.scene(options.split, index, options.objects)


def edit(scene: world.Scene) -> Edit:
    """What the pair of this scene says happened, from its split and index alone."""
    # A seed of its own: the scene's would tie the edit to the background.
    seed = hashlib.sha256(f"edit {scene.split}/{scene.index}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    categories = world.categories()
    position = int(rng.integers(len(scene.placements)))
    source = categories[scene.placements[position].category]
    targets = [
        category
        for category in categories.values()
        if category.group == source.group and category.name not in scene.names
    ]
    target = targets[int(rng.integers(len(targets)))]
    after = scene.replaced(position, target.name)
    return Edit(after, lexicon.direct(rng, source, target), position)


def _content(scene: world.Scene) -> str:
    return hashlib.sha256(_png(scene)).hexdigest()


def _png(scene: world.Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scene.render()).save(file, "PNG", compress_level=6)
    return file.getvalue()
