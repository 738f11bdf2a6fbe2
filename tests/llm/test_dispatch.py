"""Calling a language model: order, retries, the window, the limit, stopping, jobs, a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonpix.errors import CostLimit, PluginError, ReasonpixError, RecipeError, RunError
from reasonpix.llm.budget import max_prompt_tokens
from reasonpix.llm.dispatch import Dispatcher, make_dispatcher
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.requests import Job
from reasonpix.llm.types import Attempt, Completion, Conversation, Price, Unavailable
from reasonpix.plugin.types import Problem
from tests.support.scripted_llm import (
    CUT,
    DOWN,
    OVERLOADED,
    PRICE,
    Model,
    conversation,
    conversations,
    echo,
)


@contextmanager
def calling(model: Model, ledger: Ledger | None = None, poll: float = 30.0) -> Iterator[Dispatcher]:
    dispatcher = make_dispatcher(model, ledger or Ledger(None), poll)
    try:
        yield dispatcher
    finally:
        dispatcher.close()


def texts(results: Sequence[Completion | Problem]) -> list[str]:
    return [it.text if isinstance(it, Completion) else it.reason for it in results]


# -- What concerns all


def test_an_outage_stops_the_run_and_fails_no_record() -> None:
    def reply(text: str, attempt: int) -> Attempt:
        return echo(text) if int(text) < 10 else Unavailable(reason="connection refused")

    with Ledger(None) as ledger:
        with (
            calling(Model(reply, max_retries=0), ledger) as dispatcher,
            pytest.raises(
                ReasonpixError,
                match=r"5 requests in a row failed.*connection refused; run the .* to continue$",
            ),
        ):
            dispatcher.answers("rewrite", conversations(100))
        with calling(Model(max_retries=0), ledger) as dispatcher:
            assert texts(dispatcher.answers("rewrite", conversations(100)))[-1] == "re: 99"


def test_now_and_then_one_without_an_answer_stops_nothing() -> None:
    def reply(text: str, attempt: int) -> Attempt:
        return Unavailable(reason="no luck") if int(text) % 3 == 0 else echo(text)

    with calling(Model(reply, max_retries=0, concurrency=1)) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(60))
    assert sum(isinstance(result, Problem) for result in results) == 20


def test_a_model_that_gives_something_else_is_told_apart() -> None:
    model = Model(lambda text, attempt: "just text")  # type: ignore[arg-type, return-value]
    with (
        calling(model) as dispatcher,
        pytest.raises(
            ReasonpixError, match=r"Model\.complete returned 'just text'; it must return a Compl"
        ),
    ):
        dispatcher.answers("rewrite", conversations(3))


# -- Order, storing, joining


def test_answers_come_in_order_whatever_the_speed() -> None:
    def reply(text: str, attempt: int) -> Attempt:
        time.sleep(int(text) % 5 * 0.002)
        return echo(text)

    with calling(Model(reply, concurrency=8)) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(60))
    assert texts(results) == [f"re: {number}" for number in range(60)]


def test_nothing_asked_is_nothing_answered() -> None:
    with calling(Model()) as dispatcher:
        assert dispatcher.answers("rewrite", []) == []


def test_what_is_stored_is_not_asked_again(tmp_path: Path) -> None:
    model = Model(price=Price(prompt=1e6, completion=0))
    with Ledger(tmp_path / "llm.sqlite") as ledger, calling(model, ledger) as dispatcher:
        first = dispatcher.answers("rewrite", conversations(5))
    with Ledger(tmp_path / "llm.sqlite") as ledger, calling(model, ledger) as dispatcher:
        again = dispatcher.answers("rewrite", conversations(6))
        assert again[:5] == first
        assert ledger.spent().cost == 60
    assert model.attempts.total() == 6


def test_another_model_is_asked_of_its_own() -> None:
    with Ledger(None) as ledger:
        for name in ("a", "b"):
            model = Model()
            model.parameters = {"model": name}
            with calling(model, ledger) as dispatcher:
                dispatcher.answers("rewrite", conversations(1))
            assert model.attempts.total() == 1


def test_equal_questions_are_asked_one_time() -> None:
    model = Model(seconds=0.05)
    results: list[list[Completion | Problem]] = []
    with calling(model) as dispatcher:

        def ask() -> None:
            results.append(dispatcher.answers("rewrite", conversations(10) * 2))

        in_threads([ask] * 6)
    assert model.attempts == {str(number): 1 for number in range(10)}
    assert all(texts(it) == [f"re: {number}" for number in range(10)] * 2 for it in results)


def test_other_seeds_are_other_questions() -> None:
    model = Model()
    with calling(model) as dispatcher:
        dispatcher.answers("rewrite", [conversation("same", seed) for seed in range(3)])
    assert model.attempts["same"] == 3


def test_many_threads_share_the_concurrency() -> None:
    model = Model(seconds=0.002, concurrency=5)
    results: dict[int, list[str]] = {}
    with calling(model) as dispatcher:

        def ask(name: int) -> None:
            results[name] = texts(dispatcher.answers("rewrite", conversations(20, f"{name} ")))

        in_threads([lambda name=name: ask(name) for name in range(12)])  # type: ignore[misc]
    assert results == {name: [f"re: {name} {n}" for n in range(20)] for name in range(12)}
    assert 2 <= model.most_under_way <= 5


def test_batches_are_filled() -> None:
    model = Model(concurrency=1, batch_size=8)
    with calling(model) as dispatcher:
        assert len(dispatcher.answers("rewrite", conversations(20))) == 20
    assert [len(batch) for batch in model.batches] == [8, 8, 4]


def in_threads(works: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_half_a_surrogate_pair_in_an_answer_is_replaced_before_it_is_stored() -> None:
    model = Model(lambda text, attempt: Completion(text="half \ud83d", refusal="\udc00"))
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:
        expected = Completion(text="half \ufffd", refusal="\ufffd")
        assert dispatcher.answers("rewrite", conversations(1)) == [expected]
        assert dispatcher.answers("rewrite", conversations(1)) == [expected]


# -- Failures


def test_a_failure_is_tried_again() -> None:
    model = Model(lambda text, attempt: DOWN if attempt <= 3 else echo(text))
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:
        assert texts(dispatcher.answers("rewrite", conversations(3))) == ["re: 0", "re: 1", "re: 2"]
        assert [answer.attempts for answer in ledger.answers()] == [4, 4, 4]


def test_after_the_retries_it_failed_and_the_others_are_fine() -> None:
    model = Model(lambda text, attempt: DOWN if text == "1" else echo(text))
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(3))
        assert results[1] == Problem(
            status="failed", reason="no answer after 4 attempts: 500 no luck"
        )
        assert texts(results)[::2] == ["re: 0", "re: 2"]
        assert ledger.spent().lost == 0
        dispatcher.answers("rewrite", conversations(2))  # a failure is not stored
    assert model.attempts == {"0": 1, "1": 8, "2": 1}


def test_a_problem_is_final() -> None:
    rejected = Problem(status="rejected", reason="no")
    model = Model(lambda text, attempt: rejected)
    with calling(model) as dispatcher:
        assert dispatcher.answers("rewrite", conversations(1)) == [rejected]
    assert model.attempts["0"] == 1


def test_what_may_be_charged_counts_at_its_worst(tmp_path: Path) -> None:
    price = Price(prompt=1e6, completion=1e6)
    model = Model(
        lambda text, attempt: CUT if attempt == 1 else echo(text),
        price=price,
        max_answer_tokens=100,
    )
    path = tmp_path / "llm.sqlite"
    with Ledger(path) as ledger, calling(model, ledger) as dispatcher:
        dispatcher.answers("rewrite", conversations(2))
        spent = ledger.spent()
        assert (spent.answers, spent.cost, spent.lost) == (2, 40, 2)
        assert spent.lost_cost == 2 * (max_prompt_tokens(conversation("0")) + 100)
    with Ledger(path) as ledger:
        assert ledger.spent() == spent


def test_an_unexpected_error_costs_one_record() -> None:
    def reply(text: str, attempt: int) -> Attempt:
        if text == "2":
            raise ZeroDivisionError("bad luck")
        return echo(text)

    model = Model(reply)
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(4))
        assert results[2] == Problem(status="failed", reason="ZeroDivisionError: bad luck")
        assert texts(results)[:2] == ["re: 0", "re: 1"]
        assert ledger.spent().lost == 1


def test_an_unexpected_error_in_a_batch_costs_one_record() -> None:
    def reply(text: str, attempt: int) -> Attempt:
        if text == "2":
            raise ZeroDivisionError("bad luck")
        return echo(text)

    with calling(Model(reply, concurrency=1, batch_size=4)) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(6))
    assert texts(results) == [
        "ZeroDivisionError: bad luck" if number == 2 else f"re: {number}" for number in range(6)
    ]


def test_a_model_that_gives_too_few_answers_is_found_out() -> None:
    class Short(Model):
        def complete(self, conversations: Sequence[Conversation], /) -> list[Attempt]:
            return []

    with calling(Short()) as dispatcher:
        assert texts(dispatcher.answers("rewrite", conversations(1))) == [
            "ValueError: 0 answers to 1 conversations"
        ]


def test_a_reason_tells_no_file_of_this_machine() -> None:
    def reply(text: str, attempt: int) -> Attempt:
        raise FileNotFoundError(2, "No such file or directory", "/home/ada/weights")

    with calling(Model(reply)) as dispatcher:
        assert texts(dispatcher.answers("rewrite", conversations(1))) == [
            "FileNotFoundError: No such file or directory"
        ]


# -- Memory


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


class Small(Model):
    """Holds `room` conversations at once, and none that asks for too much alone."""

    def __init__(self, room: int, error: Exception, greedy: str = "") -> None:
        super().__init__(
            concurrency=1,
            batch_size=8,
            price=Price(prompt=1e6, completion=1e6),
            max_answer_tokens=100,
        )
        self.room = room
        self.error = error
        self.greedy = greedy

    def complete(self, conversations: Sequence[Conversation], /) -> list[Attempt]:
        answers = super().complete(conversations)
        texts = [it.messages[0].content for it in conversations]
        if len(texts) > self.room or self.greedy in texts:
            raise self.error
        return answers


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA: tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_memory_does_not_hold_is_halved_and_later_ones_are_as_small(
    error: Exception,
) -> None:
    model = Small(2, error)
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(20))
        assert texts(results) == [f"re: {number}" for number in range(20)]
        assert [len(batch) for batch in model.batches] == [8, 4] + [2] * 10
        assert ledger.spent().lost == 0  # nobody charges for it
        dispatcher.answers("rewrite", conversations(4, "later "))
    assert [len(batch) for batch in model.batches[-2:]] == [2, 2]


def test_one_that_memory_does_not_hold_alone_costs_one_record() -> None:
    model = Small(8, MemoryError("no room"), greedy="5")
    with Ledger(None, max_cost=1e6) as ledger, calling(model, ledger) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(8))
        assert results[5] == Problem(status="failed", reason="MemoryError: no room")
        assert sum(isinstance(result, Completion) for result in results) == 7
        assert (ledger.spent().lost, ledger.budget.reserved) == (0, 0)


# -- Overload


def test_calls_refused_together_halve_the_window_once() -> None:
    """64 calls under way, all refused: 32 follow, not one."""
    refused = threading.Barrier(64, timeout=20)

    def reply(text: str, attempt: int) -> Attempt:
        if attempt == 1:
            refused.wait()
            model.most_under_way = 0
            return OVERLOADED.model_copy(update={"retry_after_s": 0.1})
        time.sleep(0.2)
        return echo(text)

    model = Model(reply, concurrency=64)
    with calling(model) as dispatcher:
        dispatcher.answers("rewrite", conversations(64))
    assert model.most_under_way in (32, 33)  # it grows again with the answers


def test_an_overload_without_retry_after_holds_all_calls_up() -> None:
    refusal = Unavailable(reason="503", overloaded=True)
    model = Model(
        lambda text, attempt: refusal if attempt == 1 and text in "01" else echo(text),
        concurrency=1,
    )
    with calling(model) as dispatcher:
        assert texts(dispatcher.answers("rewrite", conversations(9))) == [
            f"re: {number}" for number in range(9)
        ]
    # The oldest go first, whatever happened to them.
    order = [text for [text] in model.batches]
    assert order == ["0", "0", "1", "1", *"2345678"]


def test_retry_after_is_obeyed_by_all_calls() -> None:
    def reply(text: str, attempt: int) -> Attempt:
        if text == "3" and attempt == 1:
            return OVERLOADED.model_copy(update={"retry_after_s": 0.4})
        time.sleep(0.03)
        return echo(text)

    model = Model(reply, concurrency=4)
    with calling(model) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(40))
    assert texts(results) == [f"re: {number}" for number in range(40)]
    assert model.attempts["3"] == 2
    gaps = [after - before for before, after in zip(model.times, model.times[1:], strict=False)]
    assert max(gaps) > 0.36
    assert sum(gap > 0.2 for gap in gaps) == 1


def test_one_call_that_waits_holds_up_no_other() -> None:
    """A pause before a retry takes neither a worker nor a place in the window."""
    slow = Unavailable(reason="500", retry_after_s=0.5)
    model = Model(
        lambda text, attempt: slow if text in "012" and attempt == 1 else echo(text), concurrency=1
    )
    with calling(model) as dispatcher:
        started = time.monotonic()
        dispatcher.answers("rewrite", conversations(20))
    first = [at - started for at in model.times[:20]]
    assert first[-1] < 0.3
    assert model.times[20] - started > 0.5


def test_a_strict_limit_fails_no_record() -> None:
    """The server takes one call in 20 ms, refuses all others, and says no more than that."""
    next_at = 0.0
    lock = threading.Lock()

    def reply(text: str, attempt: int) -> Attempt:
        nonlocal next_at
        with lock:
            if time.monotonic() < next_at:
                return OVERLOADED.model_copy(update={"retry_after_s": 0.005})
            next_at = time.monotonic() + 0.02
        return echo(text)

    model = Model(reply, concurrency=32, max_retries=2)
    with calling(model) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(60))
    assert texts(results) == [f"re: {number}" for number in range(60)]
    assert model.attempts.total() > 100


def test_one_that_is_never_let_in_gives_up() -> None:
    refusal = OVERLOADED.model_copy(update={"retry_after_s": 0.0})
    model = Model(lambda text, attempt: refusal, max_retries=2, concurrency=1)
    with calling(model) as dispatcher:
        assert texts(dispatcher.answers("rewrite", conversations(1))) == [
            "no answer after 21 attempts: 429 too many"
        ]


def test_without_retries_everything_is_asked_once() -> None:
    for outcome in (OVERLOADED, DOWN):
        model = Model(lambda text, attempt, outcome=outcome: outcome, max_retries=0)  # type: ignore[misc]
        with calling(model) as dispatcher:
            dispatcher.answers("rewrite", conversations(3))
        assert model.attempts.total() == 3


# -- The cost limit


def test_a_limit_needs_prices_and_a_longest_answer() -> None:
    with Ledger(None, max_cost=1.0) as ledger:
        with pytest.raises(RecipeError, match=r"price: (.|\n)*length of an answer"):
            make_dispatcher(Model(), ledger)
        with pytest.raises(RecipeError, match="length of an answer"):
            make_dispatcher(Model(price=PRICE), ledger)
        make_dispatcher(Model(price=PRICE, max_answer_tokens=1), ledger).close()


def test_the_bound_of_a_prompt_counts_its_bytes() -> None:
    short, long = conversation("ü"), conversation("ü" * 101)
    assert max_prompt_tokens(long) - max_prompt_tokens(short) == 200
    bare = max_prompt_tokens(short.model_copy(update={"answer_schema": {}}))
    assert max_prompt_tokens(short) - bare == len('"title":"Answer","type":"object"')


def test_the_limit_stops_the_run_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    model = Model(price=PRICE, max_answer_tokens=50, concurrency=3)
    worst = max_prompt_tokens(conversation("0")) + 50
    path = tmp_path / "llm.sqlite"
    with (
        Ledger(path, max_cost=4 * 20 + worst) as ledger,
        calling(model, ledger) as dispatcher,
        pytest.raises(CostLimit, match=r"raise --max-cost .* continue"),
    ):
        dispatcher.answers("rewrite", conversations(9))
    assert model.attempts.total() == 5  # the fifth fits just so
    with Ledger(path, max_cost=100 * worst) as ledger, calling(model, ledger) as dispatcher:
        assert len(dispatcher.answers("rewrite", conversations(9))) == 9
        assert ledger.spent().cost == 9 * 20
    assert model.attempts.total() == 9


def test_a_stop_by_the_limit_reaches_every_thread() -> None:
    model = Model(price=PRICE, max_answer_tokens=50, seconds=0.01)
    errors: list[BaseException] = []
    with Ledger(None, max_cost=300) as ledger, calling(model, ledger) as dispatcher:

        def ask(name: int) -> None:
            try:
                dispatcher.answers("rewrite", conversations(20, f"{name} "))
            except CostLimit as error:
                errors.append(error)

        in_threads([lambda name=name: ask(name) for name in range(6)])  # type: ignore[misc]
        assert len(errors) == 6
        assert ledger.spent().cost <= 300
        assert ledger.spent().answers == model.attempts.total()


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0, 2000),
    st.integers(1, 8),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from(["answer", "cut", "down", "odd"]))),
)
def test_the_limit_is_never_passed(
    limit: float, concurrency: int, batch_size: int, script: list[tuple[int, str]]
) -> None:
    """The server's bill, lost calls at what they really cost there, stays below the limit."""
    bill = 0.0
    lock = threading.Lock()

    def reply(text: str, attempt: int) -> Attempt:
        nonlocal bill
        tokens, kind = script[int(text)]
        kind = "answer" if attempt > 1 else kind
        with lock:
            if kind != "down":
                bill += tokens + 3
        if kind == "odd":
            raise ValueError("odd")
        outcomes = {"cut": CUT, "down": DOWN}
        return outcomes.get(kind) or Completion(text="x", prompt_tokens=3, completion_tokens=tokens)

    model = Model(
        reply,
        price=PRICE,
        max_answer_tokens=50,
        concurrency=concurrency,
        batch_size=batch_size,
    )
    with Ledger(None, max_cost=limit) as ledger, calling(model, ledger) as dispatcher:
        with suppress(CostLimit):
            dispatcher.answers("rewrite", conversations(len(script)))
        spent = ledger.spent()
        assert bill <= spent.cost + spent.lost_cost + 1e-6
        assert spent.cost + spent.lost_cost <= limit
        assert ledger.budget.in_flight == 0
        assert ledger.budget.reserved == 0


