"""Contracts of components that edit images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image

from reasonpix.plugin.components import Method
from reasonpix.plugin.edits import EditRequest, MethodRequest
from reasonpix.plugin.testing.base import ComponentContract, middle, photographs
from reasonpix.plugin.types import Box, Problem, Record


class _ImageEditContract(ComponentContract):
    """What editors and methods have in common."""

    method: ClassVar[str]
    """The name of the component's method that takes the requests."""

    def requests(self) -> list[Any]:
        """Requests for the component, each with an image."""
        raise NotImplementedError

    def test_edits_match_requests(self) -> None:
        """One RGB image of the input's size per request, the same whatever the batch."""
        requests = self.requests()
        results = self.results(getattr(self.subject, self.method), requests)
        for request, result in zip(requests, results, strict=True):
            if not isinstance(result, Problem):
                assert result.size == request.image.size
                assert result.mode == "RGB"

    def test_input_is_not_modified(self) -> None:
        """The request's image stays as it is."""
        requests = self.requests()[:1]
        before = requests[0].image.tobytes()
        getattr(self.subject, self.method)(requests)
        assert requests[0].image.tobytes() == before


class EditorContract(_ImageEditContract):
    """What an editor must satisfy."""

    method = "edit"

    def outputs(self, image: Image.Image) -> Mapping[str, Record]:
        """Example outputs of added stages, by name. Override it for an editor that reads them."""
        return {}

    def images(self, image: Image.Image) -> Mapping[str, Image.Image]:
        """Example images of added stages, by `StageSpec.image`, for an input image."""
        return {}

    def requests(self) -> list[EditRequest]:
        """An edit of each photograph."""
        return [
            EditRequest(
                image=image,
                box=Box(**middle(*image.size)),
                selected="bee",
                target="rabbit",
                caption="a bee",
                edited_caption="a rabbit",
                seed=seed,
                outputs=self.outputs(image),
                images=self.images(image),
            )
            for seed, image in enumerate(photographs())
        ]


class MethodContract(_ImageEditContract):
    """What a method of an evaluation must satisfy."""

    component: ClassVar[type[Method[Any]]]
    method = "apply"

    def requests(self) -> list[MethodRequest]:
        """Two edits of each photograph, one of them without the edited caption."""
        return [
            MethodRequest(image, instruction, seed, "a bee", edited_caption)
            for seed, image in enumerate(photographs())
            for instruction, edited_caption in [
                ("turn the bee into a rabbit", "a rabbit"),
                ("something with long ears", ""),
            ]
        ]

    def test_empty_batch(self) -> None:
        """No requests, no edits."""
        assert self.subject.apply([]) == []

    def test_missing_captions_give_problems(self) -> None:
        """`requires` names captions; a request without one of them gives a `Problem`."""
        assert self.component.requires <= {"caption", "edited_caption"}
        for field in self.component.requires:
            empty: dict[str, Any] = {field: ""}
            incomplete = [dataclasses.replace(request, **empty) for request in self.requests()[:2]]
            assert all(isinstance(result, Problem) for result in self.subject.apply(incomplete))
