"""The cases of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reasonpix.evaluation.grounder_filters import GrounderFilters
from reasonpix.plugin.types import Box

DIRECT = "direct"
"""The kind of instruction that names the target, so that methods may see the edited caption."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark. Images are read on demand, from any thread.

    Facts that a benchmark lacks are empty or None; the metrics that need them are not computed.
    """

    id: str
    """Unique in the benchmark, and safe as a file name."""
    row: str
    """The file and the row in it, for messages."""
    read_input: Callable[[], Image.Image]
    """RGB. Raises `SourceError`, which names the row."""
    instructions: Mapping[str, str]
    """By kind: `DIRECT`, reasoning, …"""
    read_truth: Callable[[], Image.Image] | None = None
    """The ground-truth edit, RGB, of any size. Raises `SourceError`."""
    caption: str = ""
    edited_caption: str = ""
    local_caption: str | None = None
    """What the edit adds, without the rest of the image: MagicBrush's local description. Empty if
    the benchmark has such descriptions, but not of this case; None if it has none."""
    target: str | None = None
    """The category that the edit should put into the box."""
    box: Box | None = None
    """The region of the edit, in pixels of the input image."""
    read_mask: Callable[[], NDArray[np.bool_]] | None = None
    """(height, width) of the input image: the pixels to edit. Raises `SourceError`."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Values to break results down by, such as {"category": "bee", "edit": "bee → ant"}."""

    @property
    def clip_t_caption(self) -> str:
        """What CLIP-T compares the edit with; empty if it cannot be computed."""
        return self.edited_caption if self.local_caption is None else self.local_caption


@dataclass(frozen=True)
class Benchmark:
    """The cases of a benchmark in their order."""

    name: str
    cases: Sequence[Case]
    caption_notes: Sequence[str] = ()
    """Which captions CLIP-T is computed with, in sentences for the reader of results."""
    grounder_filters: GrounderFilters | None = None
    """None if it is not recorded whether a grounder filtered the benchmark."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of instructions, in order of appearance."""
        return list(dict.fromkeys(kind for case in self.cases for kind in case.instructions))