def test_an_answer_without_usage_counts_at_its_worst() -> None:
    model = Model(lambda text, attempt: Completion(text="x"), price=PRICE, max_answer_tokens=50)
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:
        dispatcher.answers("rewrite", conversations(1))
        assert ledger.spent().cost == max_prompt_tokens(conversation("0")) + 50


def test_two_callers_share_a_limit() -> None:
    """One waits for what the other has under way before it says that the limit is reached."""
    planner = Model(price=PRICE, max_answer_tokens=50, seconds=0.3)
    reader = Model(price=PRICE, max_answer_tokens=50)
    reader.parameters = {"model": "reader"}
    worst = max_prompt_tokens(conversation("0")) + 50
    with (
        Ledger(None, max_cost=worst + 20) as ledger,
        calling(planner, ledger) as first,
        calling(reader, ledger) as second,
    ):
        thread = threading.Thread(target=lambda: first.answers("rewrite", conversations(1)))
        thread.start()
        while not planner.under_way:
            time.sleep(0.001)
        assert texts(second.answers("resolve", conversations(1))) == ["re: 0"]
        thread.join()
        assert ledger.spent().cost == 40


# -- What stops a run


def test_an_error_of_the_model_stops_all_and_keeps_what_was_under_way() -> None:
    all_sent = threading.Barrier(4, timeout=20)

    def reply(text: str, attempt: int) -> Attempt:
        all_sent.wait()
        if text == "2":
            raise PluginError("the key is wrong")
        time.sleep(0.1)
        return echo(text)

    model = Model(reply, concurrency=4)
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:
        with pytest.raises(PluginError, match="the key is wrong"):
            dispatcher.answers("rewrite", conversations(50))
        assert ledger.spent().answers == 3
        assert ledger.spent().lost == 0
        assert model.attempts.total() == 4
        assert texts(dispatcher.answers("rewrite", conversations(2))) == ["re: 0", "re: 1"]
        with pytest.raises(PluginError):
            dispatcher.answers("rewrite", conversations(5))


