"""The page of `reasonpix serve` in a real browser."""

from __future__ import annotations

import http.client
import io
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from reasonpix.deployment.server.service import Limits
from tests.support.browsing import needs_chromium, opened, started, sync_api
from tests.support.serve_files import FakeModel, ask, faked, picture, until
from tests.support.serve_files import started as started_server
from tests.support.tiny_model import write_tiny

pytestmark = needs_chromium

expect = sync_api.expect

TOKEN = "secret"
MAX_BYTES = 200_000
DEFAULTS = {"steps": 10, "guidance_scale": 7.5, "image_guidance_scale": 1.5, "resolution": 32}
PHONE = {"width": 360, "height": 740}
FAILED_REQUEST = ("Failed to load resource",)
"""What Chromium writes on the console for any answer that is an error."""
TRUSTED_TYPES = "This document requires 'TrustedHTML' assignment."
HOSTILE = '<img src=x onerror="document.title=1">.png'


class RecordingModel(FakeModel):
    """Keeps the settings and seeds it was called with."""

    def __init__(self, held: bool = False) -> None:
        super().__init__(held)
        self.calls: list[tuple[str, int, dict[str, float]]] = []

    def edit(self, tasks: Any, settings: Any, advance: Any) -> Any:
        tasks = list(tasks)
        names = {"steps": "num_inference_steps"}
        used = {name: getattr(settings, names.get(name, name)) for name in DEFAULTS}
        self.calls += [(task.instruction, task.seed, used) for task in tasks]
        return super().edit(tasks, settings, advance)


@contextmanager
def served(model: FakeModel, limits: Limits | None = None, **options: Any) -> Iterator[str]:
    limits = limits or Limits(max_bytes=MAX_BYTES)
    with faked(model, limits, page=True, **options) as (_, client):
        yield str(client.base_url)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with started() as browser:
        yield browser


@pytest.fixture
def model() -> RecordingModel:
    return RecordingModel()


@pytest.fixture
def page(browser: sync_api.Browser, model: RecordingModel) -> Iterator[sync_api.Page]:
    with served(model) as url, opened(browser) as page:
        visit(page, url)
        yield page


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    picture(1, (32, 24)).save(path)
    return path


def visit(page: sync_api.Page, url: str) -> None:
    page.goto(url)
    expect(page.get_by_role("button", name="Edit", exact=True)).to_be_visible()


def choose(page: sync_api.Page, path: Path) -> None:
    expect(page.locator("main")).to_be_visible()  # connected, after the token if there is one
    page.set_input_files("#file", str(path))
    expect(page.locator("#preview")).to_be_visible()


def submit(page: sync_api.Page, instruction: str) -> None:
    page.get_by_label("Instruction", exact=True).fill(instruction)
    page.keyboard.press("Enter")


def history(page: sync_api.Page, count: int) -> list[str]:
    """The texts of the edits in the history, once there are `count`."""
    buttons = page.locator("#history button")
    expect(buttons).to_have_count(count)
    return [" · ".join(text.split("\n")) for text in buttons.all_inner_texts()]


