"""A package by somebody else is installed with pip and used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import Shell, WriteRecipe

THIRD_PARTY = Path(__file__).parents[1] / "third_party"


def test_a_third_party_package_is_installed_and_used(
    shell: Shell, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install = [*pip, "--no-index", "--disable-pip-version-check", "--target", site, THIRD_PARTY]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    recipe = write_recipe(captioner={"use": "loud-captioner", "emphasis": {"times": 3}})
    assert "no captioner 'loud-captioner'" in shell("recipes", "check", recipe).stderr
    assert (
        "loud-captioner       captioner    reasonpix-loud 0.1.0"
        in shell("plugins", "ls", path=(site,)).stdout
    )
    shown = shell("plugins", "show", "loud-captioner", path=(site,))
    assert "  word: What every image is said to show (default 'bee')" in shown.stdout
    done = shell("generate", recipe, "--out", "run", path=(site,))
    assert done.returncode == 0, done.stderr
    resolved = tmp_path / "run" / "recipe.yaml"
    assert resolved.read_text().startswith("# reasonpix 0.1.0\n# reasonpix-loud 0.1.0\n")
    assert yaml.safe_load(resolved.read_text())["pipeline"]["captioner"]["word"] == "bee"
    done = shell("publish", "run", "--out", "dataset", path=(site,))
    assert done.returncode == 0, done.stderr
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "dataset" / "data" / "train-00000.parquet").to_pylist()
    assert {row["caption"] for row in rows} == {"a bee !!!"}


def test_the_third_party_package_needs_public_modules_only() -> None:
    tree = ast.parse((THIRD_PARTY / "reasonpix_loud.py").read_text())
    imported = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("reasonpix")
    }
    assert imported == {"reasonpix.plugin"}