@contextmanager
def interrupted(after_s: float) -> Iterator[None]:
    """Interrupt the block, also in a process that ignores SIGINT, such as a background job."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(after_s, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
        timer.join()
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_keyboard_interrupt_lets_calls_under_way_finish() -> None:
    model = Model(seconds=0.5, concurrency=4)
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:
        with interrupted(after_s=0.25):
            dispatcher.answers("rewrite", conversations(50))
        assert ledger.spent().answers == model.attempts.total() == 4
        assert ledger.spent().lost == 0


def test_closing_stops_those_who_wait() -> None:
    model = Model(seconds=0.1, concurrency=2)
    stopped: list[str] = []
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:

        def ask() -> None:
            with pytest.raises(ReasonpixError, match="run the same command again") as caught:
                dispatcher.answers("rewrite", conversations(50))
            stopped.append(str(caught.value))

        thread = threading.Thread(target=ask)
        thread.start()
        while not model.under_way:
            time.sleep(0.001)
        dispatcher.close()
        thread.join(5)
        assert len(stopped) == 1
        assert ledger.spent().answers == model.attempts.total()


def test_what_ends_unfinished_because_of_a_stop_fails_no_record() -> None:
    model = Model(max_retries=0, concurrency=1, batch_size=2)
    ends: list[Any] = []

    def reply(text: str, attempt: int) -> Attempt:
        while not dispatcher.stopped:
            time.sleep(0.001)
        return echo(text) if text == "0" else Unavailable(reason="it was stopped")

    model.reply = reply
    with Ledger(None) as ledger, calling(model, ledger) as dispatcher:

        def ask() -> None:
            try:
                ends.append(dispatcher.answers("rewrite", conversations(2)))
            except ReasonpixError as error:
                ends.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        while not model.batches:
            time.sleep(0.001)
        dispatcher.close()
        thread.join(5)
        assert ends == ["the run was stopped; run the same command again to continue"]
        assert ledger.spent().answers == 1  # the finished one is kept


def test_a_ledger_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    class Full(Ledger):
        def settle(self, *args: Any, **more: Any) -> None:
            raise RunError("the disk is full")

    with (
        Full(tmp_path / "llm.sqlite") as ledger,
        calling(Model(), ledger) as dispatcher,
        pytest.raises(RunError, match="the disk is full"),
    ):
        dispatcher.answers("rewrite", conversations(9))


def test_what_nobody_foresaw_stops_the_run_and_fails_no_record() -> None:
    model = Model(lambda text, attempt: Completion(text="x", prompt_tokens=10**30))
    with calling(model) as dispatcher:
        for _ in range(2):
            with pytest.raises(ReasonpixError, match="cannot be called: OverflowError"):
                dispatcher.answers("rewrite", conversations(2))


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from reasonpix.llm.dispatch import make_dispatcher
from reasonpix.llm.ledger import Ledger
from tests.support.scripted_llm import PRICE, Model, conversations, echo
def reply(text, attempt):
    if int(text) >= 20:
        sys.stdout.write("under way\\n")  # at once, unlike print
        sys.stdout.flush()
        time.sleep(60)
    return echo(text)
model = Model(reply, concurrency=5, price=PRICE, max_answer_tokens=50)
make_dispatcher(model, Ledger(Path(sys.argv[1]))).answers("rewrite", conversations(40))
"""


