"""Fixtures of the core's tests: throw-away plugins, recipes, and the command line as a user has it.

Nothing is patched. A test that needs a plugin makes a distribution of it, as files on the path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import yaml
from hypothesis import settings

# Servers of tests are on this machine; a test that needs a proxy sets one.
for kind in ("http", "https", "all", "no"):
    os.environ.pop(f"{kind}_proxy", None)
    os.environ.pop(f"{kind}_proxy".upper(), None)

# The same examples in every run, and no time limit on a busy machine.
settings.register_profile("project", derandomize=True, database=None, deadline=None)
settings.load_profile("project")

TRIAL = Path(__file__).parent / "trial"

FAKES = {
    "captioner": "fake-captioner",
    "extractor": "fake-extractor",
    "grounder": "fake-grounder",
    "planner": "fake-planner",
    "editor": "fake-editor",
}

Distribution = Callable[..., Path]
WriteRecipe = Callable[..., Path]
Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribution]:
    """Install a distribution: `distribution("its-name", {"plugin": "module"}, module="source")`.

    `group` is that of its entry points.

    Returns the folder to put on a subprocess's PYTHONPATH; this process has it on its path.
    """
    made: list[str] = []

    def make(
        name: str, plugins: dict[str, str], *, group: str = "reasonpix", **modules: str
    ) -> Path:
        site = tmp_path / f"site-{name}"
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{plugin} = {module}\n" for plugin, module in plugins.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        made.extend(modules)
        monkeypatch.syspath_prepend(site)
        return site

    yield make
    for module in made:
        sys.modules.pop(module, None)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plugins of tests/trial, installed."""
    monkeypatch.syspath_prepend(TRIAL)
    return TRIAL


@pytest.fixture
def write_recipe(tmp_path: Path) -> WriteRecipe:
    """Write a recipe of fakes; `slot=` replaces a component, None leaves it out.

    With `part="rewrite"` there is a planner alone.
    """

    def write(name: str = "recipe.yaml", **changes: object) -> Path:
        recipe: dict[str, object] = {
            key: changes.pop(key) for key in ("part", "seed", "shard_size") if key in changes
        }
        recipe["source"] = changes.pop("source", {"use": "fake-source", "count": 7})
        filters = changes.pop("filters", None)
        fakes = {"planner": FAKES["planner"]} if recipe.get("part") == "rewrite" else FAKES
        pipeline = {**fakes, **changes}
        recipe["pipeline"] = {slot: use for slot, use in pipeline.items() if use is not None}
        if filters is not None:
            recipe["filters"] = filters
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Run `reasonpix …` in a process of its own, in the test's folder."""

    def run(
        *arguments: str | Path, path: tuple[Path, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        return subprocess.run(
            [sys.executable, "-m", "reasonpix", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """An S3 server of this test session, as environment variables."""
    from tests.support.s3_server import s3_server

    with s3_server() as environment:
        yield environment


_folders = count()


@pytest.fixture
def s3(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new folder on S3."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/run-{next(_folders)}"


@pytest.fixture
def memory() -> str:
    """The URL of a new folder in this process's memory."""
    return f"memory://remote-{next(_folders)}/run"
