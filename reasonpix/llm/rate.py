"""When the next call may start: a congestion window, pauses after overload, and retry delays.

Delays are randomised so that retries spread out. They change when a call is made, never its answer.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from reasonpix.llm.types import Attempt, Unavailable

_LOG = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
"""First and last upper bound of the exponential back-off, which doubles each time."""


class AimdWindow:
    """The number of concurrent calls: additive increase, multiplicative decrease, as in TCP.

    The size starts at `largest` and grows back by 1/size with each answer. An overload halves it,
    at most once per round trip: calls sent before the last decrease still saw the old size.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.size = float(largest)
        self.decreases = 0
        """How often the size was halved; a call remembers the number at which it was sent."""
        self.streak = 0
        """Decreases since the last answer."""

    def answered(self) -> None:
        """Record an answered call."""
        self.size = min(float(self.largest), self.size + 1 / self.size)
        self.streak = 0

    def overloaded(self, decreases: int) -> bool:
        """Record an overload of a call sent after `decreases`; return whether the size shrank."""
        if decreases != self.decreases:
            return False
        self.size = max(1.0, self.size / 2)
        self.decreases += 1
        self.streak += 1
        return True


class RateController:
    """Decides when calls to one server may start. Not thread-safe: guard it with a lock."""

    def __init__(self, concurrency: int) -> None:
        self._window = AimdWindow(concurrency)
        self._paused_until = 0.0

    @property
    def decreases(self) -> int:
        """The window's number of decreases: pass it to `observe` with the call's outcomes."""
        return self._window.decreases

    def wait_s(self, in_flight: int, now: float) -> float | None:
        """Seconds until another call may start, None if one of those `in_flight` must end first."""
        if in_flight >= int(self._window.size):
            return None
        return max(0.0, self._paused_until - now)

    def observe(self, outcomes: Sequence[Attempt], decreases: int, now: float) -> None:
        """Adapt the window and the pause to the outcomes of a call sent after `decreases`."""
        refusals = [o for o in outcomes if isinstance(o, Unavailable) and o.overloaded]
        if any(not isinstance(outcome, Unavailable) for outcome in outcomes):
            self._window.answered()
        if not refusals:
            return
        shrank = self._window.overloaded(decreases)
        delays = [o.retry_after_s for o in refusals if o.retry_after_s is not None]
        if not delays and not shrank:
            return
        pause_s = retry_delay_s(self._window.streak, max(delays, default=None))
        if pause_s > LONGEST_PAUSE_S:
            _LOG.info("all calls pause for %.0f s: %s", pause_s, refusals[0].reason)
        self._paused_until = max(self._paused_until, now + pause_s)


def retry_delay_s(retry: int, retry_after_s: float | None = None) -> float:
    """Seconds before retry number `retry` (from 1): what the server asked for, or a back-off."""
    return backoff_s(retry) if retry_after_s is None else retry_after_s * random.uniform(1, 1.1)


def backoff_s(retry: int) -> float:
    """Exponential back-off with full jitter before retry number `retry` (from 1)."""
    return random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(retry - 1, 30)))
