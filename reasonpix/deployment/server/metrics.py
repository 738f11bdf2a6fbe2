"""What the server counts, for Prometheus."""

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
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "reasonpix_requests",
            "Requests answered; 499 is of clients that left before",
            ["path", "status"],
            registry=registry,
        )
        self._refused = Counter(
            "reasonpix_rejected", "Edits not taken, by reason", ["reason"], registry=registry
        )
        self._cancelled = Counter(
            "reasonpix_cancelled",
            "Edits that were taken and given up: their client left, or waited too long",
            ["when"],
            registry=registry,
        )
        for when in ("waiting", "running"):
            self._cancelled.labels(when)
        self._batch = Histogram(
            "reasonpix_batch_size",
            "Edits computed together",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
            registry=registry,
        )
        self._seconds = Histogram(
            "reasonpix_edit_seconds",
            "Seconds that a batch of edits took",
            buckets=_SECONDS,
            registry=registry,
        )
        self._waited = Histogram(
            "reasonpix_queue_seconds",
            "Seconds that an edit waited before it began",
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, batcher: Batcher) -> None:
        """Show what `batcher` holds."""
        for name, what, value in (
            ("queue_depth", "Edits that wait for their turn", lambda: batcher.waiting),
            ("in_progress", "Edits that are being computed", lambda: batcher.running),
            ("held", "Requests for an edit from admission until the answer", lambda: batcher.held),
        ):
            Gauge(f"reasonpix_{name}", what, registry=self._registry).set_function(value)

    def page(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return bytes(generate_latest(self._registry))

    def refused(self, reason: str) -> None:
        """Count an edit that was not taken."""
        self._refused.labels(reason).inc()

    def began(self, waited: Sequence[float]) -> None:
        """Count how long the edits of a batch waited."""
        for seconds in waited:
            self._waited.observe(seconds)

    def ended(self, size: int, seconds: float) -> None:
        """Count a batch."""
        self._batch.observe(size)
        self._seconds.observe(seconds)

    def cancelled(self, running: bool) -> None:
        """Count an edit that was given up."""
        self._cancelled.labels("running" if running else "waiting").inc()
