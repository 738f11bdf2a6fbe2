"""The pages in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from reasonpix_study.store import Study

from tests.support.browsing import needs_chromium, opened, started, sync_api
from tests.support.study_files import METHODS, serving, small_study

pytestmark = needs_chromium
PHONE = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("served")
    small_study(folder, workers=12).close()
    with serving(folder / "study") as (_, url):
        yield folder / "study", url


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    with opened(browser) as page:
        yield page


def link(served: tuple[Path, str], worker: int) -> str:
    folder, url = served
    with Study(folder) as study:
        return f"{url}/{study.invitations()[worker - 1].code}"


def answers(served: tuple[Path, str], worker: int) -> list[tuple[int, float | None]]:
    with Study(served[0]) as study:
        return [(it.position, it.seconds) for it in study.answers() if it.worker == worker]


def is_at(page: sync_api.Page, number: int) -> bool:
    page.wait_for_load_state()
    return str(page.title()).startswith(f"{number} of 4")


def press(page: sync_api.Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def confirm(page: sync_api.Page) -> None:
    with page.expect_navigation():
        press(page, "Enter")


def begin(page: sync_api.Page, url: str) -> None:
    page.goto(url)
    page.wait_for_function("document.activeElement.textContent === 'Start'")
    confirm(page)


def test_a_session_by_keyboard_with_a_reload(served: tuple[Path, str], page: sync_api.Page) -> None:
    begin(page, link(served, 1))
    assert is_at(page, 1)
    press(page, "Enter")  # nothing is chosen yet
    press(page, "3", "2")
    assert page.locator(":checked").get_attribute("value") == "2"
    confirm(page)
    assert is_at(page, 2)
    assert page.locator(":checked").count() == 0
    press(page, "7", "4")  # there is no seventh
    page.wait_for_timeout(300)
    page.reload()
    assert is_at(page, 2)
    press(page, "4")
    confirm(page)
    press(page, "1", "ArrowRight", "ArrowDown")  # as radio buttons have it
    confirm(page)
    assert is_at(page, 4)
    press(page, "Tab", "Space")
    confirm(page)
    assert page.locator("h1").inner_text() == "Thank you"
    found = answers(served, 1)
    assert [position for position, _ in found] == [2, 4, 3, 1]
    assert all(seconds is not None and 0 <= seconds < 30 for _, seconds in found)
    assert (found[1][1] or 0) >= 0.3  # what came before the reload counts
    page.go_back()  # to a page that was answered
    page.wait_for_load_state()
    assert page.locator("h1").inner_text() == "Thank you"


def test_goes_on_on_another_device(
    served: tuple[Path, str], page: sync_api.Page, browser: sync_api.Browser
) -> None:
    begin(page, link(served, 2))
    press(page, "1")
    confirm(page)
    with browser.new_context(viewport=PHONE, has_touch=True) as context:
        other = context.new_page()
        other.goto(link(served, 2))
        assert is_at(other, 2)
        shown = [it.get_attribute("src") for it in other.locator("label img").all()]
        assert shown == [it.get_attribute("src") for it in page.locator("label img").all()]
        other.locator("label").nth(2).tap()
        with other.expect_navigation():
            other.locator("button").tap()
        assert is_at(other, 3)
    press(page, "1")  # the first device is late
    confirm(page)
    assert is_at(page, 3)
    assert [position for position, _ in answers(served, 2)] == [1, 3]


@pytest.mark.parametrize("size", [(24, 16), (16, 40)])
def test_nothing_is_wider_than_a_phone(
    size: tuple[int, int], browser: sync_api.Browser, tmp_path: Path
) -> None:
    small_study(tmp_path, size=size, word="incomprehensibilities" * 4).close()
    with (
        serving(tmp_path / "study") as (_, url),
        browser.new_context(viewport=PHONE, has_touch=True) as context,
    ):
        page = context.new_page()
        page.goto(link((tmp_path / "study", url), 1))
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        with page.expect_navigation():
            page.locator("button").tap()
        page.wait_for_load_state()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for image in page.locator("img").all():
            box = image.bounding_box()
            assert box is not None and box["width"] >= 140 and box["height"] >= 90
        button = page.locator("button").bounding_box()  # within reach without scrolling
        assert button is not None and button["y"] + button["height"] <= 640


def test_all_candidates_are_seen_without_scrolling(
    served: tuple[Path, str], page: sync_api.Page
) -> None:
    begin(page, link(served, 3))
    assert page.evaluate("document.documentElement.scrollHeight") <= 720
    assert page.evaluate("[...document.images].every(it => it.naturalWidth === 24)")
    heights = [it.bounding_box()["height"] for it in page.locator("label img").all()]
    assert len(heights) == 4 and min(heights) > 150


def test_accessible_names_reveal_nothing(served: tuple[Path, str], page: sync_api.Page) -> None:
    begin(page, link(served, 4))
    group = page.get_by_role("group", name="Which edit follows the instruction best?")
    for number in range(1, 5):
        assert group.get_by_role("radio", name=f"Candidate {number}", exact=True).count() == 1
    assert page.get_by_role("img", name="The picture before the edit").count() == 1
    assert page.get_by_role("progressbar", name="Answered").count() == 1
    assert page.get_by_role("heading", level=1).count() == 1
    source = page.content().lower()
    assert not any(method.lower() in source for method in METHODS)
    assert "reasonpix" not in source and "case" not in source
    press(page, "Tab")  # what has the focus is seen
    outline = "getComputedStyle(document.activeElement.parentElement).outlineStyle"
    assert page.evaluate(outline) == "dashed"


def test_works_without_scripts(served: tuple[Path, str], browser: sync_api.Browser) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(link(served, 5))
        with page.expect_navigation():
            page.locator("button").click()
        page.locator("label").nth(3).click()
        with page.expect_navigation():
            page.locator("button").click()
        assert is_at(page, 2)
    assert answers(served, 5) == [(4, None)]


def test_an_unanswered_sample_is_not_left(served: tuple[Path, str], page: sync_api.Page) -> None:
    begin(page, link(served, 6))
    page.locator("button").click()
    page.wait_for_timeout(200)
    assert is_at(page, 1)
    assert page.locator("button").is_enabled()
    assert answers(served, 6) == []
    with httpx2.Client() as client:
        assert "1 of 4" in client.get(link(served, 6)).text
