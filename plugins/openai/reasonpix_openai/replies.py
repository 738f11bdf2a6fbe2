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
from reasonpix_openai.chat_response import completion_of, error_of, parse, status_of
from reasonpix_openai.dialect import FORMAT

SECRET_LENGTH = 8
"""Shorter keys, such as EMPTY for local servers, are common words and not secret."""

_FATAL = (401, 402, 403, 404, 407)
# The key, the account, the URL, the model or the proxy is wrong: all requests would fail.

_ADVICE = {
    401: "; check the key in the environment variable {key_name}",
    404: "; check model, and base_url, which usually ends in /v1",
    407: "; check the user and password of the proxy in {proxy}",
}

_PAYMENT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
# Error codes of a 429 that will not go away.

_TRANSIENT = (408, 409, 425)

_OVERLOADED = (429, 503, 529)

_GATEWAY = (502, 504, 524)
# A gateway lost the server behind it, which may have answered nevertheless.

_NOT_CHAT = "not a response of a chat API; check base_url, which usually ends in /v1"


@dataclass(frozen=True)
class ServerError:
    """An error of the server: its status and body, which is the response's `error` or all of it."""

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)
    may_be_charged: bool = False


@dataclass
class Replies:
    """Reads the replies of the server at `url`; `key_name` is the key's environment variable.

    A reply that is not of a chat API, such as a web page, means that `base_url` is wrong and stops
    the run. If the server has answered before, it is a transient error.
    """

    url: str
    key_name: str
    key: str | None = field(repr=False)
    proxy: str | None = None
    """The environment variable that names the proxy to the server, if there is one."""
    answered: bool = False
    """Whether the server has ever replied as a chat API does."""

    def read(self, content: bytes, charset: str | None = None) -> Attempt | ServerError:
        """Read the body of a successful response. Raises `ReasonpixError` if `url` is wrong."""
        try:
            return self.attempt(200, parse(content, charset))
        except ValueError:
            # Truncated, or of another protocol.
            if content.lstrip().startswith((b"{", b"data:")):
                return self.unavailable("broken JSON", may_be_charged=True)
            return self._not_chat(content.decode(errors="replace"))

    def attempt(self, status: int, body: Any) -> Attempt | ServerError:
        """Read a response with parsed body. Raises `ReasonpixError` if `url` is wrong."""
        error = error_of(body)
        if status != 200:
            return ServerError(status, body if error is None else error)
        if error is not None:
            # Some gateways forward a model's errors with status 200.
            return ServerError(status_of(error), error, may_be_charged=True)
        if isinstance(body, dict) and body.get("choices", ...) in ([], [None], None):
            self.answered = True
            return self.unavailable("an answer without choices", may_be_charged=True)
        completion = completion_of(body)
        if completion is None:
            return self._not_chat(json.dumps(body, ensure_ascii=False))
        self.answered = True
        refusal = completion.refusal and self._redacted(completion.refusal)
        return completion.model_copy(
            update={"text": self._redacted(completion.text), "refusal": refusal}
        )

    def error(self, error: ServerError) -> Attempt:
        """Read an error. Raises `ReasonpixError` for errors of all requests."""
        status, body = error.status, error.body
        fields = body if isinstance(body, dict) else {}
        codes = {str(fields.get("code")), str(fields.get("type"))}
        if "content_filter" in codes or (status == 403 and "flagged" in str(body)):
            return Completion(text="", refusal="content filter")
        said = fields.get("message") or fields.get("detail") or body or "no reason given"
        reason = f"{status}: {said}"
        if status in _FATAL or not codes.isdisjoint(_PAYMENT):
            advice = _ADVICE.get(status, "").format(key_name=self.key_name, proxy=self.proxy)
            raise ReasonpixError(f"planner openai: {self.quoted(reason)}{advice}")
        if status >= 500 or status in _OVERLOADED or status in _TRANSIENT:
            return self.unavailable(
                reason,
                retry_after_s=_retry_after_s(error.headers),
                overloaded=status in _OVERLOADED,
                may_be_charged=error.may_be_charged or status in _GATEWAY,
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
                cure = f"base_url, the proxy in {self.proxy}" if self.proxy else "base_url"
                raise ReasonpixError(
                    f"planner openai: {self.quoted(reason)}; check {cure} and that the server "
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
        way = f" (through the proxy of {self.proxy})" if self.proxy else ""
        return f"{self.url}{way}: {' '.join(text.split())[:300]}"

    def _not_chat(self, said: str) -> Unavailable:
        reason = f"{_NOT_CHAT}; it begins with {' '.join(said.split())[:80]!r}"
        if self.answered:
            return self.unavailable(reason, may_be_charged=True)
        raise ReasonpixError(f"planner openai: {self.quoted(reason)}")

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
