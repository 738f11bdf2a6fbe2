"""Hostile requests to a server: by hand, and by schemathesis from its own description.

The whole run, of 2,000, with the counts of each status:

    REASONPIX_FUZZ=2000 python -m pytest -s tests/deployment/server/test_fuzz.py
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
from PIL import Image

from tests.support.bad_uploads import SOUND, WHOLE, Request, Wire, form, requests, typed, wires
from tests.support.tiny_model import write_tiny

REQUESTS = int(os.environ.get("REASONPIX_FUZZ", "1300"))
"""In all; schemathesis makes those that are left. The whole run is of 2000."""
MAX_BYTES = 4 << 20
AT_ONCE = 8
GROWTH = 400
"""MB that the server may take more than when it has just begun, at any time."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes


@dataclass
class Server:
    """A server in a process of its own, and what it has answered."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    log: Path
    description: dict[str, Any]

    def send(self, request: Request) -> Answer:
        with closing(HTTPConnection(self.host, self.port, timeout=60)) as connection:
            connection.request(request.method, request.path, request.body, dict(request.headers))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def memory_mb(self, what: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{what}:\s+(\d+) kB", status)
        assert found
        return int(found[1]) // 1024

    def contradiction(self, method: str, path: str, answer: Answer) -> str:
        """What in an answer is not as the server's description says; nothing if it is."""
        operation = self.description["paths"].get(path, {}).get(method.lower())
        if operation is None or answer.status in (404, 405):
            return ""
        described = operation["responses"].get(str(answer.status))
        if described is None:
            return f"status {answer.status} is not described"
        kind = answer.headers.get_content_type()
        content = described.get("content", {})
        if not content and not answer.body:
            return ""
        if kind not in content:
            return f"{kind} is none of {list(content)}"
        if answer.status in (429, 503) and not answer.headers.get("retry-after", "").isdecimal():
            return "no Retry-After"
        if kind == "image/png":
            with Image.open(BytesIO(answer.body), formats=["PNG"]) as image:
                image.load()
        if kind == "application/json":
            schema = content[kind].get("schema", {}) | {
                "components": self.description.get("components", {})
            }
            try:
                jsonschema.validate(json.loads(answer.body), schema)
            except jsonschema.ValidationError as error:
                return error.message
        return ""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = write_tiny(folder / "model", num_inference_steps=1)
    log = folder / "log"
    options = ["--model", str(model), "--port", "0", "--no-page", "--timeout", "20"]
    options += ["--max-bytes", str(MAX_BYTES), "--max-steps", "2", "--wait", "0"]
    options += ["--batch-size", "2"]
    # Files of forms that end amid one are closed by the interpreter, which it complains of.
    strict = ("-W", "error", "-W", "ignore::ResourceWarning")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, *strict, "-m", "reasonpix", "serve", *options],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    try:
        assert process.stdout
        line = process.stdout.readline().decode()
        found = re.search(r"http://\S+", line)
        assert found, log.read_text()
        url = urlsplit(found[0])
        assert url.hostname and url.port
        made = Server(process, url.hostname, url.port, log, {})
        until = time.monotonic() + 60
        ready = Request("ready", method="GET", path="/readyz")
        while made.send(ready).status != 200:
            assert time.monotonic() < until and process.poll() is None, log.read_text()
            time.sleep(0.1)
        made.description = json.loads(
            made.send(Request("", method="GET", path="/openapi.json")).body
        )
        yield made
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.fixture
def unharmed(server: Server) -> Iterator[None]:
    """After whatever a test sends, the server edits as before, and has not grown much."""
    whole = Request("whole", **typed(form(*WHOLE)))
    before = server.send(whole)
    assert before.status == 200
    resident = server.memory_mb("VmRSS")
    yield
    after = server.send(whole)
    assert (after.status, after.body) == (200, before.body)
    assert server.process.poll() is None
    assert server.memory_mb("VmHWM") < resident + GROWTH
    _, *tracebacks = server.log.read_text(errors="replace").split("Traceback (most recent")
    # uvicorn answers by itself what stops being HTTP amid its body, and then minds our answer.
    assert not [it for it in tracebacks if "h11._util.LocalProtocolError" not in it]


