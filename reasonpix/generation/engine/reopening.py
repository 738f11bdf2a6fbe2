"""Reopen finished shards whose results have to be completed or decided again."""

from __future__ import annotations

from collections.abc import Sequence

from reasonpix.generation.pipeline import Stage
from reasonpix.generation.run_folder import RunFolder


def reopen_failed(run: RunFolder, stages: Sequence[Stage]) -> None:
    """Reopen the shards in which records failed.

    Other recipes may have stages in this folder that build on the same results. These are
    reopened too, and completed when their recipe is run again.
    """
    failed = {stage.entry.folder: _shards_with_failures(run, stage) for stage in stages}
    names = set().union(*failed.values())
    if names:
        reopen_behind_filters(run, stages, {shard.name for shard in run.shards()})
        _reopen_other_stages(run, stages, names)
    for folder in reversed(failed):
        _reopen(run, folder, failed[folder])


def _shards_with_failures(run: RunFolder, stage: Stage) -> set[str]:
    folder = stage.entry.folder
    done = run.done(folder)
    return {
        shard.name
        for shard in run.shards()
        if shard.name in done
        and any(status == "failed" for _, status, _ in run.ends(folder, shard))
    }


def reopen_behind_filters(run: RunFolder, stages: Sequence[Stage], names: set[str]) -> None:
    """Reopen shards in all stages behind a filter that decides by the scores of the whole run.

    What such a filter rejects depends on all records that it measured. Stored rows are kept. Only
    rewriting instructions (Part I) comes after a filter.
    """
    if any(stage.spec.filters_first for stage in stages):
        _reopen_other_stages(run, [stage for stage in stages if not stage.gates], names)


def reopen_downstream(run: RunFolder, stages: Sequence[Stage]) -> None:
    """Reopen the shards that build on one that has to be computed.

    This happens when a file was deleted or a commit failed: the new results may let other records
    through.
    """
    names = {shard.name for shard in run.shards()}
    todo: dict[str, set[str]] = {}
    for stage in stages:
        folder = stage.entry.folder
        done = run.done(folder)
        stale = set().union(*(todo[entry.folder] for entry in stage.upstream)) & done
        _reopen(run, folder, stale)
        todo[folder] = names - done | stale


def _reopen_other_stages(run: RunFolder, stages: Sequence[Stage], names: set[str]) -> None:
    """Reopen shards in all stage folders but the source's and those of `stages`."""
    excluded = {"source", *(stage.entry.folder for stage in stages)}
    for folder in reversed(run.storage.folders("stages")):
        if folder not in excluded:
            _reopen(run, folder, names)


def _reopen(run: RunFolder, folder: str, names: set[str]) -> None:
    done = run.done(folder)
    for shard in run.shards():
        if shard.name in names & done:
            run.reopen(folder, shard)
