"""Recipes for `reasonpix evaluate`: what they may say, and what they are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from reasonpix.errors import RecipeError
from reasonpix.evaluation.recipe import load_evaluation_recipe

LEAST = {"benchmark": {"path": "b"}, "methods": {"Ours": {"use": "editing-model", "model": "a/b"}}}


def problems(tmp_path: Path, body: object, *overrides: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    with pytest.raises(RecipeError) as caught:
        load_evaluation_recipe(path, overrides)
    return [line.removeprefix(str(path)) for line in caught.value.problems]


def test_the_least_recipe_measures_as_the_paper_does(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    recipe = load_evaluation_recipe(path)
    assert recipe.metrics.clip.model == "openai/clip-vit-base-patch32"
    assert recipe.metrics.dino.model == "facebook/dino-vits16"
    assert recipe.benchmark.split == "test" and recipe.grounder is None


def test_all_mistakes_are_told_at_once_and_where_they_are(tmp_path: Path) -> None:
    body = {
        "sede": 1,
        "benchmark": {"path": "b", "splt": "test"},
        "metrics": {"clip": "mini/clap"},
        "grounder": "fake-editor",
        "methods": {"Ours": "fake-methud", "ground truth": "fake-method", "X": {"model": "y"}},
    }
    found = problems(tmp_path, body)
    for expected in (
        ":1:1: sede: no such option; did you mean 'seed'?",
        "benchmark.splt: no such option",
        "grounder.use: plugin 'fake-editor' is for the slot `editor`",
        "methods.Ours.use: ",
        "methods.ground truth: this name is reserved",
        "methods.X: expected a plugin's name",
    ):
        assert any(expected in line for line in found), (expected, found)


def test_an_unknown_checkpoint_is_told(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, LEAST | {"metrics": {"clip": "mini/clap"}})
    assert "metrics.clip: no checkpoint 'mini/clap'; did you mean 'mini/clip'?" in line


@pytest.mark.parametrize("missing", ["benchmark", "methods"])
def test_what_is_missing_is_told(tmp_path: Path, missing: str) -> None:
    body = {name: value for name, value in LEAST.items() if name != missing}
    assert problems(tmp_path, body) == [f":1:1: {missing!r} is missing"]


def test_at_least_one_method_is_wanted(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, LEAST | {"methods": {}})
    assert "methods: " in line and "at least 1" in line


def test_one_option_is_overridden(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    recipe = load_evaluation_recipe(path, ["methods.Ours.guidance_scale=3"])
    assert recipe.methods["Ours"].options.guidance_scale == 3
