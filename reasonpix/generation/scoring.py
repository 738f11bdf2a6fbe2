"""The stage of a filter, which scores each edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from reasonpix.core.hashing import seed_of
from reasonpix.plugin.components import Component, Scorer
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.samples import Sample, Scores
from reasonpix.plugin.stages import Result, StageSpec, check_results
from reasonpix.plugin.types import Problem


def score(
    samples: Sequence[Sample],
    scorer: Scorer[Any],
    pipeline: Mapping[str, Component[Any]],
    run_seed: int,
) -> list[Result]:
    """Score each edit."""
    edits = [_edit(sample, run_seed) for sample in samples]
    return [
        _scores(values)
        for values in check_results(scorer, scorer.score(edits, pipeline), edits, dict)
    ]


def _edit(sample: Sample, run_seed: int) -> Edit:
    plan, selection = sample.plan, sample.selection
    pair = None if plan else sample.item.pair
    candidates = sample.candidates.candidates if sample.candidates else ()
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
        agreement=selection.agreement if selection else None,
        outputs=dict(sample.outputs),
        images=sample.stage_images(),
    )


def _scores(values: dict[str, float] | Problem) -> Result:
    if isinstance(values, Problem):
        return values
    for name, value in values.items():
        if not math.isfinite(value):  # JSON has no NaN and infinity, and NaN cannot be ranked
            return Problem(status="failed", reason=f"score {name!r} is {value}")
    return Scores(scores=values)


SCORE = StageSpec(
    name="score",
    function=score,
    output=Scores,
    slot="filter",
    parts=("replace", "rewrite"),
    settings=("run_seed",),
)
"""Every filter has a stage like this, named `score-<filter>`."""
