"""mini/clip and mini/dino tell scenes apart as their cards say, and their trainings run and resume.

Scenes are of the validation split; the cards measure the test split.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reasonpix_mini import lexicon, world
from reasonpix_mini.measure import embeddings
from reasonpix_mini.training import clip, dino
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from reasonpix.plugin import registry

SCENES = 60
NAMES = ("clip", "dino")


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return embeddings.measure(SCENES, "validation")


@pytest.mark.parametrize(
    ("figure", "bound"),
    [
        ("clip_recall", 0.8),
        ("clip_zero_shot", 0.45),
        ("clip_t_ordered", 0.93),
        ("clip_i_over_input", 0.93),
        ("clip_i_over_mistake", 0.93),
        ("clip_neighbours", 0.6),
        ("clip_probe", 0.55),
        ("dino_i_over_input", 0.85),
        ("dino_i_over_mistake", 0.8),
        ("dino_neighbours", 0.15),
        ("dino_probe", 0.3),
    ],
)
def test_scenes_are_told_apart(figures: dict[str, float], figure: str, bound: float) -> None:
    assert bound <= figures[figure] <= 1


def test_every_figure_is_bounded(figures: dict[str, float]) -> None:
    (mark,) = test_scenes_are_told_apart.pytestmark  # type: ignore[attr-defined]
    assert set(figures) == {figure for figure, _ in mark.args[1]}


def folder(name: str) -> Path:
    found = registry.checkpoint(f"mini/{name}")
    assert found is not None
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shipped_is_half_and_small_and_plain(name: str) -> None:
    assert {value.dtype for value in load_file(folder(name) / "model.safetensors").values()} <= {
        torch.float16,
        torch.int64,
    }
    assert (folder(name) / "model.safetensors").stat().st_size < 0.7e6
    assert {path.suffix for path in folder(name).iterdir()} == {".json", ".md", ".safetensors"}
    for file in folder(name).glob("*.json"):
        text = file.read_text()
        assert "auto_map" not in text and "/work" not in text and "/tmp" not in text


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_read(name: str) -> None:
    _, report = AutoModel.from_pretrained(
        folder(name),
        trust_remote_code=False,
        output_loading_info=True,
        **({"add_pooling_layer": False} if name == "dino" else {}),
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def preprocessed(name: str, image: Image.Image) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(folder(name), backend="pil")
    return processor(image, return_tensors="pt").pixel_values


def test_clip_sees_scenes_pixel_by_pixel() -> None:
    pixels = world.scene("validation", 3).render()
    facts = json.loads((folder("clip") / "preprocessor_config.json").read_text())
    expected = (pixels / 255 - facts["image_mean"]) / facts["image_std"]
    seen = preprocessed("clip", Image.fromarray(pixels))
    assert np.allclose(seen[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    # Others are resized by their shorter side and cut.
    assert preprocessed("clip", Image.new("RGB", (300, 90))).shape == (1, 3, 64, 64)


def test_dino_sees_the_centre() -> None:
    image = Image.fromarray(world.scene("validation", 3).render())
    side = AutoModel.from_pretrained(folder("dino"), add_pooling_layer=False).config.image_size
    whole = round(side * 256 / 224)
    low = (whole - side) // 2
    resized = image.resize((whole, whole), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.crop((low, low, low + side, low + side))) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    seen = preprocessed("dino", image)
    assert np.allclose(seen[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_words_are_tokens_and_the_end_is_what_is_pooled() -> None:
    words = AutoTokenizer.from_pretrained(folder("clip"))
    for category in world.categories().values():
        for name in lexicon.names(category):
            assert len(words(name).input_ids) == len(name.split()) + 2, name
    model = AutoModel.from_pretrained(folder("clip"))
    assert model.config.text_config.eos_token_id == words.eos_token_id != 2
    alone, padded = (
        model.get_text_features(**words(texts, padding=True, return_tensors="pt")).pooler_output[0]
        for texts in (["a bee"], ["a bee", "a dog, a cake and an elephant"])
    )
    assert torch.allclose(alone, padded, atol=1e-4)
    # Any text encodes: longer ones are cut at the model's own length.
    long = words(["Zürich, " * 40], truncation=True, return_tensors="pt")
    assert long.input_ids.shape[1] == model.config.text_config.max_position_embeddings
    assert long.input_ids[0, -1] == words.eos_token_id
    assert model.get_text_features(**long).pooler_output.isfinite().all()


def test_other_words_for_a_category_are_near_its_name() -> None:
    texts = embeddings.clip().texts
    names = texts([f"a {name}" for name in ("rabbit", "sailboat", "dog")])
    others = texts([f"a {name}" for name in ("bunny", "boat", "puppy")])
    assert (names @ others.T).argmax(1).tolist() == [0, 1, 2]


# --- training ------------------------------------------------------------------------------------


Train = Callable[..., None]


@pytest.mark.parametrize("training", [clip, dino])
def test_training_runs_and_goes_on_where_it_was(training: Any, tmp_path: Path) -> None:
    once = {"steps": 4, "batch": 4, "scenes": 4}
    training.train(tmp_path, **once | {"steps": 2}, resume=False)
    before = load_file(tmp_path / "average.safetensors")
    shutil.rmtree(tmp_path / "checkpoint")
    training.train(tmp_path, **once, resume=True)
    assert json.loads((tmp_path / "step.json").read_text()) == {"step": 4}
    after = load_file(tmp_path / "average.safetensors")
    distances = [(after[key] - before[key]).abs().max().item() for key in before]
    assert 0 < max(distances) < 0.5  # further, not from the start again
    model = AutoModel.from_pretrained(
        tmp_path / "checkpoint",
        **({"add_pooling_layer": False} if training is dino else {}),
    )
    assert next(model.parameters()).dtype == torch.float16


def test_equal_captions_are_no_negatives() -> None:
    similarities = torch.tensor([[5.0, 4.0, 1.0], [4.0, 5.0, 1.0], [1.0, 1.0, 5.0]])
    alone = torch.eye(3, dtype=torch.bool)
    same = alone.clone()
    same[0, 1] = same[1, 0] = True
    assert clip.loss(similarities, alone) > 0.2
    # What is left for the first two is one negative at a distance of 4, for the third two.
    expected = (2 * np.log1p(np.exp(-4)) + np.log1p(2 * np.exp(-4))) / 3
    assert clip.loss(similarities, same).item() == pytest.approx(expected, rel=1e-4)


def test_a_view_is_never_compared_with_itself() -> None:
    """A student that agrees with the teacher only on the same view gains nothing."""
    one, two = torch.eye(4)[:1], torch.eye(4)[1:2]
    centre = torch.zeros(4)
    swapped = dino.loss([two, one], [one, two], centre)
    assert swapped < 0.1 < dino.loss([one, two], [one, two], centre)


def test_recolouring_keeps_the_grey_of_greys_and_forgets_hues() -> None:
    rng = np.random.default_rng(0)
    grey = torch.rand(50, 1, 5, 5).expand(-1, 3, -1, -1)
    out = dino.recoloured(rng, grey)
    assert torch.allclose(out, out.mean(1, keepdim=True).expand_as(out), atol=1e-5)
    red = torch.zeros(50, 3, 5, 5)
    red[:, 0] = 1
    out = dino.recoloured(rng, red)
    spread = (out.amax(1) - out.amin(1))[:, 0, 0]
    assert (spread < 1e-5).float().mean() == pytest.approx(1 / 6, abs=0.12)
    assert spread.max() > 1


def test_crops_are_parts_of_their_scene() -> None:
    scenes = np.stack([world.scene("train", index).render() for index in range(3)])
    for side in (dino.SIDE, dino.LOCAL_SIDE):
        views = dino.crops(np.random.default_rng(1), scenes, side)
        assert views.shape == (3, 3, side, side) and views.isfinite().all()
        again = dino.crops(np.random.default_rng(1), scenes, side)
        assert torch.equal(views, again)


def test_a_scene_keeps_its_objects_on_another_background() -> None:
    one, other = dino.pictures("train", 6)
    for index in range(6):
        scene = world.scene("train", index, objects=1 if index % 2 else None)
        assert np.array_equal(one[index], scene.render())
        inside = scene.masks().any(0)
        equal = (one[index] == other[index]).all(-1)
        assert equal[inside].mean() > 0.3 > 0.2 > equal[~inside].mean()


def test_states_that_are_near_each_other_are_pushed_apart() -> None:
    states = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], requires_grad=True)
    value = dino.nearness(states)
    value.backward()
    assert states.grad is not None
    assert dino.nearness((states - 0.1 * states.grad).detach()) < value
