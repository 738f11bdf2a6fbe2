from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reasonpix.generation.components.edit_filters import Eq1, NoOp, RegionDistance, Regrounded
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.plugin.components import Options, Scorer
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.fakes import FakeGrounder
from reasonpix.plugin.types import Box, Grounding, Problem
from tests.conftest import WriteRecipe


def scorer(cls: type[Scorer[Any]], **options: object) -> Scorer[Any]:
    return cls(cls.Options.model_validate(options))


def edit(before: np.ndarray, after: np.ndarray, *xyxy: float) -> Edit:
    height, width = before.shape[:2]
    x0, y0, x1, y1 = xyxy or (0, 0, width, height)
    return Edit(
        read_input=lambda: Image.fromarray(before.astype(np.uint8)),
        read_edited=lambda: Image.fromarray(after.astype(np.uint8)),
        seed=0,
        box=Box(x0=x0, y0=y0, x1=x1, y1=y1, width=width, height=height),
        selected="bee",
        target="rabbit",
    )


def plain(value: int) -> np.ndarray:
    return np.full((4, 8, 3), value)


# -- Eq. 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "distance"),
    [
        (0, 0, 0.0),
        (0, 255, 1.0),
        (255, 0, 1.0),
        (10, 61, 0.04),  # (51/255)²
        (61, 10, 0.04),  # in uint8, 10 - 61 is 205, which would give 0.646
        (100, 101, 1 / 255**2),  # in uint8, (-1)² is 255² mod 256 = 1, but 16² is 0
        (16, 0, (16 / 255) ** 2),
    ],
)
def test_distance_is_that_of_floats(before: int, after: int, distance: float) -> None:
    (scores,) = scorer(Eq1, value=1).score([edit(plain(before), plain(after))], {})
    assert scores == {"distance": pytest.approx(distance, rel=1e-5)}


def test_distance_is_a_mean_over_pixels_and_channels() -> None:
    after = plain(0)
    after[0, 0, 0] = 255  # one of 4 * 8 * 3 values
    (scores,) = scorer(Eq1, value=1).score([edit(plain(0), after)], {})
    assert scores == {"distance": pytest.approx(1 / 96)}


def test_eq1_needs_nothing_but_images() -> None:
    images = [Image.new("RGB", (4, 8), colour) for colour in ("black", "white")]
    bare = Edit(read_input=lambda: images[0], read_edited=lambda: images[1], seed=0)
    assert scorer(Eq1, value=1).score([bare], {}) == [{"distance": 1.0}]
    assert Eq1.requires == frozenset()


def distances(*values: float) -> list[dict[str, float]]:
    return [{"distance": value} for value in values]


def test_eq1_by_value_drops_what_is_below_tau() -> None:
    reasons = scorer(Eq1, value=0.01).reject(distances(0.009, 0.01, 0.011))
    assert [reason is None for reason in reasons] == [False, True, True]
    assert reasons[0] == "distance 0.00900 < τ 0.01"


def test_eq1_by_rank_drops_the_share_with_the_smallest_distances() -> None:
    reasons = scorer(Eq1, reject_fraction=0.3).reject(
        distances(*(i / 100 for i in (5, 1, 9, 7, 3, 8, 2, 6, 4, 0)))
    )
    dropped = [i for i, reason in enumerate(reasons) if reason]
    assert dropped == [1, 6, 9]  # 0.01, 0.02 and 0.00
    assert "among the lowest 30%" in str(reasons[9])


def test_eq1_by_rank_breaks_ties_by_order_and_rounds_down() -> None:
    assert [bool(r) for r in scorer(Eq1, reject_fraction=0.5).reject(distances(1, 1, 1, 1, 1))] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert scorer(Eq1, reject_fraction=0.1).reject(distances(1, 2, 3)) == [None] * 3
    assert scorer(Eq1, reject_fraction=0.1).reject([]) == []


def test_rank_counts_decimal_shares_exactly() -> None:
    # 0.29 * 100 is 28.999999999999996 in floats.
    reasons = scorer(Eq1, reject_fraction=0.29).reject(distances(*range(100)))
    assert sum(reason is not None for reason in reasons) == 29


# -- inside and outside --------------------------------------------------------------------------


def test_inside_and_outside_by_hand() -> None:
    before, after = plain(0), plain(51)
    after[1:3, 2:6] = 255
    (scores,) = scorer(RegionDistance).score([edit(before, after, 2, 1, 6, 3)], {})
    assert scores == {"inside": pytest.approx(1.0), "outside": pytest.approx(0.04)}


def test_a_pixel_that_the_box_touches_is_inside() -> None:
    after = plain(0)
    after[0, 0] = 255
    (scores,) = scorer(RegionDistance).score([edit(plain(0), after, 0.9, 0.9, 1.1, 1.1)], {})
    assert scores == {"inside": pytest.approx(0.25), "outside": 0.0}


def test_a_box_of_the_whole_image_has_no_outside() -> None:
    (scores,) = scorer(RegionDistance).score([edit(plain(0), plain(255))], {})
    assert scores == {"inside": 1.0, "outside": 0.0}


