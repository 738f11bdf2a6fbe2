from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from reasonpix.core.files import yaml_locations
from reasonpix.errors import RecipeError
from reasonpix.generation.recipe import Recipe, load_recipe, schema
from tests.conftest import Distribution, WriteRecipe

BAD = Path(__file__).parents[1] / "recipes" / "bad"
BAD_RECIPES = sorted(path.stem for path in BAD.glob("*.yaml"))

# What a JSON schema cannot say, or what a YAML parser has swallowed before it is asked.
BEYOND_SCHEMA = {
    "duplicate-key", "filter-twice", "eq1-both", "eq1-neither", "unknown-checkpoint",
    "one-order", "rewriting-mistakes",
}  # fmt: skip


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, overrides)
    return raised.value.problems


# -- bad recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_RECIPES)
@pytest.mark.usefixtures("trial")
def test_every_mistake_is_told_with_its_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD)
    expected = (BAD / f"{name}.txt").read_text().splitlines()
    assert problems(Path(f"{name}.yaml")) == expected


def test_every_expectation_has_its_recipe() -> None:
    assert sorted(path.stem for path in BAD.glob("*.txt")) == BAD_RECIPES
    assert len(BAD_RECIPES) > 20


def test_a_name_like_no_other_lists_what_is_known(write_recipe: WriteRecipe) -> None:
    (problem,) = problems(write_recipe(captioner="zzz"))
    assert "no captioner 'zzz'; known are " in problem
    assert "fake-captioner" in problem
    assert "fake-editor" not in problem
    assert "is its package installed?" in problem


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: no such file, and no shipped recipe; known are ")
    path.write_bytes(b"\xff\xfe\x00")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: cannot read the recipe: ")


def test_endless_nesting_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text in ("source: &again [*again]\n", "source: " + "[" * 5000):
        path.write_text(text)
        (problem,) = problems(path)
        assert problem == f"{path}: nested too deeply"


def test_a_filter_that_needs_a_slot_the_recipe_lacks(
    write_recipe: WriteRecipe, distribution: Distribution
) -> None:
    distribution(
        "needy",
        {"needy-filter": "needy"},
        needy="""if True:
            from reasonpix.plugin.fakes import FakeScorer
            from reasonpix.plugin.hookspecs import hookimpl
            class Needy(FakeScorer):
                name = "needy-filter"
                needs_slots = frozenset({"captioner", "grounder"})
            @hookimpl
            def scorers():
                return [Needy]
        """,
    )
    assert load_recipe(write_recipe(filters=["needy-filter"])).filters[0].name == "needy-filter"
    (problem,) = problems(write_recipe(filters=["needy-filter"], captioner=None))
    assert problem.endswith("filters.0: it needs captioner; add `captioner:` under `pipeline:`")


# -- good recipes --------------------------------------------------------------------------------


def test_the_short_form_is_the_block_without_options(write_recipe: WriteRecipe) -> None:
    short = load_recipe(write_recipe(planner="fake-planner"))
    block = load_recipe(write_recipe(planner={"use": "fake-planner", "target": "pear"}))
    assert short == block
    assert short != load_recipe(write_recipe(planner={"use": "fake-planner", "target": "cat"}))


def test_the_captioner_may_be_left_out_or_null(write_recipe: WriteRecipe) -> None:
    path = write_recipe(captioner=None)
    assert "captioner" not in load_recipe(path).pipeline
    null = load_recipe(write_recipe("other.yaml"), ["pipeline.captioner=null"])
    assert null == load_recipe(path)


