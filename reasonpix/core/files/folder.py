"""The files under a folder, in a stable order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from reasonpix.core.files.ignored import Ignored, why_hidden


def files_under(root: Path) -> Iterator[str | Ignored]:
    """The names of all files, relative to `root` and sorted, and what is ignored among them.

    Hidden files and folders, and folders that cannot be entered, are ignored. Links are followed;
    a folder that is reached several times, as in a loop of links, is searched once. Broken links
    are among the files. Raises `OSError` if `root` cannot be listed.
    """
    searched: set[tuple[int, int]] = set()
    names = [""]
    while names:
        name = names.pop()
        path = os.path.join(root, name)
        is_folder = os.path.isdir(path)
        shown = f"{name}/" if is_folder else name
        if name and (reason := why_hidden(os.path.basename(name))):
            yield Ignored(shown, reason)
            continue
        if name and not is_folder:
            yield name
            continue
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) not in searched:
                searched.add((status.st_dev, status.st_ino))
                entries = sorted(os.listdir(path), reverse=True)
                names += [os.path.join(name, entry) for entry in entries]
        except OSError as error:
            if not name:
                raise
            yield Ignored(shown, f"a folder that cannot be searched ({error.strerror})")
