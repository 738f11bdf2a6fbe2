"""Contracts of sources and of scorers (filters)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image

from reasonpix.plugin.components import Component, Scorer, SourceItem
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.testing.base import ComponentContract, middle, photographs
from reasonpix.plugin.types import Box, Problem, Record


class SourceContract(ComponentContract):
    """What a source must satisfy."""

    def test_items_are_stable_and_readable(self) -> None:
        """The same rows in the same order each time; the bytes match the listed hashes."""
        rows = list(self.subject.items())
        assert rows, "the source lists nothing"
        assert list(self.subject.items()) == rows
        items = [row for row in rows if isinstance(row, SourceItem)]
        ids = [item.native_id for item in items]
        assert len(ids) == len(set(ids)), "a native id is listed twice"
        for item in reversed(items):
            content = hashlib.sha256(self.subject.read(item.native_id)).hexdigest()
            assert content == item.content, f"the bytes of {item.native_id} do not match its hash"

    def test_pairs_are_complete(self) -> None:
        """Either all items are pairs or none is; edited images match the listed hashes."""
        for item in self.subject.items():
            if not isinstance(item, SourceItem):
                continue
            if not self.subject.gives_pairs:
                assert item.pair is None, f"{item.native_id} is a pair, but `gives_pairs` is False"
                continue
            assert item.pair is not None, f"{item.native_id} is not a pair"
            content = hashlib.sha256(self.subject.read_edited(item.native_id)).hexdigest()
            assert content == item.pair.content, (
                f"the bytes of {item.native_id}'s edited image do not match its hash"
            )


class ScorerContract(ComponentContract):
    """What a scorer must satisfy. `pipeline` holds the loaded components of `needs_slots`."""

    component: ClassVar[type[Scorer[Any]]]
    pipeline: ClassVar[Mapping[str, Component[Any]]] = {}

    def outputs(self, image: Image.Image) -> Mapping[str, Record]:
        """Example outputs of added stages, by name. Override it for a scorer that reads them."""
        return {}

    def images(self, image: Image.Image) -> Mapping[str, Image.Image]:
        """Example images of added stages, by `StageSpec.image`, for an input image."""
        return {}

    def edits(self) -> list[Edit]:
        """An edit of each photograph that turns its middle upside down, with all fields set."""
        return [
            dataclasses.replace(
                _upside_down(image, seed), outputs=self.outputs(image), images=self.images(image)
            )
            for seed, image in enumerate(photographs())
        ]

    def test_scores_match_edits(self) -> None:
        """Finite numbers under the same names for each edit, whatever the batch."""
        results = self.results(lambda edits: self.subject.score(edits, self.pipeline), self.edits())
        scores = [result for result in results if not isinstance(result, Problem)]
        assert all(math.isfinite(value) for score in scores for value in score.values())
        assert len({frozenset(score) for score in scores}) <= 1

    def test_required_fields_exist(self) -> None:
        """`requires` names fields of an edit that not every recipe provides, or added stages."""
        fields = {field.name for field in dataclasses.fields(Edit)}
        always = {"read_input", "read_edited", "seed", "caption", "outputs", "images"}
        allowed = fields - always | set(self.outputs(photographs()[0]))
        unknown = ", ".join(sorted(self.component.requires - allowed))
        assert not unknown, f"no field of Edit: {unknown}; for an added stage, override outputs()"

    def test_verdicts_match_scores(self) -> None:
        """A reason or None for each score, and an empty list for no scores."""
        results = self.subject.score(self.edits(), self.pipeline)
        scores = [result for result in results if not isinstance(result, Problem)]
        verdicts = self.subject.reject(scores)
        assert len(verdicts) == len(scores)
        assert all(verdict is None or verdict for verdict in verdicts)
        assert self.subject.reject([]) == []


def _upside_down(image: Image.Image, seed: int) -> Edit:
    box = Box(**middle(*image.size))
    edited = image.copy()
    edited.paste(image.crop(box.pixels()).rotate(180), box.pixels())
    return Edit(
        read_input=lambda: image,
        read_edited=lambda: edited,
        seed=seed,
        caption="a bee on a daisy",
        instruction="Something with ears.",
        box=box,
        selected="bee",
        target="rabbit",
        synonyms=("bumblebee", "bunny"),
        edited_caption="a rabbit on a daisy",
        direct_instruction="turn the bee into a rabbit",
        candidates=("Something with ears.", "What comes out of a magician's hat?"),
        revealing=("bee", "rabbit"),
        agreement=0.5,
    )
