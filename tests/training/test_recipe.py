"""Recipes for training: checked at once, told with their place, and spelled out in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from reasonpix.cli.main import cli
from reasonpix.errors import RecipeError
from reasonpix.generation.recipe_catalog import command_of, shipped
from reasonpix.training.recipe import TrainingRecipe, load_training_recipe, schema

pytest.importorskip("reasonpix_llava", reason="the plugin of encoders is not installed")

LEAST: dict[str, Any] = {
    "data": {"path": "pairs"},
    "encoder": "fake-encoder",
    "model": {"model": "owner/name"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "recipe.yaml")


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(LEAST | changes, sort_keys=False))
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_training_recipe(path, overrides)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def test_the_least_recipe_is_instruct_pix2pix_as_the_paper_has_it(path: Path) -> None:
    recipe = load_training_recipe(path)
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (10_000, 1024, 1e-4)
    assert (recipe.betas, recipe.weight_decay, recipe.schedule) == ((0.9, 0.999), 0.01, "constant")
    assert (recipe.dropout, recipe.ema_decay, recipe.data.resolution) == (0.05, 0.9999, 256)
    assert (recipe.sampling.guidance_scale, recipe.sampling.image_guidance_scale) == (7.5, 1.5)
    assert (recipe.model.init, recipe.model.connector.kind) == ("ip2p", "text_tokens")
    assert (recipe.encoder.name, recipe.cache, recipe.align) == ("fake-encoder", True, None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder": {"use": "llava", "prompt": "<image> {instruction}"}},
        {"model": {"model": "a/b", "connector": {"kind": "query_resampler", "tokens": 9}}},
        {
            "model": {"model": "a/b", "connector": "query_resampler"},
            "data": {"path": ["a", "b"], "align": "plain"},
            "align": {"steps": 3},
            "validation": {"examples": 2},
            "max_gradient_norm": None,
            "cache": "shared/features",
        },
    ],
)
def test_the_resolved_recipe_is_the_recipe(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_training_recipe(write(tmp_path / "recipe.yaml", **changes))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.as_yaml(), encoding="utf-8")
    assert load_training_recipe(resolved) == recipe
    document = yaml.safe_load(recipe.as_yaml())
    assert list(document) == list(TrainingRecipe.model_fields)
    assert recipe.as_yaml().startswith(f"# {recipe.encoder.package}\n")


def test_overrides_win(path: Path) -> None:
    given = ["steps=7", "model.connector.kind=full_sequence", "encoder={use: llava, layer: -2}"]
    recipe = load_training_recipe(path, given)
    assert (recipe.steps, recipe.model.connector.kind) == (7, "full_sequence")
    assert recipe.encoder.options.layer == -2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": -1}, "6:1: steps: input should be greater than or equal to 0, got -1"),
        ({"stpes": 5}, "6:1: stpes: no such option; did you mean 'steps'?"),
        ({"data": {}}, "1:1: data: 'path' is missing"),
        ({"data": {"path": "x", "crops": 0}}, "crops: input should be greater"),
        ({"data": {"path": "x", "resolutoin": 3}}, "no such option; did you mean 'resolution'?"),
        ({"encoder": "fake-encodr"}, "encoder.use: no encoder 'fake-encodr'"),
        ({"encoder": {"use": "fake-encoder", "size": 2}}, "encoder.size: no such option"),
        ({"encoder": "fake-editor"}, "fake-editor"),
        ({"encoder": 7}, "encoder: expected a plugin's name, or a mapping with 'use:', got 7"),
        ({"model": {"model": "a/b", "init": "sdxl"}}, "init: input should be 'sd15' or 'ip2p'"),
        ({"model": {"model": "a/b", "connector": "q-former"}}, "input should be 'text_tokens'"),
        ({"model": {"model": "mini/gone"}}, "model.model: no checkpoint 'mini/gone'"),
        ({"batch_size": 33}, "batch_size 33 is not a multiple of micro_batch_size 32"),
        ({"dropout": 0.4}, "dropout: input should be less than or equal to 0.33"),
        ({"betas": [0.9, 1.0]}, "betas.1: input should be less than 1, got 1.0"),
        ({"learning_rate": 0}, "learning_rate: input should be greater than 0, got 0"),
        (
            {"data": {"path": "x", "instructions": ["edit_prompt", "edit_prompt"]}},
            "data.instructions: a column is named twice",
        ),
        ({"precision": "fp16"}, "precision: input should be 'auto', 'fp32' or 'bf16'"),
        ({"align": {"steps": 3}}, "align needs a connector whose tokens correspond to CLIP's"),
        (
            {"align": {"steps": 3}, "model": {"model": "a/b", "connector": "clip_residual"}},
            "align needs the column to align to: name it by data.align",
        ),
    ],
)
def test_every_mistake_is_told_in_a_line(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (problem,) = problems(write(tmp_path / "recipe.yaml", **changes))
    assert told in problem and len(problem) < 250


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    changes = {"encoder": "gone", "steps": -1, "data": {"path": "x", "crops": 0}}
    found = problems(write(tmp_path / "recipe.yaml", **changes), "seed=-3")
    assert len(found) == 4
    assert any(problem.startswith("--set seed=-3: ") or "seed" in problem for problem in found)


def test_what_is_missing(tmp_path: Path) -> None:
    empty = tmp_path / "recipe.yaml"
    empty.write_text("seed: 3\n")
    found = problems(empty)
    assert {"data", "encoder", "model"} == {problem.split("'")[1] for problem in found}


# -- commands ------------------------------------------------------------------------------------


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(it) for it in arguments])


def test_recipes_check_knows_both_kinds(path: Path) -> None:
    result = call("recipes", "check", path, "--set", "steps=3")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["steps"] == 3
    assert call("recipes", "check", "mini/part3").exit_code == 0
    assert command_of(path) == "train"
    assert command_of(shipped()["mini/part3"]) == "generate"
    wrong = call("recipes", "check", path, "--set", "stpes=3")
    assert wrong.exit_code == 2 and "did you mean 'steps'" in wrong.stderr


def test_a_recipe_of_the_other_kind_is_told_in_a_line(path: Path, tmp_path: Path) -> None:
    for command, recipe in (("train", "mini/part1"), ("generate", "mini/train")):
        result = call(command, recipe, "--out", tmp_path / "out")
        assert result.exit_code == 2 and f"not for `{command}`" in result.stderr
        assert result.stderr.count("\n") == 1
    half = write(tmp_path / "half.yaml")
    half.write_text("data: {path: pairs}\nencoder: fake-encoder\n")
    result = call("recipes", "check", half)
    assert result.stderr.splitlines() == [f"{half}:1:1: 'model' is missing"]


def test_the_schema_is_printed() -> None:
    result = call("recipes", "schema", "--for", "train")
    assert json.loads(result.stdout) == json.loads(json.dumps(schema()))
    Draft202012Validator.check_schema(schema())
    assert "source" in json.loads(call("recipes", "schema").stdout)["properties"]


def valid(document: object) -> bool:
    return Draft202012Validator(schema()).is_valid(document)


def test_the_schema_knows_the_options_of_encoders(path: Path) -> None:
    assert valid(LEAST)
    assert valid(yaml.safe_load(load_training_recipe(path).as_yaml()))
    llava = {"use": "llava", "model": "a/b", "layer": -2}
    assert valid(LEAST | {"encoder": llava})
    assert not valid(LEAST | {"encoder": llava | {"layers": 3}})
    assert not valid(LEAST | {"encoder": "fake-editor"})
    assert not valid(LEAST | {"steps": -1})
    model = {"model": "a/b", "connector": "identity"}
    assert valid(LEAST | {"model": model})
    assert not valid(LEAST | {"model": model | {"connector": "q-former"}})


def test_the_papers_training_starts_from_stable_diffusion_with_instruct_pix2pixs_settings() -> None:
    recipe = load_training_recipe("paper-train")
    assert recipe.model.init == "sd15"
    assert recipe.data.resolution == 256
    assert recipe.learning_rate == 1e-4
    assert recipe.align is None
    # configs/train.yaml of timothybrooks/instruct-pix2pix mirrors half of the pairs, and its
    # trainer does not clip gradients.
    assert recipe.data.flip
    assert recipe.max_gradient_norm is None
    assert load_training_recipe("recommended-train").model.init == "ip2p"
