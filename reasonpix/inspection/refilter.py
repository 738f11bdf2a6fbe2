"""Filters applied anew to the scores that a run holds: no model is asked."""

from __future__ import annotations

from collections.abc import Sequence

from reasonpix.errors import RunError
from reasonpix.generation.outcomes import OutcomeCounts, outcome_counts, write_stages
from reasonpix.generation.pipeline import Stage, stages_of
from reasonpix.generation.run_folder import RunFolder
from reasonpix.generation.run_recipe import recipe_of, write_recipe
from reasonpix.llm.planner import LLMPlanner
from reasonpix.plugin import registry


def reapply_filters(
    run: RunFolder, overrides: Sequence[str]
) -> tuple[OutcomeCounts, OutcomeCounts]:
    """Change the run's recipe by `overrides`, where its results are all there already.

    Thresholds may change, and filters that were measured come, go and change places. Returns how
    the records ended before and after. Raises `RunError` when something would have to be computed,
    when the run is not finished, and when another process is at work in it.
    """
    before = outcome_counts(run)
    recipe = recipe_of(run, overrides)
    stages = stages_of(recipe)
    with run.storage.lock():
        _check_computed(run, stages)
        write_recipe(run, recipe)
        write_stages(run, [stage.entry for stage in stages])
        return before, outcome_counts(run)


def _check_computed(run: RunFolder, stages: Sequence[Stage]) -> None:
    """Raise `RunError` unless every stage has all its results in the folder."""
    shards = {shard.name for shard in run.shards()}
    missing = [stage for stage in stages if shards - run.done(stage.entry.folder)]
    if not missing:
        return
    why = f"{run} holds no results of {', '.join(stage.name for stage in missing)} for this recipe"
    if missing[0].gates:
        gates = ", ".join(gate.component["use"] for gate in missing[0].gates)
        why += f" (filters that stand before {missing[0].name} decide what it is asked: {gates})"
    free = (
        "; answers of the language model that are stored are not asked again"
        if any(_asks_llm(stage) for stage in missing)
        else ""
    )
    raise RunError(
        f"{why}; compute them with `reasonpix generate {run}/recipe.yaml --out {run}` "
        f"and the same --set{free}"
    )


def _asks_llm(stage: Stage) -> bool:
    uses = [use for use in (stage.use, *stage.needs) if use is not None]
    return any(issubclass(registry.find(use.slot, use.name), LLMPlanner) for use in uses)
