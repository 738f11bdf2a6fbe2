"""A headless Chromium, and pages that must not load anything from other hosts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
sync_api.expect.set_options(timeout=15_000)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def started() -> Iterator[Any]:
    """The browser."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any, width: int = 1280, height: int = 720, besides: tuple[str, ...] = ()
) -> Iterator[Any]:
    """A page that loads nothing from other hosts and logs only lines that start with `besides`."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    messages: list[str] = []
    urls: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    yield page
    context.close()
    messages = [text for text in messages if not text.startswith(besides)]
    assert not messages, messages
    own = ("http://127.0.0.1:", "file:///", "data:", "blob:")
    foreign = [url for url in urls if not url.startswith(own)]
    assert not foreign, foreign
