"""Language models as planners: prompts, requests, budgets, and the ledger of stored answers.

Plugins for a language model import the names below; see "An LLM as planner" in `docs/plugins.md`.
"""

from typing import TYPE_CHECKING

from reasonpix.core.lazy import lazy_exports

__all__ = [
    "Attempt",
    "Completion",
    "Conversation",
    "LLMPlanner",
    "LLMPlannerOptions",
    "Message",
    "Price",
    "Unavailable",
]

if TYPE_CHECKING:
    from reasonpix.llm.planner import LLMPlanner, LLMPlannerOptions
    from reasonpix.llm.types import Attempt, Completion, Conversation, Message, Price, Unavailable
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "planner": ("LLMPlanner", "LLMPlannerOptions"),
            "types": ("Attempt", "Completion", "Conversation", "Message", "Price", "Unavailable"),
        },
    )
