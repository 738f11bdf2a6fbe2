"""Base of filters that compare scores with thresholds."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from reasonpix.plugin.components import Component, Options, Scorer
from reasonpix.plugin.edits import Edit
from reasonpix.plugin.types import Problem

_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class RejectIf(NamedTuple):
    """Marks an option as a threshold: reject records with `score` < (<=, >, >=) the option's value.

    ```
    class SharpnessOptions(ThresholdOptions):
        min_sharpness: Annotated[float, RejectIf("sharpness", "<", "sharpness {:.2f}")] = Field(
            0.1, ge=0, description="Smallest sharpness that is kept"
        )
    ```
    """

    score: str
    comparison: Literal["<", "<=", ">", ">="]
    reason: str
    """A format string: `{}` is the score, `{limit}` the option's value."""


class ThresholdOptions(Options):
    """Options with thresholds. Thresholds stay out of fingerprints: they change no score."""

    thresholds: ClassVar[tuple[tuple[str, RejectIf], ...]] = ()
    """Option name and rule of every `RejectIf`, in the order of the fields."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Collect the thresholds of the fields."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.thresholds = tuple(
            (name, rule)
            for name, field in cls.model_fields.items()
            for rule in field.metadata
            if isinstance(rule, RejectIf)
        )
        cls.fingerprint_exclude = cls.fingerprint_exclude | {name for name, _ in cls.thresholds}


O_co = TypeVar("O_co", bound=ThresholdOptions, covariant=True)


class ThresholdFilter(Scorer[O_co]):
    """A filter made of a score function and thresholds: override `score_edit`, declare options.

    Filters that compute scores in batches override `score` instead.
    """

    Options: ClassVar[type[Options]] = ThresholdOptions

    def score(
        self, edits: Sequence[Edit], pipeline: Mapping[str, Component[Any]]
    ) -> list[dict[str, float] | Problem]:
        """The scores of each edit, see `score_edit`."""
        return [self.score_edit(edit) for edit in edits]

    def score_edit(self, edit: Edit) -> dict[str, float] | Problem:
        """Named scores of one edit, or why it has none."""
        raise NotImplementedError(f"{type(self).__name__} must override score_edit or score")

    def reject(self, scores: Sequence[Mapping[str, float]]) -> list[str | None]:
        """For each record the reason of the first threshold that rejects it, or None.

        A threshold whose option is None rejects nothing.
        """
        limits = [
            (rule, limit)
            for option, rule in self.options.thresholds
            if (limit := getattr(self.options, option)) is not None
        ]

        def reason_of(record: Mapping[str, float]) -> str | None:
            for rule, limit in limits:
                if _COMPARISONS[rule.comparison](record[rule.score], limit):
                    return rule.reason.format(record[rule.score], limit=limit)
            return None

        return [reason_of(record) for record in scores]
