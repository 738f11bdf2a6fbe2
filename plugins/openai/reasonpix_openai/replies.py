"""Translate server replies into completions, refusals, retries and errors.

The API key is removed from everything that this module returns, even if the server repeats it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from reasonpix.llm import Attempt, Completion, Unavailable
from reasonpix.plugin import Problem, ReasonpixError

SECRET_LENGTH = 8
"""Shorter keys, such as EMPTY for local servers, are common words and not secret."""

FORMAT = re.compile(r"response_format|json.?(schema|object)|structured.?output", re.IGNORECASE)
"""Matches a server's error about an unsupported response format."""

_FATAL = (401, 402, 403, 404)
# The key, the account, the URL or the model is wrong: all requests would fail.

_ADVICE = {
    401: "; check the key in the environment variable {key_name}",
    404: "; check model, and base_url, which usually ends in /v1",
}

_PAYMENT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
# Error codes of a 429 that will not go away.

_TRANSIENT = (408, 409, 425)

_OVERLOADED = (429, 503, 529)

_GATEWAY = (502, 504, 524)
# A gateway lost the server behind it, which may have answered nevertheless.

_NOT_CHAT = "not a response of a chat API; check base_url, which usually ends in /v1"


@dataclass
class Replies:
    """Reads the replies of the server at `url`; `key_name` is the key's environment variable.

    A reply that is not of a chat API, such as a web page, means that `base_url` is wrong and stops
    the run. If the server has answered before, it is a transient error.
    """

    url: str
    key_name: str
    key: str | None = field(repr=False)
    answered: bool = False
    """Whether the server has ever replied as a chat API does."""

    def read(self, content: bytes) -> Attempt:
        """Read the body of a successful response. Raises `ReasonpixError` if `url` is wrong."""
        try:
            return self.attempt(200, json.loads(content))
        except ValueError:
            # Truncated, or of another protocol.
            if content.lstrip().startswith(b"{"):
                return self.unavailable("broken JSON", may_be_charged=True)
            return self._not_chat()

    def attempt(self, status: int, body: Any) -> Attempt:
        """Read a response with parsed body. Raises `ReasonpixError` for errors of all requests."""
        error = body.get("error") if isinstance(body, dict) else None
        if status != 200:
            return self.error(status, error or body)
        if error and not body.get("choices"):
            # Some gateways forward a model's errors with status 200.
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            return self.error(status, error, may_be_charged=True)
        try:
            choices, usage = body["choices"], body.get("usage") or {}
            if not choices:
                self.answered = True
                return self.unavailable("an answer without choices", may_be_charged=True)
            message, finish_reason = choices[0]["message"], choices[0].get("finish_reason")
            refusal = message.get("refusal") or None
            if finish_reason == "content_filter":
                refusal = refusal or "content filter"
            completion = Completion(
                text=self._redacted(message.get("content") or ""),
                refusal=self._redacted(refusal) if refusal else None,
                finish_reason=finish_reason or "stop",
                prompt_tokens=max(0, usage.get("prompt_tokens") or 0),
                completion_tokens=max(0, usage.get("completion_tokens") or 0),
            )
        except (AttributeError, LookupError, TypeError, ValueError):
            return self._not_chat()
        self.answered = True
        return completion

    def error(
        self,
        status: int,
        body: Any,
        headers: Mapping[str, str] | None = None,
        may_be_charged: bool = False,
    ) -> Attempt:
        """Read an HTTP error. Raises `ReasonpixError` for errors of all requests.

        `body` is the response's `error`, or the whole response.
        """
        fields = body if isinstance(body, dict) else {}
        codes = {str(fields.get("code")), str(fields.get("type"))}
        if "content_filter" in codes or (status == 403 and "flagged" in str(body)):
            return Completion(text="", refusal="content filter")
        reason = f"{status}: {fields.get('message') or body or 'no reason given'}"
        if status in _FATAL or not codes.isdisjoint(_PAYMENT):
            advice = _ADVICE.get(status, "").format(key_name=self.key_name)
            raise ReasonpixError(f"planner openai: {self.quoted(reason)}{advice}")
        if status >= 500 or status in _OVERLOADED or status in _TRANSIENT:
            return self.unavailable(
                reason,
                retry_after_s=_retry_after_s(headers or {}),
                overloaded=status in _OVERLOADED,
                may_be_charged=may_be_charged or status in _GATEWAY,
            )
        advice = "; try another structured_output, such as auto" if FORMAT.search(reason) else ""
        return Problem(status="failed", reason=self.quoted(reason) + advice)

    def lost(self, cause: BaseException, timeout_s: float) -> Unavailable:
        """A request without a response.

        Raises `ReasonpixError` if the server cannot be reached and never could.
        """
        import httpx2

        unsent = (
            httpx2.ConnectError,
            httpx2.ConnectTimeout,
            httpx2.PoolTimeout,
            httpx2.ProxyError,
            httpx2.UnsupportedProtocol,
        )
        if isinstance(cause, unsent):
            reason = f"cannot be reached: {cause or type(cause).__name__}"
            if not self.answered:
                raise ReasonpixError(
                    f"planner openai: {self.quoted(reason)}; check base_url and that the server "
                    "is running, then run the same command again to continue"
                )
            return self.unavailable(reason)
        if isinstance(cause, httpx2.TimeoutException):
            reason = f"no response for {timeout_s:g} s (timeout_s)"
        else:
            reason = f"connection lost: {cause or type(cause).__name__}"
        return self.unavailable(reason, may_be_charged=True)

    def unavailable(
        self,
        reason: str,
        retry_after_s: float | None = None,
        overloaded: bool = False,
        may_be_charged: bool = False,
    ) -> Unavailable:
        """An attempt without an answer."""
        return Unavailable(
            reason=self.quoted(reason),
            retry_after_s=retry_after_s,
            overloaded=overloaded,
            may_be_charged=may_be_charged,
        )

    def quoted(self, text: str) -> str:
        """A server's text for a message: with the URL, on one line, shortened, without the key."""
        # OpenAI quotes a part of a wrong key: "sk-abcde***wxyz".
        text = re.sub(r"\bsk-[\w*-]+", "[API key]", self._redacted(text))
        return f"{self.url}: {' '.join(text.split())[:300]}"

    def _not_chat(self) -> Unavailable:
        if self.answered:
            return self.unavailable(_NOT_CHAT, may_be_charged=True)
        raise ReasonpixError(f"planner openai: {self.quoted(_NOT_CHAT)}")

    def _redacted(self, text: str) -> str:
        if not self.key or len(self.key) < SECRET_LENGTH:
            return text
        return text.replace(self.key, "[API key]")


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms`, or from Retry-After in seconds or as a date."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            seconds = float(milliseconds) / 1000
        else:
            seconds = _seconds(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _seconds(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        date = parsedate_to_datetime(value)
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return (date - datetime.now(UTC)).total_seconds()
