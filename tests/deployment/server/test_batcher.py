from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, closing, contextmanager
from typing import cast

import pytest
from PIL import Image, ImageOps

from reasonpix.deployment.server.batcher import (
    Batcher,
    EditError,
    EditRejected,
    ModelLoading,
    Observer,
    OutOfMemory,
    QueueFull,
    ServerStopping,
)
from reasonpix.editing.pipeline import EditTask, ReasonPix2Pix
from tests.support.serve_files import FakeModel, picture, until


@contextmanager
def batching(
    model: FakeModel, limit: int = 32, wait: float = 0, observer: Observer | None = None
) -> Iterator[tuple[Batcher, ExitStack]]:
    """A batcher, and where its slots are kept."""
    load = lambda: cast(ReasonPix2Pix, model)  # noqa: E731
    batcher = Batcher(load, limit=limit, wait=wait, observer=observer)
    with closing(batcher), ExitStack() as slots:
        batcher.model.result(10)
        yield batcher, slots
        model.free.set()


def ask(
    batcher: Batcher,
    slots: ExitStack,
    words: str,
    steps: int = 2,
    size: tuple[int, int] = (32, 24),
) -> Future[Image.Image]:
    slot = slots.enter_context(batcher.admit())
    settings = batcher.model.result().resolve_settings(num_inference_steps=steps)
    return slot.submit(EditTask(picture(len(words), size), words), settings)


def test_edits_that_wait_are_made_together() -> None:
    model = FakeModel(held=True)
    with batching(model) as (batcher, slots):
        first = ask(batcher, slots, "first")
        until(lambda: model.batches == [["first"]])
        others = [ask(batcher, slots, f"other {n}") for n in range(6)]
        model.free.set()
        for future, words in zip((first, *others), ("first", *["other 0"] * 6), strict=True):
            expected = ImageOps.invert(picture(len(words), (32, 24)))
            assert future.result(10).tobytes() == expected.tobytes()
    assert [len(batch) for batch in model.batches] == [1, 4, 2]
    assert [words for batch in model.batches for words in batch][1:] == [
        f"other {n}" for n in range(6)
    ]


def test_only_the_same_settings_and_sizes_go_together_and_the_oldest_first() -> None:
    model = FakeModel(held=True)
    with batching(model) as (batcher, slots):
        futures = [ask(batcher, slots, "first")]
        until(lambda: batcher.running == 1)
        futures += [ask(batcher, slots, "lone", steps=3)]
        futures += [ask(batcher, slots, "tall", size=(24, 32))]
        futures += [ask(batcher, slots, f"many {n}") for n in range(8)]
        model.free.set()
        for future in futures:
            future.result(10)
    rest = [[f"many {n}" for n in range(start, start + 4)] for start in (0, 4)]
    assert model.batches == [["first"], ["lone"], ["tall"], *rest]


def test_an_edit_waits_for_company_but_full_batches_go_first() -> None:
    model = FakeModel()
    with batching(model, wait=0.5) as (batcher, slots):
        lone = ask(batcher, slots, "lone", steps=3)
        crowd = [ask(batcher, slots, f"many {n}") for n in range(4)]
        for future in (lone, *crowd):
            future.result(10)
    assert [len(batch) for batch in model.batches] == [4, 1]
    model = FakeModel()
    with batching(model, wait=30) as (batcher, slots):
        futures = [ask(batcher, slots, f"one of {n}") for n in range(4)]
        assert all(future.result(10) for future in futures)
    assert len(model.batches) == 1


def test_who_finds_no_room_is_told_when_to_come() -> None:
    model = FakeModel(held=True, rows=2)
    with batching(model, limit=4) as (batcher, slots):
        futures = [ask(batcher, slots, "x") for _ in range(4)]
        with (
            pytest.raises(
                QueueFull, match=r"4 edits are running or waiting; try again in 2 s"
            ) as told,
            batcher.admit(),
        ):
            pass
        assert told.value.retry_after == 2  # two batches, of a second for all that is known
        model.free.set()
        for future in futures:
            future.result(10)
        with pytest.raises(QueueFull), batcher.admit():
            pass  # what is made is held until it is sent
        slots.close()
        assert batcher.admitted == 0
        with batcher.admit():
            assert batcher.admitted == 1


