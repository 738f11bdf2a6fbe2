"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from reasonpix.deployment.server.batcher import Batcher, Observer

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics(Observer):
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "reasonpix_requests",
            "Requests answered; status 499 means the client left first",
            ["path", "status"],
            registry=registry,
        )
        self._rejected = Counter(
            "reasonpix_rejected", "Edits not admitted, by reason", ["reason"], registry=registry
        )
        self._cancelled = Counter(
            "reasonpix_cancelled",
            "Admitted edits given up because the client left or the time ran out",
            ["when"],
            registry=registry,
        )
        for when in ("waiting", "running"):
            self._cancelled.labels(when)
        self._batch = Histogram(
            "reasonpix_batch_size",
            "Edits in a batch",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
            registry=registry,
        )
        self._seconds = Histogram(
            "reasonpix_edit_seconds",
            "Seconds a batch took",
            buckets=_SECONDS,
            registry=registry,
        )
        self._wait = Histogram(
            "reasonpix_queue_seconds",
            "Seconds an edit spent in the queue",
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, batcher: Batcher) -> None:
        """Add gauges for the queue of `batcher`."""
        for name, description, value in (
            ("queue_depth", "Edits in the queue", lambda: batcher.waiting),
            ("in_progress", "Edits in the current batch", lambda: batcher.running),
            (
                "admitted",
                "Edits from admission until the response is sent",
                lambda: batcher.admitted,
            ),
        ):
            Gauge(f"reasonpix_{name}", description, registry=self._registry).set_function(value)

    def render(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return bytes(generate_latest(self._registry))

    def rejected(self, label: str) -> None:
        """Count an edit that was not admitted."""
        self._rejected.labels(label).inc()

    def batch_started(self, waits: Sequence[float]) -> None:
        """Record how long the edits of a batch waited."""
        for seconds in waits:
            self._wait.observe(seconds)

    def batch_finished(self, size: int, seconds: float) -> None:
        """Record the size and time of a batch."""
        self._batch.observe(size)
        self._seconds.observe(seconds)

    def cancelled(self, running: bool) -> None:
        """Count an edit that its client gave up."""
        self._cancelled.labels("running" if running else "waiting").inc()
