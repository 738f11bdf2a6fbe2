"""How far a run is, what a recipe would reuse of it, and which results it no longer needs.

Counts come from the journal, or from the shard files where the journal has none. Only what filters
reject, and so the number of accepted records, takes a walk over all scores and outcomes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

from reasonpix.core.figures import byte_size, counted
from reasonpix.errors import ReasonpixError
from reasonpix.generation.model_domains import run_warnings
from reasonpix.generation.outcomes import (
    StageEntry,
    Verdicts,
    current_stages,
    endings_of,
    verdicts,
)
from reasonpix.generation.pipeline import stages_of
from reasonpix.generation.plan import plan_of
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.run_folder import Plan, RunFolder, Shard


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is, in shards, and how the records of its finished shards ended.

    A record that filters reject counts at the first of them, as in the funnel of a finished run.
    """

    stage: str
    folder: str
    reused: int
    """Shards finished before the last `generate` started, or that a recipe would reuse."""
    done: int
    """Shards finished since."""
    todo: int
    ok: int
    rejected: int
    failed: int
    todo_records: int
    """Upper bound of the records that it still has to process."""


@dataclass(frozen=True)
class RunStatus:
    """How far a run is."""

    run: str
    plan: Plan
    holder: str | None
    """The process that is running it."""
    source: Counter[str]
    """How the source listed the planned records: ok, rejected or failed."""
    stages: list[StageStatus]
    finished: int | None
    """Records that have passed all stages; None if unknown or not computed."""
    accepted: int
    """Those of them that all filters accept, by the scores measured so far."""
    problem: str
    """Why `finished` is unknown."""
    warnings: Sequence[str]
    """About models that it uses on images that they are not made for."""
    superseded: Mapping[str, int]
    """Bytes of the stage folders that `stages.json` does not name."""

    def lines(self) -> Iterator[str]:
        """A table for people."""
        plan = self.plan
        more = "the whole source" if plan.complete else "the source may hold more"
        records, shards = counted(plan.rows, "record"), counted(len(plan.shards), "shard")
        yield f"{self.run}: {records} in {shards}, {more}"
        yield f"running: {self.holder}" if self.holder else "no process is running it"
        yield from (f"warning: {warning}" for warning in self.warnings)
        yield ""
        yield f"{'':>22} {'shards':>8} {'':>8} {'':>8}   {'records':>8}"
        head = ("reused", "done", "to do")
        ends = ("ok", "rejected", "failed", "to do")
        yield _line("stage", head, ends)
        listed = (self.source["ok"], self.source["rejected"], self.source["failed"], "")
        yield _line("source", ("", "", ""), listed).rstrip()
        yield from (f"{'':>22} {line}" for line in self.plan.ignored.lines())
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
            yield (
                "what filters reject is unknown, so their rows count what they measured: "
                f"{self.problem}"
            )
        if self.finished is None:
            return
        yield ""
        filters = any(stage.stage.startswith("score-") for stage in self.stages)
        if self.finished == self.plan.rows:
            yield f"{self.accepted} of {counted(self.finished, 'record')} accepted"
        else:
            yield (
                f"{self.accepted} accepted so far, of {counted(self.finished, 'record')} that "
                "passed all stages" + ("; further records may change what filters reject" * filters)
            )
        if filters and self.finished == self.plan.rows:
            yield f"to try other thresholds: reasonpix refilter {quote(self.run)} --set …"


def _line(stage: str, shards: Sequence[object], records: Sequence[object]) -> str:
    left = " ".join(f"{value!s:>8}" for value in shards)
    return f"{stage:>22} {left}   {' '.join(f'{value!s:>8}' for value in records)}"


def superseded_lines(superseded: Mapping[str, int]) -> Iterator[str]:
    """The sizes of stage folders, and their total."""
    for folder, size in superseded.items():
        yield f"{byte_size(size):>12}  {folder}"
    yield f"{byte_size(sum(superseded.values())):>12}  in total"


def read_status(run: RunFolder, recipe: Recipe | None = None) -> RunStatus:
    """How far the current stages of `run` are, or those that `recipe` would have in it.

    Raises `RunError` if it is not a run, or was planned from another source than the recipe's.
    """
    plan = run.plan()
    if recipe is None:
        entries = current_stages(run)
    else:
        plan, entries = plan_of(recipe, run), [stage.entry for stage in stages_of(recipe)]
    planned = {s.name: Counter[str](row[1] for row in run.ends("source", s)) for s in plan.shards}
    finished: int | None = None
    accepted, problem = 0, ""
    decided: dict[str, Counter[str]] = {}
    try:
        rejected = _rejected(run, entries)
        decided = _decided(run, entries, rejected)
        if recipe is None:
            finished, accepted = _accepted(run, entries, rejected)
    except ReasonpixError as error:  # a plugin is missing, or records are being recomputed
        problem = str(error)
    journal = _Journal(run, () if recipe else {entry.folder for entry in entries})
    return RunStatus(
        run=str(run),
        plan=plan,
        holder=run.storage.holder(),
        source=sum(planned.values(), Counter[str]()),
        stages=_stage_statuses(run, plan, entries, planned, journal, decided),
        finished=finished,
        accepted=accepted,
        problem=problem,
        warnings=run_warnings(plan, entries),
        superseded=superseded(run),
    )


