from __future__ import annotations

from pathlib import Path

import pytest

from reasonpix.errors import RecipeError
from reasonpix.generation.recipe_catalog import locate, shipped, summary


@pytest.mark.parametrize("name", ["mini/part3", "mini/part3.yaml", "recipes/mini/part3.yaml"])
def test_a_shipped_recipe_is_found_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(name) == shipped()["mini/part3"]


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("paper-part3").write_text("# mine\n")
    assert locate("paper-part3") == Path("paper-part3")
    assert summary(locate("paper-part3")) == "mine"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"mini/prt3: no such file.*did you mean 'mini/part3'"):
        locate("mini/prt3")
