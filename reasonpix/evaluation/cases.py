"""What an evaluation is made of: the cases of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reasonpix.plugin.types import Box

DIRECT = "direct"
"""The kind of instruction that says what comes: what the edit shows may be told with it."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark. Images are read when they are asked for, from any thread.

    What a benchmark does not know is empty or None; the metrics that need it are left out.
    """

    id: str
    """Unique in the benchmark and safe as a file's name."""
    row: str
    """The file and the row in it, for messages."""
    read_input: Callable[[], Image.Image]
    """RGB. Raises `SourceError` that names the row."""
    instructions: Mapping[str, str]
    """By kind: `DIRECT`, reasoning, …"""
    read_truth: Callable[[], Image.Image] | None = None
    """The ground-truth edit, RGB, in a size of its own. Raises `SourceError`."""
    caption: str = ""
    edited_caption: str = ""
    target: str | None = None
    """The category that should be in the box afterwards."""
    box: Box | None = None
    """Where the edit is, in pixels of the input image."""
    read_mask: Callable[[], NDArray[np.bool_]] | None = None
    """(height, width) of the input image: where the edit may change it. Raises `SourceError`."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """By which results are broken down, such as {"category": "bee", "edit": "bee → ant"}."""


@dataclass(frozen=True)
class Benchmark:
    """The cases of a benchmark in their order."""

    name: str
    cases: Sequence[Case]

    @property
    def kinds(self) -> list[str]:
        """The kinds of instructions, in the order in which they appear."""
        return list(dict.fromkeys(kind for case in self.cases for kind in case.instructions))
