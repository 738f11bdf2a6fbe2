"""A plugin adds a slot and its stage: tests/third_party/masker, installed as it would be."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from PIL import Image

from reasonpix.cli.main import cli
from reasonpix.errors import PluginError, RecipeError
from reasonpix.generation.chains import chain_of, declared
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.pipeline import stages_of
from reasonpix.generation.recipe import load_recipe, schema
from reasonpix.generation.run_folder import RunFolder
from reasonpix.inspection.gallery import write_gallery
from reasonpix.inspection.lineage import trace_record
from reasonpix.inspection.status import read_status
from reasonpix.plugin import registry
from reasonpix.plugin.slots import SLOTS
from reasonpix.plugin.testing import ScorerContract
from reasonpix.plugin.types import EditPlan, Record
from tests.conftest import Distribution, WriteRecipe

PACKAGE = Path(__file__).parents[1] / "third_party" / "masker"
MASKER = {"use": "ellipse-masker", "scale": 0.5}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed by pip."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install = [*pip, "--no-index", "--disable-pip-version-check", "--target", site, PACKAGE]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def masker(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(site)
    return site


def computed(run: RunFolder) -> list[str]:
    lines = list(run.journal())
    last = max(i for i, line in enumerate(lines) if line.get("began"))
    return [line["stage"].rpartition("-")[0] for line in lines[last:] if "ok" in line]


# -- A run with a masker --------------------------------------------------------------------------


@pytest.mark.usefixtures("masker")
def test_a_new_slot_runs_from_the_recipe_to_the_gallery(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(
        masker=MASKER, editor="mask-editor", source={"use": "fake-source", "count": 3}
    )
    recipe = load_recipe(path, ["resources={mask: {num_cpus: 2}}"])
    run = generate(recipe, tmp_path / "run")
    assert computed(run) == ["read", "caption", "extract", "ground", "plan", "mask", "edit"]
    for outcome in read_outcomes(run):
        assert outcome.status == "ok"
        masks = outcome.sample.outputs["mask"].model_dump()
        assert masks["categories"] == ("bee", "rabbit")
        # The grounder's box is 16 pixels wide, the ellipse half of that; the rabbit is on top.
        assert masks["areas"][0] == 0 < masks["areas"][1] < 81
        label = outcome.sample.image("mask")
        assert label.getpixel((16, 16)) == (2, 2, 2) and label.getpixel((0, 0)) == (0, 0, 0)

    [stage] = [it for it in read_status(run).stages if it.stage == "mask"]
    assert (stage.done, stage.ok) == (1, 3)

    record = next(iter(read_outcomes(run))).sample.record_id
    [step] = [it for it in trace_record(run, record).steps if it.stage == "mask"]
    assert step.status == "ok" and step.output["categories"] == ["bee", "rabbit"]
    assert step.image is not None and (step.image["width"], step.image["height"]) == (32, 32)
    assert step.package == "reasonpix-masker 0.1.0"

    page = Path(write_gallery(run)).read_text()
    assert page.count('alt="mask"') == 3
    assert "<summary>mask</summary>" in page and "&#34;areas&#34;" in page

    head = (tmp_path / "run" / "recipe.yaml").read_text().splitlines()
    assert "# reasonpix-masker 0.1.0" in head


@pytest.mark.usefixtures("masker")
def test_the_editor_reads_the_mask(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = write_recipe(
        masker=MASKER, editor="mask-editor", captioner={"use": "fake-captioner", "caption": "a bee"}
    )
    run = generate(load_recipe(path), tmp_path / "run")
    for outcome in read_outcomes(run):
        before, after = outcome.sample.image(), outcome.sample.edited_image()
        assert after.getpixel((16, 16)) == (255, 255, 255) != before.getpixel((16, 16))
        assert after.getpixel((9, 9)) == before.getpixel((9, 9))  # in the box, not in the ellipse

    # Without a masker the editor has nothing to read.
    with pytest.raises(RecipeError, match=r"editor: it needs mask; add `masker:` under `pipeline:"):
        load_recipe(write_recipe(editor="mask-editor"))


@pytest.mark.usefixtures("masker")
def test_another_option_computes_the_mask_and_the_edit_again_only(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(masker=MASKER, editor="mask-editor")
    generate(load_recipe(path), tmp_path / "run")
    run = generate(load_recipe(path, ["pipeline.masker.scale=1.0"]), tmp_path / "run")
    assert computed(run) == ["mask", "edit"]


@pytest.mark.usefixtures("masker")
def test_an_installed_slot_changes_no_recipe_that_leaves_it_out(
    write_recipe: WriteRecipe, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [stage.entry.folder for stage in stages_of(load_recipe(write_recipe()))]
    monkeypatch.setattr(sys, "path", [it for it in sys.path if it != str(site)])
    assert registry.added_slots() == []
    assert [stage.entry.folder for stage in stages_of(load_recipe(write_recipe()))] == folders


def test_a_run_is_read_without_the_plugin_that_added_a_stage(
    write_recipe: WriteRecipe, site: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        run = generate(load_recipe(write_recipe(masker=MASKER)), tmp_path / "run")
    assert declared("mask") is None
    [stage] = [it for it in read_status(run).stages if it.stage == "mask"]
    assert stage.ok == 7
    sample = next(iter(read_outcomes(run))).sample
    assert "mask" not in sample.outputs and isinstance(sample.edited_image(), Image.Image)
    steps = {step.stage: step for step in trace_record(run, sample.record_id).steps}
    assert steps["mask"].output["categories"] == ["bee", "rabbit"]
    assert steps["mask"].package == "not installed here"


# -- Recipes --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("masker")
def test_the_key_of_a_new_slot_is_checked_like_any_other(write_recipe: WriteRecipe) -> None:
    assert Draft202012Validator(schema()).is_valid(
        yaml.safe_load(write_recipe(masker=MASKER).read_text())
    )
    path = write_recipe(masker={"use": "ellipse-masker", "scale": 2})
    assert not Draft202012Validator(schema()).is_valid(yaml.safe_load(path.read_text()))
    with pytest.raises(RecipeError, match=r"masker\.scale: input should be less than or equal to"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"masker\.use: no masker 'ellipse'; did you mean 'elli"):
        load_recipe(write_recipe(masker="ellipse"))
    with pytest.raises(RecipeError, match=r"resources\.masks: no such stage; did you mean 'mask'"):
        load_recipe(write_recipe(masker=MASKER), ["resources={masks: {num_cpus: 2}}"])
    with pytest.raises(RecipeError, match=r"pipeline\.masker: `part: rewrite` has no masker"):
        load_recipe(write_recipe(part="rewrite", masker=MASKER))
    resolved = load_recipe(write_recipe(masker=MASKER))
    assert yaml.safe_load(resolved.as_yaml())["pipeline"]["masker"] == MASKER


def test_without_the_plugin_the_key_is_an_error_with_a_hint(write_recipe: WriteRecipe) -> None:
    path = write_recipe(masker=MASKER)
    line = path.read_text().splitlines().index("  masker:") + 1
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert raised.value.problems == [
        f"{path}:{line}:3: pipeline.masker: no such slot; known are captioner, extractor, "
        "grounder, planner, editor, resolver "
        "(plugins can add slots: is the package that adds it installed?)"
    ]


@pytest.mark.usefixtures("masker")
def test_plugins_ls_lists_slots() -> None:
    listed = CliRunner().invoke(cli, ["plugins", "ls"]).output.splitlines()
    assert "ellipse-masker       masker       reasonpix-masker 0.1.0" in listed
    assert "masker               slot         reasonpix-masker 0.1.0" in listed


# -- Contracts ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("masker")
def test_the_contract_of_a_new_slot_runs() -> None:
    component = registry.find("masker", "ellipse-masker")
    contract = registry.contract("masker")
    subject = type("TestEllipse", (contract,), {"component": component})()
    tests = [name for name in dir(contract) if name.startswith("test_")]
    assert "test_masks_match_images" in tests and len(tests) > 4
    for name in set(tests) - {"test_importing_is_light"}:  # in another process, without the site
        getattr(subject, name)()


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_has_a_contract_of_its_own(slot: str) -> None:
    assert registry.contract(slot).__name__ != "ComponentContract"


# -- Stages that do not fit in --------------------------------------------------------------------

BROKEN = {
    "unknown": ({"after": "grounding"}, "'mask' follows 'grounding', which is not a stage; did"),
    "too early": ({"after": "caption"}, "'mask' requires ground, which does not come before it"),
    "twice": ({"name": "edit"}, "stage 'edit' is declared twice"),
    "of the other part": ({"name": "select"}, "stage 'select' is declared twice"),
    "image": ({"image": "edited"}, "makes the image 'edited', which exists"),
}


@pytest.mark.usefixtures("masker")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/../../esc"}, "stage name 'a/../../esc' must be letters, digits"),
        ({"name": ""}, "stage name '' must be"),
        ({"name": None}, "stage name None must be"),
        ({"function": None}, "stage 'mask': function is not callable"),
        ({"output": dict}, "stage 'mask': output <class 'dict'> is not a Record class"),
        ({"parts": "replace"}, "stage 'mask': parts 'replace' must be among 'replace', 'rewrite'"),
        ({"parts": ("replace", "foo")}, "must be among"),
        ({"settings": ("foo",)}, "stage 'mask': no such setting 'foo'; known are candidates"),
    ],
)
def test_a_declaration_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    [spec] = registry.added_stages("masker")
    with pytest.raises((TypeError, ValueError), match=message):
        replace(spec, **changes)


@pytest.mark.usefixtures("masker")
@pytest.mark.parametrize("how", BROKEN)
def test_a_stage_that_does_not_fit_is_an_error(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, message = BROKEN[how]
    [spec] = registry.added_stages("masker")
    monkeypatch.setattr(registry, "added_stages", lambda _: (replace(spec, **changes),))
    with pytest.raises(PluginError, match=message):
        chain_of("replace", {"masker"})


def test_a_broken_slot_is_told_where_a_recipe_names_it(
    distribution: Distribution, write_recipe: WriteRecipe
) -> None:
    site = distribution("broken-dist", {}, broken="1 / 0\n")
    (declared_at,) = site.glob("*/entry_points.txt")
    declared_at.write_text("[reasonpix.slots]\nmasker = broken\n")
    load_recipe(write_recipe())
    with pytest.raises(RecipeError, match=r"pipeline\.masker: plugin 'masker' of package broken-d"):
        load_recipe(write_recipe(masker="ellipse-masker"))
    assert "masker               broken: " in CliRunner().invoke(cli, ["plugins", "ls"]).output


# -- What a stage may return ----------------------------------------------------------------------

REASONS = {
    "another mode": (
        lambda sample: (sample.outputs["plan"], Image.new("L", (32, 32))),
        "stage 'mask' returned an image of mode L and 32x32 pixels; "
        "it must be RGB and of the input's size, 32x32",
    ),
    "another size": (
        lambda sample: (sample.outputs["plan"], Image.new("RGB", (32, 16))),
        "stage 'mask' returned an image of mode RGB and 32x16 pixels; "
        "it must be RGB and of the input's size, 32x32",
    ),
    "no image": (
        lambda sample: sample.outputs["plan"],
        "stage 'mask' declares the image 'mask', but did not return one with its output",
    ),
    "another output": (
        lambda sample: (sample.outputs["read"], sample.image()),
        "stage 'mask' returned ImageFacts where EditPlan is declared",
    ),
}


@pytest.mark.usefixtures("masker")
@pytest.mark.parametrize("how", REASONS)
def test_a_result_that_the_stage_does_not_declare_fails_there(
    how: str, monkeypatch: pytest.MonkeyPatch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    result_of, reason = REASONS[how]
    [spec] = registry.added_stages("masker")
    changed = replace(
        spec, output=EditPlan, function=lambda samples, masker: [result_of(s) for s in samples]
    )
    monkeypatch.setattr(
        registry, "added_stages", lambda slot: (changed,) if slot == "masker" else ()
    )
    run = generate(load_recipe(write_recipe(masker=MASKER)), tmp_path / "run")
    outcomes = [outcome for outcome in read_outcomes(run) if outcome.stage == "mask"]
    assert outcomes and {(it.status, it.reason) for it in outcomes} == {("failed", reason)}


# -- What components require ----------------------------------------------------------------------

MASK_FILTER = """
from reasonpix.plugin import ThresholdFilter, hookimpl
class MaskArea(ThresholdFilter):
    name = "mask-area"
    requires = frozenset({"mask"})
    def score_edit(self, edit):
        assert "edited" in edit.images and edit.images["mask"] is edit.images["mask"]
        covered = sum(edit.images["mask"].getchannel(0).histogram()[1:])
        return {"area": covered, "declared": sum(edit.outputs["mask"].areas)}
