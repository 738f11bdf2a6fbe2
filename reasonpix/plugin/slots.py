"""The slots of a recipe: core's, and the declaration with which a plugin adds one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reasonpix.plugin.components import (
    Captioner,
    Component,
    Editor,
    EntityExtractor,
    Grounder,
    Method,
    MLLMEncoder,
    Planner,
    PlannerTask,
    Scorer,
    Source,
)


@dataclass(frozen=True)
class SlotSpec:
    """Declares a slot: core's are in `SLOTS`, a plugin adds its own with the hook `slots`."""

    name: str
    component: type[Component[Any]]
    """The abstract class of its components."""
    hook: str
    """The hook with which plugins offer components, such as `captioners`."""
    description: str
    in_pipeline: bool = True
    """Whether it is a key under `pipeline:`."""
    filled_by: str = ""
    """Another slot whose components fill this one too."""
    task: PlannerTask | None = None
    """The task that filters need from the planner in this slot."""
    contract: str = ""
    """Its contract, `module:Class`; by default named after `component` in `plugin.testing`."""

    @property
    def kind(self) -> str:
        """The slot whose components fill this one."""
        return self.filled_by or self.name


_SLOTS = (
    SlotSpec("source", Source, "sources", "Where input images come from", in_pipeline=False),
    SlotSpec("captioner", Captioner, "captioners", "Left out when the source gives captions"),
    SlotSpec("extractor", EntityExtractor, "extractors", "Categories from a caption (Eq. 4)"),
    SlotSpec("grounder", Grounder, "grounders", "Boxes for categories (Eq. 5)"),
    SlotSpec("planner", Planner, "planners", "The change, and the instruction (Eq. 2, 3, 6)"),
    SlotSpec("editor", Editor, "editors", "Object replacement (Eq. 7)"),
    SlotSpec("resolver", Planner, "planners", "Asked by filters", True, "planner", "resolve"),
    SlotSpec(
        "encoder",
        MLLMEncoder,
        "encoders",
        "Reads image and instruction (Eq. 8)",
        in_pipeline=False,
        contract="reasonpix.plugin.testing:EncoderContract",
    ),
    SlotSpec("method", Method, "methods", "An editing method to evaluate", in_pipeline=False),
    SlotSpec("filter", Scorer, "scorers", "Scores edits, rejects some", in_pipeline=False),
)
SLOTS: Mapping[str, SlotSpec] = {slot.name: slot for slot in _SLOTS}
"""Core's slots by name, in the order in which the pipeline uses them."""
