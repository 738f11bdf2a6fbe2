"""The contracts: components that break a promise are caught."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydantic import Field

from reasonpix.plugin import testing
from reasonpix.plugin.components import Options, Planner, SourcePair
from reasonpix.plugin.fakes import (
    FakeCaptioner,
    FakeEditor,
    FakeEncoder,
    FakeExtractor,
    FakeGrounder,
    FakeMethod,
    FakePlanner,
    FakeScorer,
    FakeSource,
)
from reasonpix.plugin.types import Box, Caption, Choice, Entity, Grounding, Problem, Rewriting

# -- components that break a promise -------------------------------------------------------------


class Crowd(FakeCaptioner):
    """Depends on the batch around an image."""

    def caption(self, images: Any) -> Any:
        return [Caption(text=f"one of {len(images)}") for _ in images]


class Counting(FakeCaptioner):
    """Depends on the place in the batch."""

    def caption(self, images: Any) -> Any:
        return [Caption(text=f"number {number}") for number, _ in enumerate(images)]


class Sorted(FakeCaptioner):
    """Gives its results in an order of its own."""

    def caption(self, images: Any) -> Any:
        return sorted((Caption(text=str(image.size)) for image in images), key=lambda c: c.text)


class Short(FakeCaptioner):
    def caption(self, images: Any) -> Any:
        return super().caption(images)[:-1]


class NeverEmpty(FakeCaptioner):
    def caption(self, images: Any) -> Any:
        return super().caption(images) or [Caption(text="nothing")]


class Texts(FakeCaptioner):
    """Gives strings in the place of captions."""

    def caption(self, images: Any) -> Any:
        return ["a bee" for _ in images]


class Repeating(FakeExtractor):
    def extract(self, captions: Any) -> Any:
        return [tuple(Entity(category="bee", text="bee") for _ in range(2)) for _ in captions]


class Backwards(FakeGrounder):
    """Gives groundings in another order than asked."""

    def ground(self, images: Any, categories: Any) -> Any:
        return [tuple(reversed(found)) for found in super().ground(images, categories)]


class Resized(FakeGrounder):
    """Gives boxes of an image that was resized before."""

    def ground(self, images: Any, categories: Any) -> Any:
        box = Box(x0=0, y0=0, x1=5, y1=5, width=224, height=224)
        return [tuple(Grounding(category=c, box=box) for c in asked) for asked in categories]


class Inventing(FakePlanner):
    def replace(self, requests: Any) -> Any:
        return [p.model_copy(update={"selected": "unicorn"}) for p in super().replace(requests)]


class Same(FakePlanner):
    def replace(self, requests: Any) -> Any:
        return [p.model_copy(update={"target": p.selected}) for p in super().replace(requests)]


class Silent(FakePlanner):
    def replace(self, requests: Any) -> Any:
        return [p.model_copy(update={"instruction": " "}) for p in super().replace(requests)]


class Idle(Planner[Options]):
    """Implements no verb."""

    name = "idle"


class Echo(FakePlanner):
    """Gives the direct instruction back."""

    def rewrite(self, requests: Any) -> Any:
        return [Rewriting(instruction=request.instruction) for request in requests]


class Mute(FakePlanner):
    def rewrite(self, requests: Any) -> Any:
        return [Rewriting(instruction="\n") for _ in requests]


class CountingFromOne(FakePlanner):
    """Takes the number that is shown for the index."""

    def select(self, requests: Any) -> Any:
        return [Choice(index=len(request.candidates)) for request in requests]

    def resolve(self, requests: Any) -> Any:
        return [Choice(index=len(request.options)) for request in requests]


class Fickle(FakePlanner):
    """Chooses by the place in the batch."""

    def select(self, requests: Any) -> Any:
        return [Choice(index=i % len(r.candidates)) for i, r in enumerate(requests)]


class OddPrompts(FakePlanner):
    def prompt_identity(self, verb: Any) -> Any:
        return {"prompt": {1, 2}}


class Lucky(FakeEditor):
    """Draws from a generator that the seed does not reach."""

    drawn = random.Random(0)

    def edit(self, requests: Any) -> Any:
        return [Image.new("RGB", r.image.size, (self.drawn.randrange(256), 0, 0)) for r in requests]


class Square(FakeEditor):
    def edit(self, requests: Any) -> Any:
        return [image.resize((64, 64)) for image in super().edit(requests)]


class Transparent(FakeEditor):
    def edit(self, requests: Any) -> Any:
        return [image.convert("RGBA") for image in super().edit(requests)]


class Scribbling(FakeEditor):
    """Draws on the image it was lent."""

    def edit(self, requests: Any) -> Any:
        for request in requests:
            ImageDraw.Draw(request.image).rectangle((0, 0, 5, 5), fill="red")
        return super().edit(requests)


class Double(FakeEncoder):
    def encode(self, images: Any, instructions: Any) -> Any:
        return [states.astype(np.float64) for states in super().encode(images, instructions)]


class Flat(FakeEncoder):
    def encode(self, images: Any, instructions: Any) -> Any:
        return [states.reshape(-1) for states in super().encode(images, instructions)]


class Ragged(FakeEncoder):
    def encode(self, images: Any, instructions: Any) -> Any:
        return [
            states[:, : 1 + len(text) % 3]
            for states, text in zip(super().encode(images, instructions), instructions, strict=True)
        ]


class UnstableSource(FakeSource):
    """Lists forwards, then backwards."""

    listed = 0

    def items(self) -> Any:
        self.listed += 1
        return iter(list(super().items())[:: (-1) ** self.listed])


class LyingSource(FakeSource):
    """Its content hashes are of something else."""

    def items(self) -> Any:
        return (item.model_copy(update={"content": "0" * 64}) for item in super().items())  # type: ignore[union-attr]


PAIR = SourcePair(content="0" * 64, caption="a hole", instruction="make a hole")


class SecretPairs(FakeSource):
    """Gives pairs and denies it."""

    def items(self) -> Any:
        return (item.model_copy(update={"pair": PAIR}) for item in super().items())  # type: ignore[union-attr]


class HalfPairs(FakeSource):
    """Says that it gives pairs, and gives none."""

    gives_pairs = True


class LyingPairs(SecretPairs):
    """Its content hashes of edited images are of something else."""

    gives_pairs = True


class SeesMore(FakeScorer):
    """Wants to see what no edit has."""

    requires = frozenset({"mask"})


class NaNScorer(FakeScorer):
    def score(self, edits: Any, pipeline: Any) -> Any:
        return [{"one": float("nan")} for _ in edits]


class ForgetfulScorer(FakeScorer):
    """Has no verdict for the last record."""

    def reject(self, scores: Any) -> Any:
        return super().reject(scores)[:-1]


class NoticingBatches(FakeMethod):
    def apply(self, requests: Any) -> Any:
        return [image.rotate(len(requests)) for image in super().apply(requests)]


class Shrinking(FakeMethod):
    def apply(self, requests: Any) -> Any:
        return [image.resize((8, 8)) for image in super().apply(requests)]


class Overdrawing(FakeMethod):
    def apply(self, requests: Any) -> Any:
        for request in requests:
            request.image.paste((0, 0, 0), (0, 0, 8, 8))
        return super().apply(requests)


class Blind(FakeMethod):
    """Says that it needs captions, and edits without."""

    requires = frozenset({"caption"})


class SeesTruth(FakeMethod):
    """Wants to see what no request has."""

    requires = frozenset({"truth"})


class AlwaysOne(FakeMethod):
    def apply(self, requests: Any) -> Any:
        return super().apply(requests) or [Image.new("RGB", (8, 8))]


class Undescribed(Options):
    word: str = "bee"


class Neutral(Options):
    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"batchsize"})

    batch_size: int = Field(1, description="…")


class UndescribedOptions(FakeCaptioner):
    Options = Undescribed


class WrongNeutral(FakeCaptioner):
    Options = Neutral


class OddIdentity(FakeCaptioner):
    def fingerprint_facts(self) -> Any:
        return {"folder": Path("weights")}


class ClosesOnce(FakeCaptioner):
    def load(self) -> None:
        self.weights = "heavy"

    def close(self) -> None:
        del self.weights


def named(component: Any, contract: Any) -> Any:
    return type("Contract", (contract,), {"component": component})


@pytest.mark.parametrize(
    ("component", "contract", "test"),
    [
        (Crowd, testing.CaptionerContract, "test_captions_match_images"),
        (Counting, testing.CaptionerContract, "test_captions_match_images"),
        (Sorted, testing.CaptionerContract, "test_captions_match_images"),
        (Short, testing.CaptionerContract, "test_captions_match_images"),
        (Texts, testing.CaptionerContract, "test_captions_match_images"),
        (NeverEmpty, testing.CaptionerContract, "test_empty_batch"),
        (Repeating, testing.EntityExtractorContract, "test_entities_match_captions"),
        (Backwards, testing.GrounderContract, "test_groundings_match_categories"),
        (Resized, testing.GrounderContract, "test_groundings_match_categories"),
        (Inventing, testing.PlannerContract, "test_plans_match_requests"),
        (Same, testing.PlannerContract, "test_plans_match_requests"),
        (Silent, testing.PlannerContract, "test_plans_match_requests"),
        (Idle, testing.PlannerContract, "test_it_implements_a_task"),
        (Echo, testing.PlannerContract, "test_rewritings_match_requests"),
        (Mute, testing.PlannerContract, "test_rewritings_match_requests"),
        (CountingFromOne, testing.PlannerContract, "test_selections_match_requests"),
        (CountingFromOne, testing.PlannerContract, "test_resolutions_match_requests"),
        (Fickle, testing.PlannerContract, "test_selections_match_requests"),
        (Lucky, testing.EditorContract, "test_edits_match_requests"),
        (Square, testing.EditorContract, "test_edits_match_requests"),
        (Transparent, testing.EditorContract, "test_edits_match_requests"),
        (Scribbling, testing.EditorContract, "test_input_is_not_modified"),
        (Double, testing.EncoderContract, "test_states_match_pairs"),
        (Flat, testing.EncoderContract, "test_states_match_pairs"),
        (Ragged, testing.EncoderContract, "test_states_match_pairs"),
        (UnstableSource, testing.SourceContract, "test_items_are_stable_and_readable"),
        (LyingSource, testing.SourceContract, "test_items_are_stable_and_readable"),
        (SecretPairs, testing.SourceContract, "test_pairs_are_complete"),
        (HalfPairs, testing.SourceContract, "test_pairs_are_complete"),
        (LyingPairs, testing.SourceContract, "test_pairs_are_complete"),
        (SeesMore, testing.ScorerContract, "test_required_fields_exist"),
        (NaNScorer, testing.ScorerContract, "test_scores_match_edits"),
        (ForgetfulScorer, testing.ScorerContract, "test_verdicts_match_scores"),
        (NoticingBatches, testing.MethodContract, "test_edits_match_requests"),
        (Shrinking, testing.MethodContract, "test_edits_match_requests"),
        (Overdrawing, testing.MethodContract, "test_input_is_not_modified"),
        (Blind, testing.MethodContract, "test_missing_captions_give_problems"),
        (SeesTruth, testing.MethodContract, "test_missing_captions_give_problems"),
        (AlwaysOne, testing.MethodContract, "test_empty_batch"),
        (UndescribedOptions, testing.CaptionerContract, "test_options_have_descriptions"),
        (WrongNeutral, testing.CaptionerContract, "test_excluded_options_exist"),
        (ClosesOnce, testing.CaptionerContract, "test_closing_twice"),
        (ClosesOnce, testing.CaptionerContract, "test_closing_without_load"),
    ],
)
def test_a_broken_promise_is_caught(component: Any, contract: Any, test: str) -> None:
    subject = named(component, contract)()
    with pytest.raises(AssertionError):
        getattr(subject, test)()


def test_an_identity_that_cannot_be_written_is_caught() -> None:
    with pytest.raises(TypeError, match="JSON"):
        named(OddIdentity, testing.CaptionerContract)().test_fingerprint_facts_are_json()
    with pytest.raises(TypeError, match="JSON"):
        named(OddPrompts, testing.PlannerContract)().test_prompt_identities_are_json()


def test_a_heavy_import_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spacy.py").write_text("")  # light, but of the name of something heavy
    (tmp_path / "heavy_plugin.py").write_text(
        "import spacy\nfrom reasonpix.plugin.fakes import FakeCaptioner\n"
        "class Heavy(FakeCaptioner):\n    pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heavy: Callable[..., Any] = type("Heavy", (FakeCaptioner,), {"__module__": "heavy_plugin"})
    with pytest.raises(AssertionError, match="importing the plugin imports spacy"):
        named(heavy, testing.CaptionerContract)().test_importing_is_light()


class Refusing(FakeEncoder):
    def encode(self, images: Any, instructions: Any) -> Any:
        return [Problem(status="rejected", reason="no") for _ in images]


def test_problems_are_answers_too() -> None:
    named(Refusing, testing.EncoderContract)().test_states_match_pairs()


class Replacing(Planner[Options]):
    """Implements one verb alone."""

    name = "replacing"

    def replace(self, requests: Any) -> Any:
        return [Problem(status="rejected", reason="no") for _ in requests]


class TestOneVerbIsEnough(testing.PlannerContract):
    component = Replacing

    def test_importing_is_light(self) -> None:
        """It is of this module, which no other process can import."""
