"""The stages of Part I: plain functions that rewrite the instructions of existing edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonpix.core.hashing import seed_of
from reasonpix.generation.replace_stages import READ, caption
from reasonpix.plugin.components import Planner
from reasonpix.plugin.samples import Candidates, Sample, Selection
from reasonpix.plugin.stages import Result, StageSpec, check_results
from reasonpix.plugin.types import (
    Caption,
    Choice,
    Problem,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)


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
    answers = check_results(planner, planner.rewrite(requests), requests, Rewriting)
    results: list[Result] = []
    for start in range(0, len(answers), candidates):
        of_sample = answers[start : start + candidates]
        rewritings = tuple(answer for answer in of_sample if isinstance(answer, Rewriting))
        problems = [answer for answer in of_sample if isinstance(answer, Problem)]
        if rewritings:
            reasons = tuple(problem.reason for problem in problems)
            results.append(Candidates(candidates=rewritings, problems=reasons))
        else:
            results.append(_worst(problems))
    return results


def select(
    samples: Sequence[Sample], planner: Planner[Any], run_seed: int, selection_orders: int
) -> list[Result]:
    """I_rea = G(P_select(I⁰ … Iⁿ)), Eq. 3, asked in several orders to counter position bias.

    The majority wins; the earliest order breaks ties. The orders are rotations of one another, so
    each candidate has another position in each.
    """
    requests: list[SelectRequest] = []
    shown: list[list[tuple[int, ...]]] = []
    for sample in samples:
        assert sample.candidates is not None
        texts = [candidate.instruction for candidate in sample.candidates.candidates]
        rng = np.random.default_rng(seed_of(run_seed, "select", sample.record_id))
        distinct = [i for i, text in enumerate(texts) if texts.index(text) == i]
        first = [int(i) for i in rng.permutation(distinct)]
        turns = range(min(selection_orders, len(first)) if len(first) > 1 else 0)
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
    answers = iter(check_results(planner, planner.select(requests), requests, Choice))
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
    """The texts of a pair that P_gen and P_select get."""
    pair = sample.item.pair
    assert pair is not None and pair.caption is not None and sample.caption is not None
    return {
        "caption": sample.caption.text,
        "edited_caption": pair.caption,
        "instruction": pair.instruction,
    }


def _worst(problems: Sequence[Problem]) -> Problem:
    """The problem to report: a failure, if any, because a retry may succeed."""
    return min(problems, key=lambda problem: problem.status)  # "failed" < "rejected"


REWRITE: tuple[StageSpec, ...] = (
    READ,
    StageSpec(
        name="caption",
        parts=("rewrite",),
        function=caption,
        output=Caption,
        if_empty="run",
        requires=("read",),
        shows=frozenset({"edited_caption", "direct_instruction"}),
    ),
    StageSpec(
        name="rewrite",
        parts=("rewrite",),
        function=rewrite,
        output=Candidates,
        slot="planner",
        if_empty="refuse",
        requires=("caption",),
        settings=("candidates", "run_seed"),
        task="rewrite",
        questions=lambda settings: settings["candidates"],
        shows=frozenset({"candidates", "revealing"}),
        filters_first=True,
    ),
    StageSpec(
        name="select",
        parts=("rewrite",),
        function=select,
        output=Selection,
        slot="planner",
        if_empty="refuse",
        requires=("caption", "rewrite"),
        settings=("selection_orders", "run_seed"),
        task="select",
        # A single candidate is chosen without asking.
        questions=lambda settings: (
            settings["selection_orders"] if settings["candidates"] > 1 else 0
        ),
        shows=frozenset({"instruction", "agreement"}),
    ),
)
