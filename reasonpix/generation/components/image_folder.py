"""Source `image-folder`: all images under a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from reasonpix.errors import SourceError
from reasonpix.generation.components.file_source import FileSource, ItemTexts, existing_folder
from reasonpix.plugin.components import Options, Source
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class ImageFolderOptions(Options):
    """Options of `image-folder`."""

    path: Path = Field(description="Folder of images, searched with its subfolders")


class ImageFolder(FileSource[ImageFolderOptions]):
    """All images under a folder, by name; they have no captions."""

    name: ClassVar[str] = "image-folder"
    Options: ClassVar[type[Options]] = ImageFolderOptions

    @property
    def root(self) -> Path:
        """The folder."""
        return existing_folder(self.options.path, "path")

    def listing(self) -> Iterator[tuple[str, ItemTexts | Problem]]:
        """Files with an image's suffix, sorted by relative path.

        Links are followed. A folder that is reached several times, as in a loop of links, is
        searched once.
        """
        root = str(self.root)
        searched: set[tuple[int, int]] = set()
        names = [""]
        while names:
            name = names.pop()
            path = os.path.join(root, name)
            try:
                if not os.path.isdir(path):
                    if os.path.splitext(name)[1].lower() in SUFFIXES:
                        yield name, ItemTexts()
                    continue
                status = os.stat(path)
                if (status.st_dev, status.st_ino) not in searched:
                    searched.add((status.st_dev, status.st_ino))
                    entries = sorted(os.listdir(path), reverse=True)
                    names += [os.path.join(name, entry) for entry in entries]
            except OSError as error:
                if not name:
                    raise SourceError(f"path: {error}") from error
                yield name, Problem(status="failed", reason=f"{name}: {error.strerror}")


@hookimpl
def sources() -> list[type[Source[Any]]]:
    """The source of this module."""
    return [ImageFolder]