def _stage_statuses(
    run: RunFolder,
    plan: Plan,
    entries: Sequence[StageEntry],
    planned: Mapping[str, Counter[str]],
    journal: _Journal,
    decided: Mapping[str, Counter[str]],
) -> list[StageStatus]:
    stages: list[StageStatus] = []
    # Upper bound of the records of each shard that can reach the stage.
    reaching = {name: counts["ok"] for name, counts in planned.items()}
    for entry in entries:
        done = run.done(entry.folder)
        counts = {s.name: journal.counts(entry.folder, s) for s in plan.shards if s.name in done}
        total = decided.get(entry.folder) or sum(counts.values(), Counter[str]())
        new = len(journal.since_start(entry.folder) & done)
        stages.append(
            StageStatus(
                entry.stage,
                entry.folder,
                reused=len(counts) - new,
                done=new,
                todo=len(plan.shards) - len(counts),
                ok=total["ok"],
                rejected=total["rejected"],
                failed=total["failed"],
                todo_records=sum(n for name, n in reaching.items() if name not in counts),
            )
        )
        if not entry.is_score:  # filters score what reaches them, independently of each other
            reaching |= {name: ended["ok"] for name, ended in counts.items()}
    return stages


class _Part(RunFolder):
    """A run restricted to some of its shards."""

    def __init__(self, run: RunFolder, shards: Collection[Shard]) -> None:
        self.storage = run.storage
        self._shards = tuple(shards)

    def shards(self) -> tuple[Shard, ...]:
        """Those shards, in order."""
        return self._shards


def _rejected(run: RunFolder, entries: Sequence[StageEntry]) -> Verdicts:
    """What the filters reject by the scores measured so far."""
    rejected: dict[str, Mapping[str, str]] = {}
    for entry in entries:
        done = run.done(entry.folder)
        measured = [shard for shard in run.shards() if shard.name in done]
        rejected |= verdicts(_Part(run, measured), [entry])
    return rejected


def _decided(
    run: RunFolder, entries: Sequence[StageEntry], rejected: Verdicts
) -> dict[str, Counter[str]]:
    """How records ended at each filter, by its folder, without those an earlier filter rejects."""
    filters = [entry for entry in entries if entry.is_score]
    counts = {entry.folder: Counter[str]() for entry in filters}
    done = {entry.folder: run.done(entry.folder) for entry in filters}
    for shard in run.shards():
        ended: set[str] = set()
        for folder, count in counts.items():
            reasons = rejected.get(folder, {})
            for record_id, status, _ in (
                run.ends(folder, shard) if shard.name in done[folder] else ()
            ):
                if record_id not in ended:
                    status = "rejected" if record_id in reasons else status
                    count[status] += 1
                    if status != "ok":
                        ended.add(record_id)
    return counts


def _accepted(run: RunFolder, entries: Sequence[StageEntry], rejected: Verdicts) -> tuple[int, int]:
    """Records of the shards that all stages have finished, and how many are accepted."""
    done = [run.done(entry.folder) for entry in entries]
    finished = [shard for shard in run.shards() if all(shard.name in names for names in done)]
    statuses = [end.status for end in endings_of(_Part(run, finished), entries, rejected)]
    return len(statuses), statuses.count("ok")


class _Journal:
    """What the journal says about finished shards."""

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

    def since_start(self, stage: str) -> set[str]:
        """The shards that the last `generate` finished."""
        return self._new.get(stage, set())

    def counts(self, stage: str, shard: Shard) -> Counter[str]:
        """How the records of a shard ended."""
        if (line := self._counts.get((stage, shard.name))) is not None:
            return Counter({status: line[status] for status in ("ok", "rejected", "failed")})
        return Counter(status for _, status, _ in self._run.ends(stage, shard))


def superseded(run: RunFolder, entries: Sequence[StageEntry] | None = None) -> dict[str, int]:
    """The stage folders that `stages.json` does not name, and their bytes."""
    run.plan()  # raises if this is not a run
    current = {"source", *(entry.folder for entry in entries or current_stages(run))}
    return {
        folder: run.storage.size(f"stages/{folder}")
        for folder in run.storage.folders("stages")
        if folder not in current and folder[0] != "."
    }


def clean(run: RunFolder, folders: Collection[str]) -> None:
    """Remove the stage `folders` that are still superseded, and leftovers of killed processes.

    Raises `RunError` if another process is running the run.
    """
    with run.storage.lock():
        for folder in superseded(run):
            if folder in folders:
                run.storage.remove(f"stages/{folder}")
        run.storage.remove_drafts()
