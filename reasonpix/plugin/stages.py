"""Stages as they are declared, by core and by plugins, and the check of a component's results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from PIL.Image import Image
from pydantic_core import to_json

from reasonpix.errors import RunError
from reasonpix.plugin.components import Component, PlannerTask
from reasonpix.plugin.types import Entity, Grounding, Problem, Record

Part = Literal["replace", "rewrite"]
"""`replace` makes edits of its own (Parts II and III); `rewrite` rewrites instructions (Part I)."""

SETTINGS = frozenset({"run_seed", "candidates", "selection_orders"})
"""The settings of a recipe that a stage may use."""

Result = Record | tuple[Record, Image] | Problem
"""What a stage returns for one sample, with the image that it made, if it makes one."""

T = TypeVar("T")


def _once(settings: Mapping[str, int]) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """Declares a stage. The recipe, run folder, `status`, `inspect` and `gallery` follow from it.

    Core declares its stages next to their functions, in `generation.replace_stages` and
    `generation.rewrite_stages`. A plugin adds stages with the hook `stages`.
    """

    name: str
    """Names the stage in a run folder, under `resources:` and in `Sample.outputs`."""
    function: Callable[..., list[Result]]
    """`function(samples, component, **settings)`: one result for each sample, in the same order.

    A record with a `Problem` goes no further.
    """
    output: type[Record]
    parts: tuple[Part, ...] = ("replace",)
    """The parts that the stage belongs to."""
    slot: str = ""
    """The slot whose component the stage calls."""
    if_empty: Literal["refuse", "skip", "run"] = "skip"
    """What a recipe means that leaves the slot empty: a mistake, no such stage, or no component.

    Stages of plugins are always skipped, so that installing a plugin changes no recipe.
    """
    after: str = ""
    """The stage that it follows. Core's stages are in order already."""
    requires: tuple[str, ...] = ()
    """Stages whose outputs it reads. They must come before it."""
    image: str | None = None
    """The name in `Sample.images` of the image that it makes: RGB, of the input's size."""
    needs_images: bool = False
    """Whether it decodes the images of every sample: they are then decoded ahead of time."""
    settings: tuple[str, ...] = ()
    """Settings of the recipe that are passed to `function`, and enter the fingerprint.

    Any of `SETTINGS`.
    """
    task: PlannerTask | None = None
    """What it asks of a planner."""
    questions: Callable[[Mapping[str, int]], int] = _once
    """How often it asks for each record, by the recipe's settings."""
    shows: frozenset[str] = frozenset()
    """The fields of `Edit` that filters can read from here on."""
    filters_first: bool = False
    """Whether filters that can decide already run before it, so that it costs less."""

    def __post_init__(self) -> None:
        """Raise `ValueError` or `TypeError` for a declaration that cannot work."""
        # The name is part of a folder's name.
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"stage name {self.name!r} must be letters, digits, '_', '.' and '-'")
        if not callable(self.function):
            raise TypeError(f"stage {self.name!r}: function is not callable")
        if not (isinstance(self.output, type) and issubclass(self.output, Record)):
            raise TypeError(f"stage {self.name!r}: output {self.output!r} is not a Record class")
        if not self.parts or not set(self.parts) <= set(get_args(Part)):
            known = ", ".join(map(repr, get_args(Part)))
            raise ValueError(f"stage {self.name!r}: parts {self.parts!r} must be among {known}")
        if unknown := sorted(set(self.settings) - SETTINGS):
            known = ", ".join(sorted(SETTINGS))
            raise ValueError(
                f"stage {self.name!r}: no such setting {unknown[0]!r}; known are {known}"
            )


_SEVERAL: tuple[type, ...] = (Entity, Grounding)
"""Of these a result holds any number, of others exactly one."""


def check_results(
    component: Component[Any], results: Sequence[T | Problem], requests: Sequence[Any], kind: type
) -> list[T | Problem]:
    """The results, one for each request; one that is not a `kind` becomes a problem.

    Raises `RunError` if their number differs: they could not be matched with the requests.
    """
    if len(results) != len(requests):
        raise RunError(
            f"{component.name!r} gave a batch of {len(results)} for a batch of {len(requests)}; "
            "a component gives one result for each item, in the same order"
        )
    return [_checked(component, result, kind) for result in results]


def _checked(component: Component[Any], result: Any, kind: type) -> Any:
    if isinstance(result, Problem):
        return Problem(status=result.status, reason=result.reason)
    parts = tuple(result) if kind in _SEVERAL and isinstance(result, tuple | list) else (result,)
    if not all(isinstance(part, kind) for part in parts):
        reason = f"{component.name!r} gave {type(result).__name__} where {kind.__name__} is due"
        return Problem(status="failed", reason=reason)
    try:
        if kind is Image:
            result.load()  # it may come from a truncated file
        else:
            to_json(parts)  # it must fit into a file
    except Exception as error:
        reason = f"{component.name!r} gave what cannot be stored: {type(error).__name__}: {error}"
        return Problem(status="failed", reason=reason)
    if any(type(part) is not kind for part in parts) and issubclass(kind, Record):
        # What a subclass adds would be lost in the file.
        parts = tuple(kind.model_validate(part.model_dump()) for part in parts)
    return parts if kind in _SEVERAL else parts[0]