def pixels(page: sync_api.Page, selector: str) -> NDArray[np.uint8]:
    """The RGB pixels that an image element shows."""
    width, height, values = page.evaluate(
        """async (selector) => {
          const image = document.querySelector(selector);
          await image.decode();
          const { naturalWidth: width, naturalHeight: height } = image;
          const context = Object.assign(document.createElement("canvas"), { width, height })
            .getContext("2d");
          context.drawImage(image, 0, 0);
          return [width, height, [...context.getImageData(0, 0, width, height).data]];
        }""",
        selector,
    )
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def original(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


# -- editing -------------------------------------------------------------------------------------


def test_an_edit_and_going_on_from_it(
    page: sync_api.Page, model: RecordingModel, file: Path
) -> None:
    assert page.title() == "fake – reasonpix"
    assert page.inner_text("h1") == "fake" and page.inner_text("#runtime") == "fake on cpu"
    choose(page, file)
    submit(page, "invert it")
    assert history(page, 1) == ["invert it · Seed 0"]
    assert model.calls == [("invert it", 0, DEFAULTS)]
    assert np.array_equal(pixels(page, "#before"), original(file))
    assert np.array_equal(pixels(page, "#after"), 255 - original(file))
    caption = "Seed 0 · guidance 7.5 · image guidance 1.5 · 10 steps · resolution 32"
    assert page.inner_text("#caption-settings") == caption
    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG").click()
    assert download.value.suggested_filename == "edit-seed-0.png"
    assert np.array_equal(np.asarray(Image.open(download.value.path())), 255 - original(file))

    # Go on from the result with other settings.
    page.get_by_role("button", name="Use as input").click()
    instruction = page.get_by_label("Instruction", exact=True)
    expect(instruction).to_have_value("")
    expect(instruction).to_be_focused()
    page.get_by_text("Settings", exact=True).click()
    seed = page.get_by_label("Seed", exact=True)
    page.get_by_role("button", name="Random").click()
    expect(seed).not_to_have_value("0")
    page.get_by_label("Guidance", exact=True).fill("3.1")  # a slider
    page.get_by_label("Image guidance, as a number").fill("1.234")
    page.get_by_label("Steps, as a number").fill("3")
    page.get_by_label("Resolution, as a number").fill("24")
    submit(page, "and back")
    number = int(seed.input_value())
    assert history(page, 2) == [f"and back · Seed {number}", "invert it · Seed 0"]
    settings = {"steps": 3, "guidance_scale": 3.1, "image_guidance_scale": 1.234, "resolution": 24}
    assert model.calls[1:] == [("and back", number, settings)]
    assert np.array_equal(pixels(page, "#before"), 255 - original(file))
    assert f"Seed {number} · guidance 3.1" in page.inner_text("#caption-settings")

    # An earlier edit comes back whole.
    page.locator("#history button").nth(1).click()
    expect(instruction).to_have_value("invert it")
    assert page.inner_text("#caption-settings") == caption
    assert np.array_equal(pixels(page, "#after"), 255 - original(file))
    assert np.array_equal(pixels(page, "#preview"), original(file))
    current = [it.get_attribute("aria-current") for it in page.locator("#history button").all()]
    assert current == ["false", "true"]
    page.keyboard.press("Escape")  # nothing is running: nothing happens
    page.get_by_role("button", name="Edit", exact=True).click()
    assert history(page, 3)[0] == "invert it · Seed 0"
    assert model.calls[2:] == [("invert it", 0, DEFAULTS)]

    page.get_by_label("Steps, as a number").fill("7")
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_label("Steps, as a number")).to_have_value("10")


def test_the_divider_compares_before_and_after(page: sync_api.Page, file: Path) -> None:
    choose(page, file)
    submit(page, "invert it")
    history(page, 1)
    divider = page.get_by_label("Divider between before and after")
    divider.focus()
    assert clip_percent(page) == 50
    page.keyboard.press("ArrowRight")
    assert clip_percent(page) == 50.5
    page.keyboard.press("Home")
    assert clip_percent(page) == 0
    box = page.locator("#viewer").bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + box["height"] / 2)
    assert abs(clip_percent(page) - 75) < 2
    assert abs(box["width"] / box["height"] - 32 / 24) < 0.01  # the image's own shape
    # The left half shows the original, the right one the edit.
    divider.fill("50")
    shot = np.asarray(Image.open(io.BytesIO(page.locator("#viewer").screenshot())).convert("RGB"))
    for x, expected in ((0.3, original(file)), (0.7, 255 - original(file))):
        seen = shot[int(0.8 * shot.shape[0]), int(x * shot.shape[1])].astype(int)
        near = expected[int(0.8 * 24) - 1 : int(0.8 * 24) + 2, int(x * 32) - 1 : int(x * 32) + 2]
        low, high = near.min((0, 1)).astype(int) - 8, near.max((0, 1)).astype(int) + 8
        assert (low <= seen).all() and (seen <= high).all()


def clip_percent(page: sync_api.Page) -> float:
    clip = page.eval_on_selector("#after", "(image) => getComputedStyle(image).clipPath")
    found = re.search(r"([\d.]+)%\)", clip)
    return float(found[1]) if found else 0.0


def test_images_are_dropped_and_pasted(page: sync_api.Page, file: Path) -> None:
    send = """([type, name, data]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(data)], name, { type: "image/png" }));
      const options = { bubbles: true, cancelable: true };
      document.body.dispatchEvent(type === "paste"
        ? new ClipboardEvent(type, { ...options, clipboardData: transfer })
        : new DragEvent(type, { ...options, dataTransfer: transfer }));
    }"""
    data = list(file.read_bytes())
    page.evaluate(send, ["dragenter", "a.png", data])
    expect(page.locator("#drop-overlay")).to_be_visible()
    page.evaluate(send, ["drop", "dropped.png", data])
    expect(page.locator("#drop-overlay")).to_be_hidden()
    expect(page.locator("#file-name")).to_contain_text("dropped.png")
    page.evaluate(send, ["paste", "pasted.png", data])
    expect(page.locator("#file-name")).to_contain_text("pasted.png")
    submit(page, "invert it")
    history(page, 1)
    assert np.array_equal(pixels(page, "#after"), 255 - original(file))


