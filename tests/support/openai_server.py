"""An OpenAI-compatible server over real HTTP, which answers, fails and charges as a test tells it.

    python tests/openai_server.py

It binds a free port of 127.0.0.1, prints its root URL, and serves until its standard input closes.

POST /script    sets what it answers from now on, and forgets what it was asked:
    replies     {marker: [reply, …]}: a request gets the next of the replies whose marker stands
                last in its questions, the last reply again and again
    refuses     [parameter, …]: parameters, or types of `response_format`, answered by 400
    latency     seconds that every chat answer takes
    faults      {"rates": {kind: probability}, "seed", "stall", "retry_after"}: what befalls
                requests without a scripted reply, see `FAULTS`; drawn for each attempt of each
                request by itself, so that it does not depend on who comes first
    batches     what becomes of a batch when it is next looked at: completed (unless told
                otherwise), in_progress, expired (after the first half), failed or cancelled
POST /batches   {"become": the same}: from now on
GET  /requests  {"requests": [{"authorization", "body"}, …], "peak": n, "batches": [batch, …]}
GET  /count     {"requests": n}
GET  /bill      {id of the request: {"asked", "delivered", "charged", "prompt_tokens",
                "completion_tokens"}}: how often each was asked, how often its answer was handed
                over in full, how often it was charged for, and the tokens charged
POST /v1/chat/completions, /v1/files, /v1/batches; GET /v1/files/…/content, /v1/batches[/…]

The id of a request is `request_id` of its JSON body. A reply is a text, or an object with any of
`content`, `refusal`, `finish_reason`, `status` (an HTTP error), `message`, `code` and `type` (of
the error), `param` (of the error), `headers`, `delay` (seconds), `row` (fields of its row in a
batch), `raw`, `encoding` and `content_type` (a body to send as it is), `cut` (the connection is
closed before a byte, or in the middle of the body).

A reply, or the script for all of them, may name the `form` in which other servers send the same
answer, see `FORMS`.

What has no reply gets a usable answer to P_replace, P_gen, P_select and P_resolve alike, with the
id of the request among the synonyms or revealing words: a stored answer tells what it answers. As
a provider does, it charges for whatever it has thought out, also when nobody waited for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from http import HTTPStatus
from typing import Any

FAULTS = {
    "429": "overloaded",
    "429-after": "overloaded, and says when to come back (Retry-After)",
    "500": "a server error, whose text repeats the Authorization header",
    "cut": "the connection is closed before a byte of the answer",
    "cut-body": "the connection is closed in the middle of the answer",
    "stall": "no answer for `stall` seconds",
    "no-json": "the content is no JSON",
    "wrong-schema": "the content is JSON of another form",
    "refusal": "the model declines",
    "empty": "an answer without choices",
    "length": "the content is cut off at max_tokens",
    "leak": "the content repeats the Authorization header",
}


def _message(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A form with other fields in its message; `...` stands for the content."""

    def changed(body: dict[str, Any]) -> dict[str, Any]:
        message = body["choices"][0]["message"]
        content = message["content"]
        encoded = json.dumps(fields).replace("...", json.dumps(content)[1:-1])
        message.update(json.loads(encoded))
        return body

    return changed


