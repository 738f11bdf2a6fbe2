"""Contracts of components that look at images and captions."""

from __future__ import annotations

import numpy as np

from reasonpix.plugin.testing.base import ComponentContract, photographs
from reasonpix.plugin.types import Caption, Problem


class CaptionerContract(ComponentContract):
    """What a captioner must satisfy."""

    def test_captions_match_images(self) -> None:
        """One caption per image, whatever the batch."""
        for result in self.results(self.subject.caption, photographs()):
            assert isinstance(result, Caption | Problem)

    def test_empty_batch(self) -> None:
        """No images, no captions."""
        assert self.subject.caption([]) == []


class EntityExtractorContract(ComponentContract):
    """What an entity extractor must satisfy."""

    def test_entities_match_captions(self) -> None:
        """One tuple per caption, without repeats; a caption without entities gives an empty one."""
        texts = ["a bee and a rabbit", "a bee, a bee and a bee", "", "it is what it is"]
        captions = [Caption(text=text) for text in texts]
        for result in self.results(self.subject.extract, captions):
            if not isinstance(result, Problem):
                names = [entity.category for entity in result]
                assert len(names) == len(set(names))


class GrounderContract(ComponentContract):
    """What a grounder must satisfy."""

    def test_groundings_match_categories(self) -> None:
        """One grounding per category, in order; boxes are in pixels of the given image."""
        images = photographs()
        categories = [("bee",), ("rabbit", "bee"), (), ("apple",), ("drum", "cake", "bee")]
        results = self.results(self.subject.ground, images, categories)
        for image, names, result in zip(images, categories, results, strict=True):
            if isinstance(result, Problem):
                continue
            assert [grounding.category for grounding in result] == list(names)
            for grounding in result:
                if grounding.box:
                    assert (grounding.box.width, grounding.box.height) == image.size


class EncoderContract(ComponentContract):
    """What an MLLM encoder must satisfy."""

    def test_states_match_pairs(self) -> None:
        """States are float32 of shape (tokens, width), of the same width for all pairs."""
        images = photographs()
        instructions = ["make it red", "more", "it is cold outside", "a b c", "Summer!"]
        widths = set()
        for states in self.results(self.subject.encode, images, instructions):
            if isinstance(states, Problem):
                continue
            assert states.dtype == np.float32
            assert states.ndim == 2
            widths.add(states.shape[1])
        assert len(widths) <= 1
