"""Fakes and the scorers of the core keep the contracts."""

from __future__ import annotations

from typing import ClassVar

from reasonpix.generation.components.edit_filters import Eq1, NoOp, RegionDistance, Regrounded
from reasonpix.generation.components.instruction_filters import (
    Agreement,
    Diversity,
    Leak,
    Resolvable,
)
from reasonpix.plugin import testing
from reasonpix.plugin.components import Options
from reasonpix.plugin.fakes import (
    HINTS,
    FakeCaptioner,
    FakeEditor,
    FakeEncoder,
    FakeExtractor,
    FakeGrounder,
    FakePlanner,
    FakeScorer,
    FakeSource,
)
from reasonpix.plugin.types import Choice, ResolveRequest, RewriteRequest, Rewriting, SelectRequest


class TestCaptioner(testing.CaptionerContract):
    component = FakeCaptioner


class TestExtractor(testing.EntityExtractorContract):
    component = FakeExtractor


class TestGrounder(testing.GrounderContract):
    component = FakeGrounder


class TestPlanner(testing.PlannerContract):
    component = FakePlanner


class TestEditor(testing.EditorContract):
    component = FakeEditor


class TestEncoder(testing.EncoderContract):
    component = FakeEncoder


class TestSource(testing.SourceContract):
    component = FakeSource


class TestSourceOfPairs(testing.SourceContract):
    component = FakeSource
    options: ClassVar = {"instruction": "make a hole", "edited_caption": "a square with a hole"}


class TestScorer(testing.ScorerContract):
    component = FakeScorer


class TestEq1(testing.ScorerContract):
    component = Eq1
    options: ClassVar = {"reject_fraction": 0.5}


class TestRegionDistance(testing.ScorerContract):
    component = RegionDistance


class TestNoOp(testing.ScorerContract):
    component = NoOp


class TestRegrounded(testing.ScorerContract):
    component = Regrounded
    pipeline: ClassVar = {"grounder": FakeGrounder(Options())}


class TestLeak(testing.ScorerContract):
    component = Leak


class TestDiversity(testing.ScorerContract):
    component = Diversity


class TestAgreement(testing.ScorerContract):
    component = Agreement


class TestResolvable(testing.ScorerContract):
    component = Resolvable
    pipeline: ClassVar = {"resolver": FakePlanner(FakePlanner.Options())}


# -- the fake planner ----------------------------------------------------------------------------


def test_the_fake_planner_chooses_the_same_in_any_order() -> None:
    planner = FakePlanner(FakePlanner.Options())
    facts = {"caption": "", "edited_caption": "", "instruction": "", "seed": 0}
    orders = [HINTS, HINTS[::-1], HINTS[2:] + HINTS[:2]]
    requests = [SelectRequest(**facts, candidates=order) for order in orders]
    chosen = [
        order[answer.index]
        for order, answer in zip(orders, planner.select(requests), strict=True)
        if isinstance(answer, Choice)
    ]
    assert len(chosen) == 3
    assert len(set(chosen)) == 1


def test_the_fake_planner_hints_by_the_seed() -> None:
    planner = FakePlanner(FakePlanner.Options())
    facts = {"caption": "a bee", "edited_caption": "an owl", "instruction": "make it an owl"}
    hints = planner.rewrite([RewriteRequest(**facts, seed=seed) for seed in range(10)])
    assert [hint.instruction for hint in hints if isinstance(hint, Rewriting)] == [*HINTS, *HINTS]


def test_the_fake_planner_understands_itself() -> None:
    planner = FakePlanner(FakePlanner.Options(target="pear"))
    options = [("apple", "pear", "plum"), ("plum", "apple")]
    answers = planner.resolve(
        [ResolveRequest(caption="", instruction="?", options=each, seed=0) for each in options]
    )
    assert answers == [Choice(index=1), Choice(index=1)]
