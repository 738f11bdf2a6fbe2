"""What is said of cases that a method was trained on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from reasonpix.cli.main import cli
from reasonpix.datasets.training_data import TrainingData
from reasonpix.editing.method import EditingModelMethod, EditingModelOptions
from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.cases import Case
from reasonpix.evaluation.results import EvaluationFolder
from reasonpix.evaluation.training_overlap import (
    TrainingOverlap,
    content_of,
    measure_overlap,
    method_overlaps,
)
from reasonpix.plugin.components import Method
from reasonpix.plugin.fakes import FakeMethod, FakeMethodOptions
from tests.support.benchmark_rows import benchmark, row, scene


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = benchmark(tmp_path_factory.mktemp("bench"), [row(number) for number in range(4)])
    return list(read_benchmark(BenchmarkOptions(path=str(folder)), Path()).cases)


def overlap(cases: list[Case], **contents: Any) -> TrainingOverlap:
    return measure_overlap(TrainingData.of_dataset("part1", 9, **contents), map(content_of, cases))


@pytest.mark.parametrize(
    ("contents", "images", "direct", "reasoning"),
    [
        ({}, 0, 0, 0),
        ({"images": [scene(0), scene(7)]}, 1, 0, 0),
        ({"images": [scene(1, edited=True), scene(1)]}, 1, 0, 0),  # one case, not two
        ({"instructions": ["turn the bee to a rabbit number 2"]}, 0, 1, 0),
        ({"instructions": ["Something with ears, number 2!", "Something else"]}, 0, 0, 1),
        ({"phrases": ["with ears"]}, 0, 0, 4),
        ({"phrases": ["number 3"]}, 0, 1, 1),
    ],
)
def test_cases_are_counted_by_what_they_share(
    cases: list[Case], contents: Any, images: int, direct: int, reasoning: int
) -> None:
    found = overlap(cases, **contents)
    assert found.images == images
    assert found.instructions == {"direct": (direct, 4), "reasoning": (reasoning, 4)}
    assert found.is_clean is not any((images, direct, reasoning))


def test_counts_in_words(cases: list[Case]) -> None:
    found = overlap(cases, phrases=["with ears"], images=[scene(0)])
    assert found.sentence("IP2P") == (
        "The training data of IP2P (part1) contain 0 of 4 direct instructions, 4 of 4 reasoning "
        "instructions and the images of 1 of 4 cases."
    )
    clean = found.model_copy(
        update={"images": 0, "instructions": {}, "unrecorded": ("timbrooks/instruct-pix2pix",)}
    )
    assert clean.sentence("Ours") == (
        "The training data of Ours (part1) share nothing with the benchmark. What "
        "timbrooks/instruct-pix2pix was trained on before is unknown."
    )


def editing_model(folder: Path) -> Method[Any]:
    return EditingModelMethod(EditingModelOptions(model=str(folder)))


def test_methods_are_compared_by_what_lies_beside_their_weights(
    cases: list[Case], tmp_path: Path
) -> None:
    for name in ("recorded", "bare"):
        (tmp_path / name).mkdir()
    TrainingData.of_dataset("p", 1, phrases=["with ears"]).write(tmp_path / "recorded")
    found = method_overlaps(
        {
            "recorded": editing_model(tmp_path / "recorded"),
            "bare": editing_model(tmp_path / "bare"),
            "without weights": FakeMethod(FakeMethodOptions()),
            "mini": EditingModelMethod(EditingModelOptions(model="mini/instruct-pix2pix")),
        },
        cases,
    )
    assert found["recorded"] is not None and found["recorded"].instructions["reasoning"] == (4, 4)
    assert found["bare"] is None and found["without weights"] is None
    assert found["mini"] is not None and found["mini"].is_clean


@pytest.mark.parametrize("use", ["edict", "null-text", "instruct-diffusion"])
def test_methods_of_plugins_are_compared_too(cases: list[Case], use: str) -> None:
    from reasonpix.plugin import registry

    model = "instruct-pix2pix" if use == "instruct-diffusion" else "stable-diffusion"
    options = registry.find("method", use).Options(model=f"mini/{model}")
    method = registry.build("method", use, options)
    assert isinstance(method, Method)
    found = method_overlaps({use: method}, cases)[use]
    assert found is not None and found.is_clean
    assert "sticker world" in found.datasets[0]


def test_evaluate_tells_before_the_first_edit_and_in_all_results(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hint = "has long ears and hops through the clover"
    rows = [row(n, edit_prompt=f"{text}.") for n, text in enumerate((f"Show what {hint}", "Else"))]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "benchmark": {"path": str(benchmark(tmp_path / "bench", rows))},
                "metrics": {"clip": "mini/clip", "dino": "mini/dino"},
                "methods": {
                    "IP2P": {
                        "use": "editing-model",
                        "model": str(model_with_record(tmp_path / "model", hint)),
                        "num_inference_steps": 1,
                    },
                    "Red": "fake-method",
                },
            }
        )
    )
    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(cli, ["evaluate", str(recipe), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    told = "0 of 2 direct instructions, 1 of 2 reasoning instructions"
    assert told in caplog.text
    flat = " ".join(result.output.split())
    assert told in flat and "The training data of Red are unknown." in flat
    folder = EvaluationFolder(tmp_path / "out")
    assert folder.training_overlaps["Red"] is None
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f'<li class="why">The training data of IP2P (hints) contain {told}' in page
    assert "<li>The training data of Red are unknown.</li>" in page
    assert "A model may repeat what it was trained on." in page
    assert (
        '"reasoning": [\n     1,\n     2\n    ]' in (tmp_path / "out" / "report.json").read_text()
    )


def model_with_record(folder: Path, hint: str) -> Path:
    """Mini InstructPix2Pix by links, with a record of its own."""
    from reasonpix.plugin import registry

    carried = registry.checkpoint("mini/instruct-pix2pix")
    assert carried is not None
    folder.mkdir()
    for part in carried.iterdir():
        if part.name != "training_data.json":
            (folder / part.name).symlink_to(part)
    TrainingData.of_dataset("hints", 1, phrases=[hint]).write(folder)
    return folder
