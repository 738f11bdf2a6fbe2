"""A hub on this machine: the endpoints that huggingface_hub calls to push a dataset.

Files arrive as they do at the real one: large ones by LFS, the others in the commit itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml

LARGE = (".parquet", ".tar", ".jpg", ".png")


class Hub(ThreadingHTTPServer):
    """`files` of each dataset, by path; what was asked in `calls`."""

    daemon_threads = True

    def __init__(self, token: str, may_write: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.may_write = token, may_write
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.commits = 0
        self.calls: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.calls.append(f"{self.command} {path}")
        if path.startswith("/large/"):  # a store that knows no tokens, as the real one
            assert "Authorization" not in self.headers
            oid = path.removeprefix("/large/")
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid] = body
            return self._send(200, {})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, {"error": "Invalid username or password."}, "Invalid token")
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "ada", "type": "user"})
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n", 2)[1]
            assert isinstance(yaml.safe_load(head), dict)
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        return self._of_dataset(path, body)

    def _create(self, asked: dict[str, Any]) -> None:
        hub, name = self.server, f"{asked['organization']}/{asked['name']}"
        assert asked["type"] == "dataset"
        url = f"{hub.url}/datasets/{name}"
        if not hub.may_write:
            return self._send(403, {"error": "You may not"}, "You may not")
        if name in hub.files:
            return self._send(409, {"error": "You already have it", "url": url})
        hub.files[name] = {".gitattributes": b"*.parquet filter=lfs\n"}
        hub.private[name] = asked.get("visibility") == "private"
        return self._send(200, {"url": url, "name": name})

    def _of_dataset(self, path: str, body: bytes) -> None:
        hub = self.server
        path = path.removeprefix("/api").removeprefix("/datasets/")
        name = "/".join(path.split("/")[:2]).removesuffix(".git")
        if name not in hub.files:
            return self._send(404, {"error": "Repository not found"}, code="RepoNotFound")
        if "/tree/" in path:
            files = [
                {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                for file, data in sorted(hub.files[name].items())
            ]
            return self._send(200, files)
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return self._send(404, {"error": f"this hub knows no {path}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        hub, files = self.server, {}
        for line in lines:
            of = line["value"]
            if line["key"] == "file":
                files[of["path"]] = base64.b64decode(of["content"])
            elif line["key"] == "lfsFile":
                files[of["path"]] = hub.large[of["oid"]]
        hub.files[name] |= files
        hub.commits += 1
        commit = f"{hub.commits:040d}"
        url = f"{hub.url}/datasets/{name}/commit/{commit}"
        self._send(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def _send(self, status: int, content: Any, message: str = "", code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for header, text in (("X-Error-Message", message), ("X-Error-Code", code)):
            if text:
                self.send_header(header, text)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running(token: str, may_write: bool = True) -> Iterator[Hub]:
    hub = Hub(token, may_write)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
