"""The page of `reasonpix serve` in a real browser, and what it lets past."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image, ImageOps

from reasonpix.core.sockets import listen, url_of
from reasonpix.editing.config import SamplingSettings
from reasonpix.errors import ReasonpixError
from tests.support.browsing import needs_chromium, opened, started, sync_api
from tests.support.serve_files import encoded, picture

pytestmark = [
    needs_chromium,
    # Gradio's and its packages' own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:gradio"),
]

expect = sync_api.expect

TOKEN = "secret"
MAX_BYTES = 200_000
GRADIO_SAYS = ("Method not implemented.", "[DOM] Password field is not contained in a form")
"""On the console, where it ends a stream and where it asks for a password."""
PHONE = {"width": 360, "height": 740}


@dataclass
class Edits:
    """Turns colours round, notes what it was asked for, and refuses what it is told to refuse."""

    asked: list[tuple[str, int, float, float, int]] = field(default_factory=list)

    def __call__(self, image: Image.Image, instruction: str, *settings: Any) -> Image.Image:
        if "refuse" in instruction:
            raise ReasonpixError("steps: <b>too many</b>; ask for fewer")
        self.asked.append((instruction, *settings))
        return ImageOps.invert(image)


@dataclass
class Served:
    url: str
    edits: Edits


@contextmanager
def served(folder: Path, token: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    from reasonpix.deployment.server.ui import mount

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    app, edits = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), Edits()
    app.add_api_route("/healthz", lambda: {"status": "alive"})
    settings = SamplingSettings(resolution=64, num_inference_steps=20)
    end = mount(app, edits, settings, "a <i>model</i>", token=token, max_bytes=MAX_BYTES)
    socket = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield Served(url_of("127.0.0.1", socket), edits)
    finally:
        end()
        server.should_exit = True
        thread.join()
        socket.close()


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("site"), None, patched) as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with started() as browser:
        yield browser


@pytest.fixture
def page(browser: sync_api.Browser, site: Served) -> Iterator[sync_api.Page]:
    with opened(browser, besides=GRADIO_SAYS) as page:
        page.goto(site.url)
        page.wait_for_selector("#edit")
        yield page


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    picture(1, (64, 48)).save(path)
    return path


def upload(page: sync_api.Page, file: Path) -> None:
    page.set_input_files("#image input[type=file]", str(file))
    page.wait_for_selector("#image img")


def type_and_enter(page: sync_api.Page, words: str) -> None:
    page.fill("#instruction textarea", words)
    page.keyboard.press("Enter")


def history(page: sync_api.Page, count: int) -> list[str]:
    """The captions of the edits, as soon as there are so many."""
    expect(page.locator("#history img")).to_have_count(count)
    return [line for line in page.inner_text("#history").splitlines() if "seed" in line]


def shown(page: sync_api.Page, image: Any) -> NDArray[np.uint8]:
    """The pixels that an element shows."""
    url = image.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(url).body())).convert("RGB"))


def test_an_edit_and_going_on_from_it(page: sync_api.Page, site: Served, file: Path) -> None:
    site.edits.asked.clear()
    assert page.inner_text("#title") == "a <i>model</i>"  # shown as it is
    upload(page, file)
    type_and_enter(page, "turn them round")
    assert history(page, 1) == ["turn them round · seed 0"]
    assert site.edits.asked == [("turn them round", 0, 7.5, 1.5, 20)]
    pixels = [shown(page, image) for image in page.locator("#result img").all()]
    given = np.asarray(Image.open(file).convert("RGB"))
    assert sorted(it.tobytes() for it in pixels) == sorted(
        [given.tobytes(), (255 - given).tobytes()]
    )
    with page.expect_download() as download:
        page.click("#save")
    saved = np.asarray(Image.open(download.value.path()))
    assert np.array_equal(saved, 255 - given)

    # Going on from the result, and back to an edit from before.
    page.click("#again")
    expect(page.locator("#instruction textarea")).to_have_value("")
    page.click("#settings button")
    page.wait_for_selector("#seed input")
    page.click("#random")
    expect(page.locator("#seed input")).not_to_have_value("0")
    seed = int(page.input_value("#seed input"))
    type_and_enter(page, "and back")
    assert history(page, 2) == [f"and back · seed {seed}", "turn them round · seed 0"]
    assert site.edits.asked[-1] == ("and back", seed, 7.5, 1.5, 20)
    assert f"Seed {seed}" in page.inner_text("#caption")
    page.locator("#history button").nth(1).click()
    expect(page.locator("#instruction textarea")).to_have_value("turn them round")
    assert "Seed 0 ·" in page.inner_text("#caption")


@pytest.mark.parametrize(
    ("instruction", "uploads", "words"),
    [
        ("refuse this", True, "steps: <b>too many</b>; ask for fewer"),
        ("", True, "Write what should change."),
        ("it rains", False, "Choose an image first."),
    ],
)
def test_what_is_wrong_is_told(
    page: sync_api.Page, file: Path, instruction: str, uploads: bool, words: str
) -> None:
    if uploads:
        upload(page, file)
    page.fill("#instruction textarea", instruction)
    page.click("#edit")
    page.get_by_text(words, exact=True).wait_for()


def test_an_upload_that_is_no_image_is_told(page: sync_api.Page, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    page.set_input_files("#image input[type=file]", str(tmp_path / "bad.png"))
    page.wait_for_timeout(300)
    type_and_enter(page, "it rains")
    page.get_by_text("cannot be read").wait_for()


def test_a_phone_shows_all_of_it(browser: sync_api.Browser, site: Served, file: Path) -> None:
    with opened(browser, **PHONE, besides=GRADIO_SAYS) as page:
        page.goto(site.url)
        page.wait_for_selector("#edit")
        upload(page, file)
        type_and_enter(page, "turn them round")
        history(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


# -- what does not get past the page -------------------------------------------------------------


def call(data: list[Any]) -> dict[str, Any]:
    return {"data": data, "fn_index": 0, "session_hash": "x", "event_data": None, "trigger_id": 1}


def test_nothing_but_the_page_is_served(site: Served) -> None:
    with httpx2.Client(base_url=site.url) as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        for path in (
            "/gradio_api/info",
            "/gradio_api/proxy=http://127.0.0.1/",
            "/docs",
            "/nothing",
        ):
            assert client.get(path).status_code == 404, path
        for path in ("/etc/passwd", "../../etc/passwd", "http://127.0.0.1:1/x"):
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path
        files = {"files": ("large.png", bytes(2 * MAX_BYTES))}
        assert client.post("/gradio_api/upload", files=files).status_code == 413
        stranger = call([{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}])
        linked = call([{"path": None, "url": "http://127.0.0.1:1/x.png"}])
        for body in (stranger, linked, {"data": [["nested"]]}, "no call"):
            answer = client.post("/gradio_api/queue/join", content=json.dumps(body))
            assert answer.status_code == 400, body
        assert "frame-ancestors" in client.get("/").headers["content-security-policy"]


def test_with_a_token_the_page_wants_it(
    browser: sync_api.Browser, tmp_path: Path, patched: pytest.MonkeyPatch, file: Path
) -> None:
    with served(tmp_path, TOKEN, patched) as site:
        with httpx2.Client(base_url=site.url) as client:
            upload_ = {"files": ("scene.png", encoded(picture()))}
            assert client.post("/gradio_api/upload", files=upload_).status_code == 401
            wrong = client.post("/login", data={"username": "me", "password": "guess"})
            assert wrong.status_code == 400
        with opened(browser, besides=GRADIO_SAYS) as page:
            page.goto(site.url)
            page.get_by_label("username").fill("anybody")
            page.get_by_label("password").fill(TOKEN)
            page.get_by_role("button", name="Login").click()
            page.wait_for_selector("#edit")
            upload(page, file)
            type_and_enter(page, "turn them round")
            assert history(page, 1) == ["turn them round · seed 0"]
        assert len(site.edits.asked) == 1
