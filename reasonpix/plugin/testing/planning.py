"""The contract of planners."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar, get_args

from reasonpix.plugin.components import PlannerTask
from reasonpix.plugin.testing.base import ComponentContract
from reasonpix.plugin.types import (
    Choice,
    EditPlan,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

_PAIR = {
    "caption": "a bee on a daisy",
    "edited_caption": "a bee on a sunflower",
    "instruction": "turn the daisy into a sunflower",
}
_FOLLOWS_LIGHT = "It wants a bloom that follows the light all day."
_TALLER = "It likes them taller."


class PlannerContract(ComponentContract):
    """What a planner must satisfy in each task that it implements."""

    replace_requests: ClassVar[Sequence[ReplaceRequest]] = [
        ReplaceRequest(caption="a bee and a rabbit", categories=("bee", "rabbit"), seed=seed)
        for seed in range(4)
    ]
    rewrite_requests: ClassVar[Sequence[RewriteRequest]] = [
        RewriteRequest(**_PAIR, seed=seed) for seed in range(4)
    ]
    select_requests: ClassVar[Sequence[SelectRequest]] = [
        SelectRequest(**_PAIR, candidates=candidates, seed=seed)
        for seed, candidates in enumerate(
            [
                ("Let it land where cooking oil is pressed from.",),
                (_TALLER, _FOLLOWS_LIGHT),
                (_FOLLOWS_LIGHT, _TALLER),
            ]
        )
    ]
    resolve_requests: ClassVar[Sequence[ResolveRequest]] = [
        ResolveRequest(
            caption="a bee on a daisy", instruction=_FOLLOWS_LIGHT, options=options, seed=seed
        )
        for seed, options in enumerate([("sunflower", "rose"), ("tulip", "sunflower", "rose")])
    ]

    def test_it_implements_a_task(self) -> None:
        """A planner that implements no task fits no recipe."""
        tasks: tuple[PlannerTask, ...] = get_args(PlannerTask)
        assert any(self.subject.can(task) for task in tasks)

    def test_prompt_identities_are_json(self) -> None:
        """What enters the fingerprint of each task can be serialized as JSON."""
        for task in get_args(PlannerTask):
            if self.subject.can(task):
                json.dumps(dict(self.subject.prompt_identity(task)))

    def test_rewritings_match_requests(self) -> None:
        """One instruction per request, not empty, and different from the direct one."""
        if not self.subject.can("rewrite"):
            return
        results = self.results(self.subject.rewrite, self.rewrite_requests)
        for request, result in zip(self.rewrite_requests, results, strict=True):
            if isinstance(result, Rewriting):
                assert result.instruction.strip()
                assert result.instruction != request.instruction

    def test_selections_match_requests(self) -> None:
        """The index of one of the candidates."""
        if not self.subject.can("select"):
            return
        results = self.results(self.subject.select, self.select_requests)
        for request, result in zip(self.select_requests, results, strict=True):
            if isinstance(result, Choice):
                assert result.index < len(request.candidates)

    def test_resolutions_match_requests(self) -> None:
        """The index of one of the options."""
        if not self.subject.can("resolve"):
            return
        results = self.results(self.subject.resolve, self.resolve_requests)
        for request, result in zip(self.resolve_requests, results, strict=True):
            if isinstance(result, Choice):
                assert result.index < len(request.options)

    def test_plans_match_requests(self) -> None:
        """The selected category is one of the request's, and differs from the target."""
        if not self.subject.can("replace"):
            return
        results = self.results(self.subject.replace, self.replace_requests)
        for request, result in zip(self.replace_requests, results, strict=True):
            if isinstance(result, EditPlan):
                assert result.selected in request.categories
                assert result.target != result.selected
                assert result.instruction.strip()
