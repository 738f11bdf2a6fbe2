"""Which files of a dataset belong to a split, by words in their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

SPLITS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
"""Words for a split in file names, grouped by meaning."""


def files_of_split(names: Sequence[str], split: str) -> list[str]:
    """The names, relative to the dataset, that contain the split. Empty if there are none.

    Without any split in names, all are for training.
    """

    def words(name: str) -> set[str]:
        return set(re.split(r"[/._ -]+", name))

    synonyms = next((set(group) for group in SPLITS if split in group), {split})
    if matches := [name for name in names if words(name) & synonyms]:
        return matches
    all_words = {word for group in SPLITS for word in group}
    if "train" in synonyms and not any(words(name) & all_words for name in names):
        return list(names)
    return []
