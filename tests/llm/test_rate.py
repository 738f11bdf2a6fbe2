"""When the next call may start: the window, the pauses, the delays before retries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reasonpix.llm.rate import (
    LONGEST_PAUSE_S,
    AimdWindow,
    RateController,
    backoff_s,
    retry_delay_s,
)
from reasonpix.llm.types import Completion, Unavailable

ANSWER = Completion(text="x")
OVERLOADED = Unavailable(reason="429", overloaded=True)


@given(st.integers(1, 100), st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=200))
def test_the_window_grows_and_halves_within_its_bounds(
    largest: int, events: list[tuple[bool, int]]
) -> None:
    window = AimdWindow(largest)
    assert window.size == largest
    for answered, age in events:
        before = window.size
        decreases = window.decreases
        if answered:
            window.answered()
            assert window.size == min(largest, before + 1 / before)
        else:
            shrank = window.overloaded(decreases - age)
            assert shrank == (age == 0)
            assert window.size == (max(1.0, before / 2) if shrank else before)
        assert 1 <= window.size <= largest


@given(st.integers(1, 10_000))
def test_the_backoff_is_bounded(number: int) -> None:
    assert 0 <= backoff_s(number) <= min(LONGEST_PAUSE_S, 0.5 * 2 ** min(number - 1, 20))


def test_a_retry_waits_at_least_as_long_as_the_server_asked() -> None:
    assert 7 <= retry_delay_s(1, 7.0) <= 7.7


def test_calls_wait_for_room_in_the_window() -> None:
    rate = RateController(2)
    assert rate.wait_s(1, now=0.0) == 0
    assert rate.wait_s(2, now=0.0) is None


def test_an_overload_pauses_all_calls_as_long_as_the_server_asked() -> None:
    rate = RateController(8)
    refusal = OVERLOADED.model_copy(update={"retry_after_s": 10.0})
    rate.observe([ANSWER, refusal], rate.decreases, now=100.0)
    pause_s = rate.wait_s(0, now=100.0)
    assert pause_s is not None and 10 <= pause_s <= 11
    assert rate.wait_s(0, now=111.1) == 0
    assert rate.wait_s(4, now=111.1) is None  # half of the window


def test_refusals_of_calls_that_were_sent_together_count_once() -> None:
    rate = RateController(8)
    sent_after = rate.decreases
    for _ in range(8):
        rate.observe([OVERLOADED], sent_after, now=0.0)
    later = LONGEST_PAUSE_S
    assert rate.wait_s(3, now=later) == 0
    assert rate.wait_s(4, now=later) is None


def test_other_failures_leave_the_rate_as_it_is() -> None:
    rate = RateController(8)
    rate.observe([Unavailable(reason="500", retry_after_s=5.0)], rate.decreases, now=0.0)
    assert rate.wait_s(7, now=0.0) == 0