def test_region_distance_rejects_too_little_inside_and_too_much_outside() -> None:
    scores = [{"inside": i, "outside": o} for i, o in ((0.1, 0.0), (0.02, 0.0), (0.1, 0.3))]
    reasons = scorer(RegionDistance, min_inside=0.05, max_outside=0.2).reject(scores)
    assert reasons == [None, "inside changed by 0.02000 only", "outside changed by 0.30000"]
    assert scorer(RegionDistance).reject(scores) == [None] * 3


# -- no-op ---------------------------------------------------------------------------------------


def test_changed_is_the_share_of_the_box_beyond_the_tolerance() -> None:
    before, after = plain(100), plain(100)
    after[0, 0, 2] = 113  # 13 in one channel: visible
    after[0, 1] = 88  # 12 in all: not
    after[3, 7] = 255  # outside
    (scores,) = scorer(NoOp).score([edit(before, after, 0, 0, 4, 2)], {})
    assert scores == {"changed": pytest.approx(1 / 8)}
    (scores,) = scorer(NoOp, tolerance=11).score([edit(before, after, 0, 0, 4, 2)], {})
    assert scores == {"changed": pytest.approx(2 / 8)}


def test_no_op_rejects_below_min_changed() -> None:
    reasons = scorer(NoOp, min_changed=0.5).reject([{"changed": 0.5}, {"changed": 0.125}])
    assert reasons == [None, "12.5% of the box changed"]


# -- regrounded ----------------------------------------------------------------------------------


class Listed(FakeGrounder):
    """Gives the boxes it was told, category by category."""

    boxes: dict[str, Box | None]

    def ground(self, images: Any, categories: Any) -> list[tuple[Grounding, ...] | Problem]:
        return [
            tuple(Grounding(category=c, box=self.boxes[c], score=0.5) for c in asked)
            for asked in categories
        ]


def box(*xyxy: float) -> Box:
    x0, y0, x1, y1 = xyxy
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, width=8, height=4)


@pytest.mark.parametrize(
    ("target", "source", "reason"),
    [
        (box(0, 0, 4, 4), None, None),
        (box(1, 1, 2, 2), None, None),  # smaller, but within
        (None, None, "the target category is not found in the box"),
        (box(6, 0, 8, 4), None, "the target category is not found in the box"),
        (box(0, 0, 4, 4), box(0, 0, 4, 4), "the selected category is still found in the box"),
        (box(0, 0, 4, 4), box(6, 0, 8, 4), None),  # another of its kind, elsewhere
    ],
)
def test_regrounded(target: Box | None, source: Box | None, reason: str | None) -> None:
    grounder = Listed(Options())
    grounder.boxes = {"rabbit": target, "bee": source}
    subject = scorer(Regrounded)
    (scores,) = subject.score([edit(plain(0), plain(9), 0, 0, 4, 4)], {"grounder": grounder})
    assert isinstance(scores, dict)
    assert subject.reject([scores]) == [reason]


class Refusing(FakeGrounder):
    def ground(self, images: Any, categories: Any) -> list[tuple[Grounding, ...] | Problem]:
        return [Problem(status="failed", reason="no") for _ in images]


def test_regrounded_hands_problems_on() -> None:
    (result,) = scorer(Regrounded).score(
        [edit(plain(0), plain(9))], {"grounder": Refusing(Options())}
    )
    assert result == Problem(status="failed", reason="no")


# -- filters are views ---------------------------------------------------------------------------


def ends(run: RunFolder) -> list[str]:
    return [outcome.status for outcome in read_outcomes(run)]


@pytest.mark.parametrize(
    ("loose", "strict"),
    [
        ({"use": "eq1", "value": 1e-9}, {"use": "eq1", "reject_fraction": 0.5}),
        ({"use": "region-distance"}, {"use": "region-distance", "min_inside": 0.9}),
        ({"use": "no-op"}, {"use": "no-op", "min_changed": 1.0}),
    ],
)
def test_thresholds_recompute_nothing(
    loose: dict[str, Any], strict: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    source = {"use": "fake-source", "count": 4}
    fill = {"use": "fake-editor", "colour": [20, 20, 1]}
    run = generate(load_recipe(write_recipe(source=source, editor=fill, filters=[loose])), out)
    assert ends(run) == ["ok"] * 4
    before = [line for line in RunFolder(out).journal() if "ok" in line]
    stages = sorted(path.name for path in (out / "stages").iterdir())
    generate(load_recipe(write_recipe(source=source, editor=fill, filters=[strict])), out)
    assert "rejected" in ends(run)
    assert [line for line in RunFolder(out).journal() if "ok" in line] == before
    assert sorted(path.name for path in (out / "stages").iterdir()) == stages


def test_what_changes_a_score_is_computed_again(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for tolerance in (12, 13):
        filters = [{"use": "no-op", "tolerance": tolerance}]
        generate(load_recipe(write_recipe(filters=filters)), out)
    assert len(list((out / "stages").glob("score-no-op-*"))) == 2
    assert len(list((out / "stages").glob("edit-*"))) == 1
