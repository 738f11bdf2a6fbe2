"""The hub through proxies: in processes of their own, because its settings are read on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from reasonpix.errors import ReasonpixError
from reasonpix.plugin.hub_client import check_hub_proxy

PASSWORD = "recognisable"

ASK = """if True:
    import json, os, sys
    from huggingface_hub.utils import get_session
    from reasonpix.errors import ReasonpixError
    from reasonpix.plugin.hub_client import connect_hub
    connect_hub()
    url, *environments = map(json.loads, sys.argv[1:])
    for environment in environments:
        os.environ.update(environment)
        try:
            print(get_session().get(url).text)
        except ReasonpixError as error:
            assert error.__context__ is None
            print(error)
        for name in environment:
            del os.environ[name]
"""


class _Proxy(BaseHTTPRequestHandler):
    """Answers each request itself, and refuses to connect with its server's `status`."""

    def do_GET(self) -> None:
        self._answer(200)

    def do_HEAD(self) -> None:
        self._answer(200)

    def do_CONNECT(self) -> None:
        self._answer(self.server.status)  # type: ignore[attr-defined]

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(b"here I am")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running(status: int = 501) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    server.status = status  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def clean_environment(folder: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    return {**kept, "HF_HOME": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}


def asked(folder: Path, url: str, *environments: dict[str, str]) -> list[str]:
    """What a request of huggingface_hub gets in each environment."""
    command = [sys.executable, "-c", ASK, *map(json.dumps, (url, *environments))]
    done = subprocess.run(command, env=clean_environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    return done.stdout.splitlines()


EDIT = ["edit", "a.png", "--instruction", "x", "--model", "foo/bar", "--out", "e.png"]

UNUSABLE = [
    f"http://me:{PASSWORD}/x@127.0.0.1:1",
    f"http://me:{PASSWORD}@127.0.0.1:port",
    f"socks4://me:{PASSWORD}@127.0.0.1:1",
    f"socks5://me:{PASSWORD}@127.0.0.1:1",
    f"ftp://me:{PASSWORD}@127.0.0.1:1",
]


def test_a_proxy_that_is_not_used_does_not_matter(tmp_path: Path) -> None:
    with running() as proxy:
        local = [{"HTTP_PROXY": value, "ALL_PROXY": value} for value in UNUSABLE]
        assert asked(tmp_path, f"http://{proxy}/", *local) == ["here I am"] * len(local)
        others = [
            {"HTTP_PROXY": f"http://{proxy}", "HTTPS_PROXY": value, "ALL_PROXY": value}
            for value in UNUSABLE
        ]
        assert asked(tmp_path, "http://hub.example/", *others) == ["here I am"] * len(others)


def test_a_proxy_that_cannot_be_used_is_told_by_its_variable(tmp_path: Path) -> None:
    environments = [{"HTTPS_PROXY": value} for value in UNUSABLE]
    told = asked(tmp_path, "https://hub.example/", *environments)
    assert len(told) == len(UNUSABLE)  # each on one line
    assert all(line.startswith("HTTPS_PROXY ") for line in told)
    assert "pip install 'httpx2[socks]'" in told[3]


@pytest.mark.parametrize("status", [407, 501, 403])
def test_a_proxy_that_refuses_to_connect_is_named(tmp_path: Path, status: int) -> None:
    with running(status) as proxy:
        url = f"http://me:{PASSWORD}@{proxy}"
        told = asked(tmp_path, "https://hub.example/", {"HTTPS_PROXY": url}, {"all_proxy": url})
    for line, variable in zip(told, ("HTTPS_PROXY", "all_proxy"), strict=True):
        assert line.startswith(f"the proxy in {variable} refuses to connect to hub.example: ")
        assert str(status) in line


def test_edit_tells_of_the_proxy_on_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with running(407) as proxy:
        done = subprocess.run(
            [sys.executable, "-m", "reasonpix", *EDIT],
            env=clean_environment(tmp_path)
            | {"HTTPS_PROXY": f"http://me:{PASSWORD}@{proxy}", "HTTP_PROXY": UNUSABLE[0]},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1, done.stderr
    [line] = done.stderr.splitlines()
    assert "the proxy in HTTPS_PROXY refuses to connect to huggingface.co: 407" in line
    assert PASSWORD not in line


def test_the_hub_is_checked_unless_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ReasonpixError, match="HTTPS_PROXY names a SOCKS proxy"):
        check_hub_proxy()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_hub_proxy()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://localhost:8080")
    check_hub_proxy()
