"""Models say what images they are made for; a run over others is warned of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasonpix.errors import WeightsError
from reasonpix.generation.model_domains import run_warnings
from reasonpix.generation.pipeline import stages_of
from reasonpix.generation.plan import plan_of
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.recipe_catalog import locate
from reasonpix.generation.run_folder import RunFolder
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.intended_images import (
    IntendedImages,
    domain_of_dataset,
    domain_warnings,
    read_intended_images,
)

STICKERS = IntendedImages(domain="stickers", description="drawings of stickers")
FACES = IntendedImages(domain="faces", description="photographs of faces")


def folder(path: Path, text: str) -> ModelOptions:
    path.mkdir()
    (path / "intended_images.json").write_text(text)
    return ModelOptions(model=str(path))


def test_a_folder_of_weights_says_what_it_is_for(tmp_path: Path) -> None:
    assert read_intended_images(folder(tmp_path / "a", STICKERS.model_dump_json())) == STICKERS
    assert read_intended_images(ModelOptions(model=str(tmp_path))) is None
    assert read_intended_images(ModelOptions(model="nobody/model", cache_dir=tmp_path)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "intended_images.json of .* is not valid JSON"),
        ('{"domain": "faces"}', "description: Field required; it needs `domain`"),
        ('{"domain": "", "description": "faces"}', "domain: "),
        ('{"domain": "a", "description": "b", "size": 3}', "size: "),
    ],
)
def test_a_damaged_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        read_intended_images(folder(tmp_path / "a", text))


def test_of_a_hub_model_only_the_cache_is_read(tmp_path: Path) -> None:
    root = tmp_path / "models--nobody--faces"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("ab12")
    (root / "snapshots/ab12").mkdir(parents=True)
    (root / "snapshots/ab12/intended_images.json").write_text(FACES.model_dump_json())
    options = ModelOptions(model="nobody/faces", cache_dir=tmp_path)
    assert read_intended_images(options) == FACES


def test_models_with_the_same_purpose_share_a_line() -> None:
    made_for = [("captioner", STICKERS), ("editor", STICKERS), ("judge", FACES), ("clip", None)]
    stickers, faces = domain_warnings(made_for, "", "your images")
    assert stickers.startswith("captioner, editor: made for drawings of stickers only; if your im")
    assert faces.startswith("judge: made for photographs of faces only")
    assert len(domain_warnings(made_for, "faces", "your images")) == 1
    assert domain_warnings(made_for[:2], "stickers", "they") == []
    assert domain_warnings([("clip", None)], "", "they") == []


def test_a_published_dataset_says_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nimage_domain: faces\ntags: [a]\n---\n# Title\n")
    assert domain_of_dataset(tmp_path) == "faces"
    for text in ("# Title\n", "---\nimage_domain: [1]\n---\n", "---\n{\n---\n", "---\n", ""):
        (tmp_path / "README.md").write_text(text)
        assert domain_of_dataset(tmp_path) == ""
    assert domain_of_dataset("nobody/dataset") == ""
    (tmp_path / "README.md").write_text("---\nimage_domain: faces\n---\n")
    for name, options in {
        "image-folder": {"path": str(tmp_path)},
        "hf-dataset": {"path": str(tmp_path)},
    }.items():
        given = registry.find("source", name).Options.model_validate(options)
        assert registry.fingerprint_facts("source", name, given)["domain"] == "faces"


mini = pytest.importorskip("reasonpix_mini")


def test_every_mini_checkpoint_says_what_it_is_for() -> None:
    carried = {name: path for name, path in mini.checkpoints().items() if path.is_dir()}
    assert len(carried) >= 10
    for path in carried.values():
        intended = read_intended_images(ModelOptions(model=str(path)))
        assert intended is not None and intended.domain == "sticker-world"


Warned = Callable[..., list[str]]


@pytest.fixture
def warned(tmp_path: Path) -> Warned:
    """The warnings of a shipped recipe with another source."""

    def read(recipe: str, *overrides: str) -> list[str]:
        loaded = load_recipe(locate(recipe), overrides)
        plan = plan_of(loaded, RunFolder(tmp_path / "run"))
        return run_warnings(plan, [stage.entry for stage in stages_of(loaded)])

    return read


@pytest.mark.parametrize("recipe", ["mini/part1", "mini/part2", "mini/part3", "mini/benchmark"])
def test_no_mini_recipe_warns(recipe: str, warned: Warned) -> None:
    assert warned(recipe) == []


def test_mini_models_on_other_images_are_warned_of(warned: Warned, tmp_path: Path) -> None:
    source: dict[str, Any] = {"use": "image-folder", "path": str(tmp_path)}
    [line] = warned("mini/part3", f"source={json.dumps(source)}")
    for part in ("captioner blip2", "grounder grounding-dino", "editor gligen"):
        assert part in line
    assert "scenes of the sticker world" in line and "source `image-folder`" in line
    fakes = ("captioner=fake-captioner", "grounder=fake-grounder", "editor=fake-editor")
    overrides = [f"pipeline.{slot}" for slot in fakes]
    assert warned("mini/part3", f"source={json.dumps(source)}", *overrides) == []
    [line] = warned("mini/part3", f"source={json.dumps(source)}", *overrides[1:])
    assert re.match("captioner blip2: made for", line)
