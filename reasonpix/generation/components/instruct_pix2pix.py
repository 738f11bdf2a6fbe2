"""Source `instruct-pix2pix`: the data of InstructPix2Pix, as images or as pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from reasonpix.core.files.encodings import parse_json
from reasonpix.core.files.ignored import Ignored, unread_columns
from reasonpix.core.text import is_text
from reasonpix.errors import SourceError
from reasonpix.generation.components.file_source import (
    FileSource,
    ItemTexts,
    existing_folder,
    file_bytes,
    others_under,
    read_json,
)
from reasonpix.plugin.components import Options, Source
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem

PROMPT_KEYS = ("input", "caption", "edit", "output")
"""The keys of prompt.json that are read."""


class InstructPix2PixOptions(Options):
    """Options of `instruct-pix2pix`."""

    path: Path = Field(
        description="Folder with seeds.json and <dir>/prompt.json, <dir>/<seed>_0.jpg"
    )
    pairs: bool = Field(
        False, description="Give the edited images <dir>/<seed>_1.jpg and instructions too (Part I)"
    )


class InstructPix2Pix(FileSource[InstructPix2PixOptions]):
    """InstructPix2Pix data: its input images with their captions (Part II), or its pairs (Part I).

    Layout of timothybrooks/instruct-pix2pix: `seeds.json` is [[dir, [seed, …]], …]; `prompt.json`
    holds `input` (older files: `caption`), `edit` and `output`. An invalid prompt.json makes its
    own images fail, and no others.
    """

    name: ClassVar[str] = "instruct-pix2pix"
    Options: ClassVar[type[Options]] = InstructPix2PixOptions

    @property
    def gives_pairs(self) -> bool:
        """The option `pairs`."""
        return self.options.pairs

    @property
    def root(self) -> Path:
        """The folder."""
        return existing_folder(self.options.path, "path")

    def edited(self, native_id: str) -> str:
        """<dir>/<seed>_1.jpg beside <dir>/<seed>_0.jpg."""
        return native_id.removesuffix("_0.jpg") + "_1.jpg"

    def folders(self) -> list[tuple[str, list[str]]]:
        """The (dir, seeds) of seeds.json."""
        expected = "expected seeds.json as [[dir, [seed, …]], …]"
        rows = read_json(self.root / "seeds.json", expected)
        try:
            return [(str(folder), [str(seed) for seed in seeds]) for folder, seeds in rows]
        except (TypeError, ValueError) as error:
            raise SourceError(f"{self.root / 'seeds.json'}: {expected}, but {error}") from error

    def listing(self) -> Iterator[tuple[str, ItemTexts | Problem] | Ignored]:
        """One input image for each seed of each prompt, in the order of seeds.json."""
        folders = self.folders()
        keys: dict[str, None] = {}
        for folder, seeds in folders:
            texts = self._prompt(folder, keys)
            for seed in seeds:
                yield f"{folder}/{seed}_0.jpg", texts
        yield from unread_columns(key for key in keys if key not in PROMPT_KEYS)
        yield from self.unnamed(folders)

    def unnamed(self, folders: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Ignored]:
        """The files that no entry of seeds.json stands for."""
        known = {"seeds.json", "metadata.jsonl"}
        for folder, seeds in folders:
            known.add(f"{folder}/prompt.json")
            known |= {f"{folder}/{seed}_{which}.jpg" for seed in seeds for which in (0, 1)}
        yield from others_under(self.root, known, "a file that seeds.json does not name")

    def _prompt(self, folder: str, keys: dict[str, None]) -> ItemTexts | Problem:
        """The texts of a folder's prompt.json, or what is wrong with it. Its keys join `keys`."""
        name = f"{folder}/prompt.json"
        try:
            prompt = parse_json(file_bytes(self.root / name))
        except OSError as error:
            return Problem(status="failed", reason=f"{name}: {error.strerror}")
        except (ValueError, RecursionError) as error:
            return Problem(status="failed", reason=f"{name}: cannot be read: {error}")
        fields = prompt if isinstance(prompt, dict) else {}
        keys.update(dict.fromkeys(fields))
        caption = fields.get("input") or fields.get("caption")
        missing = [] if is_text(caption) else ['"input" (or "caption")']
        if not self.gives_pairs:
            texts = ItemTexts(caption)
        else:
            texts = ItemTexts(caption, fields.get("output"), fields.get("edit"))
            missing += [f'"{key}"' for key in ("edit", "output") if not is_text(fields.get(key))]
        if missing:
            reason = f"{name}: has no text for {' and '.join(missing)}"
            return Problem(status="failed", reason=reason)
        return texts


@hookimpl
def sources() -> list[type[Source[Any]]]:
    """The source of this module."""
    return [InstructPix2Pix]
