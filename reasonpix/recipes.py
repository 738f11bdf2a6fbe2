"""The recipes that are shipped: `mini/part3` is the name of recipes/mini/part3.yaml."""

from __future__ import annotations

from pathlib import Path

from reasonpix.errors import RecipeError
from reasonpix.plugins import nearest


def _folder() -> Path:
    here = Path(__file__).parent
    installed = here / "shipped_recipes"
    # In a checkout the recipes lie beside the package.
    return installed if installed.is_dir() else here.parent / "recipes"


def shipped() -> dict[str, Path]:
    """All shipped recipes by name, sorted."""
    folder = _folder()
    paths = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def locate(recipe: str) -> Path:
    """The file of a recipe given by path, or by the name of a shipped one."""
    path = Path(recipe)
    if path.is_file():
        return path
    name = recipe.removesuffix(".yaml").removeprefix("recipes/")
    if name in shipped():
        return shipped()[name]
    raise RecipeError([f"{recipe}: no such file, and no shipped recipe{nearest(name, shipped())}"])


def summary(path: Path) -> str:
    """The first comment line of a recipe."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip()
