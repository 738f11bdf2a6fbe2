"""How far a run is, what a recipe would reuse of it, and what no recipe of it needs any more.

Counts are read from the journal, and from the shard files where it has none. Only how many records
are accepted is known from all scores and endings, and takes a walk over them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

from reasonpix.errors import ReasonpixError
from reasonpix.generation.outcomes import StageEntry, current_stages, endings_of, verdicts
from reasonpix.generation.pipeline import stages_of
from reasonpix.generation.plan import plan_of
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.run_folder import Plan, RunFolder, Shard


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is: shards, and how the records of the finished ones ended in it."""

    stage: str
    folder: str
    reused: int
    """Shards that were finished before the last `generate` began, or that a recipe would reuse."""
    done: int
    """Shards that were finished since."""
    todo: int
    ok: int
    rejected: int
    """By the stage's component. What a filter rejects by its thresholds is not counted here."""
    failed: int
    todo_records: int
    """The most records that it has still to do, as far as is known now."""


@dataclass(frozen=True)
class RunStatus:
    """How far a run is."""

    run: str
    plan: Plan
    holder: str | None
    """Who is at work in it."""
    source: Counter[str]
    """How the planned records ended in being listed: ok, rejected or failed."""
    stages: list[StageStatus]
    finished: int | None
    """Records that all stages are finished with; None when that is not known or not asked."""
    accepted: int
    """Those of them that all filters accept, by what is measured now."""
    problem: str
    """Why it is not known."""
    superseded: Mapping[str, int]
    """Bytes of the stage folders that `stages.json` does not name."""

    def lines(self) -> Iterator[str]:
        """A table for people."""
        plan = self.plan
        more = "all of the source" if plan.complete else "the source may hold more"
        records, shards = _counted(plan.rows, "record"), _counted(len(plan.shards), "shard")
        yield f"{self.run}: {records} in {shards}, {more}"
        yield f"{self.holder} is at work in it" if self.holder else "nobody is at work in it"
        yield ""
        yield f"{'':>22} {'shards':>8} {'':>8} {'':>8}   {'records':>8}"
        head = ("reused", "done", "to do")
        ends = ("ok", "rejected", "failed", "to do")
        yield _line("stage", head, ends)
        listed = (self.source["ok"], self.source["rejected"], self.source["failed"], "")
        yield _line("source", ("", "", ""), listed).rstrip()
        for stage in self.stages:
            todo = f"≤ {stage.todo_records}" if stage.todo_records else "0"
            yield _line(
                stage.stage,
                (stage.reused, stage.done, stage.todo),
                (stage.ok, stage.rejected, stage.failed, todo),
            )
        yield from self._accepted_lines()
        if self.superseded:
            yield ""
            yield "superseded (`reasonpix clean` removes them):"
            yield from superseded_lines(self.superseded)

    def _accepted_lines(self) -> Iterator[str]:
        if self.problem:
            yield f"how many records are accepted cannot be told: {self.problem}"
        if self.finished is None:
            return
        yield ""
        filters = any(stage.stage.startswith("score-") for stage in self.stages)
        if self.finished == self.plan.rows:
            yield f"{self.accepted} of {_counted(self.finished, 'record')} accepted"
        else:
            yield (
                f"{self.accepted} accepted so far, of {_counted(self.finished, 'record')} that all "
                "stages are finished with" + ("; more may change what filters do" * filters)
            )
        if filters and self.finished == self.plan.rows:
            yield f"what each filter rejects: reasonpix refilter {quote(self.run)}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _line(stage: str, shards: Sequence[object], records: Sequence[object]) -> str:
    left = " ".join(f"{value!s:>8}" for value in shards)
    return f"{stage:>22} {left}   {' '.join(f'{value!s:>8}' for value in records)}"


def superseded_lines(superseded: Mapping[str, int]) -> Iterator[str]:
    """Stage folders with their sizes, and all together."""
    for folder, size in superseded.items():
        yield f"{size / 1e6:>12.1f} MB  {folder}"
    yield f"{sum(superseded.values()) / 1e6:>12.1f} MB  in all"


