"""The plugin grounding-dino, on the mini checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from reasonpix_grounding_dino import GroundingDino, GroundingDinoOptions, grounders
from reasonpix_mini import world
from reasonpix_mini.measure.grounding import THRESHOLD

from reasonpix.errors import WeightsError
from reasonpix.plugin.testing import GrounderContract
from reasonpix.plugin.types import Box, Grounding, Problem

FOLDER = resources.files("reasonpix_mini") / "checkpoints" / "grounding-dino"


def loaded(**options: object) -> GroundingDino:
    options = {"model": str(FOLDER), "device": "cpu", "threshold": THRESHOLD} | options
    grounder = GroundingDino(GroundingDinoOptions(**options))
    grounder.load()
    return grounder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def grounder() -> GroundingDino:
    return loaded()


class TestContract(GrounderContract):
    component = GroundingDino
    options: ClassVar = {"model": str(FOLDER), "device": "cpu", "threshold": 0.05}


def groundings(result: tuple[Grounding, ...] | Problem) -> tuple[Grounding, ...]:
    assert not isinstance(result, Problem), result
    return result


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.scene("test", index) for index in range(24)]


@pytest.fixture(scope="module")
def pictures(scenes: list[world.Scene]) -> list[Image.Image]:
    return [Image.fromarray(scene.render()) for scene in scenes]


def test_finds_what_is_there(grounder, scenes, pictures):
    asked = [[p.category for p in scene.placements] for scene in scenes]
    hits = []
    for scene, result in zip(scenes, grounder.ground(pictures, asked), strict=True):
        found = groundings(result)
        assert [g.category for g in found] == [p.category for p in scene.placements]
        for placement, grounding in zip(scene.placements, found, strict=True):
            x0, y0, x1, y1 = placement.box
            truth = Box(x0=x0, y0=y0, x1=x1, y1=y1, width=64, height=64)
            hits.append(grounding.box is not None and grounding.box.iou(truth) >= 0.5)
            assert (grounding.score > THRESHOLD) == (grounding.box is not None)
    assert np.mean(hits) >= 0.85


def test_does_not_find_what_is_absent(grounder, scenes, pictures):
    names = list(world.categories())
    asked = [
        [n for n in names if n not in scene.names][i % 8 :: 8] for i, scene in enumerate(scenes)
    ]
    found = [g.box is not None for r in grounder.ground(pictures, asked) for g in groundings(r)]
    assert len(found) > 60
    assert np.mean(found) <= 0.15


def test_the_word_decides(grounder):
    """One picture, two words: each gets its own box."""
    pair = world.scene("test", 7, names=["bee", "pizza"])
    (result,) = grounder.ground([Image.fromarray(pair.render())], [["pizza", "bee"]])
    pizza, bee = groundings(result)
    assert pizza.box and bee.box
    assert pizza.box.iou(bee.box) < 0.1
    bee_box = Box(**dict(zip(("x0", "y0", "x1", "y1"), pair.placements[0].box, strict=True)),
                  width=64, height=64)  # fmt: skip
    assert bee.box.iou(bee_box) > 0.5


def test_finds_what_an_edit_put_there(grounder, scenes):
    """What the filter that grounds again relies on."""
    names = list(world.categories())
    hits, ghosts = [], []
    for index, before in enumerate(scenes):
        target = [name for name in names if name not in before.names][index]
        after = before.replaced(0, target)
        asked = [[target, before.placements[0].category]]
        new, old = groundings(grounder.ground([Image.fromarray(after.render())], asked)[0])
        box = dict(zip(("x0", "y0", "x1", "y1"), after.placements[0].box, strict=True))
        hits.append(new.box is not None and new.box.iou(Box(**box, width=64, height=64)) >= 0.5)
        ghosts.append(old.box is not None)
    assert np.mean(hits) >= 0.85
    assert np.mean(ghosts) <= 0.15


@pytest.mark.parametrize(
    ("size", "left", "top"),
    [((128, 64), 0, 0), ((128, 64), 64, 0), ((64, 128), 0, 64), ((96, 64), 32, 0)],
)
def test_objects_at_the_sides_are_found(grounder, scenes, pictures, size, left, top):
    """Their places, that is: the mini network was trained on squares, and its boxes are as wide."""
    hits = []
    for scene, picture in list(zip(scenes, pictures, strict=True))[:8]:
        image = Image.new("RGB", size, picture.getpixel((0, 0)))
        image.paste(picture, (left, top))
        placement = scene.placements[0]
        x0, y0, x1, y1 = placement.box
        (found,) = groundings(grounder.ground([image], [[placement.category]])[0])
        if box := found.box:
            x, y = (box.x0 + box.x1) / 2 - left, (box.y0 + box.y1) / 2 - top
        hits.append(bool(box) and x0 <= x <= x1 and y0 <= y <= y1)
    assert np.mean(hits) >= 0.75


def test_unknown_words_find_nothing(grounder, pictures):
    results = grounder.ground(pictures[:8], [["zeppelin", "", "..."]] * 8)
    assert np.mean([g.box is not None for r in results for g in groundings(r)]) <= 0.1


def test_case_and_full_stop_do_not_matter(grounder, scenes, pictures):
    name = scenes[0].names[0]
    (result,) = grounder.ground(pictures[:1], [[name, name.upper(), f" {name}. "]])
    plain, *others = groundings(result)
    assert plain.box
    assert all((g.box, g.score) == (plain.box, plain.score) for g in others)
    assert others[0].category == name.upper()


@pytest.fixture(scope="module")
def mixed(pictures) -> tuple[list[Image.Image], list[list[str]]]:
    """Images of three shapes and texts of two lengths."""
    wide = Image.new("RGB", (150, 97), "white")
    wide.paste(pictures[3], (40, 20))
    images = [*pictures[:6], wide, pictures[6].resize((96, 96)), *pictures[7:12]]
    asked = [["bee", "red fish"], ["snail"], ["cake", "frog", "dog"], ["apple"], [], ["drum"]] * 2
    return images, [*asked, ["rocket"]]


def test_result_does_not_depend_on_the_batch(mixed):
    images, asked = mixed
    one, eight = loaded(batch_size=1), loaded(batch_size=8)
    expected = one.ground(images, asked)
    assert eight.ground(images, asked) == expected
    assert eight.ground(images[::-1], asked[::-1]) == expected[::-1]
    assert [eight.ground([i], [a])[0] for i, a in zip(images, asked, strict=True)] == expected


def test_batches_agree_up_to_rounding(mixed):
    """What a GPU does: queries of one shape and length go through the network together."""
    images, asked = mixed
    alone, together = (loaded(threshold=0.0, text_threshold=0.0) for _ in range(2))
    together._together = 5
    for a, b in zip(alone.ground(images, asked), together.ground(images, asked), strict=True):
        for x, y in zip(groundings(a), groundings(b), strict=True):
            assert x.box and y.box
            assert x.score == pytest.approx(y.score, abs=2e-4)
            assert x.box.xyxy == pytest.approx(y.box.xyxy, abs=0.03)


def test_photographs_of_any_size_and_mode():
    from skimage import data

    images = [
        Image.fromarray(data.astronaut()).crop((0, 0, 211, 333)),
        Image.fromarray(data.camera()).resize((301, 127)),
        Image.fromarray(data.horse()).convert("1"),
        Image.fromarray(data.logo()),
        Image.fromarray(data.coffee()).resize((31, 29)),
    ]
    assert {image.mode for image in images} >= {"RGB", "L", "RGBA"}
    results = loaded(threshold=0.0, text_threshold=0.0).ground(images, [["dog", "cake"]] * 5)
    for image, result in zip(images, results, strict=True):
        for grounding in groundings(result):
            # Box itself rejects corners outside its image.
            assert grounding.box
            assert (grounding.box.width, grounding.box.height) == image.size


def test_a_picture_too_narrow_is_a_problem(grounder, pictures):
    results = grounder.ground([Image.new("RGB", (4, 900)), pictures[0]], [["bee"], ["bee"]])
    assert isinstance(results[0], Problem)
    assert results[0].status == "rejected"
    assert "4x900" in results[0].reason
    assert isinstance(results[1], tuple)


@pytest.mark.parametrize("size", [(8000, 6), (6, 8000), (8000, 1), (1, 3000), (900, 3)])
def test_a_picture_with_a_side_that_vanishes_is_a_problem(grounder, pictures, size):
    results = grounder.ground([Image.new("RGB", size), pictures[0]], [["bee"], ["bee"]])
    assert isinstance(results[0], Problem)
    assert results[0].status == "rejected"
    assert f"{size[0]}x{size[1]} pixels is too narrow for grounding-dino" in results[0].reason
    assert isinstance(results[1], tuple)


def test_overflow_is_a_problem_and_not_an_empty_answer(pictures):
    broken = loaded()
    with torch.no_grad():
        broken._model.model.text_projection.bias.fill_(torch.nan)
    (result,) = broken.ground(pictures[:1], [["bee"]])
    assert isinstance(result, Problem)
    assert result.status == "failed"
    assert "dtype: float32" in result.reason


def test_nothing_asked(grounder, pictures):
    assert grounder.ground(pictures[:2], [[], []]) == [(), ()]
    assert grounder.ground([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        grounder.ground(pictures[:2], [["bee"]])


def test_thresholds(scenes, pictures):
    asked = [scene.names for scene in scenes[:6]]
    for options in ({"threshold": 1.0}, {"text_threshold": 1.0}):
        results = loaded(**options).ground(pictures[:6], asked)
        assert all(g.box is None and g.score == 0 for r in results for g in groundings(r))


def test_bfloat16(grounder, scenes, pictures):
    asked = [scene.names for scene in scenes[:8]]
    exact = grounder.ground(pictures[:8], asked)
    rough = loaded(dtype="bfloat16").ground(pictures[:8], asked)
    same = [
        a.box.iou(b.box) > 0.7 if a.box and b.box else a.box is b.box
        for x, y in zip(exact, rough, strict=True)
        for a, b in zip(groundings(x), groundings(y), strict=True)
    ]
    assert np.mean(same) >= 0.8


def test_missing_folder_says_so():
    with pytest.raises(WeightsError, match=r"no folder '\./no/such'"):
        loaded(model="./no/such")


def test_folder_without_weights_says_what_is_missing(tmp_path: Path):
    copied = tmp_path / "checkpoint"
    shutil.copytree(str(FOLDER), copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no safetensors weights: it has .*config\.json"):
        loaded(model=str(copied))


def test_hub_offline_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        loaded(model="IDEA-Research/grounding-dino-base", cache_dir=tmp_path)


def test_hook_and_defaults():
    assert grounders() == [GroundingDino]
    assert GroundingDinoOptions().model == "IDEA-Research/grounding-dino-base"
    assert json.loads(GroundingDinoOptions().model_dump_json())["threshold"] == 0.35


def test_close_lets_go(pictures):
    grounder = loaded()
    grounder.close()
    with pytest.raises(AttributeError):
        grounder.ground(pictures[:1], [["bee"]])


def test_shipped_weights_are_small_and_half_precision():
    from safetensors import safe_open

    path = Path(str(FOLDER)) / "model.safetensors"
    assert path.stat().st_size < 3_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
