"""Warnings about models that a run uses on images that they are not made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reasonpix.generation.outcomes import StageEntry
from reasonpix.generation.run_folder import Plan
from reasonpix.plugin.intended_images import IntendedImages, domain_warnings


def run_warnings(plan: Plan, entries: Sequence[StageEntry]) -> list[str]:
    """A warning for each kind of models that a run uses on images that they are not made for."""
    images = f"the images of the source `{plan.source.get('use')}`"
    return domain_warnings(_made_for(entries), plan.source.get("domain", ""), images)


def _made_for(entries: Sequence[StageEntry]) -> Iterator[tuple[str, IntendedImages]]:
    for entry in entries:
        for facts in (entry.component, *entry.component.get("uses", ())):
            if intended := facts.get("intended_images"):
                name = f"{facts['slot']} {facts['use']}"
                yield name, IntendedImages.model_validate(intended)
