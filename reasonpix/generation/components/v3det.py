"""Source `v3det`: the images of V3Det."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import Field

from reasonpix.core.files.ignored import Ignored, unread_columns
from reasonpix.errors import SourceError
from reasonpix.generation.components.file_source import (
    FileSource,
    ItemTexts,
    existing_folder,
    others_under,
    read_json,
)
from reasonpix.plugin.components import Options, Source
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem


class V3DetOptions(Options):
    """Options of `v3det`."""

    annotations: Path = Field(description="v3det_2023_v1_train.json or _val.json")
    images: Path = Field(description='Folder that "images/<node>/…" is relative to')


class V3Det(FileSource[V3DetOptions]):
    """V3Det's COCO-like JSON (https://v3det.openxlab.org.cn). Its boxes are not used."""

    name: ClassVar[str] = "v3det"
    Options: ClassVar[type[Options]] = V3DetOptions

    @property
    def gives_captions(self) -> bool:
        """Never."""
        return False

    @property
    def root(self) -> Path:
        """The folder of the images."""
        return existing_folder(self.options.images, "images")

    def listing(self) -> Iterator[tuple[str, ItemTexts | Problem] | Ignored]:
        """`file_name` of each image, in the order of its id."""
        path = self.options.annotations
        expected = 'expected {"images": [{"id": …, "file_name": …}, …]}'
        try:
            content = read_json(path, expected)
            rows = sorted((row["id"], row["file_name"]) for row in content["images"])
            names = [PurePosixPath(file_name).as_posix() for _, file_name in rows]
        except (KeyError, TypeError) as error:
            raise SourceError(f"{path}: {expected}, but {error!r}") from error
        for name in names:
            yield name, ItemTexts()
        yield from unread_columns(key for key in content if key != "images")
        known = {*names, os.path.relpath(path, self.root)}
        yield from others_under(self.root, known, f"a file that {path.name} does not name")


@hookimpl
def sources() -> list[type[Source[Any]]]:
    """The source of this module."""
    return [V3Det]
