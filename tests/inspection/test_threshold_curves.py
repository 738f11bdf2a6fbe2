"""Survival by the thresholds of filters, from stored scores."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest

from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import (
    StageEntry,
    outcome_counts,
    read_outcomes,
    write_stages,
)
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import Plan, Row, RunFolder, Shard
from reasonpix.inspection.refilter import reapply_filters
from reasonpix.inspection.threshold_curves import (
    SAMPLED,
    filter_survival,
    filter_survivals,
    write_survival_page,
)
from tests.conftest import Distribution, WriteRecipe

EQ1 = {"use": "eq1", "reject_fraction": 0.3}


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
    assert (eq1.measured, eq1.ok, curve.option, curve.current) == (
        7,
        5,
        "reject_fraction",
        0.3,
    )
    assert curve.ok == pytest.approx(5 / 7)
    assert 0 < curve.points[0][0] < 0.05 and 0.95 < curve.points[-1][0] < 1
    for value, share in curve.points:
        assert share == pytest.approx(1 - int(7 * value) / 7)
    [changed] = no_op.curves  # tolerance changes scores, so that it has no curve
    assert (changed.points[0][0], changed.points[-1][0]) == (0.0, 1.0)
    whole = [o.scores["no-op.changed"] for o in read_outcomes(run)]
    for value, share in changed.points:
        assert share == pytest.approx(sum(score >= value for score in whole) / 7)
    [distance] = eq1.distributions
    assert sum(distance.counts) == 7
    assert distance.low == min(o.scores["eq1.distance"] for o in read_outcomes(run))


def test_an_option_without_bounds_runs_where_it_makes_a_difference(tmp_path: Path) -> None:
    run, entry = synthetic(tmp_path / "run", 400, {"min_inside": 0.0005, "max_outside": 0.7})
    inside, outside = filter_survival(run, entry).curves
    # Each runs over the score that it is named after: to 0.002, and to 1.5.
    assert inside.points[0][0] == 0.0 and 0.002 <= inside.points[-1][0] < 0.0022
    assert outside.points[0][0] == 0.0 and 1.5 <= outside.points[-1][0] < 1.6
    assert inside.points[-1][1] == 0.0
    assert len({share for _, share in inside.points}) > 20
    assert inside.ok == pytest.approx(3 / 8)  # of 400 the upper three quarters, half outside
    shares = sorted({share for _, share in outside.points})
    assert shares == pytest.approx([0.1875, 0.375, 0.5625, 0.75], abs=0.002)


def test_an_option_set_beyond_its_scores_does_not_widen_the_axis(tmp_path: Path) -> None:
    run, entry = synthetic(tmp_path / "run", 40, {"max_outside": 900.0})
    outside = filter_survival(run, entry).curves[1]
    assert outside.points[-1][0] < 1.6 and outside.ok == 1.0


def test_the_second_line_is_what_all_filters_accept_together(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    filters = [EQ1, {"use": "region-distance", "max_outside": 5.0, "min_inside": 0.0}]
    run = generate(load_recipe(write_recipe(filters=filters)), tmp_path / "run")
    ended = list(read_outcomes(run))
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
    assert told.ok == pytest.approx(3 / 8 * told.measured, abs=2)
    curve = told.curves[0]
    assert curve.ok == pytest.approx(told.ok / told.measured, abs=0.01)


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
        "reject_fraction is 0.3: 71.4 % ok",
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
