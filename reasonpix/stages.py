"""The stages of the pipeline: plain functions, samples in, one result for each out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from reasonpix.errors import RunError
from reasonpix.images import UndecodableImage, decode, encode_png
from reasonpix.records import (
    Box,
    Caption,
    EditPlan,
    Entity,
    Grounding,
    Problem,
    Record,
    ReplaceRequest,
)
from reasonpix.run import Row, seed_of
from reasonpix.slots import (
    Captioner,
    Component,
    EditedPair,
    Editor,
    EditRequest,
    EntityExtractor,
    Grounder,
    Planner,
    Scorer,
    Source,
    SourceItem,
)


class ImageFacts(Record):
    """Output of `read`: the decoded image's size in pixels."""

    width: int
    height: int


class Entities(Record):
    """Output of `extract`."""

    entities: tuple[Entity, ...]


class Groundings(Record):
    """Output of `ground`."""

    groundings: tuple[Grounding, ...]


class Scores(Record):
    """Output of a `score` stage: values by the scorer's own names."""

    scores: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """A record on its way: what the stages so far have found out."""

    record_id: str
    item: SourceItem
    load: Callable[[], bytes]
    """Gives the encoded input image."""
    caption: Caption | None = None
    entities: tuple[Entity, ...] = ()
    groundings: tuple[Grounding, ...] = ()
    plan: EditPlan | None = None
    edited: bytes | None = None
    """The edited image, PNG."""

    def image(self) -> Image.Image:
        """The input image, RGB."""
        return decode(self.load())

    def edited_image(self) -> Image.Image:
        """The edited image, RGB."""
        assert self.edited is not None
        return decode(self.edited)

    @property
    def box(self) -> Box:
        """The box of the selected category."""
        assert self.plan is not None
        found = next(g.box for g in self.groundings if g.category == self.plan.selected)
        assert found is not None
        return found

    def after(self, stage: str, row: Row) -> Sample:
        """This sample with what an ok row of `stage` adds to it."""
        if stage == "caption":
            return replace(self, caption=Caption.model_validate_json(row.output))
        if stage == "extract":
            return replace(self, entities=Entities.model_validate_json(row.output).entities)
        if stage == "ground":
            return replace(self, groundings=Groundings.model_validate_json(row.output).groundings)
        if stage == "plan":
            return replace(self, plan=EditPlan.model_validate_json(row.output))
        if stage == "edit":
            return replace(self, edited=row.image)
        return self


Result = Record | tuple[Record, bytes] | Problem


T = TypeVar("T")


def _each(component: Component[Any], answers: Sequence[T], asked: Sequence[Any]) -> Sequence[T]:
    """The answers, one for each thing asked. Raises `RunError`: they could not be told apart."""
    if len(answers) != len(asked):
        raise RunError(
            f"{component.name!r} gave {len(answers)} results for a batch of {len(asked)}; "
            "a component gives one for each item, in the same order"
        )
    return answers


def read(samples: Sequence[Sample], source: Source[Any]) -> list[Result]:
    """Decode each image once, so that every later stage may rely on it."""
    results: list[Result] = []
    for sample in samples:
        try:
            image = sample.image()
            results.append(ImageFacts(width=image.width, height=image.height))
        except (UndecodableImage, OSError) as error:
            results.append(Problem(status="failed", reason=f"{sample.item.native_id}: {error}"))
    return results


def caption(samples: Sequence[Sample], captioner: Captioner[Any] | None) -> list[Result]:
    """C: what the image shows, by the captioner or, without one, as the source gives it."""
    if captioner is not None:
        return list(_each(captioner, captioner.caption([s.image() for s in samples]), samples))
    return [
        Caption(text=sample.item.caption)
        if sample.item.caption
        else Problem(
            status="rejected", reason="the source gives no caption and the recipe has no captioner"
        )
        for sample in samples
    ]


