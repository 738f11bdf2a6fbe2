"""The record of what the shipped mini checkpoints were trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import reasonpix_mini
from PIL import Image
from reasonpix_mini import stickers, training_data, world
from reasonpix_mini.measure.instructed import cases
from reasonpix_mini.training.instruct_pix2pix import edit

from reasonpix.datasets.training_data import TrainingData, image_hash, read_training_data
from reasonpix.plugin import registry

EDITING = ("instruct-pix2pix", "reasonpix2pix")
ALL = (*EDITING, "stable-diffusion")


def recorded(name: str) -> TrainingData:
    folder = Path(reasonpix_mini.__file__).parent / "checkpoints" / name
    return read_training_data(folder / "training_data.json")


def rendered(scene: world.Scene) -> list[str]:
    return [image_hash(Image.fromarray(scene.render()))]


@pytest.mark.parametrize("name", ALL)
def test_every_checkpoint_that_a_method_uses_has_a_record(name: str) -> None:
    assert registry.checkpoints()[f"mini/{name}"].is_dir()
    data = recorded(name)
    assert data.datasets and not data.unrecorded


@pytest.mark.parametrize("name", ALL)
def test_training_hints_are_known_and_held_out_ones_are_not(name: str) -> None:
    data = recorded(name)
    for category in world.categories().values():
        assert all(data.has_instruction(f"Put {hint} there.") for hint in category.hints)
        assert not any(data.has_instruction(hint) for hint in category.held_out_hints)
    for case in cases(20):
        assert data.has_instruction(case.instructions["train"])
        assert not data.has_instruction(case.instructions["held_out"])
        # The templates are those of training.
        assert data.has_instruction(case.instructions["direct"])
        assert data.has_instruction(case.instructions["plain"])


@pytest.mark.parametrize("name", EDITING)
@pytest.mark.parametrize("index", [0, 777, 23_999])
def test_scenes_of_training_are_known_and_others_are_not(name: str, index: int) -> None:
    data, one = recorded(name), edit("train", index)
    assert data.has_image(rendered(one.before)) and data.has_image(rendered(one.after))
    assert not data.has_image(rendered(edit("train", 24_000 + index).before))
    assert not data.has_image(rendered(world.scene("test", index)))
    part = world.scene("train", index % 3500)
    assert data.has_image(rendered(stickers.edit(part).after)) is bool((index % 3500 + 1) % 10)


def test_a_few_scenes_recorded_again_are_part_of_the_record() -> None:
    data = recorded("instruct-pix2pix")
    again = training_data.rendered_edits(5) | training_data.part1(5)
    assert again.images <= data.images and len(again.images) == 20
    assert again.instructions <= data.instructions and again.phrases == data.phrases
    scenes = training_data.scenes(3)
    assert scenes.images <= recorded("stable-diffusion").images
