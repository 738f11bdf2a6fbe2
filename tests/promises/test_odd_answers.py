"""Answers that are none: each costs its record, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from reasonpix.errors import RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import Distribution, WriteRecipe

ODD = """
import io
from PIL import Image
from pydantic import Field
from reasonpix.plugin.fakes import FakeCaptioner, FakeEditor
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Caption, Problem
from reasonpix.plugin.components import (Options)

class OddOptions(Options):
    odd: str = Field("", description="How it is odd")

class MyCaption(Caption):
    mood: str = "glad"

class MyProblem(Problem):
    pass

class OddCaptioner(FakeCaptioner):
    name = "odd-captioner"
    Options = OddOptions
    def caption(self, images):
        odd = {
            "none": None, "text": "a bee", "several": (Caption(text="a bee"),) * 2,
            "mine": MyCaption(text="a bee"),
            "problem": MyProblem(status="rejected", reason="too dark"),
            "half": Caption.model_construct(text="a bee \\ud83d"),
            "half-problem": Problem.model_construct(status="failed", reason="bad \\udc80"),
        }[self.options.odd]
        return [odd if i == 1 else Caption(text="a bee") for i, _ in enumerate(images)]

class OddEditor(FakeEditor):
    name = "odd-editor"
    Options = OddOptions
    def edit(self, requests):
        whole = io.BytesIO()
        Image.effect_noise((32, 32), 90).convert("RGB").save(whole, "PNG")
        torn = Image.open(io.BytesIO(whole.getvalue()[:-900]))
        return [torn if i == 1 else request.image for i, request in enumerate(requests)]

@hookimpl
def captioners():
    return [OddCaptioner]
@hookimpl
def editors():
    return [OddEditor]
"""


def ends(run: RunFolder) -> list[tuple[str, str, str]]:
    return [(o.status, o.stage, o.reason) for o in read_outcomes(run)]


@pytest.mark.parametrize(
    ("odd", "end"),
    [
        ("none", ("failed", "caption", "'odd-captioner' gave NoneType where Caption is due")),
        ("text", ("failed", "caption", "'odd-captioner' gave str where Caption is due")),
        ("several", ("failed", "caption", "'odd-captioner' gave tuple where Caption is due")),
        ("mine", ("ok", "", "")),
        ("problem", ("rejected", "caption", "too dark")),
        ("half", ("failed", "caption", "'odd-captioner' gave what cannot be stored: Pydantic")),
        ("half-problem", ("failed", "caption", "bad \\udc80")),
    ],
)
def test_an_odd_answer_costs_its_record_and_no_other(
    odd: str,
    end: tuple[str, str, str],
    distribution: Distribution,
    write_recipe: WriteRecipe,
    tmp_path: Path,
) -> None:
    distribution("odd", {"odd-captioner": "odd", "odd-editor": "odd"}, odd=ODD)
    path = write_recipe(captioner={"use": "odd-captioner", "odd": odd}, filters=["no-op"])
    run = generate(load_recipe(path), tmp_path / "run")
    first, second, *others = ends(run)
    assert second[:2] == end[:2]
    assert second[2].startswith(end[2])
    assert [first, *others] == [("ok", "", "")] * 6


def test_an_edit_that_is_torn_costs_its_record_alone(
    distribution: Distribution, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    distribution("odd", {"odd-captioner": "odd", "odd-editor": "odd"}, odd=ODD)
    run = generate(load_recipe(write_recipe(editor="odd-editor")), tmp_path / "run")
    first, second, *others = ends(run)
    assert second[:2] == ("failed", "edit")
    assert second[2].startswith("'odd-editor' gave what cannot be stored: OSError: ")
    assert [first, *others] == [("ok", "", "")] * 6


def test_a_filter_that_cannot_decide_is_named(
    distribution: Distribution, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = """
from reasonpix.plugin.fakes import FakeScorer
from reasonpix.plugin.hookspecs import hookimpl
class Undecided(FakeScorer):
    name = "undecided"
    def reject(self, scores):
        return [1 / 0 for _ in scores]
@hookimpl
def scorers():
    return [Undecided]
"""
    distribution("undecided", {"undecided": "undecided"}, undecided=source)
    run = generate(load_recipe(write_recipe(filters=["undecided"])), tmp_path / "run")
    with pytest.raises(RunError, match=r"filter 'undecided' cannot decide: ZeroDivisionError"):
        ends(run)
