"""The stages of the pipeline: plain functions, samples in, one result for each out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from PIL.Image import Image
from pydantic_core import to_json

from reasonpix.core.hashing import seed_of
from reasonpix.core.images import UndecodableImage
from reasonpix.errors import RunError
from reasonpix.generation.samples import (
    Candidates,
    Entities,
    Groundings,
    ImageFacts,
    Sample,
    Scores,
    Selection,
)
from reasonpix.plugin.components import (
    Captioner,
    Component,
    Edit,
    Editor,
    EditRequest,
    EntityExtractor,
    Grounder,
    Planner,
    Scorer,
    Source,
)
from reasonpix.plugin.types import (
    Caption,
    Choice,
    EditPlan,
    Entity,
    Grounding,
    Problem,
    Record,
    ReplaceRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

Result = Record | tuple[Record, Image] | Problem
"""What a stage finds out about one sample, with the image that it made, if it makes one."""


T = TypeVar("T")

_SEVERAL: tuple[type, ...] = (Entity, Grounding)
"""Of these an answer holds any number; of the others it is one."""


def _each(
    component: Component[Any], answers: Sequence[T | Problem], asked: Sequence[Any], kind: type
) -> Sequence[T | Problem]:
    """The answers, one for each thing asked; what is no `kind` becomes a problem.

    Raises `RunError` when there are too many or too few: they could not be told apart.
    """
    if len(answers) != len(asked):
        raise RunError(
            f"{component.name!r} gave {len(answers)} results for a batch of {len(asked)}; "
            "a component gives one for each item, in the same order"
        )
    return [_checked(component, answer, kind) for answer in answers]


def _checked(component: Component[Any], answer: Any, kind: type) -> Any:
    if isinstance(answer, Problem):
        return Problem(status=answer.status, reason=answer.reason)
    parts = tuple(answer) if kind in _SEVERAL and isinstance(answer, tuple | list) else (answer,)
    if not all(isinstance(part, kind) for part in parts):
        what = f"{component.name!r} gave {type(answer).__name__} where {kind.__name__} is due"
        return Problem(status="failed", reason=what)
    try:
        if kind is Image:
            answer.load()  # it may be read from a file that is torn
        else:
            to_json(parts)  # the file must take it
    except Exception as error:
        what = f"{component.name!r} gave what cannot be stored: {type(error).__name__}: {error}"
        return Problem(status="failed", reason=what)
    if any(type(part) is not kind for part in parts) and issubclass(kind, Record):
        # What a class of the component's own adds would be lost on the way.
        parts = tuple(kind.model_validate(part.model_dump()) for part in parts)
    return parts if kind in _SEVERAL else parts[0]


def read(samples: Sequence[Sample], source: Source[Any]) -> list[Result]:
    """Decode each image once, so that every later stage may rely on it."""
    results: list[Result] = []
    for sample in samples:
        where = sample.item.native_id
        try:
            image = sample.image()
            edited = sample.edited_image() if sample.load_edited else image
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
    """C: what the image shows, by the captioner or, without one, as the source gives it."""
    if captioner is not None:
        return list(
            _each(captioner, captioner.caption([s.image() for s in samples]), samples, Caption)
        )
    results: list[Result] = []
    for sample in samples:
        item = sample.item
        if not item.caption:
            reason = "the source gives no caption and the recipe has no captioner"
            results.append(Problem(status="rejected", reason=reason))
        elif item.pair and not item.pair.caption:
            reason = "the source gives no caption of the edited image"
            results.append(Problem(status="rejected", reason=reason))
        else:
            results.append(Caption(text=item.caption))
    return results


def extract(samples: Sequence[Sample], extractor: EntityExtractor[Any]) -> list[Result]:
    """y_1 … y_i = S(C), Eq. 4."""
    captions = [sample.caption for sample in samples if sample.caption]
    results: list[Result] = []
    answers = _each(extractor, extractor.extract(captions), captions, Entity)
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
    for asked, answer in zip(
        categories, _each(grounder, found, categories, Grounding), strict=True
    ):
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
    answers = _each(planner, planner.replace(requests), requests, EditPlan)
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, EditPlan) and answer.selected not in request.categories:
            answer = Problem(
                status="failed",
                reason=f"the planner selected {answer.selected!r}, "
                f"which is none of {', '.join(request.categories)}",
            )
        results.append(answer)
    return results


def rewrite(
    samples: Sequence[Sample], planner: Planner[Any], run_seed: int, candidates: int
) -> list[Result]:
    """I_gen = G(P_gen(C_in, C_edit, I)), `candidates` times, Eq. 2."""
    requests = [
        RewriteRequest(
            **_direct(sample), seed=seed_of(run_seed, "rewrite", sample.record_id, number)
        )
        for sample in samples
        for number in range(candidates)
    ]
    answers = _each(planner, planner.rewrite(requests), requests, Rewriting)
    results: list[Result] = []
    for start in range(0, len(answers), candidates):
        given = answers[start : start + candidates]
        written = tuple(answer for answer in given if isinstance(answer, Rewriting))
        problems = [answer for answer in given if isinstance(answer, Problem)]
        if written:
            reasons = tuple(problem.reason for problem in problems)
            results.append(Candidates(candidates=written, problems=reasons))
        else:
            results.append(_worst(problems))
    return results


def select(
    samples: Sequence[Sample], planner: Planner[Any], run_seed: int, orders: int
) -> list[Result]:
    """I_rea = G(P_select(I⁰ … Iⁿ)), Eq. 3, asked in several orders to see through position bias.

    What most orders choose is chosen; between equals, what the earlier order chose. The orders are
    rotations of one another, so that a candidate stands in another place in each.
    """
    requests: list[SelectRequest] = []
    shown: list[list[tuple[int, ...]]] = []
    for sample in samples:
        assert sample.candidates is not None
        texts = [candidate.instruction for candidate in sample.candidates.candidates]
        rng = np.random.default_rng(seed_of(run_seed, "select", sample.record_id))
        distinct = [i for i, text in enumerate(texts) if texts.index(text) == i]
        first = [int(i) for i in rng.permutation(distinct)]
        turns = range(min(orders, len(first)) if len(first) > 1 else 0)
        steps = [turn * len(first) // len(turns) for turn in turns]
        shown.append([(*first[step:], *first[:step]) for step in steps])
        requests += [
            SelectRequest(
                **_direct(sample),
                candidates=tuple(texts[i] for i in order),
                seed=seed_of(run_seed, "select", sample.record_id, turn),
            )
            for turn, order in enumerate(shown[-1])
        ]
    answers = iter(_each(planner, planner.select(requests), requests, Choice))
    return [_selection(orders, [next(answers) for _ in orders]) for orders in shown]


def _selection(
    orders: Sequence[tuple[int, ...]], answers: Sequence[Choice | Problem]
) -> Selection | Problem:
    if not orders:
        return Selection(chosen=0)
    chosen: list[tuple[tuple[int, ...], int]] = []
    problems: list[Problem] = []
    for order, answer in zip(orders, answers, strict=True):
        if isinstance(answer, Problem):
            problems.append(answer)
        elif answer.index < len(order):
            chosen.append((order, order[answer.index]))
        else:
            reason = f"the planner chose option {answer.index + 1} of {len(order)}"
            problems.append(Problem(status="failed", reason=reason))
    if not chosen:
        return _worst(problems)
    choices = [choice for _, choice in chosen]
    return Selection(
        chosen=Counter(choices).most_common(1)[0][0],
        asked=len(orders),
        orders=tuple(order for order, _ in chosen),
        choices=tuple(choices),
    )


def _direct(sample: Sample) -> dict[str, str]:
    """What P_gen and P_select are told of a pair."""
    pair = sample.item.pair
    assert pair is not None and pair.caption is not None and sample.caption is not None
    return {
        "caption": sample.caption.text,
        "edited_caption": pair.caption,
        "instruction": pair.instruction,
    }


def _worst(problems: Sequence[Problem]) -> Problem:
    """The problem to tell of: what failed may be mended, what was rejected is settled."""
    return min(problems, key=lambda problem: problem.status)  # "failed" < "rejected"


def edit(samples: Sequence[Sample], editor: Editor[Any], run_seed: int) -> list[Result]:
    """x' = GLIGEN(x, y_select, b_select, y'), Eq. 7."""
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
    answers = _each(editor, editor.edit(requests), requests, Image)
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
            results.append((facts, answer))
    return results


def score(
    samples: Sequence[Sample],
    scorer: Scorer[Any],
    pipeline: dict[str, Component[Any]],
    run_seed: int,
) -> list[Result]:
    """What a scorer measures of each edit."""
    edits = [_edit(sample, run_seed) for sample in samples]
    return [_scores(values) for values in _each(scorer, scorer.score(edits, pipeline), edits, dict)]


def _edit(sample: Sample, run_seed: int) -> Edit:
    plan, given, chosen = sample.plan, sample.candidates, sample.selection
    pair = None if plan else sample.item.pair
    candidates = given.candidates if given else ()
    words = (word for candidate in candidates for word in candidate.revealing)
    return Edit(
        read_input=sample.image,
        read_edited=sample.edited_image,
        seed=seed_of(run_seed, "score", sample.record_id),
        caption=sample.caption.text if sample.caption else "",
        instruction=sample.instruction,
        box=sample.box if plan else None,
        selected=plan.selected if plan else None,
        target=plan.target if plan else None,
        synonyms=plan.synonyms if plan else (),
        edited_caption=pair.caption if pair else None,
        direct_instruction=pair.instruction if pair else None,
        candidates=tuple(candidate.instruction for candidate in candidates),
        revealing=tuple(dict.fromkeys(words)),
        agreement=chosen.agreement if chosen else None,
    )


def _scores(values: dict[str, float] | Problem) -> Result:
    if isinstance(values, Problem):
        return values
    for name, value in values.items():
        if not math.isfinite(value):  # JSON has no such numbers, and no rank is theirs
            return Problem(status="failed", reason=f"score {name!r} is {value}")
    return Scores(scores=values)
