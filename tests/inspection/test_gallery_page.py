"""The gallery in a browser: it searches, filters, sorts and pages thousands of records."""

from __future__ import annotations

import io
import time
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import Ending, read_stages
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder, Shard
from reasonpix.inspection.cards import read_cards
from reasonpix.inspection.gallery import render_page, write_gallery
from reasonpix.inspection.reasons import Tally
from tests.conftest import WriteRecipe
from tests.support.browsing import needs_chromium, opened, started

pytestmark = needs_chromium

COUNT = 5000
CATEGORIES = ("bee", "cat", "fire hydrant", "Ünicorn")
TARGETS = ("pear", "owl", "bench")
REASONS = ("distance 0.0{n} is among the lowest 30%", "no box found for ghost")
STAGES = ("score-eq1", "ground")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as browser:
        yield browser


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Seven records of which the two with the smallest change are rejected."""
    filters = ["no-op", {"use": "eq1", "reject_fraction": 0.3}]
    return generate(load_recipe(write_recipe(filters=filters)), tmp_path / "run")


@cache
def noise(number: int, side: int) -> str:
    """An image that no compression makes small."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def large_page(run: RunFolder, folder: Path, count: int = COUNT, side: int = 48) -> Path:
    """A gallery of `count` records: of five, a filter rejects one, and the grounder one."""
    entries = [entry for entry in read_stages(run) if entry.stage != "score-no-op"]
    first = Tally(entries, 1)
    shard, record_id, *_ = next(
        Ending(shard, record_id, "ok", "", "")
        for shard in run.shards()
        for record_id, *_ in run.ends("source", shard)
    )
    first.add(Ending(shard, record_id, "ok", entries[-1].stage, ""))
    [(_, card)] = read_cards(run, entries, first.shown())
    tally = Tally(entries, count)
    cards = {}
    for n in range(count):
        kind = n % 5  # 0 and 1 are rejected
        ok = kind > 1
        end = Ending(
            Shard("000000", count), f"{n:06x}", "ok" if ok else "rejected",
            entries[-1].stage if ok else STAGES[kind], "" if ok else REASONS[kind].format(n=n),
        )  # fmt: skip
        tally.add(end)
        cards[end.record_id] = card | {
            "id": end.record_id,
            "source_id": f"photos/{n}.jpg",
            "status": end.status,
            "stage": end.stage,
            "reason": end.reason,
            "caption": f"a {CATEGORIES[n % 4]} beside number {n}",
            "change": f"{CATEGORIES[n % 4]} → {TARGETS[n % 3]}",
            "category": CATEGORIES[n % 4],
            "target": TARGETS[n % 3],
            "input": noise(2 * n % 200, side),
            "edited": noise((2 * n + 1) % 200, side),
            "scores": {} if kind == 1 else {"eq1.distance": (n * 7919 % count) / count},
        }
    path = folder / "gallery.html"
    path.write_text(render_page(run, entries, tally, cards), encoding="utf-8")
    return path


