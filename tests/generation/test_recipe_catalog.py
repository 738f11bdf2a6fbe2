from __future__ import annotations

from pathlib import Path

import pytest

from reasonpix.errors import RecipeError
from reasonpix.generation.recipe import load_recipe
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


@pytest.mark.parametrize("name", ["part1", "part2", "part3", "benchmark"])
def test_the_papers_recipes_have_no_filter_that_the_paper_does_not_name(name: str) -> None:
    paper, recommended = (load_recipe(f"{kind}-{name}") for kind in ("paper", "recommended"))
    # Eq. 1 filters the pairs of InstructPix2Pix, which only Part I uses.
    assert [use.name for use in paper.filters] == (["eq1"] if name == "part1" else [])
    assert len(recommended.filters) > len(paper.filters)
    assert recommended.source == paper.source
    assert recommended.pipeline == paper.pipeline


def test_the_recommended_benchmark_is_not_chosen_by_the_grounder_that_measures() -> None:
    filters = [use.name for use in load_recipe("recommended-benchmark").filters]
    assert filters and "regrounded" not in filters
