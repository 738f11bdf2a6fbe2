"""Read the body of a chat response, in the forms that OpenAI-compatible servers give it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from reasonpix.llm import Completion

_MOST_TOKENS = 2**31
# A larger count is an error of the server.

_CUT_OFF = ("length", "max_tokens", "max_output_tokens", "model_length")
_FILTERED = ("content_filter", "content_filtered", "safety", "prohibited_content", "blocklist")

_REASONING = ("thinking", "reasoning", "redacted_thinking")
# Types of parts.

_STATUS_OF = {
    "authentication_error": 401,
    "invalid_api_key": 401,
    "unauthorized": 401,
    "insufficient_quota": 429,
    "payment_required": 402,
    "permission_denied": 403,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "too_many_requests": 429,
    "overloaded": 529,
    "overloaded_error": 529,
    "service_unavailable": 503,
    "bad_request": 400,
    "context_length_exceeded": 400,
    "invalid_request_error": 400,
    "unsupported_parameter": 400,
    "unsupported_value": 400,
}
"""The HTTP status of an error that only names its kind; 500 for any other kind."""


def parse(content: bytes, charset: str | None = None) -> Any:
    """The JSON of a body; the events of a stream are merged into one response.

    `charset` is the one that the response declares. Raises `ValueError` if the body is neither JSON
    nor a stream, or if a stream breaks off.
    """
    text = _decoded(content, charset).lstrip("\ufeff \r\n\t")
    if re.match(r"(data|event|id|retry)?:", text):
        return _joined(_events(text))
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _decoded(content: bytes, charset: str | None) -> str:
    """The text of a body: JSON is UTF-8, unless it is not valid and another charset is declared."""
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        pass
    try:
        return content.decode(charset or encoding)
    except (UnicodeDecodeError, LookupError):
        return content.decode(encoding, errors="replace")


def error_of(body: Any) -> Any:
    """The error in a body that was sent as a success, None if there is none."""
    if not isinstance(body, dict):
        return None
    choice = _choice(body)
    if choice is not None and not isinstance(choice.get("error"), dict):
        return None
    said = (choice or {}).get("error") or body.get("error") or body.get("errors")
    if said:
        return said[0] if isinstance(said, list) else said
    is_error = (
        body.get("object") == "error"
        or "detail" in body
        or ("message" in body and status_of(body) != 500)
    )
    return body if is_error and "choices" not in body else None


def status_of(error: Any) -> int:
    """The HTTP status that an error stands for."""
    fields = error if isinstance(error, dict) else {}
    for key in ("code", "status", "status_code", "type"):
        value = fields.get(key)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, int) and 400 <= value < 600:
            return value
        if status := _STATUS_OF.get(str(value).lower()):
            return status
    return 400 if fields.get("param") else 500


def completion_of(body: Any) -> Completion | None:
    """The completion in the first choice of a response, None if it has none.

    A choice without a message is one if it says why it finished: a filter took the message, or all
    tokens went into reasoning.
    If a token count is missing or impossible, both are 0, which means not reported.
    """
    choice = _choice(body)
    if choice is None:
        return None
    message = choice.get("message", choice.get("delta"))
    if not isinstance(message, dict):
        message = {"content": message if isinstance(message, str) else choice.get("text")}
        if message["content"] is None and not choice.get("finish_reason"):
            return None
    reason = str(choice.get("finish_reason") or "stop").lower()
    if reason in _CUT_OFF:
        reason = "length"
    text = _text(message.get("content")) or _tool_arguments(message)
    if not text and reason != "length":  # a server that takes the whole answer for reasoning
        text = _text(message.get("reasoning_content") or message.get("reasoning"))
    refusal = message.get("refusal") or _refusal(message.get("content"))
    if reason in _FILTERED:
        refusal = refusal or "content filter"
    prompt_tokens, completion_tokens = _tokens(body.get("usage"), is_empty=not text)
    return Completion(
        text=text,
        refusal=str(refusal) if refusal else None,
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def _choice(body: Any) -> dict[str, Any] | None:
    choices = body.get("choices") if isinstance(body, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return None


# -- The parts of a message


def _text(content: Any) -> str:
    """The text of a content: a string, a list of parts, or JSON that the server has parsed."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(_text, content))
    if not isinstance(content, dict):
        return ""
    if "type" not in content and "text" not in content:
        return json.dumps(content, ensure_ascii=False)
    text = content.get("text")
    return text if isinstance(text, str) and content.get("type") not in _REASONING else ""


