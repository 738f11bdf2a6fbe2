"""The mini editing models do what their cards say, on scenes of the validation split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from reasonpix_mini import world
from reasonpix_mini.measure.instructed import Case, cases, judged
from reasonpix_mini.plain_instructions import plain_instruction

from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.plugin import registry

MODELS = ("mini/instruct-pix2pix", "mini/reasonpix2pix")
SCENES = 16


@pytest.fixture(scope="module")
def tests() -> list[Case]:
    return cases(SCENES, "validation")


def edited(model: str, tests: list[Case], kind: str) -> list[Image.Image]:
    inputs = [Image.fromarray(case.scene.render()) for case in tests]
    editor = ReasonPix2Pix.from_pretrained(model, device="cpu")
    return editor(inputs, [case.instructions[kind] for case in tests], seed=list(range(SCENES)))


@pytest.mark.parametrize("model", MODELS)
def test_a_direct_instruction_is_followed(model: str, tests: list[Case]) -> None:
    pictures = [np.asarray(image) for image in edited(model, tests, "direct")]
    assert sum(judged(tests, pictures)) >= SCENES * 0.8
    for case, picture in zip(tests, pictures, strict=True):
        # What is far from the object stays about as it was.
        before, (x0, y0, x1, y1) = case.scene.render().astype(int), case.box
        far = np.ones(before.shape[:2], bool)
        far[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = False
        assert np.abs(before - picture)[far].mean() < 20


def test_hints_never_seen_are_understood_only_by_the_model_that_reasons(tests: list[Case]) -> None:
    right = {
        model: sum(judged(tests, [np.asarray(image) for image in edited(model, tests, "held_out")]))
        for model in MODELS
    }
    assert right["mini/reasonpix2pix"] > right["mini/instruct-pix2pix"]


def test_the_plain_words_of_an_edit() -> None:
    assert (
        plain_instruction("a bee and a dog", "a bee and an apple")
        == "Replace the dog with an apple."
    )


@pytest.mark.parametrize("model", MODELS)
def test_what_is_shipped_is_half_and_names_no_machine(model: str) -> None:
    folder = registry.checkpoint(model)
    assert folder is not None
    for file in folder.rglob("*.json"):
        assert "/work" not in (text := file.read_text()) and "/tmp" not in text, file
    from safetensors.torch import load_file

    for file in folder.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} <= {torch.float16, torch.int64}


def test_hints_of_the_test_are_none_of_the_training(tests: list[Case]) -> None:
    training = {hint for category in world.categories().values() for hint in category.hints}
    for case in tests:
        assert not any(hint in case.instructions["held_out"] for hint in training)
