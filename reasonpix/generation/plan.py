"""The plan of a run: the rows of its source, divided into shards as more are needed.

The plan only grows. Planned shards never change, so a run of 100 images can continue to 400,000,
and a run with a target of accepted samples reads only as many images as it needs.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from numbers import Integral
from typing import Any

from reasonpix.core.files.ignored import Ignored, IgnoredCounts
from reasonpix.core.hashing import fingerprint
from reasonpix.errors import ReasonpixError, RunError
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.run_folder import Plan, Row, RunFolder, Shard
from reasonpix.plugin import registry
from reasonpix.plugin.components import Source, SourceItem
from reasonpix.plugin.types import Problem


def plan_of(recipe: Recipe, run: RunFolder) -> Plan:
    """The plan of `run`; empty for a new run.

    Raises `RunError` if the run was planned from another source than the recipe's.
    """
    use = recipe.source
    identity = registry.fingerprint_facts("source", use.name, use.options)
    if not run.is_planned:
        return Plan(identity, use.options.model_dump(mode="json"))
    plan = run.plan()
    if plan.source != identity:
        raise RunError(
            f"{run} was planned from another source ({_changes(plan.source, identity)}); "
            "use the same source to continue, or another --out"
        )
    return plan


def _changes(before: Any, now: Any, where: str = "") -> str:
    """Describe the values in which two sets of fingerprint facts differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{where} was {before!r}, is {now!r}"
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    parts = (
        _changes(before.get(key), now.get(key), f"{where}.{key}".lstrip(".")) for key in changed
    )
    return "; ".join(parts)


def rows_wanted(plan: Plan, limit: float | None, target: int | None) -> float:
    """How many records to plan first: up to a limit or a target, as many as before, or all.

    Raises `RunError` if the limit is below the number of planned records, and `ReasonpixError` for
    a limit or a target that is not a number of images.
    """
    if limit not in (None, math.inf):
        _check_count("limit", limit, "a positive whole number, or math.inf for all images")
    if target is not None:
        _check_count("target_accepted", target, "a positive whole number")
    if limit is not None and limit < plan.rows:
        raise RunError(
            f"{plan.rows} records are already planned, and a run cannot shrink; "
            f"give --limit {plan.rows} or more, or another --out"
        )
    if plan.shards and (target is not None or limit is None):
        return plan.rows
    return min(target or math.inf, limit or math.inf)


def _check_count(name: str, value: Any, expected: str) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ReasonpixError(f"{name}: {value!r} is not a number of images; give {expected}")


def rows_for(target: int, accepted: int, planned: int) -> int:
    """How many records to plan to get `target` accepted ones, given the rate so far.

    A fifth more than the rate suggests, because every further round loads the models again.
    """
    missing = target - accepted
    more = planned if accepted == 0 else -(-6 * missing * planned // (5 * accepted))
    return planned + max(more, 1)


class Listing:
    """Lists the rows of a source into the plan of a run."""

    def __init__(self, recipe: Recipe, run: RunFolder, source: Source[Any]) -> None:
        self.plan = plan_of(recipe, run)
        self._recipe = recipe
        self._run = run
        self._source = source
        self._rows: Iterator[Row] | None = None
        self._ignored = IgnoredCounts()
        self._items = 0
        self._with_captions = 0

    def extend(self, wanted: float) -> bool:
        """Plan up to `wanted` records. Returns whether the plan has grown.

        Raises `RunError` if the source has no images, or none with the captions that are needed.
        """
        if not self.plan.may_grow(wanted):
            return False
        if self._rows is None:
            self._rows = self._unplanned()
        shards = list(self.plan.shards)
        rows = self.plan.rows
        complete = False
        while rows < wanted and not complete:
            size = int(min(self._recipe.shard_size, wanted - rows))
            chunk = list(islice(self._rows, size))
            complete = len(chunk) < size
            if chunk:
                shards.append(Shard(f"{len(shards):06d}", len(chunk)))
                self._run.write("source", shards[-1], chunk)
                rows += len(chunk)
        if not shards:
            lines = (f"\n  {line}" for line in self._ignored.lines())
            raise RunError(f"the source {self._recipe.source.name!r} has no images{''.join(lines)}")
        self._check_captions()
        grown = rows > self.plan.rows
        if len(self._ignored) > len(self.plan.ignored):
            self._ignored.log(f"source {self._recipe.source.name}")
        self.plan = replace(
            self.plan, shards=tuple(shards), complete=complete, ignored=self._ignored
        )
        self._run.freeze(self.plan)
        return grown

    def _check_captions(self) -> None:
        """Raise `RunError` if every record would be rejected because it lacks a caption."""
        if self._with_captions or not self._items or "captioner" in self._recipe.pipeline:
            return
        if "caption" not in [spec.name for spec in self._recipe.chain]:
            return
        if self._recipe.part == "rewrite":
            raise RunError(
                f"source: none of {self._items} pairs has captions of both images, which "
                "`part: rewrite` needs; use a source with captions, or name the columns that hold "
                "them (hf-dataset: caption and edited_caption)"
            )
        raise RunError(
            f"source: none of {self._items} images has a caption; add `captioner:` under "
            "`pipeline:`, or name the column of captions (hf-dataset: caption)"
        )

    def _unplanned(self) -> Iterator[Row]:
        """The rows of the source that are not planned yet, in its order."""
        # SQLite keeps them in a temporary file, so that a million ids need no memory.
        with closing(sqlite3.connect("", check_same_thread=False)) as ids_seen:
            ids_seen.execute("CREATE TABLE records (id TEXT PRIMARY KEY, listed) WITHOUT ROWID")
            for shard in self.plan.shards:
                ids = ((record_id,) for record_id, _, _ in self._run.ends("source", shard))
                ids_seen.executemany("INSERT INTO records VALUES (?, 0)", ids)
            new = "INSERT OR IGNORE INTO records VALUES (?, 1)"
            for number, item in enumerate(self._listed()):
                row = _planned(self._recipe.source.name, item)
                if ids_seen.execute(new, (row.record_id,)).rowcount:
                    yield row
                    continue
                first = "UPDATE records SET listed = 1 WHERE id = ? AND NOT listed"
                if ids_seen.execute(first, (row.record_id,)).rowcount:
                    continue
                again = fingerprint([row.record_id, number])
                if ids_seen.execute(new, (again,)).rowcount:
                    reason = "the source lists it twice"
                    yield row._replace(record_id=again, status="rejected", reason=reason)

    def _listed(self) -> Iterator[SourceItem | tuple[str, Problem]]:
        """The rows of the source from its first one; what it ignores is counted."""
        self._ignored = IgnoredCounts()
        self._items = self._with_captions = 0
        for item in self._source.items():
            if isinstance(item, Ignored):
                self._ignored.add(item)
                continue
            if isinstance(item, SourceItem):
                self._items += 1
                has_captions = item.caption and (item.pair is None or item.pair.caption)
                self._with_captions += bool(has_captions)
            yield item


def _planned(source: str, item: SourceItem | tuple[str, Problem]) -> Row:
    if isinstance(item, SourceItem):
        pair = [item.pair.content, item.pair.instruction] if item.pair else []
        record_id = fingerprint([source, item.native_id, item.content, *pair])
        return Row(record_id, "ok", output=item.model_dump_json())
    native_id, problem = item
    unread = SourceItem(native_id=native_id, content="")
    return Row(
        fingerprint([source, native_id]), problem.status, problem.reason, unread.model_dump_json()
    )