def read_status(run: RunFolder, recipe: Recipe | None = None) -> RunStatus:
    """How far the current stages of `run` are, or those that `recipe` would have in it.

    Raises `RunError` when it is no run, or was planned from another source than the recipe's.
    """
    if recipe is None:
        plan, entries = run.plan(), current_stages(run)
    else:
        run.plan()  # one that is not there yet is an error
        plan, entries = plan_of(recipe, run), [stage.entry for stage in stages_of(recipe)]
    told = _Journal(run, () if recipe else {entry.folder for entry in entries})
    stages: list[StageStatus] = []
    listed = {s.name: Counter[str](it[1] for it in run.ends("source", s)) for s in plan.shards}
    # The most records of each shard that can reach the stage.
    reaching = {name: counts["ok"] for name, counts in listed.items()}
    for entry in entries:
        done = run.done(entry.folder)
        ends = Counter[str]()
        going = dict(reaching)
        todo = 0
        for shard in plan.shards:
            if shard.name in done:
                counts = told.ends(entry.folder, shard)
                ends.update(counts)
                going[shard.name] = counts["ok"]
            else:
                todo += reaching[shard.name]
        finished = sum(shard.name in done for shard in plan.shards)
        new = len(told.since_began(entry.folder) & done)
        stages.append(
            StageStatus(
                entry.stage,
                entry.folder,
                reused=finished - new,
                done=new,
                todo=len(plan.shards) - finished,
                ok=ends["ok"],
                rejected=ends["rejected"],
                failed=ends["failed"],
                todo_records=todo,
            )
        )
        if not entry.is_score:  # the filters score what reaches them, each by itself
            reaching = going
    through: int | None = None
    accepted, problem = 0, ""
    if recipe is None:
        try:
            through, accepted = _accepted(run, entries)
        except ReasonpixError as error:  # a plugin that is gone, records that are computed anew
            problem = str(error)
    return RunStatus(
        run=str(run),
        plan=plan,
        holder=run.storage.holder(),
        source=sum(listed.values(), Counter[str]()),
        stages=stages,
        finished=through,
        accepted=accepted,
        problem=problem,
        superseded=superseded(run),
    )


class _Part(RunFolder):
    """A run of which no more is known than some of its shards."""

    def __init__(self, run: RunFolder, shards: Collection[Shard]) -> None:
        self.storage = run.storage
        self._shards = tuple(shards)

    def shards(self) -> tuple[Shard, ...]:
        """Those shards, in order."""
        return self._shards


def _accepted(run: RunFolder, entries: Sequence[StageEntry]) -> tuple[int, int]:
    """Records of the shards that all stages are finished with, and how many are accepted."""
    done = {entry.folder: run.done(entry.folder) for entry in entries}
    rejected: dict[str, Mapping[str, str]] = {}
    shards = run.shards()
    for entry in entries:
        measured = [shard for shard in shards if shard.name in done[entry.folder]]
        rejected |= verdicts(_Part(run, measured), [entry])
    finished = [shard for shard in shards if all(shard.name in names for names in done.values())]
    ended = [it.status for it in endings_of(_Part(run, finished), entries, rejected)]
    return len(ended), ended.count("ok")


class _Journal:
    """What the journal tells of finished shards."""

    def __init__(self, run: RunFolder, current: Collection[str]) -> None:
        self._run = run
        self._counts: dict[tuple[str, str], Mapping[str, int]] = {}
        self._new: dict[str, set[str]] = {}
        for line in run.journal():
            if line.get("began"):
                self._new.clear()
            elif line.get("reopened"):
                self._counts.pop((line["stage"], line["shard"]), None)
            elif "stage" in line:
                stage, shard = line["stage"], line["shard"]
                self._counts[stage, shard] = line
                if stage in current:
                    self._new.setdefault(stage, set()).add(shard)

    def since_began(self, stage: str) -> set[str]:
        """The shards that the last `generate` finished."""
        return self._new.get(stage, set())

    def ends(self, stage: str, shard: Shard) -> Counter[str]:
        """How the records of a shard ended."""
        if (line := self._counts.get((stage, shard.name))) is not None:
            return Counter({status: line[status] for status in ("ok", "rejected", "failed")})
        return Counter(status for _, status, _ in self._run.ends(stage, shard))


def superseded(run: RunFolder, entries: Sequence[StageEntry] | None = None) -> dict[str, int]:
    """The stage folders that `stages.json` does not name, and their bytes."""
    run.plan()  # what is no run is told so
    current = {"source", *(entry.folder for entry in entries or current_stages(run))}
    found = run.storage.folders("stages")
    return {
        folder: run.storage.size(f"stages/{folder}")
        for folder in found
        if folder not in current and folder[0] != "."
    }


def clean(run: RunFolder, folders: Collection[str]) -> None:
    """Remove those of the stage `folders` that are still superseded, and what kills left over.

    Raises `RunError` when another process is at work in the run.
    """
    with run.storage.lock():
        for folder in superseded(run):
            if folder in folders:
                run.storage.remove(f"stages/{folder}")
        run.storage.remove_drafts()