def test_after_a_kill_answers_are_there_and_calls_under_way_count_as_lost(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    killed(KILLED, path, "under way", times=5)
    model = Model(price=PRICE, max_answer_tokens=50)
    worst = max_prompt_tokens(conversation("20")) + 50
    with Ledger(path) as ledger:
        spent = ledger.spent()
        assert (spent.answers, spent.cost) == (20, 20 * 20)
        assert (spent.lost, spent.lost_cost) == (5, 5 * worst)
        with calling(model, ledger) as dispatcher:
            assert len(dispatcher.answers("rewrite", conversations(40))) == 40
        assert model.attempts == {str(number): 1 for number in range(20, 40)}
        assert ledger.spent().lost == 5


def killed(script: str, path: Path, sign: str, times: int = 1) -> None:
    """Run a script until it printed `sign` so many times, and kill it."""
    here = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path), here], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(times)]
        os.kill(process.pid, signal.SIGKILL)
    assert lines == [f"{sign}\n"] * times


# -- Jobs


class Service(Model):
    """A model that answers in jobs; `polls` looks find a job unfinished. Jobs are its memory."""

    def __init__(
        self, reply: Callable[[str, int], Attempt] = lambda text, attempt: echo(text), **more: Any
    ) -> None:
        super().__init__(reply, jobs=True, **more)
        self.polls = 1
        self.handed_in: dict[str, Mapping[str, Conversation]] = {}
        self.looks: Counter[str] = Counter()
        self.submits = 0

    def submit(self, conversations: Mapping[str, Conversation], /) -> str:
        self.submits += 1
        for name, job in self.handed_in.items():
            if job.keys() == conversations.keys():
                return name
        name = f"job-{len(self.handed_in)}"
        self.handed_in[name] = dict(conversations)
        return name

    def collect(self, job_id: str, /) -> Mapping[str, Attempt] | None:
        self.looks[job_id] += 1
        if self.looks[job_id] <= self.polls:
            return None
        asked = self.handed_in[job_id]
        answers = self.complete(list(asked.values()))
        return dict(zip(asked, answers, strict=True))


