"""The queue by itself: no thread, no rate, no transport."""

from __future__ import annotations

import pytest

from reasonpix.errors import CostLimit, ReasonpixError
from reasonpix.llm.budget import cost_bound
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.queue import PendingRequest, RequestQueue, Waiter
from reasonpix.llm.types import Completion, Unavailable
from tests.support.scripted_llm import DOWN, PRICE, Model, conversation, conversations, echo


def queued(queue: RequestQueue, count: int) -> Waiter:
    waiter = queue.add("rewrite", conversations(count))
    for pending in waiter.new:
        queue.push(pending)
    waiter.count_down()
    return waiter


def text_of(pending: PendingRequest) -> str:
    return pending.request.conversation.messages[0].content


def test_equal_requests_are_one_and_all_waiters_get_its_answer() -> None:
    with Ledger(None) as ledger:
        queue = RequestQueue(Model(), ledger)
        first, second = queued(queue, 1), queued(queue, 1)
        assert (len(first.new), len(second.new), len(queue)) == (1, 0, 1)
        batch = queue.take(1)
        [outcome] = queue.settle(queue.send(batch), [echo("0")])
        assert not first.over.is_set()  # stored, but not handed out yet
        assert queue.finish(batch[0], outcome) is False
        assert first.over.is_set() and second.over.is_set()
        assert first.results() == second.results() == [echo("0")]
        third = queue.add("rewrite", conversations(1))
        assert (third.new, third.entries, len(queue)) == ([], [echo("0")], 0)


def test_the_oldest_are_taken_first_and_those_marked_alone_by_themselves() -> None:
    with Ledger(None) as ledger:
        queue = RequestQueue(Model(), ledger)
        queued(queue, 5)
        batch = queue.take(3)
        assert [text_of(pending) for pending in batch] == ["0", "1", "2"]
        batch[1].alone = True
        for pending in batch:
            queue.push(pending)
        taken = [[text_of(pending) for pending in queue.take(3)] for _ in range(3)]
        assert taken == [["0"], ["1"], ["2", "3", "4"]]


def test_a_delayed_request_is_ready_when_it_is_due() -> None:
    with Ledger(None) as ledger:
        queue = RequestQueue(Model(), ledger)
        [pending] = queue.add("rewrite", conversations(1)).new
        queue.delay(pending, 1000)
        assert queue.release_delayed(now=0.0) is not None
        assert not queue.ready
        assert queue.release_delayed(now=1e12) is None
        assert list(queue.ready) == [pending]


def test_only_what_fits_the_budget_is_taken() -> None:
    model = Model(price=PRICE, max_answer_tokens=50)
    bound = cost_bound(model, conversation("0"))
    with Ledger(None, max_cost=2.5 * bound) as ledger:
        queue = RequestQueue(model, ledger)
        queued(queue, 4)
        batch = queue.take(4)
        assert [text_of(pending) for pending in batch] == ["0", "1"]
        assert ledger.budget.reserved == pytest.approx(2 * bound)
        assert queue.take(4) == []
        assert not queue.stopped  # the two in flight may cost less than their bound
        queue.settle(queue.send(batch), [echo("0"), Unavailable(reason="500")])
        assert ledger.budget.reserved == 0
        assert [text_of(pending) for pending in queue.take(1)] == ["2"]


def test_a_budget_that_fits_nothing_stops_the_queue() -> None:
    model = Model(price=PRICE, max_answer_tokens=50)
    with Ledger(None, max_cost=1.0) as ledger:
        queue = RequestQueue(model, ledger)
        waiter = queued(queue, 1)
        assert queue.take(1) == []
        assert isinstance(queue.error, CostLimit)
        assert waiter.over.is_set() and waiter.missing


def test_a_failure_is_to_be_sent_again_until_the_retries_are_used_up() -> None:
    with Ledger(None) as ledger:
        queue = RequestQueue(Model(max_retries=2), ledger)
        waiter = queued(queue, 1)
        [pending] = queue.take(1)
        assert [queue.finish(pending, DOWN) for _ in range(3)] == [True, True, False]
        [result] = waiter.results()
        assert not isinstance(result, Completion)
        assert result.reason == "no answer after 3 attempts: 500 no luck"


def test_the_first_error_is_the_one_that_counts() -> None:
    with Ledger(None) as ledger:
        queue = RequestQueue(Model(), ledger)
        queue.stop(ReasonpixError("first"))
        queue.stop(ReasonpixError("second"))
        with pytest.raises(ReasonpixError, match="first"):
            queue.add("rewrite", conversations(1))
