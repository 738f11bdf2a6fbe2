"""Errors cross process boundaries, in multiprocessing and Ray."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from reasonpix.core import images
from reasonpix.deployment.server import batcher
from reasonpix.errors import ReasonpixError, RecipeError


def tree(root: type[ReasonpixError]) -> Iterator[type[ReasonpixError]]:
    yield root
    for error in root.__subclasses__():
        yield from tree(error)


@pytest.mark.parametrize(
    "error",
    [
        RecipeError(["a.yaml:1:2: seed: too small", "a.yaml: no source"]),
        *(
            kind("nothing works")
            for kind in tree(ReasonpixError)
            if kind is not RecipeError and kind.__module__.startswith("reasonpix.")
        ),
        batcher.QueueFull("the queue is full", 17),
        images.UndecodableImage("no image"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_pickled_error_stays_the_same(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) and "\n\n" not in str(copy)
    assert vars(copy) == vars(error) and copy.args == error.args
