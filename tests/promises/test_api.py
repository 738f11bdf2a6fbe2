"""The public Python interface: what docs/api.md documents exists, works and is cheap to import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import reasonpix
from reasonpix.errors import ReasonpixError, RecipeError
from reasonpix.generation.recipe_catalog import shipped
from tests.conftest import WriteRecipe
from tests.promises.test_docs import ROOT, blocks

PAGE = "docs/api.md"


def run_python(code: str, folder: Path) -> str:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_all_public_names_are_documented_and_nothing_else() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    documented = {
        re.match(r"\w+", name)[0]  # type: ignore[index]
        for row in rows
        for name in re.findall(r"`([^`]+)`", row)
    }
    assert documented == set(reasonpix.__all__)


@pytest.mark.parametrize("name", reasonpix.__all__)
def test_every_public_name_exists_and_describes_itself(name: str) -> None:
    value = getattr(reasonpix, name)
    assert name == "__version__" or (value.__doc__ or "").strip()


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'reasonpix' has no attribute 'no_such_name'"):
        _ = reasonpix.no_such_name


def test_the_import_is_light(tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "pydantic", "numpy", "PIL", "pyarrow", "yaml"}
    code = f"import sys, reasonpix; print(sorted(set(sys.modules) & {heavy}))"
    assert run_python(code, tmp_path).strip() == "[]"


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import reasonpix
        try:
            from reasonpix import train
        except reasonpix.ReasonpixError as error:
            print(error)
    """
    printed = run_python(code, tmp_path)
    assert printed == "this needs the package torch: pip install 'reasonpix[train]'\n"


def test_the_example_of_the_page_runs(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    write_recipe()
    generating, loading = blocks(PAGE, "python")
    lines = run_python(generating + loading, tmp_path).splitlines()
    assert lines[0] == "4 samples"
    assert {"input_image", "edit_prompt", "edited_image"} <= set(eval(lines[1]))
    resolved = yaml.safe_load((tmp_path / "runs/first/recipe.yaml").read_text(encoding="utf-8"))
    assert resolved["seed"] == 7


def test_a_recipe_is_a_file_or_a_shipped_name(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    path = write_recipe()
    assert reasonpix.load_recipe(str(path)) == reasonpix.load_recipe(path)
    by_name = reasonpix.load_training_recipe("mini/train")
    assert by_name == reasonpix.load_training_recipe(shipped()["mini/train"])
    with pytest.raises(RecipeError, match="is a recipe for `reasonpix evaluate`, not for `train`"):
        reasonpix.load_training_recipe("mini/table3")
    run = reasonpix.generate(path, tmp_path / "run", limit=1)
    assert reasonpix.publish(str(run), str(tmp_path / "dataset")) == 1


def test_overrides_are_a_mapping_or_the_lines_of_set(write_recipe: WriteRecipe) -> None:
    path = write_recipe()
    changes = {"seed": 3, "source.caption": "a bee: yellow", "filters": [{"use": "no-op"}]}
    lines = ["seed=3", 'source.caption="a bee: yellow"', "filters=[{use: no-op}]"]
    assert reasonpix.load_recipe(path, changes) == reasonpix.load_recipe(path, lines)
    with pytest.raises(RecipeError, match="sead"):
        reasonpix.load_recipe(path, {"sead": 3})


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReasonpixError, match="no dataset format 'webdatset'; did you mean"):
        reasonpix.publish(tmp_path / "run", tmp_path / "dataset", to="webdatset")