POLL_S = 0.06


def test_what_is_asked_meanwhile_goes_into_one_job() -> None:
    service = Service()
    results: dict[int, list[str]] = {}
    service.polls = 0
    with Ledger(None) as ledger, calling(service, ledger, 10 * POLL_S) as dispatcher:

        def ask(name: int) -> None:
            results[name] = texts(dispatcher.answers("rewrite", conversations(20, f"{name} ")))

        in_threads([lambda name=name: ask(name) for name in range(5)])  # type: ignore[misc]
        assert ledger.spent().answers == 100
        assert ledger.open_jobs() == []
    assert results == {name: [f"re: {name} {n}" for n in range(20)] for name in range(5)}
    assert [len(job) for job in service.handed_in.values()] == [100]


def test_what_a_job_leaves_out_goes_into_the_next() -> None:
    def reply(text: str, attempt: int) -> Attempt:
        return {"1": DOWN, "2": DOWN if attempt == 1 else echo(text)}.get(text, echo(text))

    service = Service(reply, max_retries=2)
    with calling(service, poll=POLL_S) as dispatcher:
        assert texts(dispatcher.answers("rewrite", conversations(4))) == [
            "re: 0",
            "no answer after 3 attempts: 500 no luck",
            "re: 2",
            "re: 3",
        ]
    assert [len(job) for job in service.handed_in.values()] == [4, 2, 1]


