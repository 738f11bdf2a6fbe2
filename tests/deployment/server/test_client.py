from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from reasonpix import Client
from reasonpix.core.images import decode
from reasonpix.deployment.server.service import Limits
from reasonpix.errors import ReasonpixError
from tests.support.serve_files import FakeModel, encoded, faked, figures, picture, until


def test_edits_of_open_images_and_of_files(tmp_path: Path) -> None:
    image = picture(1, (32, 24))
    image.save(tmp_path / "bee.png")
    clear = image.convert("RGBA")
    with faked(FakeModel()) as (_, http), Client(str(http.base_url)) as client:
        for given in (image, clear, tmp_path / "bee.png", str(tmp_path / "bee.png")):
            edited = client.edit(given, "invert", seed=3)
            assert edited.tobytes() == ImageOps.invert(image).tobytes()
        assert client.edit(picture(2, (300, 200)), "invert").size == (300, 200)


@pytest.mark.parametrize(
    ("variable", "proxy"),
    [
        ("HTTP_PROXY", "http://127.0.0.1:9"),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("all_proxy", "what is this?"),
    ],
)
def test_a_server_on_this_machine_is_reached_past_proxies(
    monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str
) -> None:
    monkeypatch.setenv(variable, proxy)
    with faked(FakeModel()) as (_, http), Client(str(http.base_url)) as client:
        assert client.edit(picture(), "invert")


@pytest.mark.parametrize(
    ("variable", "proxy", "told"),
    [
        ("HTTP_PROXY", "http://me:secret@127.0.0.1:9", r"through the proxy of HTTP_PROXY\) cannot"),
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", r"ALL_PROXY names a SOCKS proxy"),
        ("http_proxy", "http://me:secret@ 127.0.0.1:9", r"http_proxy is not the URL of a proxy"),
    ],
)
def test_a_proxy_that_fails_is_named_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str, told: str
) -> None:
    monkeypatch.setenv(variable, proxy)
    with (
        pytest.raises(ReasonpixError, match=told) as error,
        Client("http://edits.example:8000", timeout=5) as client,
    ):
        client.edit(picture(), "invert")
    assert "secret" not in str(error.value)


def test_settings_reach_the_server() -> None:
    model = FakeModel()
    with faked(model) as (_, http), Client(f"{http.base_url}/") as client:
        client.edit(picture(), "x", num_inference_steps=7, guidance_scale=2.5, resolution=16)
        assert model.steps == 7
        with pytest.raises(ReasonpixError, match="steps: 101 exceeds the limit of 100"):
            client.edit(picture(), "x", num_inference_steps=101)


def test_a_full_server_is_asked_again() -> None:
    model = FakeModel(held=True)
    with (
        faked(model, Limits(queue=1)) as (service, http),
        Client(str(http.base_url)) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(client.edit, picture(), "first")
        until(lambda: service.batcher.running == 1)
        second = pool.submit(client.edit, picture(), "second")
        until(lambda: figures(http).get('reasonpix_rejected_total{reason="full"}') == 1)
        model.free.set()
        assert first.result(10) and second.result(10)
        assert model.batches == [["first"], ["second"]]


def test_patience_ends() -> None:
    model = FakeModel(held=True)
    with faked(model, Limits(queue=1)) as (service, http), ThreadPoolExecutor(1) as pool:
        with Client(str(http.base_url)) as patient, Client(str(http.base_url), timeout=0.9) as not_:
            first = pool.submit(patient.edit, picture(), "first")
            until(lambda: service.batcher.running == 1)
            begun = time.monotonic()
            with pytest.raises(ReasonpixError, match="1 edits are running or waiting"):
                not_.edit(picture(), "second")
            assert time.monotonic() - begun < 0.9
            model.free.set()
            first.result(10)
            model.free.clear()
            with pytest.raises(ReasonpixError, match=r"no answer within 0.9 s"):
                not_.edit(picture(), "third")
        until(lambda: service.batcher.running == 0)


def test_what_the_server_says_is_told(tmp_path: Path) -> None:
    with faked(FakeModel(), token="known") as (_, http):
        url = str(http.base_url).rstrip("/")
        with Client(url, "known") as client:
            assert client.edit(picture(), "x")
            with pytest.raises(ReasonpixError, match=f"^{url}: there is nothing to edit$"):
                client.edit(picture(), "decline")
            with pytest.raises(ReasonpixError, match=r"none.png: No such file"):
                client.edit(tmp_path / "none.png", "x")
            with pytest.raises(ReasonpixError, match="image: its greys are not 8-bit or 16-bit"):
                client.edit(Image.new("F", (8, 8)), "x")
        with (
            Client(url, "other") as stranger,
            pytest.raises(ReasonpixError, match="missing or wrong token"),
        ):
            stranger.edit(picture(), "x")


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server of a socket's own words, one connection after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for words in answers:
                line, _ = listening.accept()
                with line:
                    seen = b""
                    while b"--\r\n" not in seen[-4:]:
                        seen += line.recv(100_000)
                    line.sendall(words)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


HEAD = b"HTTP/1.1 %s\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n"


def test_servers_of_another_kind() -> None:
    html = b"<p>hello</p>"
    page, error = (HEAD % (it, b"", len(html)) + html for it in (b"200 OK", b"502 Bad Gateway"))
    with answering(page, error) as url, Client(url) as client:
        with pytest.raises(
            ReasonpixError, match=r"the answer is not an image .*; is this a reasonpix"
        ):
            client.edit(picture(), "x")
        with pytest.raises(ReasonpixError, match="status 502 without an error message"):
            client.edit(picture(), "x")
    with (
        Client(url) as client,
        pytest.raises(ReasonpixError, match=r"cannot be reached: .*running"),
    ):
        client.edit(picture(), "x")
    with pytest.raises(ReasonpixError, match="nonsense"), Client("nonsense://x") as client:
        client.edit(picture(), "x")


def test_a_server_that_is_not_ready_yet_is_waited_for() -> None:
    later = HEAD % (b"503 Service Unavailable", b"Retry-After: 1\r\n", 0)
    png = encoded(picture(5))
    with answering(later, HEAD % (b"200 OK", b"", len(png)) + png) as url, Client(url) as client:
        begun = time.monotonic()
        assert client.edit(picture(), "x").tobytes() == decode(png).tobytes()
        assert time.monotonic() - begun >= 1


def test_what_the_docs_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "deployment.md").read_text(encoding="utf-8")
    (python,) = re.findall(r"^```python\n(import reasonpix\n.*?)^```", page, re.M | re.S)
    (curl,) = re.findall(r"^(curl [^\n]*\\\n.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    image = picture(3, (48, 32))
    image.save("photo.jpg")
    with faked(FakeModel()) as (_, http):
        here = str(http.base_url).rstrip("/")
        exec(python.replace("http://127.0.0.1:8000", here))
        assert decode(Path("edited.png").read_bytes()).size == (48, 32)
        if shutil.which("curl"):
            Path("edited.png").unlink()
            words = curl.replace("http://127.0.0.1:8000", here)
            subprocess.run(["sh", "-ec", words], check=True, stderr=subprocess.DEVNULL)
            assert decode(Path("edited.png").read_bytes()).size == (48, 32)


def test_it_is_offered_lazily() -> None:
    code = """if True:
        import sys, reasonpix
        assert "httpx2" not in sys.modules and "PIL" not in sys.modules
        reasonpix.Client
        heavy = {"torch", "transformers", "fastapi", "gradio"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_address_that_is_not_text() -> None:
    url: Any = None
    with pytest.raises(ReasonpixError, match=r"^None: not a server address; give one as text, "):
        Client(url)
