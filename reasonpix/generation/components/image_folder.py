"""Source `image-folder`: all images under a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from reasonpix.core.files.folder import files_under
from reasonpix.core.files.ignored import Ignored
from reasonpix.core.images import why_not_image
from reasonpix.errors import SourceError
from reasonpix.generation.components.file_source import FileSource, ItemTexts, existing_folder
from reasonpix.plugin.components import Options, Source
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem


class ImageFolderOptions(Options):
    """Options of `image-folder`."""

    path: Path = Field(description="Folder of images, searched with its subfolders")


class ImageFolder(FileSource[ImageFolderOptions]):
    """All images under a folder, by name; they have no captions."""

    name: ClassVar[str] = "image-folder"
    Options: ClassVar[type[Options]] = ImageFolderOptions

    @property
    def gives_captions(self) -> bool:
        """Never."""
        return False

    @property
    def root(self) -> Path:
        """The folder."""
        return existing_folder(self.options.path, "path")

    def listing(self) -> Iterator[tuple[str, ItemTexts | Problem] | Ignored]:
        """Files whose name or content is an image's, sorted by relative path."""
        root = self.root
        try:
            for file in files_under(root):
                if isinstance(file, Ignored):
                    yield file
                elif reason := why_not_image(os.path.join(root, file)):
                    yield Ignored(file, reason)
                else:
                    yield file, ItemTexts()
        except OSError as error:
            raise SourceError(f"path: {error}") from error


@hookimpl
def sources() -> list[type[Source[Any]]]:
    """The source of this module."""
    return [ImageFolder]
