"""Adds the slot `masker` to recipes: a segmentation mask for each box, which an editor can read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from PIL import Image, ImageDraw
from pydantic import Field

from reasonpix.plugin import (
    Box,
    Component,
    Editor,
    EditRequest,
    Options,
    Problem,
    Record,
    Result,
    Sample,
    SlotSpec,
    StageSpec,
    check_results,
    hookimpl,
)

O_co = TypeVar("O_co", bound=Options, covariant=True)


# -- The slot


class Masker(Component[O_co]):
    """Segments the objects in boxes."""

    @abstractmethod
    def mask(
        self, images: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]
    ) -> list[Image.Image | Problem]:
        """For each RGB image a mask of its size, mode L: k inside object k, from 1; 0 outside."""


@hookimpl
def slots() -> list[SlotSpec]:
    return [
        SlotSpec(
            "masker",
            Masker,
            hook="maskers",
            description="A segmentation mask for each box",
            contract="reasonpix_masker_contract:MaskerContract",
        )
    ]


# -- The stage


class Masks(Record):
    """Output of `mask`."""

    categories: tuple[str, ...]
    """Category k of the mask image, from 1."""
    areas: tuple[int, ...]
    """Pixels of each object."""


def mask(samples: Sequence[Sample], masker: Masker[Options]) -> list[Result]:
    """A mask for each box of each sample."""
    found = [[(g.category, g.box) for g in sample.groundings if g.box] for sample in samples]
    boxes = [[box for _, box in each] for each in found]
    masks = masker.mask([sample.image() for sample in samples], boxes)
    results: list[Result] = []
    for each, image in zip(found, check_results(masker, masks, boxes, Image.Image), strict=True):
        if isinstance(image, Problem):
            results.append(image)
            continue
        counts = image.histogram()
        facts = Masks(
            categories=tuple(category for category, _ in each),
            areas=tuple(counts[k] for k in range(1, len(each) + 1)),
        )
        results.append((facts, image.convert("RGB")))
    return results


@hookimpl
def stages() -> list[StageSpec]:
    return [
        StageSpec(
            name="mask",
            slot="masker",
            function=mask,
            output=Masks,
            image="mask",
            after="plan",
            requires=("ground",),
            needs_images=True,
        )
    ]


# -- Components


class EllipseOptions(Options):
    scale: float = Field(1.0, gt=0, le=1, description="Size of the ellipse, as a share of the box")


class EllipseMasker(Masker[EllipseOptions]):
    """Takes every object for an ellipse."""

    name: ClassVar[str] = "ellipse-masker"
    Options: ClassVar[type[Options]] = EllipseOptions

    def mask(
        self, images: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]
    ) -> list[Image.Image | Problem]:
        results: list[Image.Image | Problem] = []
        for image, found in zip(images, boxes, strict=True):
            labels = Image.new("L", image.size)
            for number, box in enumerate(found, 1):
                x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
                w, h = (box.x1 - box.x0) / 2, (box.y1 - box.y0) / 2
                w, h = w * self.options.scale, h * self.options.scale
                ImageDraw.Draw(labels).ellipse((x - w, y - h, x + w, y + h), fill=number)
            results.append(labels)
        return results


class MaskEditor(Editor[Options]):
    """Paints the object white, by its mask."""

    name: ClassVar[str] = "mask-editor"
    requires: ClassVar[frozenset[str]] = frozenset({"mask"})

    def edit(self, requests: Sequence[EditRequest]) -> list[Image.Image | Problem]:
        return [self._painted(request) for request in requests]

    def _painted(self, request: EditRequest) -> Image.Image:
        masks = request.outputs["mask"]
        assert isinstance(masks, Masks)
        number = masks.categories.index(request.selected) + 1
        labels = request.images["mask"].getchannel(0)
        image = request.image.copy()
        image.paste((255, 255, 255), mask=labels.point(lambda value: 255 * (value == number)))
        return image


@hookimpl
def maskers() -> list[type[EllipseMasker]]:
    return [EllipseMasker]


@hookimpl
def editors() -> list[type[MaskEditor]]:
    return [MaskEditor]
