"""What the documentation shows is run as it stands there."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from reasonpix.cli.main import cli
from reasonpix.core.files import yaml_locations
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.plugin.components import Captioner
from reasonpix.plugin.testing import MethodContract, PlannerContract, ScorerContract
from reasonpix.plugin.types import EditPlan, ReplaceRequest
from tests.conftest import Distribution, WriteRecipe

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_plugin_of_the_tutorial_keeps_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, contract = blocks("docs/plugins.md", "python")[:2]
    module = types.ModuleType("reasonpix_loud")
    exec(compile(plugin, "docs/plugins.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "reasonpix_loud", module)
    offered = module.captioners()
    assert [issubclass(component, Captioner) for component in offered] == [True]
    tests: dict[str, type] = {}
    exec(compile(contract, "docs/plugins.md", "exec"), tests)
    case = tests["TestLoud"]()
    case.test_captions_match_images()
    case.test_empty_batch()
    case.test_options_have_descriptions()
    with pytest.raises(ValueError, match="wrod"):
        offered[0].Options(wrod="bee")


def test_the_llm_planner_of_the_tutorial_keeps_its_contract() -> None:
    source = blocks("docs/plugins.md", "python")[2]
    module = types.ModuleType("reasonpix_echo")
    exec(compile(source, "docs/plugins.md", "exec"), module.__dict__)
    [planner] = module.planners()

    class Contract(PlannerContract):
        component = planner

    # The "model" always gives the same plan: for a bee a good one.
    request = ReplaceRequest(caption="a bee", categories=("bee",), seed=0)
    [plan] = Contract().subject.replace([request])
    assert isinstance(plan, EditPlan) and plan.target == "pear"
    assert planner.Options().price is None
    assert Contract().subject.max_answer_tokens == planner.Options().max_tokens
    Contract().test_plans_match_requests()


@pytest.mark.parametrize(
    ("name", "contract"), [("Blur", MethodContract), ("Brightness", ScorerContract)]
)
def test_a_component_of_the_tutorial_keeps_its_contract(name: str, contract: type[Any]) -> None:
    names: dict[str, Any] = {"__name__": name.lower()}
    source = next(it for it in blocks("docs/plugins.md", "python") if f"class {name}(" in it)
    exec(compile(source, "docs/plugins.md", "exec", dont_inherit=True), names)
    subject = type("Subject", (contract,), {"component": names[name]})()
    for test in dir(contract):
        # A module of its own to import it has none.
        if test.startswith("test_") and test != "test_importing_is_light":
            getattr(subject, test)()


def test_the_slot_of_the_tutorial_can_be_installed(
    distribution: Distribution, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = next(it for it in blocks("docs/plugins.md", "python") if "class Masker" in it)
    site = distribution("masker", {"ellipse-masker": "reasonpix_masker"}, reasonpix_masker=source)
    (declared,) = site.glob("*/entry_points.txt")
    declared.write_text(f"{declared.read_text()}[reasonpix.slots]\nmasker = reasonpix_masker\n")
    recipe = load_recipe(write_recipe(masker="ellipse-masker"))
    assert [spec.name for spec in recipe.chain][-3:] == ["plan", "mask", "edit"]
    assert all(ended.status == "ok" for ended in read_outcomes(generate(recipe, tmp_path / "run")))


def test_the_recipes_of_the_docs_are_recipes(tmp_path: Path) -> None:
    replacing, rewriting, merging = blocks("docs/recipes.md", "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(replacing)
    assert [use.name for use in load_recipe(path).filters] == ["eq1", "regrounded"]
    path.write_text(rewriting)
    assert load_recipe(path).part == "rewrite"
    path.write_text(merging)
    gpu = {"device": "cuda", "dtype": "float16"}
    captioner, grounder = yaml_locations.read(path)[0]["pipeline"].values()
    assert (captioner, grounder) == ({"use": "blip2"} | gpu, {"use": "grounding-dino"} | gpu)


PLANNERS = [
    text
    for page in ("docs/llm.md", "README.md")
    for text in blocks(page, "yaml")
    if text.startswith("planner:")
]


@pytest.mark.parametrize("line", PLANNERS)
def test_the_planners_of_the_docs_can_be_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    pairs = "{use: fake-source, caption: a bee, edited_caption: a pear, instruction: swap it}"
    path.write_text(f"part: rewrite\nsource: {pairs}\npipeline:\n  {line}")
    assert line.count("\n") == 1
    load_recipe(path)


def test_the_reader_of_the_docs_is_one(tmp_path: Path) -> None:
    (resolver,) = (text for text in blocks("docs/llm.md", "yaml") if "resolver:" in text)
    others = "  extractor: spacy\n  grounder: fake-grounder\n  editor: fake-editor\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"source: fake-source\n{resolver.replace('filters:', others + 'filters:')}")
    assert [use.name for use in load_recipe(path).filters] == ["resolvable"]


def options_of(words: Sequence[str]) -> tuple[str, set[str]]:
    """The command that `reasonpix` and these words call, and its options."""
    command: click.Command = cli
    context, name = click.Context(cli), "reasonpix"
    for word in words:
        if not isinstance(command, click.Group):
            break
        called = command.get_command(context, word)
        assert called is not None, f"{name} has no command {word!r}"
        command, name = called, f"{name} {word}"
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return name, flags | {"-h", "--help"}


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
    *sorted((ROOT / "plugins/mini/reasonpix_mini/checkpoints").glob("*/README.md")),
    *sorted((ROOT / "recipes").rglob("*.yaml")),
]


def code_of(page: Path) -> str:
    """The code on a page: blocks, indented lines and spans; of a recipe, its comments."""
    text = re.sub(r"\\\n[ #]*", "", page.read_text(encoding="utf-8"))
    if page.suffix == ".yaml":
        return "\n".join(re.findall(r"^# (.*)", text, re.MULTILINE))
    parts = re.findall(r"^```\w*\n(.*?)^```|^ {4}(\S.*?)$|`([^`\n]+)`", text, re.M | re.S)
    return "\n".join("".join(part) for part in parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_of_the_docs_exist(page: Path) -> None:
    calls = re.findall(
        r"^(?:Then: |\.venv/bin/)?reasonpix ([a-z][^\n#|]*)", code_of(page), re.MULTILINE
    )
    for call in calls:
        if call.startswith("hello"):  # the command that docs/plugins.md adds
            continue
        words = call.split()
        name, flags = options_of(words)
        for word in words:
            assert not word.startswith("-") or word in flags, f"{name} has no option {word}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        links = re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
        for target, anchor in links:
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in anchors(path), f"{page.name} links to {target}#{anchor}"