def tell(what: str, statuses: Iterable[object]) -> None:
    """The counts, for those who run pytest -s."""
    counts = sorted(Counter(map(str, statuses)).items())
    print(f"\n{what}: " + ", ".join(f"{status}: {count}" for status, count in counts))


@pytest.mark.usefixtures("unharmed")
def test_requests_made_by_hand(server: Server) -> None:
    wrong: list[str] = []

    def check(request: Request) -> int:
        try:
            answer = server.send(request)
        except (OSError, HTTPException) as error:
            wrong.append(f"{request.name}: {type(error).__name__}: {error}")
            return 0
        if answer.status not in request.statuses:
            what = answer.body[:200]
            wrong.append(f"{request.name}: {answer.status} {what!r}, not {set(request.statuses)}")
        elif found := server.contradiction(request.method, request.path, answer):
            wrong.append(f"{request.name}: {found}")
        return answer.status

    with ThreadPoolExecutor(AT_ONCE) as pool:
        statuses = list(pool.map(check, requests()))
    tell("by hand", statuses)
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("unharmed")
def test_connections_that_go_wrong(server: Server) -> None:
    wrong: list[str] = []

    def answered(wire: Wire) -> int | None:
        """The status, None where there was no answer."""
        with socket.create_connection((server.host, server.port), 60) as connection:
            try:
                for piece in wire.pieces:
                    if isinstance(piece, bytes):
                        connection.sendall(piece)
                    else:
                        time.sleep(piece)
            except ConnectionError:
                pass  # what it said before it hung up is still to be read
            if not wire.statuses:
                return None
            connection.settimeout(60 if wire.must else 1)
            response = HTTPResponse(connection)
            try:
                response.begin()
                response.read()
            except (OSError, HTTPException):
                return None
            finally:
                response.close()
            return response.status

    def check(wire: Wire) -> int | None:
        status = answered(wire)
        if status is None and wire.must:
            wrong.append(f"{wire.name}: no answer")
        elif status is not None and status not in wire.statuses:
            wrong.append(f"{wire.name}: {status}, not {set(wire.statuses)}")
        return status

    with ThreadPoolExecutor(AT_ONCE) as pool:
        statuses = list(pool.map(check, wires(MAX_BYTES)))
    tell("connections", statuses)
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("unharmed")
def test_requests_from_the_description(server: Server) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import Status, events, from_schema

    left = REQUESTS - len(requests()) - len(wires(MAX_BYTES))
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "continue-on-failure": True,
            "generation": {
                "deterministic": True,
                "database": "none",
                "no-shrink": True,
                "max-examples": left,
            },
            # Most of what is drawn as an image is none; and a form has no types: an empty list is
            # sent as no field at all, and null as a word.
            "checks": {
                "positive_data_acceptance": {"enabled": False},
                "negative_data_rejection": {"enabled": False},
            },
            "phases": {"stateful": {"enabled": False}},
        }
    )
    url = f"http://{server.host}:{server.port}/openapi.json"
    schema = schemathesis.openapi.from_url(url, config=config)

    @schema.hook
    def map_body(context: Any, body: Any) -> Any:
        # Every other picture is one, or nothing behind the decoding would be reached.
        image = body.get("image") if isinstance(body, dict) else None
        if isinstance(image, bytes) and sum(image) % 2 == 0:
            return body | {"image": SOUND}
        return body

    statuses: list[object] = []
    wrong: list[str] = []
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            wrong.append(str(event))
        if not isinstance(event, events.ScenarioFinished):
            continue
        recorder = event.recorder
        for name, interaction in recorder.interactions.items():
            response = interaction.response
            statuses.append(response.status_code if response else "none")
            for node in recorder.checks.get(name, ()):
                if node.status == Status.FAILURE and node.failure_info:
                    case = recorder.cases[name].value
                    what = f"{node.name}: {node.failure_info.failure}"
                    wrong.append(f"{recorder.label}: {what}\n{case!r:.500}")
    tell("schemathesis", statuses)
    assert not wrong, "\n".join(wrong[:20])
    assert len(statuses) >= left
