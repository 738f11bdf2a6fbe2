"""Recover the LLM requests behind one record from stored answers, without calling a model.

The requests of a stage follow from its code and its input. So the stage is run again on one record,
with a planner that looks up every request in the ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reasonpix.llm.ledger import Ledger, StoredAnswer
from reasonpix.llm.planner import LLMPlanner
from reasonpix.llm.requests import Job
from reasonpix.llm.types import Completion
from reasonpix.plugin.components import Component
from reasonpix.plugin.spec import ComponentSpec

_MISSING = Completion(text="", refusal="no answer is stored")


class ReplayLedger(Ledger):
    """A run's ledger, or an empty one if `path` does not exist, that answers every request.

    Requests without a stored answer count as refused, so nothing is ever sent.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path if path.exists() else None)
        self._keys: list[str] = []

    def get(self, key: str) -> Completion:
        """The stored answer, or a refusal."""
        self._keys.append(key)
        return super().get(key) or _MISSING

    def open_jobs(self) -> list[Job]:
        """No jobs, so that none is polled."""
        return []

    def clear_lookups(self) -> None:
        """Start a new list of `lookups`."""
        self._keys = []

    @property
    def lookups(self) -> list[StoredAnswer | None]:
        """The answers looked up since `clear_lookups`, in order; None for missing ones."""
        return [self.answer(key) for key in self._keys]


def build_replayed(spec: ComponentSpec, ledger: ReplayLedger) -> Component[Any]:
    """Build a component, without loading it. A planner with an LLM is answered by `ledger`."""
    component = spec.build()
    if isinstance(component, LLMPlanner):
        component.ledger = ledger
    return component