def test_retry_after_follows_what_edits_take() -> None:
    model = FakeModel(held=True, rows=1)
    with batching(model, limit=3) as (batcher, slots):
        future = ask(batcher, slots, "slow")
        threading.Timer(1.3, model.free.set).start()
        future.result(10)
        until(lambda: batcher.running == 0)
        model.free.clear()
        for _ in range(2):
            ask(batcher, slots, "x")
        with pytest.raises(QueueFull) as told, batcher.admit():
            pass
    assert told.value.retry_after >= 4  # three of 1.3 s


class Counts(Observer):
    def __init__(self) -> None:
        self.given_up: list[bool] = []
        self.sizes: list[int] = []

    def cancelled(self, running: bool) -> None:
        self.given_up.append(running)

    def batch_finished(self, size: int, seconds: float) -> None:
        self.sizes.append(size)


def test_a_batch_goes_on_for_who_is_left_and_stops_for_nobody() -> None:
    model, counts = FakeModel(held=True, rows=2), Counts()
    with batching(model, wait=0.2, observer=counts) as (batcher, slots):
        gone, stays = ask(batcher, slots, "gone", 5), ask(batcher, slots, "stays", 5)
        until(lambda: batcher.running == 2)
        waits = ask(batcher, slots, "waits")
        assert waits.cancel() and gone.cancel()
        assert (batcher.waiting, counts.given_up) == (0, [False, True])
        model.free.set()
        assert stays.result(10)
        assert model.steps == 5
        model.free.clear()
        alone = ask(batcher, slots, "alone", 1000)
        until(lambda: batcher.running == 1)
        assert alone.cancel()
        until(lambda: batcher.running == 0)
        assert model.steps == 5
        assert model.batches == [["gone", "stays"], ["alone"]]
        with pytest.raises(CancelledError):
            gone.result()


def test_leaving_a_slot_cancels_its_edit() -> None:
    model = FakeModel(held=True)
    with batching(model) as (batcher, slots):
        ask(batcher, slots, "x")
        until(lambda: batcher.running == 1)
        slots.close()
        until(lambda: batcher.running == 0)
        assert batcher.admitted == 0


def test_what_breaks_breaks_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = FakeModel(held=True)
    with batching(model) as (batcher, slots):
        first = ask(batcher, slots, "first")
        until(lambda: batcher.running == 1)
        words = ("good", "break", "exhaust", "decline")
        good, broken, exhausted, declined = (ask(batcher, slots, it) for it in words)
        model.free.set()
        with caplog.at_level(logging.ERROR, "reasonpix"):
            assert first.result(10) and good.result(10)
            with pytest.raises(EditError, match="see the server's log"):
                broken.result(10)
            with pytest.raises(OutOfMemory, match="ran out of memory; try again in"):
                exhausted.result(10)
            with pytest.raises(EditRejected, match="there is nothing to edit"):
                declined.result(10)
        assert ask(batcher, slots, "next").result(10)
    assert caplog.text.count("ValueError: a plugin is broken") == 1  # with its traceback, once


def test_closing_finishes_what_was_taken_and_takes_no_more() -> None:
    model = FakeModel(held=True)
    with batching(model) as (batcher, slots):
        futures = [ask(batcher, slots, str(n)) for n in range(6)]
        late = slots.enter_context(batcher.admit())
        batcher.stop()
        with (
            pytest.raises(ServerStopping, match="the server is shutting down; try again in"),
            batcher.admit(),
        ):
            pass
        futures.append(late.submit(EditTask(picture(), "late"), batcher.model.result().settings))
        model.free.set()
        assert all(future.result(10) for future in futures)
        slots.close()
        assert batcher.close(10)


def test_closing_cancels_what_is_left_after_the_grace() -> None:
    model = FakeModel(held=True)
    with batching(model) as (batcher, slots):
        futures = [ask(batcher, slots, str(n)) for n in range(6)]
        assert batcher.close(0.1)
        assert all(future.cancelled() for future in futures)


def test_before_the_model_is_loaded() -> None:
    loading = threading.Event()

    def load() -> ReasonPix2Pix:
        loading.wait(10)
        raise MemoryError("no room for the weights")

    with closing(Batcher(load, limit=1, wait=0)) as batcher:
        with pytest.raises(ModelLoading, match="the model is still loading"), batcher.admit():
            pass
        loading.set()
        with pytest.raises(MemoryError, match="no room"):
            batcher.model.result(10)
        with pytest.raises(ModelLoading), batcher.admit():
            pass