def extract(samples: Sequence[Sample], extractor: EntityExtractor[Any]) -> list[Result]:
    """y_1 … y_i = S(C), Eq. 4."""
    captions = [sample.caption for sample in samples if sample.caption]
    results: list[Result] = []
    answers = _each(extractor, extractor.extract(captions), captions)
    for text, found in zip(captions, answers, strict=True):
        if isinstance(found, Problem):
            results.append(found)
        elif not found:
            results.append(Problem(status="rejected", reason=f"no entity in {text.text!r}"))
        else:
            results.append(Entities(entities=found))
    return results


def ground(samples: Sequence[Sample], grounder: Grounder[Any]) -> list[Result]:
    """b_k = DINO(x, y_k), Eq. 5; a record goes on when at least one category has a box."""
    categories = [[entity.category for entity in sample.entities] for sample in samples]
    results: list[Result] = []
    found = grounder.ground([sample.image() for sample in samples], categories)
    for asked, answer in zip(categories, _each(grounder, found, categories), strict=True):
        if isinstance(answer, Problem):
            results.append(answer)
        elif all(grounding.box is None for grounding in answer):
            results.append(
                Problem(status="rejected", reason=f"no box found for {', '.join(asked)}")
            )
        else:
            results.append(Groundings(groundings=answer))
    return results


def plan(samples: Sequence[Sample], planner: Planner[Any], run_seed: int) -> list[Result]:
    """y_select, y', I = G(P_replace(C, y_1 … y_i)), Eq. 6, over the categories with a box."""
    requests = [
        ReplaceRequest(
            caption=sample.caption.text if sample.caption else "",
            categories=tuple(g.category for g in sample.groundings if g.box),
            seed=seed_of(run_seed, "plan", sample.record_id),
        )
        for sample in samples
    ]
    results: list[Result] = []
    answers = _each(planner, planner.replace(requests), requests)
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, EditPlan) and answer.selected not in request.categories:
            answer = Problem(
                status="failed",
                reason=f"the planner selected {answer.selected!r}, "
                f"which is none of {', '.join(request.categories)}",
            )
        results.append(answer)
    return results


def edit(samples: Sequence[Sample], editor: Editor[Any], run_seed: int) -> list[Result]:
    """x' = GLIGEN(x, y_select, b_select, y'), Eq. 7; stored as PNG."""
    requests = [
        EditRequest(
            image=sample.image(),
            box=sample.box,
            selected=sample.plan.selected,
            target=sample.plan.target,
            caption=sample.caption.text if sample.caption else "",
            seed=seed_of(run_seed, "edit", sample.record_id),
        )
        for sample in samples
        if sample.plan
    ]
    results: list[Result] = []
    answers = _each(editor, editor.edit(requests), requests)
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, Problem):
            results.append(answer)
        elif (answer.mode, answer.size) != ("RGB", request.image.size):
            results.append(
                Problem(
                    status="failed",
                    reason=f"the editor made {answer.mode} of {answer.size} "
                    f"of an RGB image of {request.image.size}",
                )
            )
        else:
            facts = ImageFacts(width=answer.width, height=answer.height)
            results.append((facts, encode_png(answer)))
    return results


def score(
    samples: Sequence[Sample], scorer: Scorer[Any], pipeline: dict[str, Component[Any]]
) -> list[Result]:
    """What a scorer measures of each finished edit."""
    pairs = [
        EditedPair(
            input_image=sample.image(),
            edited_image=sample.edited_image(),
            box=sample.box,
            selected=sample.plan.selected,
            target=sample.plan.target,
            instruction=sample.plan.instruction,
        )
        for sample in samples
        if sample.plan
    ]
    return [_scores(values) for values in _each(scorer, scorer.score(pairs, pipeline), pairs)]


def _scores(values: dict[str, float] | Problem) -> Result:
    if isinstance(values, Problem):
        return values
    for name, value in values.items():
        if not math.isfinite(value):  # JSON has no such numbers, and no rank is theirs
            return Problem(status="failed", reason=f"score {name!r} is {value}")
    return Scores(scores=values)
