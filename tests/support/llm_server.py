"""The test server `openai_server.py`, started in a process of its own, as tests see it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "openai_server.py"

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# A test may set proxies for what it tests.


class Server:
    """What to tell it, and what to ask it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.url = f"{root}/v1"

    def script(self, replies: dict[str, list[Any]] | None = None, **more: Any) -> None:
        """How it behaves from now on; what it was asked is forgotten."""
        self.tell("script", {"replies": replies or {}, **more})

    def tell(self, path: str, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        _DIRECT.open(urllib.request.Request(f"{self.root}/{path}", content)).close()

    def log(self, path: str = "requests") -> Any:
        with _DIRECT.open(f"{self.root}/{path}") as response:
            return json.load(response)

    def bodies(self) -> list[dict[str, Any]]:
        """What it was asked, in order."""
        return [request["body"] for request in self.log()["requests"]]


@contextmanager
def served() -> Iterator[Server]:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        yield Server(process.stdout.readline().strip())
        process.stdin.close()