def test_an_empty_pipeline_lacks_its_slots(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("source: fake-source\npipeline: {}\n")
    assert problems(path) == [
        f"{path}:2:1: pipeline: {slot!r} is missing; `part: replace` needs it"
        for slot in ("extractor", "grounder", "planner", "editor")
    ]


@pytest.mark.parametrize("part", [["replace"], {"a": 1}])
def test_a_part_that_is_not_a_word(part: object, write_recipe: WriteRecipe) -> None:
    path = write_recipe(part=part)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:")
    assert problem.endswith(f": part: input should be 'replace' or 'rewrite', got {part!r}")


def test_anchors_repeat_values(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    path = write_recipe()
    path.write_text(
        path.read_text() + "filters:\n  - {use: no-op, min_changed: &share 0.25}\n"
        "  - {use: eq1, reject_fraction: *share}\n"
    )
    assert [use.as_yaml() for use in load_recipe(path).filters] == [
        {"use": "no-op", "tolerance": 12, "min_changed": 0.25},
        {"use": "eq1", "reject_fraction": 0.25},
    ]


def test_merge_keys_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """\
x-share: &share {min_changed: 0.25, tolerance: 3}
x-more: &more {<<: *share, tolerance: 4}
source: {use: fake-source, count: 1}
pipeline: {captioner: fake-captioner, extractor: fake-extractor, grounder: fake-grounder,
  planner: fake-planner, editor: fake-editor}
filters:
- {use: no-op, <<: *more}
- use: eq1
  <<: [{reject_fraction: 0.5}, {reject_fraction: 0.25}]
""",
        encoding="utf-16",
    )
    assert [use.as_yaml() for use in load_recipe(path).filters] == [
        {"use": "no-op", "tolerance": 4, "min_changed": 0.25},
        {"use": "eq1", "reject_fraction": 0.5},
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a {c: 1, c: 2}\nb: {<<: *a}\n", ["1:14: a.c: given twice"]),
        ("a: &a {c: 1}\nb: {<<: *a, d: 1, d: 2}\n", ["2:19: b.d: given twice"]),
        ("a: &a {c: 1}\nb: {<<: *a, <<: *a}\n", ["2:13: b.<<: given twice"]),
        ("a: &a [1]\nb: {<<: *a}\n", ["1:8: <<: expected a mapping such as *name, or a list"]),
        ("b:\n  <<: 5\n", ["2:7: <<: expected a mapping such as *name, or a list of them"]),
        ("a: &a {<<: *a}\n", [": nested too deeply"]),
        ("b: {<<: *a}\n", ["1:9: not valid YAML: found undefined alias 'a'"]),
        (
            "b0: &b0 {x: 1}\n"
            + "".join(f"b{i + 1}: &b{i + 1} {{<<: [*b{i}, *b{i}]}}\n" for i in range(30)),
            [": its anchors give more than 100000 values"],
        ),
        (
            "b0: &b0 [1]\n"
            + "".join(f"b{i + 1}: &b{i + 1} [*b{i}, *b{i}]\n" for i in range(30)),
            [": its anchors give more than 100000 values"],
        ),
    ],
)  # fmt: skip
def test_mistakes_in_merge_keys_have_their_place(text: str, told: list[str]) -> None:
    with pytest.raises(RecipeError) as raised:
        yaml_locations.parse(text, "r")
    lines = str(raised.value).splitlines()
    assert len(lines) == len(told)
    for line, start in zip(lines, told, strict=True):
        assert line.startswith(f"r:{start.removeprefix(':')}")


def test_a_merged_value_is_where_its_anchor_is() -> None:
    text = "x-a: &a\n  c: {d: 1}\n  e: 2\nb:\n  <<: *a\n  e: 3\n"
    data, marks = yaml_locations.parse(text, "r")
    assert data == {"b": {"c": {"d": 1}, "e": 3}}
    assert [marks["b", "c", "d"], marks["b", "e"], marks[("b",)]] == ["r:2:7", "r:6:3", "r:4:1"]


keys = st.sampled_from("abc")
mappings = st.dictionaries(keys, st.integers(0, 9), min_size=1)


@given(st.lists(mappings, min_size=1, max_size=3), mappings)
def test_merging_agrees_with_yaml(bases: list[dict[str, int]], own: dict[str, int]) -> None:
    lines = [f"base{i}: &base{i} {json.dumps(base)}" for i, base in enumerate(bases)]
    merged = ", ".join(f"*base{i}" for i in range(len(bases)))
    text = "\n".join([*lines, f"own: {{<<: [{merged}], {json.dumps(own)[1:]}"])
    assert yaml_locations.parse(text, "r")[0] == yaml.safe_load(text)


round_trips = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63),
        "shard_size": st.integers(1, 10**6),
        "source": st.builds(
            lambda count, caption: {"use": "fake-source", "count": count, "caption": caption},
            st.integers(1, 99),
            st.none() | st.text(),
        ),
        "captioner": st.none()
        | st.builds(lambda text: {"use": "fake-captioner", "caption": text}, st.text()),
        "editor": st.builds(
            lambda colour: {"use": "fake-editor", "colour": colour},
            st.lists(st.integers(0, 255), min_size=3, max_size=3),
        ),
        "filters": st.sampled_from(
            [
                [],
                ["no-op"],
                [{"use": "eq1", "reject_fraction": 0.1}, "regrounded"],
                [{"use": "eq1", "value": 1}],
            ]
        ),
    }
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(round_trips)
def test_a_resolved_recipe_is_the_same_recipe(
    write_recipe: WriteRecipe, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = load_recipe(write_recipe(**changes))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.as_yaml(), encoding="utf-8")
    assert load_recipe(resolved) == recipe


