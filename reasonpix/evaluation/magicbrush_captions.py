"""MagicBrush's captions: local descriptions for CLIP-T, global ones for everything else.

```
local_descriptions.json    {image: {edited file: what the edit puts there}}
global_descriptions.json   {image: {file: caption of the whole image}}, of inputs and edits
```

MagicBrush's published CLIP-T compares edits with the local descriptions. Methods that start from
captions, and CLIP direction, need the captions of whole images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from reasonpix.core.figures import counted, listed
from reasonpix.core.text import is_text
from reasonpix.generation.components.file_source import read_json_mapping

LOCAL = "local_descriptions.json"
GLOBAL = "global_descriptions.json"

_NAMES_IN_NOTE = 10


class TurnCaptions(TypedDict):
    """The captions of one turn, as fields of a case."""

    caption: str
    edited_caption: str
    local_caption: str | None
    """Empty if the file lacks it; None without a file of local descriptions."""


class MagicBrushCaptions:
    """The descriptions in a folder, and which of them are missing. Raises `SourceError`."""

    def __init__(self, folder: Path) -> None:
        self._files = {name: _read(folder / name) for name in (LOCAL, GLOBAL)}
        self._asked = dict.fromkeys(self._files, 0)
        self._lacking: dict[str, dict[str, str]] = {name: {} for name in self._files}

    def __bool__(self) -> bool:
        """Whether either file is there."""
        return any(it is not None for it in self._files.values())

    def of(self, image: str, before: str, after: str) -> TurnCaptions:
        """The captions of the turn that edits the file `before` into `after`."""
        return {
            "caption": self._find(GLOBAL, image, before),
            "edited_caption": self._find(GLOBAL, image, after),
            "local_caption": None
            if self._files[LOCAL] is None
            else self._find(LOCAL, image, after),
        }

    def _find(self, name: str, image: str, file: str) -> str:
        by_image = self._files[name]
        if by_image is None:
            return ""
        self._asked[name] += 1
        by_file = by_image.get(image)
        caption = by_file.get(file) if isinstance(by_file, dict) else None
        if is_text(caption):
            return str(caption)
        self._lacking[name][file] = "missing" if caption is None else "not a text"
        return ""

    def notes(self) -> Iterator[str]:
        """Sentences for the report: which captions were used, and which are missing."""
        if not self:
            yield f"{LOCAL} and {GLOBAL} are missing, so CLIP-T is not computed."
            return
        if self._files[LOCAL] is not None:
            yield (
                f"CLIP-T compares edits with MagicBrush's local descriptions ({LOCAL}), as its "
                "published numbers do."
            )
        else:
            yield (
                f"CLIP-T compares edits with MagicBrush's global descriptions ({GLOBAL}), because "
                f"{LOCAL} is missing. MagicBrush's published numbers use local descriptions and "
                "are not comparable."
            )
        if self._files[GLOBAL] is None:
            yield f"{GLOBAL} is missing, so the images have no captions for CLIP direction."
        without = {
            LOCAL: "CLIP-T is not computed there",
            GLOBAL: "CLIP direction is not computed there"
            if self._files[LOCAL] is not None
            else "CLIP-T and CLIP direction are not computed there",
        }
        for name, files in self._lacking.items():
            if files:
                shown = listed([f"{file} ({why})" for file, why in files.items()], _NAMES_IN_NOTE)
                yield (
                    f"{name} lacks the descriptions of {counted(len(files), 'image')}: {shown}; "
                    f"{without[name]}."
                )


def _read(path: Path) -> Mapping[str, Any] | None:
    """The descriptions by image and file; None if there is no such file."""
    if not path.exists():
        return None
    return read_json_mapping(path, "expected {image: {file: description}}")
