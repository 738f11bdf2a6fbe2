"""Reapply filters to the scores that a run stores, without running a model."""

from __future__ import annotations

from collections.abc import Sequence

from reasonpix.errors import RunError
from reasonpix.generation.engine.unit import asks_llm
from reasonpix.generation.outcomes import OutcomeCounts, outcome_counts, write_stages
from reasonpix.generation.pipeline import Stage, stages_of
from reasonpix.generation.run_folder import RunFolder
from reasonpix.generation.run_recipe import recipe_of, write_recipe


def reapply_filters(
    run: RunFolder, overrides: Sequence[str]
) -> tuple[OutcomeCounts, OutcomeCounts]:
    """Change the run's recipe by `overrides` that need no new results.

    Thresholds may change, and filters with stored scores may be added, removed and reordered.
    Returns how the records ended before and after. Raises `RunError` if something would have to be
    computed, the run is not finished, or another process is running it.
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
    """Raise `RunError` unless the folder holds all results of every stage."""
    shards = {shard.name for shard in run.shards()}
    missing = [stage for stage in stages if shards - run.done(stage.entry.folder)]
    if not missing:
        return
    names = ", ".join(stage.name for stage in missing)
    message = f"{run} has no results of {names} for this recipe"
    if missing[0].gates:
        gates = ", ".join(gate.component["use"] for gate in missing[0].gates)
        message += f" (filters before {missing[0].name} decide which records reach it: {gates})"
    message += (
        f"; compute them with `reasonpix generate {run}/recipe.yaml --out {run}` and the same --set"
    )
    if any(asks_llm(stage) for stage in missing):
        message += "; stored answers of the language model are reused"
    raise RunError(message)