def test_an_option_that_is_set_to_nothing_stays_so(
    write_recipe: WriteRecipe, distribution: Distribution, tmp_path: Path
) -> None:
    distribution(
        "nothing",
        {"nothing-captioner": "nothing"},
        nothing="""if True:
            from pydantic import Field
            from reasonpix.plugin.fakes import FakeCaptioner
            from reasonpix.plugin.hookspecs import hookimpl
            from reasonpix.plugin.components import Options
            class Settings(Options):
                limit: int | None = Field(5, description="No limit when null")
            class Nothing(FakeCaptioner):
                name = "nothing-captioner"
                Options = Settings
            @hookimpl
            def captioners():
                return [Nothing]
        """,
    )
    recipe = load_recipe(write_recipe(captioner={"use": "nothing-captioner", "limit": None}))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.as_yaml())
    assert load_recipe(resolved) == recipe
    assert recipe != load_recipe(write_recipe(captioner="nothing-captioner"))


def test_a_resolved_recipe_names_the_packages(write_recipe: WriteRecipe) -> None:
    assert (
        load_recipe(write_recipe())
        .as_yaml()
        .startswith("# reasonpix 0.1.0\npart: replace\nseed: 0\n")
    )


# -- overrides -----------------------------------------------------------------------------------


def overridden(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides)


def test_the_command_line_wins_and_the_last_one_most(write_recipe: WriteRecipe) -> None:
    path = write_recipe(seed=1, planner={"use": "fake-planner", "target": "cat"})
    assert overridden(path, "seed=2").seed == 2
    assert overridden(path, "seed=2", "seed=3").seed == 3
    recipe = overridden(path, "pipeline.planner.target=dog", "source.count=2")
    assert recipe.pipeline["planner"].as_yaml() == {"use": "fake-planner", "target": "dog"}
    assert recipe.source.as_yaml() == {"use": "fake-source", "count": 2}


def test_a_short_form_grows_into_a_block(write_recipe: WriteRecipe) -> None:
    recipe = overridden(write_recipe(), "pipeline.captioner.caption=a cat and a dog")
    assert recipe.pipeline["captioner"].as_yaml() == {
        "use": "fake-captioner",
        "caption": "a cat and a dog",
    }


def test_list_entries_are_named_by_number(write_recipe: WriteRecipe) -> None:
    path = write_recipe(filters=["no-op", {"use": "eq1", "reject_fraction": 0.1}])
    recipe = overridden(path, "filters.1.reject_fraction=0.2", "filters.0.tolerance=3")
    assert [use.as_yaml() for use in recipe.filters] == [
        {"use": "no-op", "tolerance": 3, "min_changed": 0.1},
        {"use": "eq1", "reject_fraction": 0.2},
    ]
    assert overridden(path, "filters=[]").filters == ()
    assert overridden(path, "filters.1=regrounded").filters[1].name == "regrounded"