@hookimpl
def scorers():
    return [MaskArea]
"""


@pytest.mark.usefixtures("masker")
def test_a_filter_reads_the_images_of_stages(
    write_recipe: WriteRecipe, distribution: Distribution, tmp_path: Path
) -> None:
    distribution("area-dist", {"mask-area": "mask_area"}, mask_area=MASK_FILTER)
    run = generate(
        load_recipe(write_recipe(masker=MASKER, filters=["mask-area"])), tmp_path / "run"
    )
    scores = [outcome.scores for outcome in read_outcomes(run) if outcome.scores]
    assert scores and all(
        each["mask-area.area"] == each["mask-area.declared"] > 0 for each in scores
    )
    with pytest.raises(RecipeError) as raised:
        load_recipe(write_recipe(filters=["mask-area"]))
    [problem] = raised.value.problems
    assert problem.endswith("filters.0: it needs mask; add `masker:` under `pipeline:`")


@pytest.mark.usefixtures("masker")
def test_a_contract_takes_the_outputs_that_a_filter_requires(distribution: Distribution) -> None:
    distribution("area-dist", {"mask-area": "mask_area"}, mask_area=MASK_FILTER)
    masks = sys.modules[registry.find("masker", "ellipse-masker").__module__].Masks

    class Contract(ScorerContract):
        component = registry.find("filter", "mask-area")

        def outputs(self, image: Image.Image) -> dict[str, Record]:
            return {"mask": masks(categories=("bee",), areas=(3,))}

        def images(self, image: Image.Image) -> dict[str, Image.Image]:
            return {"edited": image, "mask": Image.new("RGB", image.size)}

    for name in ("required_fields_exist", "scores_match_edits", "verdicts_match_scores"):
        getattr(Contract(), f"test_{name}")()
    without = type("Without", (ScorerContract,), {"component": Contract.component})
    with pytest.raises(AssertionError, match=r"no field of Edit: mask; .* override outputs\(\)"):
        without().test_required_fields_exist()


@pytest.mark.usefixtures("masker")
@pytest.mark.parametrize(
    ("required", "message"),
    [
        ("mask", "it needs mask; add `masker:` under `pipeline:`"),
        ("captioner", "it needs captioner; add `captioner:` under `pipeline:`"),
        ("edit", "it needs edit, which comes too late"),
        ("captoin", "it needs captoin, which is unknown; did you mean 'caption'? (plugins can"),
    ],
)
def test_an_editor_declares_what_it_requires(
    required: str, message: str, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.find("editor", "mask-editor"), "requires", frozenset({required}))
    path = write_recipe(editor="mask-editor", captioner=None)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "editor:" in text)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    [problem] = raised.value.problems
    assert problem.startswith(f"{path}:{line}:3: pipeline.editor: {message}")


@pytest.mark.usefixtures("masker")
def test_a_stage_in_a_wrong_place_is_the_only_error(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    [spec] = registry.added_stages("masker")
    wrong = replace(spec, after="planer")
    monkeypatch.setattr(registry, "added_stages", lambda slot: (wrong,) if slot == "masker" else ())
    path = write_recipe(masker=MASKER, editor="mask-editor", filters=["no-op"])
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, ["resources={caption: {num_cpus: 2}}"])
    [problem] = raised.value.problems
    assert "stage 'mask' follows 'planer', which is not a stage; did you mean 'plan'?" in problem


def test_a_run_without_its_plugin_says_which_package_to_install(
    write_recipe: WriteRecipe, site: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        generate(load_recipe(write_recipe(masker=MASKER)), tmp_path / "run")
    done = CliRunner().invoke(cli, ["status", str(tmp_path / "run"), "--set", "seed=1"])
    assert done.exit_code == 2
    assert "made with reasonpix-masker 0.1.0, which is not installed here" in done.output


def test_a_run_without_its_filter_says_which_package_to_install(
    write_recipe: WriteRecipe, distribution: Distribution, tmp_path: Path
) -> None:
    head, _, hook = MASK_FILTER.replace('{"mask"}', "").partition("        assert")
    source = f"{head}        return {{'area': 1}}\n{hook[hook.index('@hookimpl') :]}"
    with pytest.MonkeyPatch.context() as patch:
        site = distribution("area-dist", {"mask-area": "mask_area"}, mask_area=source)
        generate(load_recipe(write_recipe(filters=["mask-area"])), tmp_path / "run")
        patch.setattr(sys, "path", [it for it in sys.path if it != str(site)])
        for command in ("gallery", "refilter"):
            output = CliRunner().invoke(cli, [command, str(tmp_path / "run")]).output
            assert "made with area-dist 1.0, which is not installed here" in output, command


BROKEN_SLOTS = {
    "exits": ("import sys\nsys.exit(7)\n", "is broken (broken): SystemExit: 7"),
    "declares words": (
        "from reasonpix.plugin import hookimpl\n@hookimpl\ndef slots():\n    return ['masker']\n",
        "hook slots() returned 'masker', which is not a SlotSpec",
    ),
    "takes a hook of core": (
        "from reasonpix.plugin import Component, SlotSpec, hookimpl\n"
        "@hookimpl\ndef slots():\n"
        "    return [SlotSpec('masker', Component, 'captioners', 'Masks')]\n",
        "'captioners' cannot be the name of its hook",
    ),
    "declares a stage of another slot": (
        "from reasonpix.plugin import Caption, Component, SlotSpec, StageSpec, hookimpl\n"
        "@hookimpl\ndef slots():\n"
        "    return [SlotSpec('masker', Component, 'maskers', 'Masks')]\n"
        "@hookimpl\ndef stages():\n"
        "    return [StageSpec(name='mask', function=print, output=Caption, slot='')]\n",
        "a stage names '', which is not its slot",
    ),
}


@pytest.mark.parametrize("how", BROKEN_SLOTS)
def test_a_broken_slot_harms_no_recipe_that_leaves_it_out(
    how: str, distribution: Distribution, write_recipe: WriteRecipe
) -> None:
    source, message = BROKEN_SLOTS[how]
    site = distribution("broken-dist", {}, broken=source)
    (declared_at,) = site.glob("*/entry_points.txt")
    declared_at.write_text("[reasonpix.slots]\nmasker = broken\n")
    load_recipe(write_recipe())
    with pytest.raises(PluginError, match=re.escape(message)):
        registry.slot("masker")
