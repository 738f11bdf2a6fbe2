"""The qualitative grid, of images with and without a ground truth."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from reasonpix.cli.main import cli
from reasonpix.core.images import encode_png
from reasonpix.errors import SourceError
from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.comparison import compare
from reasonpix.evaluation.report.grid import render_grid
from reasonpix.evaluation.report.writer import write_report
from reasonpix.evaluation.results import EvaluationFolder
from tests.evaluation.report.test_report import make
from tests.support.pair_files import picture


def evaluated(tmp_path: Path, images: list[dict[str, str]], **recipe: Any) -> Path:
    body = {
        "benchmark": {"images": images},
        # No case can be measured, so that these are never looked for.
        "metrics": {"clip": str(tmp_path / "nowhere"), "dino": str(tmp_path / "nowhere")},
        "methods": {"Red": "fake-method", "Black": {"use": "fake-method", "tint": 0}},
    } | recipe
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["evaluate", str(tmp_path / "recipe.yaml"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


def unscored(method: str, kind: str, case: int) -> None:
    """No edit can be measured."""


def grid_of(file: Path) -> Image.Image:
    return Image.open(io.BytesIO(file.read_bytes())).convert("RGB")


def test_own_images_are_edited_and_shown_without_ground_truth(tmp_path: Path) -> None:
    sizes = {"wide": (90, 40), "tall": (30, 70), "square": (16, 16)}
    images = []
    for number, (name, size) in enumerate(sizes.items()):
        (tmp_path / f"{name}.png").write_bytes(encode_png(picture(number, size)))
        images.append({"image": str(tmp_path / f"{name}.png"), "instruction": f"Make it {name}."})
    out = evaluated(tmp_path, images)
    folder = EvaluationFolder(out)
    assert list(folder.records) == ["01-wide", "02-tall", "03-square"]
    assert folder.kinds == ["reasoning"]
    page = (out / "report.html").read_text(encoding="utf-8")
    for text in ("Make it wide.", "Make it tall.", "Make it square.", "Training data", "Red"):
        assert text in page
    for absent in ("Methods by metrics", "Differences to", "to do", '<h2 id="plots">'):
        assert absent not in page
    assert json.loads((out / "report.json").read_bytes())["means"] == []
    grid = grid_of(out / "grid-reasoning.png")
    assert grid.width == 2 * 16 + 3 * 256 + 2 * 8  # the input and two methods

    cells = [grid.crop((16 + n * 264, 40, 16 + n * 264 + 256, 290)) for n in range(3)]
    assert len({cell.tobytes() for cell in cells}) == 3
    first = (out / "grid-reasoning.png").read_bytes()
    write_report(out)
    assert (out / "grid-reasoning.png").read_bytes() == first


def test_a_benchmark_with_ground_truth_has_a_column_for_it(tmp_path: Path) -> None:
    comparison = write_report(make(tmp_path / "with", methods=("theirs", "ours")))
    assert grid_of(tmp_path / "with" / "grid-direct.png").width == 2 * 16 + 4 * 256 + 3 * 8
    assert len(comparison.spread("direct")) == 4
    write_report(make(tmp_path / "without", truth=False))
    assert grid_of(tmp_path / "without" / "grid-direct.png").width == 2 * 16 + 3 * 256 + 2 * 8


@pytest.mark.parametrize(
    "instruction", ["🐝" * 40, "把蜜蜂换成猫头鹰" * 20, "word " * 200, "x" * 500]
)
def test_long_instructions_are_broken_into_lines(tmp_path: Path, instruction: str) -> None:
    long = {"instruction": instruction, "methods": ("a" * 100, "b")}
    comparison = compare(make(tmp_path / "out", unscored, **long))
    short = compare(make(tmp_path / "short", unscored, instruction="x", methods=("a", "b")))
    heights = [
        Image.open(io.BytesIO(render_grid(it, "direct", it.spread("direct")))).height
        for it in (comparison, short)
    ]
    assert heights[0] > heights[1]


def test_a_failed_edit_leaves_its_cell_empty(tmp_path: Path) -> None:
    comparison = compare(make(tmp_path / "out", unscored))
    png = render_grid(comparison, "direct", list(comparison.folder.records)[:1])
    grid = Image.open(io.BytesIO(png)).convert("RGB")
    left = 16 + 2 * 264  # input, ground truth, then the methods
    cell = grid.crop((left, 60, left + 256, 60 + 190))
    assert cell.getcolors() == [(cell.width * cell.height, (255, 255, 255))]


def test_images_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"image": name, "instruction": "x"} for name in ("bad.png", "none.png", "none.png")]
    options = BenchmarkOptions.model_validate({"images": rows})
    with pytest.raises(SourceError, match=r"3 broken rows\n  images 1: bad\.png: input image: "):
        read_benchmark(options, tmp_path)


@pytest.mark.parametrize(
    "body", [{}, {"path": "x", "images": [{"image": "a", "instruction": "b"}]}]
)
def test_either_a_benchmark_or_images(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="name either path or images"):
        BenchmarkOptions.model_validate(body)
