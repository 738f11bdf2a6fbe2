from __future__ import annotations

import logging
import signal
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import jsonschema
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from reasonpix.core.images import decode
from reasonpix.deployment.server.service import Limits
from reasonpix.editing.pipeline_parts import working_size
from tests.conftest import Shell
from tests.support.serve_files import (
    FakeModel,
    ask,
    encoded,
    faked,
    figures,
    picture,
    serving,
    started,
    until,
)
from tests.support.tiny_model import write_tiny

TOKEN = "s3cret-of-the-tests"
WORDS = "make it rain"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", num_inference_steps=2)


@pytest.fixture(scope="module")
def client(tiny: Path) -> Iterator[httpx2.Client]:
    """Of a process that serves the tiny model, with a token that it knows."""
    limits = ("--max-bytes", 100_000, "--max-pixels", 250_000, "--max-resolution", 48)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        serving(tiny, *limits, token=TOKEN) as (_, url),
        httpx2.Client(base_url=url, headers=headers, timeout=30) as client,
    ):
        yield client


def told(answer: httpx2.Response, status: int) -> str:
    """What an error says."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    (detail,) = answer.json().values()
    return str(detail)


# -- edits ---------------------------------------------------------------------------------------


def test_many_clients_get_what_the_command_gives(
    client: httpx2.Client, tiny: Path, shell: Shell, tmp_path: Path
) -> None:
    image = picture(3, (90, 60))
    image.save(tmp_path / "bee.png")
    options = {"steps": 3, "guidance-scale": 4, "image-guidance-scale": 1.2, "resolution": 44}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = shell("edit", "bee.png", "--instruction", WORDS, "--model", tiny, "--device", "cpu",
                 "--seed", 7, *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    fields = {name.replace("-", "_"): value for name, value in options.items()}

    def others(n: int) -> httpx2.Response:
        return ask(client, picture(n, (50, 40 + n)), f"{WORDS} {n}", seed=n, **fields)

    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(others, n) for n in range(6)]
        same = [pool.submit(ask, client, image, WORDS, seed=7, **fields) for _ in range(2)]
        assert all(it.result().status_code == 200 for it in noise)
        answers = [it.result() for it in same]
    assert answers[0].headers["content-type"] == "image/png"
    assert answers[0].content == answers[1].content
    edited = np.asarray(decode(answers[0].content))
    assert np.array_equal(edited, np.asarray(Image.open(tmp_path / "bee-edited.png")))
    assert edited.shape == (60, 90, 3)


@example((1, 1), 996, 8)
@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.integers(8, 1100),
    st.sampled_from([8, 16, 32, 64]),
)
def test_what_was_shrunk_is_not_shrunk_again(
    size: tuple[int, int], resolution: int, stride: int
) -> None:
    once = working_size(size, resolution, stride)
    assert working_size(once, resolution, stride) == once


def test_images_are_read_as_the_command_reads_them(client: httpx2.Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(4, (64, 32))
    image.save(turned := BytesIO(), "JPEG", exif=exif)
    answer = ask(client, turned.getvalue(), WORDS)
    assert decode(answer.content).size == (32, 64)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": " "}, "instruction: string should have at least 1 character"),
        ({"instruction": "x" * 2001}, "at most 2000 characters"),
        ({"seed": "-1"}, "seed: input should be greater than or equal to 0"),
        ({"seed": "9" * 30}, "seed: "),
        ({"steps": "many", "sead": 1}, "no such option; did you mean 'seed'?"),
        ({"steps": 101}, "steps: 101 exceeds the limit of 100"),
        ({"resolution": 49}, "resolution: 49 exceeds the limit of 48"),
        ({"guidance_scale": "nan"}, "guidance_scale: input should be a finite number"),
        ({"image": "words"}, "image: must be a file"),
    ],
)
def test_fields_that_cannot_be(
    client: httpx2.Client, fields: dict[str, object], message: str
) -> None:
    values = {"instruction": WORDS} | {name: str(it) for name, it in fields.items()}
    file = None if "image" in fields else {"image": ("image", encoded(picture()))}
    if file is None:
        values = {"instruction": WORDS}
        file = {"image": (None, b"words")}  # type: ignore[dict-item]
    assert message in told(client.post("/v1/edits", data=values, files=file), 422)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 99))


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 422, "image: the file is empty"),
        (b"no image", 422, "image: not an image, or a format"),
        (encoded(picture(1, (200, 200)))[:-9000], 422, "image: damaged image"),
        (bomb(501, 500), 413, "image: 501x500 pixels exceed the limit of 250000"),
        (bomb(60_000, 60_000), 422, "image: "),
        (bytes(100_001), 413, "image: larger than the limit of 100000 bytes"),
        (bytes(200_000), 413, "image: larger than the limit of 100000 bytes"),
        (bytes(5_000_000), 413, "image: larger than the limit of 100000 bytes"),
    ],
)
def test_images_that_cannot_be(
    client: httpx2.Client, data: bytes, status: int, message: str
) -> None:
    assert message in told(ask(client, data, WORDS), status)


def test_bodies_that_are_no_forms(client: httpx2.Client) -> None:
    answer = client.post("/v1/edits", json={"instruction": WORDS})
    assert "application/json: send multipart/form-data" in told(answer, 415)
    for kind, body in (
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"--c\r\n\r\n"),
        ("multipart/form-data; boundary=b; charset=idna",
         b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + b"a" * 70 + b"\r\n--b--"),
    ):  # fmt: skip
        answer = client.post("/v1/edits", content=body, headers={"Content-Type": kind})
        assert answer.status_code in (400, 422) and told(answer, answer.status_code)

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        for _ in range(30):
            yield bytes(10_000)

    kind = "multipart/form-data; boundary=b"
    answer = client.post("/v1/edits", content=endless(), headers={"Content-Type": kind})
    assert "image: larger than the limit of 100000 bytes" in told(answer, 413)


def test_the_token_is_asked_for(client: httpx2.Client) -> None:
    wrong = (b"", b"Bearer " + TOKEN.encode() + b"x", b"Basic " + TOKEN.encode(), b"Bearer \xe9")
    for given_token in (None, *wrong):
        given_headers = [] if given_token is None else [(b"Authorization", given_token)]
        with httpx2.Client(base_url=client.base_url, headers=given_headers) as other:
            for path in ("/v1/model", "/metrics"):
                assert "missing or wrong token" in told(other.get(path), 401)
            answer = ask(other, bytes(3_000_000), WORDS)
            assert told(answer, 401) and answer.headers["www-authenticate"] == "Bearer"
            assert all(other.get(it).status_code == 200 for it in ("/healthz", "/readyz"))
    other_case = client.get("/v1/model", headers={"Authorization": f"bearer {TOKEN}"})
    assert other_case.status_code == 200


# -- what is told --------------------------------------------------------------------------------


def test_what_is_served(client: httpx2.Client) -> None:
    facts = client.get("/v1/model").json()
    assert (facts["name"], facts["device"]) == ("tiny", "cpu")
    assert facts["settings"]["num_inference_steps"] == 2
    assert facts["limits"]["max_steps"] == 100 and facts["limits"]["max_resolution"] == 48
    for path in ("/v1/model", "/nothing", "/v1/edits", "/openapi.json", "/docs"):
        headers = client.get(path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in headers
    assert client.get("/v1/edits").status_code == 405
    assert client.get("/docs").status_code == client.get("/").status_code == 404


def test_head_is_answered_as_get_is(client: httpx2.Client) -> None:
    for path in ("/healthz", "/readyz"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(got.content))
    assert client.head("/v1/edits").status_code == 405


def test_the_description_is_complete(client: httpx2.Client) -> None:
    document = client.get("/openapi.json").json()
    edits = document["paths"]["/v1/edits"]["post"]
    statuses = {"200", "400", "401", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert set(edits["responses"]) == statuses
    for status, answer in edits["responses"].items():
        assert list(answer["content"]) == ["image/png" if status == "200" else "application/json"]
    assert all("Retry-After" in edits["responses"][it]["headers"] for it in ("429", "503"))
    form = edits["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["steps"]["maximum"] == 100
    assert form["properties"]["resolution"]["maximum"] == 48
    assert form["required"] == ["image", "instruction"]
    assert edits["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert set(document["paths"]) == {"/v1/edits", "/v1/model", "/metrics", "/healthz", "/readyz"}
    schema = {"$ref": "#/components/schemas/Error", "components": document["components"]}
    jsonschema.validate(client.get("/nothing").json(), schema)


# -- room, and those who leave -------------------------------------------------------------------


def test_a_full_server_says_when_to_come_again_before_it_reads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = FakeModel(held=True)
    with faked(model, Limits(queue=3)) as (service, client), ThreadPoolExecutor(3) as pool:
        held = [pool.submit(ask, client, picture(), WORDS) for _ in range(3)]
        until(lambda: service.batcher.admitted == 3)
        address = urlsplit(str(client.base_url))
        with socket.create_connection((address.hostname, address.port)) as line:
            # The body never comes: the answer does not wait for it.
            line.sendall(
                b"POST /v1/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b"
            )
            line.settimeout(3)
            head = line.recv(10_000).decode().lower()
        assert head.startswith("http/1.1 429") and "retry-after: 1\r\n" in head
        refused = ask(client, bytes(3_000_000), WORDS)
        assert "3 edits are running or waiting; try again in 1 s" in told(refused, 429)
        assert figures(client)['reasonpix_rejected_total{reason="full"}'] == 2
        model.free.set()
        assert all(it.result().status_code == 200 for it in held)
        until(lambda: service.batcher.admitted == 0)
        assert ask(client, picture(), WORDS).status_code == 200


def test_who_leaves_takes_the_edit_along() -> None:
    model = FakeModel(held=True, rows=1)
    with faked(model) as (service, client), ThreadPoolExecutor(1) as pool:
        stays = pool.submit(ask, client, picture(), "stays")
        until(lambda: service.batcher.running == 1)
        for when, words in (("waiting", "second"), ("running", "third")):
            with (
                pytest.raises(httpx2.TimeoutException),
                httpx2.Client(base_url=client.base_url, timeout=0.5) as leaver,
            ):
                ask(leaver, picture(), words)
            name = f'reasonpix_cancelled_total{{when="{when}"}}'
            until(lambda name=name: figures(client)[name] == 1)  # type: ignore[misc]
            until(lambda left=int(when == "waiting"): service.batcher.admitted == left)  # type: ignore[misc]
            if when == "waiting":
                model.free.set()
                assert stays.result().status_code == 200
                model.free.clear()
        assert model.batches == [["stays"], ["third"]]
        until(lambda: figures(client)["reasonpix_in_progress"] == 0)
        seen = figures(client)
        assert seen["reasonpix_queue_depth"] == 0
        assert seen['reasonpix_requests_total{path="/v1/edits",status="499"}'] == 2
        model.free.set()
        assert ask(client, picture(), WORDS).status_code == 200


def test_an_edit_that_takes_too_long_is_given_up() -> None:
    model = FakeModel(held=True)
    with faked(model, Limits(timeout=0.4)) as (service, client):
        assert "took longer than 0.4 s" in told(ask(client, picture(), WORDS), 504)
        until(lambda: service.batcher.running == 0)
        assert figures(client)['reasonpix_cancelled_total{when="running"}'] == 1


def test_a_body_that_comes_too_slowly_gives_its_room_back() -> None:
    with faked(FakeModel(), Limits(queue=1, timeout=0.5)) as (service, client):
        address = urlsplit(str(client.base_url))
        with socket.create_connection((address.hostname, address.port)) as line:
            line.sendall(
                b"POST /v1/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            )
            until(lambda: service.batcher.admitted == 1)
            line.settimeout(3)
            assert line.recv(10_000).startswith(b"HTTP/1.1 408")
        assert ask(client, picture(), WORDS).status_code == 200


def test_who_leaves_while_sending_gives_the_room_back() -> None:
    with faked(FakeModel(), Limits(queue=1)) as (service, client):
        address = urlsplit(str(client.base_url))
        with socket.create_connection((address.hostname, address.port)) as line:
            line.sendall(
                b"POST /v1/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b"
            )
            until(lambda: service.batcher.admitted == 1)
        until(lambda: service.batcher.admitted == 0)


def test_the_server_survives_what_breaks(caplog: pytest.LogCaptureFixture) -> None:
    with faked(FakeModel()) as (_, client), caplog.at_level(logging.ERROR):
        assert "see the server's log" in told(ask(client, picture(), "break"), 500)
        answer = ask(client, picture(), "exhaust")
        assert "ran out of memory" in told(answer, 503) and int(answer.headers["retry-after"]) >= 1
        assert told(ask(client, picture(), "decline"), 422) == "there is nothing to edit"
        assert ask(client, picture(), WORDS).status_code == 200
        seen = figures(client)
    assert "ValueError: a plugin is broken" in caplog.text
    for status in (200, 422, 500, 503):
        assert seen[f'reasonpix_requests_total{{path="/v1/edits",status="{status}"}}'] == 1
    assert seen["reasonpix_batch_size_count"] == seen["reasonpix_queue_seconds_count"] == 4


def test_images_are_shrunk_before_they_wait() -> None:
    model = FakeModel(held=True)
    with faked(model) as (service, client), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, picture(1, (1200, 800)), WORDS)
        until(lambda: service.batcher.running == 1)
        (job,) = service.batcher._running
        assert job.task.image.size == (32, 24)
        model.free.set()
        assert decode(answer.result().content).size == (1200, 800)


# -- beginning and end ---------------------------------------------------------------------------


def test_a_signal_lets_accepted_edits_end(tiny: Path) -> None:
    with (
        serving(tiny) as (process, url),
        httpx2.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        answers = [pool.submit(ask, client, picture(), str(n), steps=100) for n in range(6)]
        until(lambda: figures(client)["reasonpix_admitted"] == 6)
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        refused = ask(client, picture(), WORDS)
        assert "the server is shutting down" in told(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        assert [it.result().status_code for it in answers] == [200] * 6
        assert process.wait(20) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_before_it_is_ready_and_a_second_signal(tiny: Path) -> None:
    with (
        started(tiny, page=True) as (process, url),
        httpx2.Client(base_url=url, timeout=60) as client,
    ):
        answer = client.get("/readyz")
        assert "the model is still loading" in told(answer, 503)
        assert int(answer.headers["retry-after"]) >= 1
        assert told(ask(client, picture(), WORDS), 503) and told(client.get("/v1/model"), 503)
        assert client.get("/healthz").status_code == 200
        until(lambda: client.get("/readyz").status_code == 200, 60)
        page = client.get("/")
        assert page.status_code == 200 and "<html" in page.text
        assert all(client.get(it).status_code == 200 for it in ("/page.js", "/page.css"))
        assert process.stdout is not None and process.stdout.readline() == f"serving on {url}\n"
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(ask, client, picture(), WORDS, steps=100)
            until(lambda: figures(client)["reasonpix_in_progress"] == 1)
            process.send_signal(signal.SIGTERM)
            until(lambda: client.get("/readyz").status_code == 503)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 128 + signal.SIGINT
            assert isinstance(lost.exception(), httpx2.HTTPError)


def test_a_signal_while_it_loads(tiny: Path) -> None:
    with started(tiny) as (process, _):
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - begun < 15


def test_what_keeps_it_from_serving(shell: Shell, tmp_path: Path) -> None:
    done = shell("serve", "--model", "./none", "--port", 0, "--no-page")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "model: no folder './none'" in done.stderr.splitlines()[-1]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = shell("serve", "--model", "./none", "--port", port)
        assert f"127.0.0.1:{port} cannot be served" in done.stderr and done.returncode == 1


@pytest.mark.parametrize("token", ["", "with space", "ü"])
def test_tokens_that_cannot_be(token: str, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REASONPIX_TOKEN", token)
    done = shell("serve", "--model", "./none", "--port", 0)
    assert done.returncode == 1 and done.stderr.startswith("REASONPIX_TOKEN ")
    assert not token or token not in done.stderr.replace("REASONPIX_TOKEN", "")