def test_jobs_keep_to_the_limit() -> None:
    """Only what fits is handed in; the rest waits until the job tells what it really cost."""
    worst = max_prompt_tokens(conversation("0")) + 50
    service = Service(price=PRICE, max_answer_tokens=50)
    with (
        Ledger(None, max_cost=3 * worst) as ledger,
        calling(service, ledger, POLL_S) as dispatcher,
    ):
        assert len(dispatcher.answers("rewrite", conversations(6))) == 6
        assert ledger.spent().cost == 120
    assert len(next(iter(service.handed_in.values()))) == 3

    service = Service(price=PRICE, max_answer_tokens=50)
    with (
        Ledger(None, max_cost=2 * worst) as ledger,
        calling(service, ledger, POLL_S) as dispatcher,
        pytest.raises(CostLimit),
    ):
        dispatcher.answers("rewrite", conversations(50))
    assert 20 * service.attempts.total() <= 2 * worst


def test_an_interrupt_leaves_a_job_open_and_a_restart_waits_for_it(tmp_path: Path) -> None:
    path = tmp_path / "llm.sqlite"
    service = Service(price=PRICE, max_answer_tokens=50)
    service.polls = 10**6
    with Ledger(path) as ledger, calling(service, ledger, POLL_S) as dispatcher:
        with interrupted(after_s=0.2):
            dispatcher.answers("rewrite", conversations(3))
        reserved = ledger.budget.reserved
    assert service.submits == 1
    service.polls = 0
    with Ledger(path) as ledger, calling(service, ledger, POLL_S) as dispatcher:
        assert ledger.budget.reserved == reserved > 0
        assert ledger.spent().lost == 0
        # Only two of the three are asked again: the third is stored all the same.
        assert texts(dispatcher.answers("rewrite", conversations(2))) == ["re: 0", "re: 1"]
        assert ledger.spent().answers == 3
        assert ledger.budget.reserved == 0
        assert texts(dispatcher.answers("rewrite", conversations(3)))[2] == "re: 2"
    assert service.submits == 1


