"""An OpenAI-compatible chat server that answers what a test tells it to, over real HTTP.

    python tests/openai_server.py

It binds a free port of 127.0.0.1, prints its base URL, and serves until its standard input closes.

POST /script    {"replies": {marker: [reply, …]}, "refuses": [parameter, …]}  sets what it answers
GET  /requests  {"requests": [{"authorization", "body"}, …], "peak": n}  what it was asked
POST /v1/chat/completions

A request gets the next of the replies whose marker stands in its last question, the last reply
again and again. A reply is a text, or an object with any of `content`, `refusal`,
`finish_reason`, `status` (an HTTP error), `message` and `code` (of the error), `delay` (seconds),
`raw` and `type` (a body to send as it is, and its content type). `refuses` names parameters, or
types of `response_format`, that are answered by 400.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Script:
    """What the server is to answer, and what it was asked meanwhile.

    A request belongs to the script it came under, however late it ends.
    """

    def __init__(self, script: dict[str, Any]) -> None:
        self.lock = threading.Lock()
        self.replies: dict[str, list[Any]] = script.get("replies", {})
        self.refuses: list[str] = script.get("refuses", [])
        self.requests: list[dict[str, Any]] = []
        self.peak = self.under_way = 0

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = " ".join(turn["content"] for turn in body["messages"] if turn["role"] == "user")
        # Worked examples stand before the question, so the marker that comes last is meant.
        marker = max(self.replies, key=asked.rfind, default="")
        if marker not in asked or not self.replies:
            return {"status": 404, "message": f"no reply scripted for {asked[-200:]!r}"}
        queue = self.replies[marker]
        reply = queue.pop(0) if len(queue) > 1 else queue[0]
        return {"content": reply} if isinstance(reply, str) else reply

    def refused(self, body: dict[str, Any]) -> dict[str, str] | None:
        """The error for the first parameter that this server does not know."""
        for name in self.refuses:
            if name in body:
                hint = "; use 'max_completion_tokens'" if name == "max_tokens" else ""
                return {"message": f"Unsupported parameter: {name!r}{hint}"}
            if name == body.get("response_format", {}).get("type"):
                return {"message": f"response_format of type {name!r} is not supported"}
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script = Script({})

    def do_GET(self) -> None:
        with self.script.lock:
            self.send(200, {"requests": self.script.requests, "peak": self.script.peak})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/script":
            Handler.script = Script(body)
            return self.send(200, {})
        if self.path != "/v1/chat/completions":
            return self.send(200, b"<html>a web page</html>", "text/html")
        script = self.script
        with script.lock:
            script.under_way += 1
            script.peak = max(script.peak, script.under_way)
            authorization = self.headers.get("Authorization")
            script.requests.append({"authorization": authorization, "body": body})
            refused = script.refused(body)
            reply = {"status": 400, **refused} if refused else script.reply(body)
        time.sleep(reply.get("delay", 0))
        with script.lock:
            script.under_way -= 1
        self.answer(reply)

    def answer(self, reply: dict[str, Any]) -> None:
        if "raw" in reply:
            return self.send(200, reply["raw"].encode(), reply.get("type", "application/json"))
        if "status" in reply:
            error = {"message": reply.get("message", "boom"), "code": reply.get("code")}
            return self.send(reply["status"], {"error": error})
        message = {
            "role": "assistant",
            "content": reply.get("content"),
            "refusal": reply.get("refusal"),
        }
        finish_reason = reply.get("finish_reason", "stop")
        self.send(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "test",
                "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
            },
        )

    def send(self, status: int, body: Any, content_type: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # The client did not wait.

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()  # Ends with the test process, however that ends.


if __name__ == "__main__":
    main()
