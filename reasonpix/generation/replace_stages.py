"""The stages of Parts II and III: plain functions, samples in, one result for each out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from reasonpix.core.hashing import seed_of
from reasonpix.core.images import UndecodableImage
from reasonpix.plugin.components import (
    Captioner,
    Editor,
    EntityExtractor,
    Grounder,
    Planner,
    Source,
)
from reasonpix.plugin.edits import EditRequest
from reasonpix.plugin.samples import Entities, Groundings, ImageFacts, Sample
from reasonpix.plugin.stages import Result, StageSpec, check_results
from reasonpix.plugin.types import Caption, EditPlan, Entity, Grounding, Problem, ReplaceRequest


def read(samples: Sequence[Sample], source: Source[Any]) -> list[Result]:
    """Decode each image once, so that later stages can rely on it."""
    results: list[Result] = []
    for sample in samples:
        where = sample.item.native_id
        try:
            image = sample.image()
            edited = sample.edited_image() if sample.has_edit else image
        except (UndecodableImage, OSError) as error:
            results.append(Problem(status="failed", reason=f"{where}: {error}"))
            continue
        if edited.size != image.size:
            reason = f"{where}: input of {image.size} pixels, edited image of {edited.size}"
            results.append(Problem(status="rejected", reason=reason))
        else:
            results.append(ImageFacts(width=image.width, height=image.height))
    return results


def caption(samples: Sequence[Sample], captioner: Captioner[Any] | None) -> list[Result]:
    """C: the caption of the image, from the captioner or, without one, from the source."""
    if captioner is not None:
        captions = captioner.caption([sample.image() for sample in samples])
        return list(check_results(captioner, captions, samples, Caption))
    results: list[Result] = []
    for sample in samples:
        item = sample.item
        if not item.caption:
            reason = "the source has no caption and the recipe has no captioner"
            results.append(Problem(status="rejected", reason=reason))
        elif item.pair and not item.pair.caption:
            reason = "the source has no caption of the edited image"
            results.append(Problem(status="rejected", reason=reason))
        else:
            results.append(Caption(text=item.caption))
    return results


def extract(samples: Sequence[Sample], extractor: EntityExtractor[Any]) -> list[Result]:
    """y_1 … y_i = S(C), Eq. 4."""
    captions = [sample.caption for sample in samples if sample.caption]
    results: list[Result] = []
    answers = check_results(extractor, extractor.extract(captions), captions, Entity)
    for text, entities in zip(captions, answers, strict=True):
        if isinstance(entities, Problem):
            results.append(entities)
        elif not entities:
            results.append(Problem(status="rejected", reason=f"no entity in {text.text!r}"))
        else:
            results.append(Entities(entities=entities))
    return results


def ground(samples: Sequence[Sample], grounder: Grounder[Any]) -> list[Result]:
    """b_k = DINO(x, y_k), Eq. 5; a record continues if at least one category has a box."""
    categories = [[entity.category for entity in sample.entities] for sample in samples]
    results: list[Result] = []
    answers = grounder.ground([sample.image() for sample in samples], categories)
    answers = check_results(grounder, answers, categories, Grounding)
    for names, answer in zip(categories, answers, strict=True):
        if isinstance(answer, Problem):
            results.append(answer)
        elif all(grounding.box is None for grounding in answer):
            results.append(
                Problem(status="rejected", reason=f"no box found for {', '.join(names)}")
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
    answers = check_results(planner, planner.replace(requests), requests, EditPlan)
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, EditPlan) and answer.selected not in request.categories:
            answer = Problem(
                status="failed",
                reason=f"the planner selected {answer.selected!r}, "
                f"which is not one of {', '.join(request.categories)}",
            )
        results.append(answer)
    return results


def edit(samples: Sequence[Sample], editor: Editor[Any], run_seed: int) -> list[Result]:
    """x' = GLIGEN(x, y_select, b_select, y'), Eq. 7."""
    requests = [
        EditRequest(
            image=sample.image(),
            box=sample.box,
            selected=sample.plan.selected,
            target=sample.plan.target,
            caption=sample.caption.text if sample.caption else "",
            edited_caption=sample.edited_caption or "",
            seed=seed_of(run_seed, "edit", sample.record_id),
            outputs=dict(sample.outputs),
            images=sample.stage_images(),
        )
        for sample in samples
        if sample.plan
    ]
    results: list[Result] = []
    answers = check_results(editor, editor.edit(requests), requests, Image)
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, Problem):
            results.append(answer)
        elif (answer.mode, answer.size) != ("RGB", request.image.size):
            results.append(
                Problem(
                    status="failed",
                    reason=f"the editor returned {answer.mode} of size {answer.size} "
                    f"for an RGB image of size {request.image.size}",
                )
            )
        else:
            facts = ImageFacts(width=answer.width, height=answer.height)
            results.append((facts, answer))
    return results


READ = StageSpec(
    parts=("replace", "rewrite"),
    name="read",
    function=read,
    output=ImageFacts,
    slot="source",
    if_empty="refuse",
    needs_images=True,
)

REPLACE: tuple[StageSpec, ...] = (
    READ,
    StageSpec(
        name="caption",
        function=caption,
        output=Caption,
        slot="captioner",
        if_empty="run",
        requires=("read",),
        needs_images=True,
    ),
    StageSpec(
        name="extract",
        function=extract,
        output=Entities,
        slot="extractor",
        if_empty="refuse",
        requires=("caption",),
    ),
    StageSpec(
        name="ground",
        function=ground,
        output=Groundings,
        slot="grounder",
        if_empty="refuse",
        requires=("extract",),
        needs_images=True,
    ),
    StageSpec(
        name="plan",
        function=plan,
        output=EditPlan,
        slot="planner",
        if_empty="refuse",
        requires=("caption", "ground"),
        settings=("run_seed",),
        task="replace",
        shows=frozenset({"instruction", "box", "selected", "target", "synonyms"}),
    ),
    StageSpec(
        name="edit",
        function=edit,
        output=ImageFacts,
        slot="editor",
        if_empty="refuse",
        requires=("caption", "ground", "plan"),
        settings=("run_seed",),
        image="edited",
        needs_images=True,
    ),
)