JOB_KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.llm.test_dispatch import PRICE, Ledger, Service, make_dispatcher, conversations
class Dying(Service):
    def submit(self, conversations):
        if WHEN == "submit":
            print("now", flush=True)
            time.sleep(60)
        return super().submit(conversations)
    def collect(self, job_id):
        print("now", flush=True)
        time.sleep(60)
model = Dying(price=PRICE, max_answer_tokens=50)
dispatcher = make_dispatcher(model, Ledger(Path(sys.argv[1])), 0.06)
dispatcher.answers("rewrite", conversations(5))
"""


@pytest.mark.parametrize(("when", "submits"), [("collect", 0), ("submit", 1)])
def test_a_job_survives_a_kill(tmp_path: Path, when: str, submits: int) -> None:
    """Before the server's word it is handed in again just as it was; after it, it is waited for."""
    path = tmp_path / "llm.sqlite"
    killed(f"WHEN = {when!r}\n{JOB_KILLED}", path, "now")
    service = Service(price=PRICE, max_answer_tokens=50)
    service.handed_in["job-0"] = {  # the server has it
        job_key: asked
        for job_key, asked in zip(keys_of(conversations(5)), conversations(5), strict=True)
    }
    with Ledger(path) as ledger, calling(service, ledger, POLL_S) as dispatcher:
        results = dispatcher.answers("rewrite", conversations(8))
        assert texts(results) == [f"re: {number}" for number in range(8)]
        spent = ledger.spent()
        assert (spent.answers, spent.lost, spent.cost) == (8, 0, 160)
        assert ledger.open_jobs() == []
    assert service.submits == submits + 1
    assert service.attempts == {str(number): 1 for number in range(8)}


