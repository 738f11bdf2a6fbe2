"""Numbers that are not finite become a reason, in every command, and never a black image."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import httpx2
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from reasonpix.cli.main import cli
from reasonpix.editing.decoded_images import NOT_FINITE, decoded_image
from reasonpix.editing.pipeline import EditTask, ReasonPix2Pix
from reasonpix.errors import ReasonpixError
from reasonpix.evaluation.results import EvaluationFolder
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.recipe_catalog import locate
from reasonpix.generation.run_folder import RunFolder
from reasonpix.plugin.types import Problem
from tests.support.benchmark_rows import benchmark, row
from tests.support.serve_files import ask, picture, serving
from tests.support.tiny_model import make_x_nan, overwrite_number, write_pipeline, write_tiny

NAN, INFINITY = float("nan"), float("inf")


def test_an_image_is_decoded_from_finite_numbers_only() -> None:
    latents = torch.zeros(4, 2, 2)
    pixels = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1).expand(3, 4, 6)
    image = decoded_image(pixels * 1.5, latents)  # overshoots are normal
    assert isinstance(image, Image.Image) and image.size == (6, 4)
    assert image.getpixel((5, 3)) == (0, 128, 255)
    for value in (NAN, INFINITY, -INFINITY):
        for spoilt in (0, 1):
            both = [pixels.clone(), latents.clone()]
            both[spoilt][-1, -1, -1] = value
            assert decoded_image(*both) == Problem(status="failed", reason=NOT_FINITE)
    half = (latents + 70_000).half()  # more than float16 holds
    assert decoded_image(pixels, half) == Problem(status="failed", reason=NOT_FINITE)


BROKEN: dict[str, tuple[str, str, float]] = {
    "UNet, NaN": ("unet", "mid_block.resnets.0.conv1.weight", NAN),
    "UNet, infinity": ("unet", "conv_out.bias", INFINITY),
    "VAE's decoder": ("vae", "decoder.conv_in.weight", NAN),
    "VAE's encoder": ("vae", "encoder.conv_out.bias", NAN),
}


@pytest.mark.parametrize("which", BROKEN)
def test_edit_fails_for_weights_that_are_not_finite(which: str, tmp_path: Path) -> None:
    part, tensor, value = BROKEN[which]
    model = write_tiny(tmp_path / "model", num_inference_steps=1)
    overwrite_number(model / part, tensor, value)
    picture().save(tmp_path / "in.png")
    words = ["edit", tmp_path / "in.png", "--instruction", "rain", "--model", model, "--device",
             "cpu", "--out", tmp_path / "edited.png"]  # fmt: skip
    result = CliRunner().invoke(cli, [str(it) for it in words])
    assert result.exit_code == 1
    assert result.stderr.strip().endswith(f"in.png: {NOT_FINITE}")
    assert not (tmp_path / "edited.png").exists()
    with pytest.raises(ReasonpixError, match="image 0: the network's output is not finite"):
        ReasonPix2Pix.from_pretrained(model, device="cpu")([picture()], "rain")


@pytest.fixture(scope="module")
def picky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InstructPix2Pix that computes NaN for every instruction with an x."""
    return make_x_nan(write_pipeline(tmp_path_factory.mktemp("nan") / "model", 8))


def test_the_other_edits_of_a_batch_are_unaffected(picky: Path) -> None:
    model = ReasonPix2Pix.from_pretrained(picky, device="cpu")
    assert model.rows == 4  # all in one batch
    tasks = [EditTask(picture(), words) for words in ("rain", "a fox", "snow", "six")]
    results = dict(model.edit(tasks, model.resolve_settings(num_inference_steps=2)))
    failed = Problem(status="failed", reason=NOT_FINITE)
    assert [results[number] == failed for number in range(4)] == [False, True, False, True]
    (alone,) = model([picture()], "snow", num_inference_steps=2)
    assert results[2].tobytes() == alone.tobytes()  # type: ignore[union-attr]


def test_evaluate_counts_it_as_a_failure(picky: Path, tmp_path: Path) -> None:
    rows = [row(0, edit_prompt="rain"), row(1, edit_prompt="a fox")]
    data = benchmark(tmp_path / "benchmark", rows)
    body = {
        "benchmark": {"path": str(data)},
        "metrics": {"clip": "mini/clip", "dino": "mini/dino"},
        "methods": {
            "Picky": {
                "use": "editing-model",
                "model": str(picky),
                "device": "cpu",
                "num_inference_steps": 2,
            }
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
    words = ["evaluate", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert EvaluationFolder(tmp_path / "out").failures("Picky", "reasoning") == {
        "record-1": NOT_FINITE
    }
    assert "Picky: 1 failed, not in its means" in result.stdout


def test_the_server_says_so(picky: Path) -> None:
    with serving(picky) as (_, url), httpx2.Client(base_url=url, timeout=30) as client:
        good, bad = (ask(client, picture(), words) for words in ("rain", "a fox"))
    assert (good.status_code, bad.status_code) == (200, 422), good.text[:300]
    assert NOT_FINITE in bad.text


def test_generate_keeps_it_as_a_failed_record(tmp_path: Path) -> None:
    mini = Path(str(resources.files("reasonpix_mini"))) / "checkpoints" / "gligen"
    shutil.copytree(mini, tmp_path / "gligen")
    overwrite_number(tmp_path / "gligen/unet", "conv_out.bias", NAN)
    overrides = ("source.count=2", "pipeline.editor.num_inference_steps=1",
                 f"pipeline.editor.model={tmp_path / 'gligen'}")  # fmt: skip
    generate(load_recipe(locate("mini/part3"), overrides), tmp_path / "run")
    ended = list(read_outcomes(RunFolder(tmp_path / "run")))
    assert len(ended) == 2 and not any(outcome.sample.has_edit for outcome in ended)
    assert NOT_FINITE in [outcome.reason for outcome in ended]