def _refusal(content: Any) -> Any:
    parts = content if isinstance(content, list) else []
    return next((part["refusal"] for part in parts if _has(part, "refusal")), None)


def _has(part: Any, name: str) -> bool:
    return isinstance(part, dict) and bool(part.get(name))


def _tool_arguments(message: dict[str, Any]) -> str:
    """The answer of a server that enforces its form by a tool call."""
    calls = message.get("tool_calls")
    call = calls[0] if isinstance(calls, list) and calls else None
    function = call.get("function") if isinstance(call, dict) else None
    return _text(function.get("arguments")) if isinstance(function, dict) else ""


def _tokens(usage: Any, is_empty: bool) -> tuple[int, int]:
    """Prompt and completion tokens; two zeros if one of them is not known."""
    counts = usage if isinstance(usage, dict) else {}
    prompt = _count(counts.get("prompt_tokens", counts.get("input_tokens")))
    completion = _count(counts.get("completion_tokens", counts.get("output_tokens")))
    if not prompt or completion is None or (completion == 0 and not is_empty):
        return 0, 0
    return prompt, completion


def _count(value: Any) -> int | None:
    try:
        count = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return round(count) if 0 <= count < _MOST_TOKENS else None


# -- Streams: some servers stream whether or not they are asked to


def _events(text: str) -> Iterator[Any]:
    """The JSON of each event. Raises `ValueError` if the last is not the end."""
    ended = False
    for data in _data(text):
        if data == "[DONE]":
            ended = True
            break
        event = json.loads(data)
        choice = _choice(event)
        ended = ended or error_of(event) is not None or bool(choice and choice.get("finish_reason"))
        yield event
    if not ended:
        raise ValueError("the stream breaks off")


def _data(text: str) -> Iterator[str]:
    """The data of each event: its lines are joined, as the standard of server-sent events says.

    Some servers leave out the empty line between events: then each line is the data of an event.
    """
    lines: list[str] = []
    # Not `splitlines`, which also splits at characters that JSON may hold, such as U+2028.
    for line in (*re.split(r"\r\n|\n|\r", text), ""):
        name, _, value = line.partition(":")
        if name == "data" and (value := value.strip(" \t")):
            lines.append(value)
        if line or not lines:
            continue
        if len(lines) > 1 and _is_json(joined := "\n".join(lines)):
            yield joined
        else:
            yield from lines
        lines.clear()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _joined(events: Iterator[Any]) -> dict[str, Any]:
    """The response made of the events of a stream."""
    texts = {"content": "", "reasoning_content": "", "refusal": ""}
    body: dict[str, Any] = {"usage": None}
    choice: dict[str, Any] = {"message": texts}
    for event in events:
        if error_of(event) is not None:
            return {"error": error_of(event)}
        if not isinstance(event, dict):
            raise ValueError("not an event of a chat response")
        body["usage"] = event.get("usage") or body["usage"]
        part = _choice(event)
        if part is None:
            continue
        body["choices"] = [choice]
        choice["finish_reason"] = part.get("finish_reason") or choice.get("finish_reason")
        delta = part.get("delta", part.get("message"))
        if not isinstance(delta, dict):
            delta = {"content": part.get("text")}
        texts["content"] += _text(delta.get("content"))
        texts["reasoning_content"] += _text(
            delta.get("reasoning_content") or delta.get("reasoning")
        )
        texts["refusal"] += _text(delta.get("refusal"))
    return body
