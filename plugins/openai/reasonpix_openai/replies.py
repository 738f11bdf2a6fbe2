"""What servers reply, in the core's terms: an answer, a refusal, a reason to ask again or to stop.

Nothing that leaves this module holds the API key, also where the server repeats it.
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

from reasonpix.llm import Completion, Unavailable
from reasonpix.plugin import Problem, ReasonpixError

SECRET_LENGTH = 8
"""Shorter keys, such as the EMPTY that local servers are given, are no secret, but common words."""

FORMAT = re.compile(r"response_format|json.?(schema|object)|structured.?output", re.IGNORECASE)
"""Found in what servers say about a form of answer that they do not know."""

_CONCERN_ALL = (401, 402, 403, 404)
# The key, the account, the URL or the model: no other record would fare better.

_ADVICE = {
    401: "; check the key in the environment variable {key_name}",
    404: "; check model, and base_url, which usually ends in /v1",
}

_PAYMENT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
# Codes of a 429 that waiting does not mend.

_COMES_AND_GOES = (408, 409, 425)

_OVERLOADED = (429, 503, 529)

_FROM_BETWEEN = (502, 504, 524)
# A gateway lost or gave up the server behind it, which may have answered all the same.

_NO_CHAT = "no answer of a chat API; check base_url, which usually ends in /v1"


@dataclass
class Replies:
    """Reads the replies of the server at `url`; `key_name` is the key's environment variable.

    What cannot come from a chat API, such as a web page, is taken for a wrong `base_url` and stops
    the run, unless the server has answered before: then something on the way broke, once.
    """

    url: str
    key_name: str
    key: str | None = field(repr=False)
    answered: bool = False
    """Whether the server has given an answer of a chat API."""

    def read(self, content: bytes) -> Completion | Problem | Unavailable:
        """Read the body of a successful response. Raises `ReasonpixError` for a wrong `url`."""
        try:
            return self.outcome(200, json.loads(content))
        except ValueError:
            # Cut off on the way, or of another protocol.
            if content.lstrip().startswith(b"{"):
                return self.unavailable("broken JSON", may_be_charged=True)
            return self._no_chat()

    def outcome(self, status: int, body: Any) -> Completion | Problem | Unavailable:
        """Read a response with its body parsed. Raises `ReasonpixError` for what concerns all."""
        error = body.get("error") if isinstance(body, dict) else None
        if status != 200:
            return self.error(status, error or body)
        if error and not body.get("choices"):
            # Some gateways send errors of the model behind them with status 200.
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
            return self._no_chat()
        self.answered = True
        return completion

    def error(
        self,
        status: int,
        body: Any,
        headers: Mapping[str, str] | None = None,
        may_be_charged: bool = False,
    ) -> Completion | Problem | Unavailable:
        """Read an HTTP error. Raises `ReasonpixError` for what concerns all requests.

        `body` is what stands under `error` in the response, or all of it.
        """
        fields = body if isinstance(body, dict) else {}
        codes = {str(fields.get("code")), str(fields.get("type"))}
        if "content_filter" in codes or (status == 403 and "flagged" in str(body)):
            return Completion(text="", refusal="content filter")
        reason = f"{status}: {fields.get('message') or body or 'no reason given'}"
        if status in _CONCERN_ALL or not codes.isdisjoint(_PAYMENT):
            advice = _ADVICE.get(status, "").format(key_name=self.key_name)
            raise ReasonpixError(f"planner openai: {self.said(reason)}{advice}")
        if status >= 500 or status in _OVERLOADED or status in _COMES_AND_GOES:
            return self.unavailable(
                reason,
                retry_after_s=_retry_after_s(headers or {}),
                overloaded=status in _OVERLOADED,
                may_be_charged=may_be_charged or status in _FROM_BETWEEN,
            )
        advice = "; try another structured_output, such as auto" if FORMAT.search(reason) else ""
        return Problem(status="failed", reason=self.said(reason) + advice)

    def lost(self, cause: BaseException, timeout_s: float) -> Unavailable:
        """What became of a request without a response.

        Raises `ReasonpixError` when the server cannot be reached and never could.
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
                    f"planner openai: {self.said(reason)}; check base_url, and that the server "
                    "runs, then run the same command again to continue"
                )
            return self.unavailable(reason)
        if isinstance(cause, httpx2.TimeoutException):
            reason = f"silent for {timeout_s:g} s (timeout_s)"
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
        """No answer this time."""
        return Unavailable(
            reason=self.said(reason),
            retry_after_s=retry_after_s,
            overloaded=overloaded,
            may_be_charged=may_be_charged,
        )

    def said(self, text: str) -> str:
        """Foreign text for a message: with the URL, on one line, not endless, without a key."""
        # OpenAI repeats a part of a wrong key: "sk-abcde***wxyz".
        text = re.sub(r"\bsk-[\w*-]+", "[API key]", self._redacted(text))
        return f"{self.url}: {' '.join(text.split())[:300]}"

    def _no_chat(self) -> Unavailable:
        if self.answered:
            return self.unavailable(_NO_CHAT, may_be_charged=True)
        raise ReasonpixError(f"planner openai: {self.said(_NO_CHAT)}")

    def _redacted(self, text: str) -> str:
        if not self.key or len(self.key) < SECRET_LENGTH:
            return text
        return text.replace(self.key, "[API key]")


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long to wait: `retry-after-ms`, or Retry-After in seconds or as a date."""
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