def ids(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all("#cards article", "all => all.map(one => one.id)")
    return found


def said(page: Any, text: str) -> None:
    """Wait until the line above the cards starts with `text`."""
    page.wait_for_function(
        "text => document.getElementById('count').textContent.startsWith(text)", arg=text
    )


@pytest.mark.parametrize("size", [(40, 1600), (3, 900), (8000, 6), (300, 200), (48, 48), (4, 120)])
def test_images_of_any_shape_are_visible_and_not_too_tall(
    size: tuple[int, int], write_recipe: WriteRecipe, browser: Any, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", size, "navy").save(tmp_path / "photos" / "a.png")
    source = {"use": "image-folder", "path": str(tmp_path / "photos")}
    run = generate(load_recipe(write_recipe(source=source)), tmp_path / "run")
    with opened(browser) as page:
        page.goto(Path(write_gallery(run)).absolute().as_uri())
        [image, *_] = page.locator("article img").all()
        drawn, frame = image.bounding_box(), page.locator(".frame").first.bounding_box()
        assert 3 <= drawn["height"] <= 450 and 0 < drawn["width"] <= 360
        # Boxes are placed in the frame, which the image fills without a margin.
        assert drawn["height"] == pytest.approx(frame["height"], abs=1)
        if 0.2 < size[0] / size[1] < 5:
            ratio = drawn["width"] / drawn["height"]
            assert ratio == pytest.approx(size[0] / size[1], rel=0.05)


def test_five_thousand_records_are_searched_without_freezing(
    run: RunFolder, browser: Any, tmp_path: Path
) -> None:
    path = large_page(run, tmp_path)
    with opened(browser) as page:
        page.set_default_timeout(8000)
        page.goto(path.as_uri())
        said(page, "5,000 of 5,000 records match, 1–60 shown")
        assert len(ids(page)) == 60
        # Only the images of this page are loaded.
        assert page.locator("img").count() == 120
        broken = "all => all.filter(one => one.complete && !one.naturalWidth).length"
        assert page.eval_on_selector_all("img", broken) == 0

        # Every step ends within a fraction of a second; the slack is for a busy machine.
        for field, value, count in (
            ("q", "PHOTOS/499", "11 of"),  # 499, 4990 … 4999
            ("q", "photos/77.jpg", "1 of"),
            ("q", "00004d", "1 of"),
            ("q", "ünicorn pear", "417 of"),
            ("q", "nothing like it", "0 of"),
            ("q", "", "5,000 of"),
        ):
            before = time.monotonic()
            page.fill(f"[name={field}]", value)
            said(page, count)
            assert time.monotonic() - before < 3
        page.select_option("[name=sort]", "eq1.distance")
        page.select_option("[name=order]", "descending")
        page.wait_for_function("location.hash.includes('descending')")
        page.wait_for_function("document.querySelector('#cards article').id !== '000002'")
        best = sorted((n for n in range(COUNT) if n % 5 != 1), key=lambda n: -(n * 7919 % COUNT))
        assert ids(page) == [f"{n:06x}" for n in best[:60]]


def test_filters_combine_and_the_address_keeps_the_view(
    run: RunFolder, browser: Any, tmp_path: Path
) -> None:
    path = large_page(run, tmp_path, 300)
    with opened(browser) as page:
        page.set_default_timeout(8000)
        page.goto(path.as_uri())
        said(page, "300 of 300")
        page.select_option("[name=outcome]", "rejected at ground")
        said(page, "60 of 300")
        page.select_option("[name=category]", "fire hydrant")
        page.select_option("[name=target]", "owl")
        wanted = [n for n in range(300) if n % 5 == 1 and n % 4 == 2 and n % 3 == 1]
        said(page, f"{len(wanted)} of 300")
        page.select_option("[name=sort]", "id")
        page.select_option("[name=order]", "descending")
        page.wait_for_function("location.hash.endsWith('descending')")
        said(page, f"{len(wanted)} of 300")
        address = page.url
        assert ids(page) == [f"{n:06x}" for n in reversed(wanted)]
        # Without a score a record comes last, in either order.
        page.click("[type=reset]")
        said(page, "300 of 300")
        page.select_option("[name=sort]", "eq1.distance")
        page.wait_for_function("location.hash.includes('sort')")
        for order in ("", "descending"):
            page.goto(f"{path.as_uri()}#sort=eq1.distance&order={order}&page=5")
            page.wait_for_function(
                "document.querySelector('.pages span').textContent.includes('5')"
            )
            assert all(int(it, 16) % 5 == 1 for it in ids(page))
    with opened(browser) as page:
        page.goto(address)
        said(page, f"{len(wanted)} of 300")
        assert ids(page) == [f"{n:06x}" for n in reversed(wanted)]
        assert page.input_value("[name=category]") == "fire hydrant"


def test_pages_are_turned_by_keys_and_the_history_goes_back(
    run: RunFolder, browser: Any, tmp_path: Path
) -> None:
    path = large_page(run, tmp_path, 150)
    with opened(browser) as page:
        page.set_default_timeout(8000)
        page.goto(path.as_uri())
        said(page, "150 of 150 records match, 1–60 shown")
        page.keyboard.press("ArrowLeft")  # there is no page before
        page.keyboard.press("ArrowRight")
        said(page, "150 of 150 records match, 61–120 shown")
        page.keyboard.press("ArrowRight")
        said(page, "150 of 150 records match, 121–150 shown")
        assert page.is_disabled("[data-step='1']")
        page.go_back()
        said(page, "150 of 150 records match, 61–120 shown")
        page.keyboard.press("/")
        page.keyboard.type("photos/14")
        said(page, "11 of 150")  # on the first page again
        assert page.input_value("[name=q]") == "photos/14"
        page.keyboard.press("ArrowRight")  # moves the cursor, and does not turn a page
        said(page, "11 of 150")
        # All controls are reached with Tab.
        reached = set()
        for _ in range(10):
            reached.add(page.evaluate("document.activeElement.name || document.activeElement.type"))
            page.keyboard.press("Tab")
        assert {"q", "outcome", "category", "target", "sort", "order", "reset"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(
    run: RunFolder, browser: Any, tmp_path: Path, scheme: str
) -> None:
    path = large_page(run, tmp_path, 70)
    with opened(browser, width=360, height=740) as page:
        page.emulate_media(color_scheme=scheme)
        page.set_default_timeout(8000)
        page.goto(path.as_uri())
        said(page, "70 of 70")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        colours = page.eval_on_selector(
            "[name=q]",
            "one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]",
        )
        text, ground = (sum(map(int, it[it.index("(") + 1 : -1].split(",")[:3])) for it in colours)
        assert (text > ground) == (scheme == "dark")
        page.click(".pages >> nth=1 >> text=Next")
        said(page, "70 of 70 records match, 61–70 shown")


def test_a_reason_of_the_table_leads_to_its_records(
    run: RunFolder, browser: Any, tmp_path: Path
) -> None:
    with opened(browser) as page:
        page.goto(Path(write_gallery(run)).as_uri())
        said(page, "7 of 7")
        page.click("table a")
        said(page, "2 of 7")
        assert page.locator("#cards .why").count() == 2
        [first, second] = ids(page)
        page.goto(f"{Path(write_gallery(run)).as_uri()}#{second}")  # a record's own address
        said(page, "1 of 7")
        assert ids(page) == [second] != [first]


def test_hostile_words_run_nothing(write_recipe: WriteRecipe, browser: Any, tmp_path: Path) -> None:
    hostile = "</script><script>document.title = 1</script><img src=x onerror=alert(1)>{{ 7 }}"
    recipe = write_recipe(
        captioner={"use": "fake-captioner", "caption": f"a bee {hostile}"},
        planner={"use": "fake-planner", "target": hostile},
    )
    path = write_gallery(generate(load_recipe(recipe), tmp_path / "run"))
    with opened(browser) as page:
        page.goto(Path(path).as_uri())
        said(page, "7 of 7")
        assert page.title() == "run · reasonpix"
        assert page.locator("#cards figcaption").first.inner_text() == f"a bee {hostile}"
        page.select_option("[name=target]", hostile)
        page.wait_for_function("location.hash.includes('target')")
        said(page, "7 of 7")
        page.fill("[name=q]", "<script>")
        said(page, "7 of 7")
