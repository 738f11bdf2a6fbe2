"""Filters applied anew, and survival by their thresholds: from stored scores, with no model."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest

from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import (
    StageEntry,
    current_stages,
    outcome_counts,
    outcomes,
    write_stages,
)
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import Plan, Row, RunFolder, Shard
from reasonpix.generation.run_recipe import recipe_of
from reasonpix.inspection.refilter import reapply_filters
from reasonpix.inspection.threshold_curves import (
    SAMPLED,
    filter_survival,
    filter_survivals,
    write_survival_page,
)
from tests.conftest import Distribution, WriteRecipe

EQ1 = {"use": "eq1", "reject_fraction": 0.3}
PAIRS = {"use": "fake-source", "count": 6, "caption": "a bee", "instruction": "add a hole",
         "edited_caption": "a bee with a hole"}  # fmt: skip


def ends(run: RunFolder) -> list[tuple[str, str, str]]:
    return [(o.status, o.stage, o.reason) for o in outcomes(run)]


def files(out: Path) -> dict[str, bytes]:
    """All but what says which filters there are."""
    changing = {"recipe.yaml", "stages.json", "holder"}
    paths = [path for path in out.rglob("*") if path.is_file() and path.name not in changing]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


# -- refilter -------------------------------------------------------------------------------------


def test_another_threshold_gives_what_a_run_with_it_gives(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(shard_size=3, filters=[EQ1, "no-op"])
    out = tmp_path / "run"
    run = generate(load_recipe(path), out)
    kept = files(out)
    changes = ["filters.0.reject_fraction=0.6", "filters.1.min_changed=0.5"]
    before, after = reapply_filters(run, changes)
    assert (before.accepted, after.accepted) == (5, 3)
    assert files(out) == kept

    fresh = generate(load_recipe(path, changes), tmp_path / "fresh")
    assert ends(run) == ends(fresh)
    for name in ("recipe.yaml", "stages.json"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    # The recipe is the run's own now: going on with it computes nothing.
    generate(recipe_of(run), out)
    assert [line for line in run.journal() if "stage" in line] == [
        json.loads(line) for line in kept["journal.jsonl"].splitlines() if b"stage" in line
    ]


def test_filters_that_were_measured_go_come_back_and_change_places(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(filters=[EQ1, "no-op", "region-distance"])
    run = generate(load_recipe(path), tmp_path / "run")
    kept = files(tmp_path / "run")

    def stages() -> list[str]:
        return [entry.stage for entry in current_stages(run) if entry.is_score]

    _, after = reapply_filters(run, ["filters=[region-distance]"])
    assert stages() == ["score-region-distance"] and after.accepted == 7
    _, after = reapply_filters(run, ["filters=[no-op, {use: eq1, reject_fraction: 0.5}]"])
    assert stages() == ["score-no-op", "score-eq1"] and after.accepted == 4
    _, after = reapply_filters(run, ["filters=[]"])
    assert stages() == [] and after.accepted == 7
    assert files(tmp_path / "run") == kept


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("filters.1.tolerance=3", "score-no-op"),
        ("filters.1=regrounded", "score-regrounded"),
        ("pipeline.captioner.caption=a cat", "caption, extract"),
        ("seed=1", "plan, edit, score-eq1, score-no-op"),
    ],
)
def test_what_would_have_to_be_computed_is_refused(
    change: str, stages: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = generate(load_recipe(write_recipe(filters=[EQ1, "no-op"])), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=f"no results of {stages}.*reasonpix generate .*--set"):
        reapply_filters(run, [change])
    (out / "holder").write_bytes(before[out / "holder"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_filter_before_the_planner_decides_what_that_is_asked(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(source=PAIRS, filters=[EQ1, "leak"], part="rewrite")
    run = generate(load_recipe(path), tmp_path / "run")
    with pytest.raises(RunError, match=r"rewrite, select, score-leak.*before rewrite.*: eq1"):
        reapply_filters(run, ["filters.0.reject_fraction=0.5"])
    # One after it is free to change, and the fakes leak nothing at -1.
    before, after = reapply_filters(run, ["filters=[{use: eq1, reject_fraction: 0.3}]"])
    assert before.accepted == after.accepted == 5


def test_mistakes_and_unfinished_runs_are_told(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = generate(load_recipe(write_recipe(filters=[EQ1])), out)
    with pytest.raises(RecipeError, match=r"filters\.0\.reject_fraction.*less than 1"):
        reapply_filters(run, ["filters.0.reject_fraction=2"])
    with run.storage.lock(), pytest.raises(RunError, match="is in use by process"):
        reapply_filters(RunFolder(out), ["filters.0.reject_fraction=0.5"])
    [folder] = (out / "stages").glob("score-eq1-*")
    (folder / "000000.parquet").unlink()
    with pytest.raises(RunError, match="is not finished: stage score-eq1"):
        reapply_filters(run, ["filters.0.reject_fraction=0.5"])
    with pytest.raises(RunError, match="is no run folder"):
        reapply_filters(RunFolder(tmp_path / "nothing"), [])


def test_the_packages_that_made_the_results_stay_named(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = generate(load_recipe(write_recipe(filters=[EQ1])), tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(re.sub(r"# reasonpix \S+", "# reasonpix 0.0.7", path.read_text()))
    reapply_filters(run, ["filters.0.reject_fraction=0.5"])
    assert path.read_text().startswith("# reasonpix 0.0.7\npart: replace\n")
    assert "reject_fraction: 0.5" in path.read_text()


# -- survival -------------------------------------------------------------------------------------


def synthetic(out: Path, rows: int, options: dict[str, Any], use: str = "region-distance") -> Any:
    """A run that measured `rows` records, made without computing anything."""
    run, shard = RunFolder(out), Shard("000000", rows)
    entry = StageEntry(f"score-{use}", f"score-{use}-0", {"use": use}, options)
    scores = [
        json.dumps({"scores": {"inside": 0.002 * i / rows, "outside": 0.5 * (i % 4)}})
        for i in range(rows)
    ]
    run.write("source", shard, [Row(str(i), "ok", output="{}") for i in range(rows)])
    run.write(entry.folder, shard, [Row(str(i), "ok", output=it) for i, it in enumerate(scores)])
    run.freeze(Plan({"use": "fake-source"}, {}, (shard,), True))
    write_stages(run, [entry])
    return run, entry


def test_a_curve_is_the_share_that_each_value_lets_through(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(filters=[EQ1, {"use": "no-op", "min_changed": 0.2}])
    run = generate(load_recipe(path), tmp_path / "run")
    eq1, no_op = filter_survivals(run)
    [curve] = eq1.curves
    assert (eq1.measured, eq1.survive, curve.option, curve.current) == (
        7,
        5,
        "reject_fraction",
        0.3,
    )
    assert curve.survive == pytest.approx(5 / 7)
    assert 0 < curve.points[0][0] < 0.05 and 0.95 < curve.points[-1][0] < 1
    for value, share in curve.points:
        assert share == pytest.approx(1 - int(7 * value) / 7)
    [changed] = no_op.curves  # tolerance changes scores, so that it has no curve
    assert (changed.points[0][0], changed.points[-1][0]) == (0.0, 1.0)
    whole = [o.scores["no-op.changed"] for o in outcomes(run)]
    for value, share in changed.points:
        assert share == pytest.approx(sum(score >= value for score in whole) / 7)
    [distance] = eq1.distributions
    assert sum(distance.counts) == 7
    assert distance.low == min(o.scores["eq1.distance"] for o in outcomes(run))


def test_an_option_without_bounds_runs_where_it_makes_a_difference(tmp_path: Path) -> None:
    run, entry = synthetic(tmp_path / "run", 400, {"min_inside": 0.0005, "max_outside": 0.7})
    inside, outside = filter_survival(run, entry).curves
    # Each runs over the score that it is named after: to 0.002, and to 1.5.
    assert inside.points[0][0] == 0.0 and 0.002 <= inside.points[-1][0] < 0.0022
    assert outside.points[0][0] == 0.0 and 1.5 <= outside.points[-1][0] < 1.6
    assert inside.points[-1][1] == 0.0
    assert len({share for _, share in inside.points}) > 20
    assert inside.survive == pytest.approx(3 / 8)  # of 400 the upper three quarters, half outside
    shares = sorted({share for _, share in outside.points})
    assert shares == pytest.approx([0.1875, 0.375, 0.5625, 0.75], abs=0.002)


def test_an_option_set_beyond_its_scores_does_not_widen_the_axis(tmp_path: Path) -> None:
    run, entry = synthetic(tmp_path / "run", 40, {"max_outside": 900.0})
    outside = filter_survival(run, entry).curves[1]
    assert outside.points[-1][0] < 1.6 and outside.survive == 1.0


def test_the_second_line_is_what_all_filters_accept_together(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    filters = [EQ1, {"use": "region-distance", "max_outside": 5.0, "min_inside": 0.0}]
    run = generate(load_recipe(write_recipe(filters=filters)), tmp_path / "run")
    ended = list(outcomes(run))
    limit = sorted(o.scores["region-distance.inside"] for o in ended)[4]
    reapply_filters(run, [f"filters.1.min_inside={limit}"])
    eq1, region = filter_survivals(run)
    far = {o.sample.record_id for o in ended if o.scores["region-distance.inside"] >= limit}
    distances = sorted(ended, key=lambda o: o.scores["eq1.distance"])
    [curve] = eq1.curves
    assert curve.accepted == pytest.approx(outcome_counts(run).accepted / 7)
    for (value, alone), (same, together) in zip(curve.points, curve.together, strict=True):
        kept = distances[int(round(7 * value, 6)) :]
        assert same == value and alone == pytest.approx(len(kept) / 7)
        assert together == pytest.approx(sum(o.sample.record_id in far for o in kept) / 7)
    inside = region.curves[0]
    assert inside.option == "min_inside"
    assert inside.together[0][1] == pytest.approx(5 / 7) and inside.points[0][1] == 1.0
    assert inside.accepted == curve.accepted
    text = Path(write_survival_page(run)).read_text()
    assert text.count('class="curve together"') == 3
    for label in ("0 %", "50 %", "100 %"):
        assert text.count(f">{label}</text>") == 3


def test_a_large_run_is_drawn_from_a_part_of_it(tmp_path: Path) -> None:
    run, entry = synthetic(tmp_path / "run", 3 * SAMPLED - 1, {"min_inside": 0.001})
    told = filter_survival(run, entry)
    assert told.sampled == SAMPLED and told.measured == 3 * SAMPLED - 1
    assert told.survive == pytest.approx(3 / 8 * told.measured, abs=2)
    curve = told.curves[0]
    assert curve.survive == pytest.approx(told.survive / told.measured, abs=0.01)


COUNTING = """
from typing import ClassVar
from pydantic import Field
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.components import Options, Scorer