def test_the_keyboard_is_enough(page: sync_api.Page, model: RecordingModel, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        while page.evaluate("document.activeElement.id") != "file":
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    chooser.value.set_files(str(file))
    page.keyboard.press("Tab")
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "edit"
    page.keyboard.press("Space")
    history(page, 1)
    assert [call[0].split("\r\n") for call in model.calls] == [["first line", "second line"]]


def test_every_control_has_a_name(page: sync_api.Page, file: Path) -> None:
    choose(page, file)
    submit(page, "invert it")
    history(page, 1)
    page.get_by_text("Settings", exact=True).click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, textarea, img, progress")]
          .filter((it) => it.checkVisibility() && !it.closest("[aria-hidden=true]"))
          .filter((it) => !(it.getAttribute("aria-label") || it.alt || it.textContent.trim()
                            || it.labels?.length))
          .map((it) => it.outerHTML)"""
    )
    assert unnamed == []
    assert page.evaluate("document.documentElement.lang") == "en"


# -- waiting, cancelling, failing ------------------------------------------------------------------


def test_an_edit_can_be_cancelled(browser: sync_api.Browser, file: Path) -> None:
    model = RecordingModel(held=True)
    with faked(model, page=True) as (service, client), opened(browser) as page:
        visit(page, str(client.base_url))
        choose(page, file)
        for cancel in ("button", "Escape"):
            submit(page, "invert it")
            expect(page.locator("#state")).to_contain_text("Editing…")
            expect(page.locator("#elapsed")).to_have_text("1 s")
            until(lambda: service.batcher.running == 1)
            if cancel == "button":
                page.get_by_role("button", name="Cancel").click()
            else:
                page.keyboard.press("Escape")
            expect(page.locator("#state")).to_be_hidden()
            expect(page.locator("#announcement")).to_have_text("The edit was cancelled.")
            expect(page.locator("#error")).to_be_hidden()
            until(lambda: service.batcher.admitted == 0)
        model.free.set()
        submit(page, "invert it")
        assert history(page, 1) == ["invert it · Seed 0"]


def test_a_busy_server_is_asked_again(browser: sync_api.Browser, file: Path) -> None:
    model = RecordingModel(held=True)
    with (
        faked(model, Limits(queue=1), page=True) as (service, client),
        ThreadPoolExecutor(1) as pool,
        opened(browser, besides=FAILED_REQUEST) as page,
    ):
        visit(page, str(client.base_url))
        other = pool.submit(ask, client, picture(), "other")
        until(lambda: service.batcher.admitted == 1)
        choose(page, file)
        submit(page, "invert it")
        busy = re.compile(r"The server is busy with other edits. Trying again in \d+ s\.")
        expect(page.locator("#state-text")).to_have_text(busy)
        model.free.set()
        assert other.result().status_code == 200
        assert history(page, 1) == ["invert it · Seed 0"]
        expect(page.locator("#error")).to_be_hidden()


def test_the_page_waits_for_the_model(browser: sync_api.Browser, tmp_path: Path) -> None:
    """It answers before the server is ready, and connects by itself."""
    model = write_tiny(tmp_path / "tiny", num_inference_steps=1)
    with (
        started_server(model, page=True) as (process, url),
        opened(browser, besides=FAILED_REQUEST) as page,
    ):
        page.goto(url)
        loading = "The model is still loading. Trying again in 5 s."
        expect(page.locator("#startup")).to_have_text(loading)
        assert process.stdout is not None and process.stdout.readline() == f"serving on {url}\n"
        expect(page.get_by_role("button", name="Edit", exact=True)).to_be_visible(timeout=15_000)
        assert page.inner_text("h1") == "tiny"


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("break", "The model failed on this edit; see the server's log"),
        ("decline", "There is nothing to edit"),
        ("", "Write what should change."),
    ],
)
def test_errors_are_explained(
    browser: sync_api.Browser, model: RecordingModel, file: Path, instruction: str, message: str
) -> None:
    with served(model) as url, opened(browser, besides=FAILED_REQUEST) as page:
        visit(page, url)
        submit(page, instruction)
        expect(page.get_by_role("alert")).to_have_text("Choose an image first.")
        choose(page, file)
        submit(page, instruction)
        expect(page.get_by_role("alert")).to_have_text(message)
        submit(page, "invert it")
        assert history(page, 1) == ["invert it · Seed 0"]
        expect(page.locator("#error")).to_be_hidden()


def test_settings_that_cannot_be(page: sync_api.Page, model: RecordingModel, file: Path) -> None:
    choose(page, file)
    page.get_by_text("Settings", exact=True).click()
    for label, value, message in (
        ("Steps, as a number", "101", "Steps: enter a whole number from 1 to 100."),
        ("Resolution, as a number", "", "Resolution: enter a whole number from 8 to 32."),
        ("Guidance, as a number", "-1", "Guidance: enter a number of at least 0."),
        ("Seed", "1.5", "Seed: enter a whole number of at least 0."),
    ):
        before = page.get_by_label(label, exact=True).input_value()
        page.get_by_label(label, exact=True).fill(value)
        submit(page, "invert it")
        expect(page.get_by_role("alert")).to_have_text(message)
        expect(page.get_by_label(label, exact=True)).to_be_focused()
        page.get_by_label(label, exact=True).fill(before)
    assert model.calls == []


def test_files_that_cannot_be(browser: sync_api.Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes(MAX_BYTES + 1))
    picture(1, (32, 24)).save(tmp_path / "scan.tiff")
    with served(FakeModel()) as url, opened(browser, besides=FAILED_REQUEST) as page:
        visit(page, url)
        page.set_input_files("#file", str(tmp_path / "notes.txt"))
        expect(page.get_by_role("alert")).to_have_text("notes.txt is not an image.")
        page.set_input_files("#file", str(tmp_path / "large.png"))
        large = "large.png has 0.19 MB; this server takes images of up to 0.19 MB."
        expect(page.get_by_role("alert")).to_have_text(large)
        page.set_input_files("#file", str(tmp_path / "bad.png"))
        expect(page.locator("#file-name")).to_contain_text("your browser cannot show it")
        submit(page, "it rains")
        expect(page.get_by_role("alert")).to_contain_text("Image: ")
        # The server reads what the browser cannot show.
        page.set_input_files("#file", str(tmp_path / "scan.tiff"))
        submit(page, "invert it")
        history(page, 1)
        assert np.array_equal(pixels(page, "#after"), 255 - original(tmp_path / "scan.tiff"))
        expect(page.locator("#before")).to_be_hidden()


def test_a_server_that_is_gone(browser: sync_api.Browser, file: Path) -> None:
    with opened(browser, besides=FAILED_REQUEST) as page:
        with served(FakeModel()) as url:
            visit(page, url)
            choose(page, file)
        submit(page, "invert it")
        expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")


# -- safety --------------------------------------------------------------------------------------


def test_hostile_names_and_words_are_shown_as_text(
    browser: sync_api.Browser, tmp_path: Path
) -> None:
    name = HOSTILE.replace("/", "")
    picture(1, (32, 24)).save(tmp_path / name)
    with served(FakeModel()) as url, opened(browser, besides=(TRUSTED_TYPES,)) as page:
        visit(page, url)
        choose(page, tmp_path / name)
        expect(page.locator("#file-name")).to_contain_text(name)
        submit(page, HOSTILE)
        assert history(page, 1) == [f"{HOSTILE} · Seed 0"]
        assert page.inner_text("#caption-instruction") == HOSTILE
        assert page.title() == "fake – reasonpix"
        # No text becomes HTML, by mistake or otherwise.
        blocked = page.evaluate(
            "() => { try { document.body.innerHTML = 'x'; } catch (error) { return error.name; } }"
        )
        assert blocked == "TypeError"


def test_headers(model: RecordingModel) -> None:
    with served(model) as url, httpx2.Client(base_url=url) as client:
        for path, kind in (
            ("/", "text/html; charset=utf-8"),
            ("/page.js", "text/javascript; charset=utf-8"),
            ("/page.css", "text/css; charset=utf-8"),
            ("/icon.svg", "image/svg+xml"),
        ):
            answer = client.get(path)
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(answer.content))
            policy = answer.headers["content-security-policy"]
            assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-store"
            assert "set-cookie" not in answer.headers
        html, script = client.get("/").text, client.get("/page.js").text
        assert not re.search(r"(src|href)=\"(/|http)|style=|\bon\w+=", html)
        assert "http" not in script and "innerHTML" not in script
        for path in ("/static/index.html", "/page.js/..%2fapp.py", "/docs", "/nothing"):
            assert client.get(path).status_code == 404, path
        assert client.post("/").status_code == 405


def test_with_a_token_the_page_asks_for_it(
    browser: sync_api.Browser, model: RecordingModel, file: Path
) -> None:
    with served(model, token=TOKEN) as url, opened(browser, besides=FAILED_REQUEST) as page:
        sent: list[str | None] = []
        page.route(
            "**/v1/edits",
            lambda route: (
                sent.append(route.request.headers.get("authorization")),
                route.continue_(),
            ),
        )
        page.goto(url)
        token = page.get_by_label("Token of this server")
        expect(page.locator("main")).to_be_hidden()
        expect(page.locator("#login-error")).to_be_hidden()
        for wrong, message in (
            ("guess", "This token is wrong."),
            ("gueß", "A token has letters, digits and signs only."),
        ):
            token.fill(wrong)
            page.get_by_role("button", name="Continue").click()
            expect(page.get_by_role("alert")).to_have_text(message)
        assert TOKEN not in page.content()
        token.fill(TOKEN)
        page.keyboard.press("Enter")
        choose(page, file)
        submit(page, "invert it")
        assert history(page, 1) == ["invert it · Seed 0"]
        assert sent == [f"Bearer {TOKEN}"]
        # It survives a reload in this tab, and goes nowhere else.
        page.reload()
        expect(page.get_by_role("button", name="Edit", exact=True)).to_be_visible()
        assert page.context.cookies() == [] and TOKEN not in page.url
        assert page.evaluate("JSON.stringify(localStorage)") == "{}"
        other = page.context.new_page()
        other.goto(url)
        expect(other.get_by_label("Token of this server")).to_be_visible()
    assert len(model.calls) == 1


# -- everywhere ----------------------------------------------------------------------------------


class _StrippingProxy(BaseHTTPRequestHandler):
    """Serves `target` below /tools/edit/, as a prefix-stripping reverse proxy; nothing else."""

    target = ""

    def do_GET(self) -> None:
        if not self.path.startswith("/tools/edit/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = self.path.removeprefix("/tools/edit")
        with closing(http.client.HTTPConnection(self.target)) as connection:
            connection.request(self.command, path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_behind_a_path_prefix(browser: sync_api.Browser, model: RecordingModel, file: Path) -> None:
    with served(model, token=TOKEN) as url:
        handler = type("Proxy", (_StrippingProxy,), {"target": urlsplit(url).netloc})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
            thread = threading.Thread(target=proxy.serve_forever)
            thread.start()
            try:
                with opened(browser, besides=FAILED_REQUEST) as page:
                    page.goto(f"http://127.0.0.1:{proxy.server_port}/tools/edit/")
                    page.get_by_label("Token of this server").fill(TOKEN)
                    page.keyboard.press("Enter")
                    choose(page, file)
                    submit(page, "invert it")
                    assert history(page, 1) == ["invert it · Seed 0"]
                    assert np.array_equal(pixels(page, "#after"), 255 - original(file))
            finally:
                proxy.shutdown()
                thread.join()


def test_dark_mode(browser: sync_api.Browser, model: RecordingModel) -> None:
    def is_dark() -> bool:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)[:3])) < 3 * 128

    with served(model) as url, opened(browser) as page:
        toggle = page.get_by_role("button", name="Dark mode")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            visit(page, url)
            assert is_dark() == (scheme == "dark")
            expect(toggle).to_have_attribute("aria-pressed", str(scheme == "dark").lower())
        toggle.click()
        assert not is_dark()
        page.reload()  # the choice is kept
        expect(toggle).to_have_attribute("aria-pressed", "false")
        assert not is_dark()
        toggle.click()
        assert is_dark()


def test_a_phone_shows_all_of_it(
    browser: sync_api.Browser, model: RecordingModel, file: Path
) -> None:
    with served(model) as url, opened(browser, **PHONE) as page:
        visit(page, url)
        choose(page, file)
        page.get_by_text("Settings", exact=True).click()
        submit(page, "x" * 200)
        history(page, 1)
        expect(page.locator("#comparison")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        small = page.evaluate(
            """() => [...document.querySelectorAll("button, a")]
              .filter((it) => it.checkVisibility() && it.getBoundingClientRect().height < 40)
              .map((it) => it.id)"""
        )
        assert small == []