def _usage(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda body: body | {"usage": body["usage"] | fields}


def _usage_as(kind: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda body: body | {"usage": {key: kind(n) for key, n in body["usage"].items()}}


def _parsed(body: dict[str, Any]) -> dict[str, Any]:
    message = body["choices"][0]["message"]
    message["content"] = json.loads(message["content"])
    return body


def _old(body: dict[str, Any]) -> dict[str, Any]:
    text = body["choices"][0]["message"]["content"]
    return body | {"choices": [{"index": 0, "text": text, "finish_reason": "eos"}]}


def _stream(body: dict[str, Any], lines: str = "\n\n", end: str = "data: [DONE]\n\n") -> str:
    """The answer in pieces, the usage in an event of its own."""
    message, usage = body["choices"][0]["message"], body["usage"]
    text, reason = message["content"] or "", body["choices"][0]["finish_reason"]
    deltas: list[Any] = [{"role": "assistant", "content": None}]
    deltas += [{"content": text[start : start + 9]} for start in range(0, len(text), 9)]
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    chunks.append({"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}{lines}" for chunk in chunks) + end


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "parts": _message(content=[{"type": "text", "text": "..."}]),
    "output-parts": _message(content=[{"type": "output_text", "text": "..."}, {"type": "image"}]),
    "strings": _message(content=["", "..."]),
    "thinking-parts": _message(
        content=[
            {"type": "thinking", "thinking": [{"type": "text", "text": "{hm}"}]},
            {"type": "reasoning", "text": "{so}"},
            {"type": "text", "text": "..."},
        ]
    ),
    "part": _message(content={"type": "text", "text": "..."}),
    "parsed": _parsed,
    "reasoning": _message(content=None, reasoning_content="Hm. ..."),
    "reasoning-only": _message(content="", reasoning="..."),
    "tool-call": _message(
        content=None, tool_calls=[{"type": "function", "function": {"arguments": "..."}}]
    ),
    "no-refusal": _message(refusal=False, annotations=[], audio=None),
    "old": _old,
    "finish-null": lambda body: {
        **body,
        "choices": [{**body["choices"][0], "finish_reason": None}],
    },
    "finish-number": lambda body: {**body, "choices": [{**body["choices"][0], "finish_reason": 0}]},
    "error-null": lambda body: body | {"error": None, "detail": "fine"},
    "byte-order-mark": lambda body: "\ufeff" + json.dumps(body),
    "keep-alive": lambda body: "\n \n" + json.dumps(body),
    "stream": _stream,
    "stream-crlf": lambda body: ": PROCESSING\r\n\r\n" + _stream(body, "\r\n\r\n"),
    "stream-events": lambda body: "event: chunk\nid: 1\n" + _stream(body, "\n", ""),
    "stream-whole": lambda body: f"data:{json.dumps(body)}\n\ndata:[DONE]",
    "usage-strings": _usage_as(str),
    "usage-floats": _usage_as(float),
    "usage-renamed": lambda body: (
        body
        | {
            "usage": {
                "input_tokens": body["usage"]["prompt_tokens"],
                "output_tokens": body["usage"]["completion_tokens"],
            }
        }
    ),
    "usage-details": _usage(prompt_tokens_details={"cached_tokens": "3"}, cost=1e-5),
    "usage-absent": lambda body: {key: body[key] for key in body if key != "usage"},
    "usage-null": lambda body: body | {"usage": None},
    "usage-list": lambda body: body | {"usage": [1, 2]},
    "usage-words": _usage(prompt_tokens="many"),
    "usage-nulls": _usage_as(lambda count: None),
    "usage-negative": _usage(prompt_tokens=-5),
    "usage-zero": _usage(completion_tokens=0),
    "usage-infinite": _usage(completion_tokens=float("inf")),
    "usage-huge": _usage(prompt_tokens=10**30),
    "usage-true": _usage(prompt_tokens={"value": 3}),
}
"""What other servers make of an answer: a body, or its text."""

_TARGETS = ("lighthouse", "accordion", "cactus", "submarine", "chandelier")


def request_id(body: dict[str, Any]) -> str:
    """What a chat request is known by: equal bodies are one request."""
    return "q" + hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:20]


def answer_of(body: dict[str, Any], mark: str) -> str:
    """An answer that can be used, derived from the question, with `mark` among its words."""
    form = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    keys = set(form.get("properties", ()))
    for turn in body["messages"]:
        if not keys and turn["role"] == "assistant":  # a worked example
            keys = set(json.loads(turn["content"]))
    if "best" in keys:
        return json.dumps({"best": 1})
    if "revealing" in keys:
        wish = f"Someone has other plans here, and {random.Random(mark).randrange(99)} reasons."
        return json.dumps({"revealing": [mark], "instruction": wish})
    asked = [turn["content"] for turn in body["messages"] if turn["role"] == "user"]
    [categories] = [
        match[1].split(", ")
        for question in asked[::-1]
        if (match := re.search(r"^Categories: (.+)$", question, re.MULTILINE))
    ][:1]
    target = next(name for name in _TARGETS if name not in categories)
    return json.dumps(
        {
            "selected": categories[0],
            "target": target,
            "selected_synonyms": [],
            "target_synonyms": [mark],
            "instruction": "Something else would serve everybody much better there.",
        }
    )


def tokens_of(body: dict[str, Any]) -> int:
    """Tokens of the prompt: the schema and the frame of each message count as well."""
    texts = [turn["content"] for turn in body["messages"]]
    if "response_format" in body:
        texts.append(json.dumps(body["response_format"]))
    return sum(4 + (len(text.encode()) + 3) // 4 for text in texts)


class Script:
    """What the server is to answer, and what it was asked meanwhile.

    A request belongs to the script it came under, however late it ends.
    """

    def __init__(self, script: dict[str, Any]) -> None:
        self.replies: dict[str, list[Any]] = script.get("replies", {})
        self.refuses: list[str] = script.get("refuses", [])
        self.latency: float = script.get("latency", 0.0)
        self.form: str | None = script.get("form")
        self.faults: dict[str, Any] = {"rates": {}, **script.get("faults", {})}
        assert self.faults["rates"].keys() <= FAULTS.keys()
        self.become: str = script.get("batches", "completed")
        self.requests: list[dict[str, Any]] = []
        self.peak = self.under_way = 0
        self.bill: dict[str, dict[str, int]] = defaultdict(
            lambda: dict.fromkeys(
                ("asked", "delivered", "charged", "prompt_tokens", "completion_tokens"), 0
            )
        )
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []

    def reply(self, identity: str, body: dict[str, Any], authorization: str) -> dict[str, Any]:
        """What a chat request gets."""
        self.requests.append({"authorization": authorization, "body": body})
        attempt = self.bill[identity]["asked"]
        self.bill[identity]["asked"] += 1
        for name in self.refuses:
            if name in body:
                hint = "; use 'max_completion_tokens'" if name == "max_tokens" else ""
                return {"status": 400, "message": f"Unsupported parameter: {name!r}{hint}"}
            if name == body.get("response_format", {}).get("type"):
                message = f"response_format of type {name!r} is not supported"
                return {"status": 400, "message": message}
        asked = " ".join(turn["content"] for turn in body["messages"] if turn["role"] == "user")
        # Worked examples stand before the question, so the marker that comes last is meant.
        marker = max(self.replies, key=asked.rfind, default="")
        if marker in asked and self.replies:
            queue = self.replies[marker]
            reply = queue.pop(0) if len(queue) > 1 else queue[0]
            return {"content": reply} if isinstance(reply, str) else reply
        return self.befallen(identity, attempt, body, authorization)

    def befallen(
        self, identity: str, attempt: int, body: dict[str, Any], authorization: str
    ) -> dict[str, Any]:
        """The answer, or what is drawn to happen in its place."""
        content = answer_of(body, identity)
        draw = random.Random(f"{self.faults.get('seed', 0)} {identity} {attempt}")
        rates = self.faults["rates"]
        odds = [*rates.values(), 1 - sum(rates.values())]
        [kind] = draw.choices([*rates, "none"], odds)
        after = str(self.faults.get("retry_after", 1))
        limit = body.get("max_tokens", 400)
        return {
            "none": {"content": content},
            "429": {"status": 429, "message": "Rate limit reached"},
            "429-after": {"status": 429, "message": "slow down", "headers": {"Retry-After": after}},
            "500": {"status": 500, "message": f"cannot serve {authorization}"},
            "cut": {"content": content, "cut": "before"},
            "cut-body": {"content": content, "cut": "middle"},
            "stall": {"content": content, "delay": self.faults.get("stall", 60)},
            "no-json": {"content": f"I would say {identity}."},
            "wrong-schema": {"content": json.dumps({"answer": identity})},
            "refusal": {"refusal": f"I will not answer {identity}."},
            "empty": {"empty": True},
            "length": {"content": ("{" + identity * limit)[: limit * 4], "finish_reason": "length"},
            "leak": {"content": json.dumps({"said": identity, "you_are": authorization})},
        }[kind]

    def completion(
        self, identity: str, body: dict[str, Any], reply: dict[str, Any]
    ) -> dict[str, Any]:
        """The body of a successful answer; it is charged for."""
        content, refusal = reply.get("content"), reply.get("refusal")
        prompt = tokens_of(body)
        completion = (len((content or refusal or "").encode()) + 3) // 4
        entry = self.bill[identity]
        entry["charged"] += 1
        entry["prompt_tokens"] += prompt
        entry["completion_tokens"] += completion
        message = {"role": "assistant", "content": content, "refusal": refusal}
        finish_reason = reply.get("finish_reason", "stop")
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        return {
            "id": f"chatcmpl-{identity}",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [] if reply.get("empty") else [choice],
            "usage": usage | {"total_tokens": prompt + completion},
        }

    # -- files and batches ------------------------------------------------------------------------

    def upload(self, headers: dict[str, str], content: bytes) -> tuple[int, Any]:
        form = f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + content
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in BytesParser(policy=HTTP).parsebytes(form).iter_parts()
        }
        assert parts["purpose"] == b"batch"
        return 200, {**self.keep(parts["file"]), "purpose": "batch", "filename": "input.jsonl"}

    def keep(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return {"id": name, "object": "file", "bytes": len(content), "created_at": 0}

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert body["input_file_id"] in self.files
        batch = {
            **body,
            "id": f"batch_{len(self.batches)}",
            "object": "batch",
            "status": "validating",
            "created_at": len(self.batches),
        }
        self.batches.append(batch)
        return 200, batch

    def retrieve(self, name: str, authorization: str) -> tuple[int, Any]:
        for batch in self.batches:
            if batch["id"] == name:
                if batch["status"] in ("validating", "in_progress"):
                    self.advance(batch, authorization)
                return 200, batch
        return 404, {"error": {"message": f"No batch found with id {name!r}."}}

    def advance(self, batch: dict[str, Any], authorization: str) -> None:
        """Let a batch become what it is to become."""
        batch["status"] = self.become
        if self.become == "failed":
            error = {"code": "model_not_found", "message": "no such model", "line": 1}
            batch["errors"] = {"object": "list", "data": [error]}
        if self.become not in ("completed", "expired"):
            return
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        random.Random(0).shuffle(lines)  # as the real one, in no order
        outcomes: dict[str, list[Any]] = {"output_file_id": [], "error_file_id": []}
        for number, line in enumerate(lines):
            done = {"id": f"batch_req_{number}", "custom_id": line["custom_id"], "error": None}
            if self.become == "expired" and number >= len(lines) // 2:
                done["error"] = {"code": "batch_expired", "message": "could not be executed"}
                outcomes["error_file_id"].append({**done, "response": None})
                continue
            body = line["body"]
            identity = request_id(body)
            reply = self.reply(identity, body, authorization)
            status, said = reply.get("status", 200), _error(reply)
            if status == 200:
                said = self.completion(identity, body, reply)
                if form := reply.get("form", self.form):
                    said = FORMS[form](said)
                self.bill[identity]["delivered"] += 1
            response = {"status_code": status, "request_id": "1", "body": said}
            if row := reply.get("row"):
                done, response = done | row, row.get("response", response)
            file = "output_file_id" if status == 200 else "error_file_id"
            outcomes[file].append({**done, "response": response})
        for name, made in outcomes.items():
            if made:  # there is no empty file
                content = "".join(json.dumps(line) + "\n" for line in made).encode()
                batch[name] = self.keep(content)["id"]
        counts = {name: len(made) for name, made in outcomes.items()}
        batch["request_counts"] = {
            "total": len(lines),
            "completed": counts["output_file_id"],
            "failed": counts["error_file_id"],
        }


def _error(reply: dict[str, Any]) -> dict[str, Any]:
    message = reply.get("message", "boom")
    fields = {name: reply.get(name) for name in ("code", "type", "param")}
    return {"error": {"message": message, **fields}}


class Server:
    """Speaks HTTP/1.1 with any number of clients."""

    def __init__(self) -> None:
        self.script = Script({})

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.rstrip("\r\n").split("\r\n")
                method, path, _ = first.split(" ", 2)
                path = re.sub("^http://[^/]+", "", path)  # it may stand in for a proxy
                fields = (line.split(":", 1) for line in lines)
                headers = {name.lower(): value.strip() for name, value in fields}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self.answer(reader, writer, method, path.split("?")[0], headers, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # The client has gone, or was sent away.
        finally:
            writer.close()

    async def answer(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        headers: dict[str, str],
        content: bytes,
    ) -> None:
        script, authorization = self.script, headers.get("authorization", "")
        status, said = 200, {}
        if (method, path) == ("POST", "/v1/chat/completions"):
            await self.chat(writer, json.loads(content), authorization, reader.at_eof)
            return
        if (method, path) == ("POST", "/script"):
            self.script = Script(json.loads(content))
        elif (method, path) == ("POST", "/batches"):
            script.become = json.loads(content)["become"]
        elif path == "/requests":
            said = {
                "requests": script.requests,
                "peak": script.peak,
                "batches": script.batches,
            }
        elif path == "/count":
            said = {"requests": len(script.requests)}
        elif path == "/bill":
            said = script.bill
        elif (method, path) == ("POST", "/v1/files"):
            status, said = script.upload(headers, content)
        elif (method, path) == ("POST", "/v1/batches"):
            status, said = script.create(json.loads(content))
        elif path == "/v1/batches":
            said = {"object": "list", "data": script.batches[::-1], "has_more": False}
        elif match := re.fullmatch(r"/v1/batches/(\w+)", path):
            status, said = script.retrieve(match[1], authorization)
        elif match := re.fullmatch(r"/v1/files/([\w-]+)/content", path):
            return await _send(writer, 200, script.files[match[1]], "application/octet-stream")
        else:
            return await _send(writer, 200, b"<html>a web page</html>", "text/html")
        await _send(writer, status, json.dumps(said).encode())

    async def chat(
        self,
        writer: asyncio.StreamWriter,
        body: dict[str, Any],
        authorization: str,
        gone: Callable[[], bool],
    ) -> None:
        script, arrived = self.script, time.monotonic()
        identity = request_id(body)
        script.under_way += 1
        script.peak = max(script.peak, script.under_way)
        reply = script.reply(identity, body, authorization)
        # Whoever asks is charged, whether or not the answer can still be handed over.
        answered = not {"status", "raw"} & reply.keys()
        said = script.completion(identity, body, reply) if answered else _error(reply)
        form = reply.get("form", script.form)
        if answered and form:
            said = FORMS[form](said)
        content = (said if isinstance(said, str) else json.dumps(said)).encode()
        due = arrived + script.latency + reply.get("delay", 0)
        await asyncio.sleep(due - time.monotonic())
        script.under_way -= 1
        if gone():
            raise ConnectionError
        extra = reply.get("headers", {})
        if "raw" in reply:
            kind = reply.get("content_type", "application/json")
            raw = reply["raw"].encode(reply.get("encoding", "utf-8"))
            return await _send(writer, reply.get("status", 200), raw, kind, extra)
        status = reply.get("status", 200)
        await _send(writer, status, content, headers=extra, cut=reply.get("cut"))
        if answered:
            script.bill[identity]["delivered"] += 1


async def _send(
    writer: asyncio.StreamWriter,
    status: int,
    content: bytes,
    content_type: str = "application/json",
    headers: dict[str, str] | None = None,
    cut: str | None = None,
) -> None:
    """Send a response. Raises `ConnectionError` when it does not get through, or is cut off."""
    if cut == "before":
        raise ConnectionError
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase if status in set(HTTPStatus) else ''}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(content)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    head = "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"
    if writer.is_closing():
        raise ConnectionError
    writer.write(head + (content[: len(content) // 2] if cut else content))
    await writer.drain()
    if cut:
        raise ConnectionError


async def main() -> None:
    server = await asyncio.start_server(Server().serve, "127.0.0.1", 0, limit=2**26, backlog=1024)
    host, port = server.sockets[0].getsockname()
    print(f"http://{host}:{port}", flush=True)
    # Ends with the test process, however that ends.
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # Nobody waits for the connections that are still open.


if __name__ == "__main__":
    asyncio.run(main())
