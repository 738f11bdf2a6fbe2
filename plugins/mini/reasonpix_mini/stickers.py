"""Scenes of the sticker world as a source of input images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

from PIL import Image
from pydantic import Field

from reasonpix.slots import Options, Source, SourceItem

from . import world


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


class Stickers(Source[StickersOptions]):
    """Scenes `start` to `start + count` of a split; the native id is "<split>/<index>"."""

    name = "stickers"
    Options = StickersOptions

    def items(self) -> Iterator[SourceItem]:
        """The scenes in order; their content is the hash of the bytes that `read` gives."""
        options = self.options
        for index in range(options.start, options.start + options.count):
            scene = world.scene(options.split, index, options.objects)
            yield SourceItem(
                native_id=f"{options.split}/{index}",
                content=hashlib.sha256(_png(scene)).hexdigest(),
                caption=scene.caption if options.captions else None,
            )

    def read(self, native_id: str) -> bytes:
        """The scene as PNG, the same bytes every time. Raises `OSError` for an id not listed."""
        options = self.options
        split, _, number = native_id.partition("/")
        index = int(number) if number.isdecimal() else -1
        if split != options.split or not 0 <= index - options.start < options.count:
            raise FileNotFoundError(
                f"no scene {native_id!r}; there are {options.split}/{options.start} to "
                f"{options.split}/{options.start + options.count - 1}"
            )
        return _png(world.scene(options.split, index, options.objects))


def _png(scene: world.Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scene.render()).save(file, "PNG", compress_level=6)
    return file.getvalue()