class CountingOptions(Options):
    fingerprint_exclude: ClassVar = frozenset({"most", "fussy", "strict"})
    most: int = Field(2, ge=0, description="Most that is accepted")
    fussy: float | None = Field(None, description="Not set")
    strict: bool = Field(True, description="No number")


class Counting(Scorer[CountingOptions]):
    name = "counting"
    Options = CountingOptions
    requires = frozenset()

    def score(self, edits, pipeline):
        return [{"<b>n</b>": float(edit.seed % 5)} for edit in edits]

    def reject(self, scores):
        return ["too many" if s["<b>n</b>"] > self.options.most else None for s in scores]


@hookimpl
def scorers():
    return [Counting]
"""


class Page(HTMLParser):
    """Collects elements, and checks that every one is closed in turn."""

    VOID: ClassVar = {"meta", "br"}

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_whole_numbers_are_counted_and_what_is_no_number_left_out(
    distribution: Distribution, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    distribution("counting", {"counting": "counting_plugin"}, counting_plugin=COUNTING)
    run = generate(load_recipe(write_recipe(filters=["counting"])), tmp_path / "run")
    [told] = filter_survivals(run)
    [most] = told.curves
    assert most.option == "most"
    assert all(isinstance(value, int) for value, _ in most.points)
    assert most.points[-1][1] == 1.0
    page = Page(write_survival_page(run))
    assert "b" in page.elements and "<b>n</b>" in "".join(page.text)  # escaped


def test_the_page_shows_all_filters_and_needs_no_network(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(filters=[EQ1, "no-op", "region-distance"])
    run = generate(load_recipe(path), tmp_path / "run")
    where = write_survival_page(run)
    assert where == str(tmp_path / "run" / "survival.html")
    page = Page(where)
    text = " ".join(" ".join(page.text).split())
    assert "5 of 7 records are accepted" in text and "were before" not in text
    for words in (
        "reject_fraction is 0.3: 71.4 % survive",
        "min_changed is 0.1",
        "max_outside is 1",
    ):
        assert words in text
    assert page.elements.count("svg") == 4 + 4  # options that are set, scores
    assert not {"script", "link", "img"} & set(page.elements)
    assert not re.search(r"//[a-z]|@import|url[(]", page.source)

    before, _ = reapply_filters(run, ["filters.0.reject_fraction=0.6"])
    other = write_survival_page(run, tmp_path / "page.html", before)
    assert other == str(tmp_path / "page.html")
    assert "3 of 7 records are accepted (5 before)" in " ".join(Page(other).text)


@pytest.mark.usefixtures("trial")
def test_a_filter_that_measured_nothing(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = write_recipe(grounder="trial-grounder", filters=[EQ1])
    run = generate(load_recipe(path, ["pipeline.captioner.caption=a ghost"]), tmp_path / "run")
    [told] = filter_survivals(run)
    assert (told.measured, told.curves, told.distributions) == (0, [], [])
    assert "0 records measured" in "".join(Page(write_survival_page(run)).text)
    assert outcome_counts(run).accepted == 0


def test_no_filters(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = generate(load_recipe(write_recipe()), tmp_path / "run")
    assert "This run has no filters." in "".join(Page(write_survival_page(run)).text)
    assert filter_survivals(run) == []
