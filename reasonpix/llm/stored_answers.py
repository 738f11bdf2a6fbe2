"""What a language model was asked about one record, found by asking again: of the ledger alone.

The questions of a stage follow from its code and its input. So the stage is run once more, on this
one record, with a planner whose every question is looked up and none is sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reasonpix.llm.ledger import Job, Ledger, StoredAnswer
from reasonpix.llm.planner import LLMPlanner
from reasonpix.llm.types import Completion
from reasonpix.plugin.components import Component
from reasonpix.plugin.spec import ComponentSpec

_NONE = Completion(text="", refusal="no answer is stored")


class ReplayLedger(Ledger):
    """A run's ledger that only remembers: a question it cannot answer counts as refused.

    Without a file it knows no answer.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path if path.exists() else None)
        self._asked: list[str] = []

    def get(self, key: str) -> Completion:
        """The stored answer, or a refusal, so that nothing is asked."""
        self._asked.append(key)
        return super().get(key) or _NONE

    def open_jobs(self) -> list[Job]:
        """None: no job is waited for here."""
        return []

    def begin(self) -> None:
        """Forget what was looked up."""
        self._asked = []

    @property
    def asked(self) -> list[StoredAnswer | None]:
        """What was looked up since `begin`, in order; None where nothing is stored."""
        return [self.answer(key) for key in self._asked]


def remembering(use: ComponentSpec, ledger: ReplayLedger) -> Component[Any]:
    """The component, built; a planner that asks an LLM has `ledger` to answer in its place."""
    component = use.build()
    if isinstance(component, LLMPlanner):
        component.ledger = ledger
    return component
