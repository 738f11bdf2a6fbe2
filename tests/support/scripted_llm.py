"""A language model whose answers a test scripts, and conversations to send to it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reasonpix.llm.types import Attempt, Completion, Conversation, Message, Price, Unavailable

PRICE = Price(prompt=1e6, completion=1e6)  # a token costs 1
SCHEMA = {"title": "Answer", "type": "object"}
OVERLOADED = Unavailable(reason="429 too many", overloaded=True, retry_after_s=0.01)
DOWN = Unavailable(reason="500 no luck", retry_after_s=0.001)
CUT = Unavailable(reason="cut off", retry_after_s=0.001, may_be_charged=True)


def conversation(text: str, seed: int = 0) -> Conversation:
    return Conversation(
        messages=(Message(role="user", content=text),), answer_schema=SCHEMA, seed=seed
    )


def conversations(count: int, name: str = "") -> list[Conversation]:
    return [conversation(f"{name}{number}") for number in range(count)]


def echo(text: str) -> Completion:
    return Completion(text=f"re: {text}", prompt_tokens=10, completion_tokens=10)


class Model:
    """A language model that answers by `reply(text, attempt)`, and notes what it is asked."""

    def __init__(
        self,
        reply: Callable[[str, int], Attempt] = lambda text, attempt: echo(text),
        *,
        seconds: float = 0.0,
        concurrency: int = 4,
        batch_size: int = 1,
        max_retries: int = 3,
        price: Price | None = None,
        max_answer_tokens: int | None = None,
        jobs: bool = False,
    ) -> None:
        self.reply = reply
        self.seconds = seconds
        self.concurrency = concurrency
        self.batch_size = batch_size
        self.max_retries = max_retries
        self.price = price
        self.max_answer_tokens = max_answer_tokens
        self.jobs = jobs
        self.parameters: Mapping[str, Any] = {"model": "test"}
        self.lock = threading.Lock()
        self.attempts: Counter[str] = Counter()
        self.batches: list[list[str]] = []
        self.times: list[float] = []
        self.under_way = 0
        self.most_under_way = 0

    def complete(self, conversations: Sequence[Conversation], /) -> list[Attempt]:
        texts = [it.messages[0].content for it in conversations]
        with self.lock:
            self.batches.append(texts)
            self.times.append(time.monotonic())
            self.attempts.update(texts)
            attempts = [self.attempts[text] for text in texts]
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            time.sleep(self.seconds)
            return [self.reply(*it) for it in zip(texts, attempts, strict=True)]
        finally:
            with self.lock:
                self.under_way -= 1

    def submit(self, conversations: Mapping[str, Conversation], /) -> str:
        raise NotImplementedError

    def collect(self, job_id: str, /) -> Mapping[str, Attempt] | None:
        raise NotImplementedError