def test_a_ledger_that_cannot_forget_a_job_stops_the_run(tmp_path: Path) -> None:
    class Full(Ledger):
        def forget(self, job: Job) -> None:
            raise RunError("the disk is full")

    class Lost(Service):
        def submit(self, conversations: Mapping[str, Conversation], /) -> str:
            raise ReasonpixError("cut off")

    path = tmp_path / "llm.sqlite"
    with (
        Ledger(path) as ledger,
        calling(Lost(), ledger, POLL_S) as dispatcher,
        pytest.raises(ReasonpixError, match="cut off"),
    ):
        dispatcher.answers("rewrite", conversations(2))
    stopped: list[str] = []
    with Full(path) as ledger, calling(Service(), ledger, POLL_S) as dispatcher:

        def ask() -> None:
            with pytest.raises(RunError) as raised:
                dispatcher.answers("rewrite", conversations(2))
            stopped.append(str(raised.value))

        in_threads([ask])
    assert stopped == ["the disk is full"]


def keys_of(asked: Sequence[Conversation]) -> list[str]:
    from reasonpix.llm.requests import request_key

    return [request_key({"model": "test"}, it) for it in asked]


# -- Speed


def test_the_core_takes_little_time_for_a_call(tmp_path: Path) -> None:
    """At 20 ms latency 64 calls at once leave 0.3 ms for each; the model itself takes nothing."""
    model = Model(seconds=0.02, concurrency=8)
    with Ledger(tmp_path / "llm.sqlite") as ledger, calling(model, ledger) as dispatcher:
        started = time.process_time()
        dispatcher.answers("rewrite", conversations(400))
        per_call_s = (time.process_time() - started) / 400
    assert per_call_s < 0.001  # about 0.2 ms on an idle machine