def test_a_value_is_yaml_and_may_hold_equals_signs(write_recipe: WriteRecipe) -> None:
    recipe = overridden(
        write_recipe(),
        "pipeline.captioner.caption=a=b=c",
        "pipeline.editor={use: fake-editor, colour: [1, 2, 3]}",
        "pipeline.planner.target='7'",
    )
    assert recipe.pipeline["captioner"].as_yaml()["caption"] == "a=b=c"
    assert recipe.pipeline["editor"].as_yaml()["colour"] == [1, 2, 3]
    assert recipe.pipeline["planner"].as_yaml()["target"] == "7"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "--set seed: expected key=value, such as seed=1 or pipeline.planner.model=x"),
        ("=3", "--set =3: expected key=value, such as seed=1 or pipeline.planner.model=x"),
        ("seed=-1", "--set seed=-1: seed: input should be greater than or equal to 0, got -1"),
        ("seed=", "--set seed=: seed: input should be a valid integer, got None"),
        (
            "seed=[1",
            "--set seed=[1: the value is not valid YAML: expected ',' or ']', "
            "but got '<stream end>'",
        ),
        (
            "seed=2026-02-30",
            "--set seed=2026-02-30: the value is not valid YAML: day is out of range for month",
        ),
        ("seed.now=1", "--set seed.now=1: there is no seed.now"),
        ("filters.7=no-op", "--set filters.7=no-op: there is no filters.7"),
        ("filters.-1=no-op", "--set filters.-1=no-op: there is no filters.-1"),
        ("filters.x.reject_fraction=1", "--set filters.x.reject_fraction=1: there is no filters.x"),
        ("pipeline.0=x", "--set pipeline.0=x: pipeline.0: no such slot; known are captioner, "),
        ("sede=1", "--set sede=1: sede: no such option; did you mean 'seed'?"),
        ("a.b.c=1", "--set a.b.c=1: a: no such option; known are part, seed, "),
        (
            "pipeline.editor.color=[1, 2, 3]",
            "--set pipeline.editor.color=[1, 2, 3]: pipeline.editor.color: "
            "no such option; did you mean 'colour'?",
        ),
        (
            "pipeline.planner={use: fake-planner, target: 7}",
            "--set pipeline.planner={use: fake-planner, target: 7}: pipeline.planner.target: "
            "input should be a valid string, got 7",
        ),
        (
            "pipeline.editor.use=fake-edtor",
            "--set pipeline.editor.use=fake-edtor: pipeline.editor.use: no editor 'fake-edtor'; "
            "did you mean 'fake-editor'? ",
        ),
    ],
)
def test_a_wrong_override_is_named_as_the_place(
    override: str, problem: str, write_recipe: WriteRecipe
) -> None:
    path = write_recipe(seed=1, filters=["no-op"], planner={"use": "fake-planner", "target": "cat"})
    (told,) = problems(path, override)
    assert told.startswith(problem)


def test_an_override_of_a_broken_line_mends_it(write_recipe: WriteRecipe) -> None:
    path = write_recipe(editor="fake-edtor")
    assert len(problems(path)) == 1
    assert (
        load_recipe(path, ["pipeline.editor=fake-editor"]).pipeline["editor"].name == "fake-editor"
    )


# -- the JSON schema -----------------------------------------------------------------------------


def valid(document: object) -> bool:
    return Draft202012Validator(schema()).is_valid(document)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema())


def test_the_schema_accepts_resolved_recipes(write_recipe: WriteRecipe) -> None:
    filters = ["no-op", {"use": "eq1", "reject_fraction": 0.1}, "region-distance", "regrounded"]
    assert valid(yaml.safe_load(load_recipe(write_recipe(filters=filters)).as_yaml()))


@pytest.mark.parametrize(("slot", "optional"), [("captioner", True), ("editor", False)])
def test_the_schema_accepts_null_for_optional_slots_alone(
    slot: str, optional: bool, write_recipe: WriteRecipe
) -> None:
    document = yaml.safe_load(write_recipe().read_text())
    document["pipeline"][slot] = None
    assert valid(document) == optional


@pytest.mark.parametrize("name", BAD_RECIPES)
@pytest.mark.usefixtures("trial")
def test_the_schema_rejects_bad_recipes(name: str) -> None:
    try:
        document = yaml.safe_load((BAD / f"{name}.yaml").read_text())
    except (yaml.YAMLError, ValueError):
        return  # no editor gets as far as the schema
    assert valid(document) == (name in BEYOND_SCHEMA)


def test_the_schema_knows_the_options_of_installed_plugins(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = {"use": "loud-captioner", "word": "cat", "emphasis": {"mark": "?", "times": 2}}
    document = yaml.safe_load(write_recipe(captioner=loud).read_text())
    assert not valid(document)
    third_party = Path(__file__).parents[1] / "third_party"
    info = Path(write_recipe().parent) / "reasonpix_loud-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reasonpix-loud\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[reasonpix]\nloud-captioner = reasonpix_loud\n")
    monkeypatch.syspath_prepend(third_party)
    monkeypatch.syspath_prepend(info.parent)
    Draft202012Validator.check_schema(schema())
    assert valid(document)
    document["pipeline"]["captioner"]["emphasis"]["times"] = 0
    assert not valid(document)


def test_a_single_override_may_be_a_string(write_recipe: WriteRecipe) -> None:
    assert load_recipe(write_recipe(), "seed=7").seed == 7
