from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reasonpix.errors import InvalidBox
from reasonpix.plugin.types import Box, Caption, EditPlan, Grounding

WIDTH, HEIGHT = 640, 480


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x0, x1 = sorted(draw(st.lists(st.floats(0, WIDTH), min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(draw(st.lists(st.floats(0, HEIGHT), min_size=2, max_size=2, unique=True)))
    try:
        return Box(x0=x0, y0=y0, x1=x1, y1=y1, width=WIDTH, height=HEIGHT)
    except InvalidBox as error:
        assert "too small to have an area" in str(error)
        return Box(x0=0, y0=0, x1=1, y1=1, width=WIDTH, height=HEIGHT)


def box(x0: float, y0: float, x1: float, y1: float) -> Box:
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, width=WIDTH, height=HEIGHT)


@given(boxes(), boxes())
def test_iou_and_overlap_are_symmetric_shares(one: Box, other: Box) -> None:
    assert one.iou(other) == other.iou(one)
    assert one.overlap(other) == other.overlap(one)
    assert 0 <= one.iou(other) <= one.overlap(other) <= 1


@given(boxes())
def test_a_box_is_like_itself(one: Box) -> None:
    assert one.iou(one) == 1
    assert one.overlap(one) == 1
    assert 0 <= one.share <= 1


@given(boxes())
def test_pixels_cover_the_box_and_no_pixel_more(one: Box) -> None:
    x0, y0, x1, y1 = one.pixels()
    assert 0 <= x0 <= one.x0 < x0 + 1
    assert 0 <= y0 <= one.y0 < y0 + 1
    assert x1 - 1 < one.x1 <= x1 <= WIDTH
    assert y1 - 1 < one.y1 <= y1 <= HEIGHT


@given(boxes())
def test_a_box_survives_json(one: Box) -> None:
    assert Box.model_validate_json(one.model_dump_json()) == one


def test_iou_and_overlap_by_hand() -> None:
    # 10x10 and 20x10 that share 5x10.
    assert box(0, 0, 10, 10).iou(box(5, 0, 25, 10)) == pytest.approx(50 / 250)
    assert box(0, 0, 10, 10).overlap(box(5, 0, 25, 10)) == pytest.approx(0.5)
    assert box(0, 0, 10, 10).iou(box(10, 0, 20, 10)) == 0
    assert box(2, 2, 4, 4).overlap(box(0, 0, 10, 10)) == 1
    assert box(0, 0, WIDTH, HEIGHT / 2).share == 0.5


@pytest.mark.parametrize(
    ("xyxy", "what"),
    [
        ((5, 0, 5, 9), "x1=5.0 must exceed x0=5.0"),
        ((9, 0, 5, 9), "x1=5.0 must exceed x0=9.0"),
        ((0, 9, 5, 2), "y1=2.0 must exceed y0=9.0"),
        ((-1, 0, 5, 9), "leaves the image of 640x480 pixels"),
        ((0, -0.5, 5, 9), "leaves the image"),
        ((0, 0, 640.5, 9), "leaves the image"),
        ((0, 0, 5, 481), "leaves the image"),
        ((math.nan, 0, 5, 9), "must be finite"),
        ((0, 0, math.inf, 9), "must be finite"),
        ((0, 0, 1e-200, 1e-200), "too small to have an area"),
    ],
)
def test_coordinates_that_make_no_box(xyxy: tuple[float, ...], what: str) -> None:
    with pytest.raises(InvalidBox, match=what):
        box(*xyxy)


def test_records_are_frozen() -> None:
    caption = Caption(text="a bee")
    with pytest.raises(ValidationError, match="frozen"):
        caption.text = "a rabbit"  # type: ignore[misc]
    assert caption.model_copy(update={"text": "a rabbit"}) == Caption(text="a rabbit")
    assert hash(caption) == hash(Caption(text="a bee"))


def test_unknown_fields_and_impossible_scores_are_rejected() -> None:
    with pytest.raises(ValidationError, match="extra"):
        EditPlan(selected="bee", target="cat", instruction="…", reason="none")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Grounding(category="bee", score=1.5)
