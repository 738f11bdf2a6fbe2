"""What every stage of a run did with one record: inputs, LLM questions, results and time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from reasonpix.core.images import decode
from reasonpix.datasets.columns import RunColumns, part_of, score_columns
from reasonpix.errors import PluginError, ReasonpixError
from reasonpix.generation.outcomes import Outcome, StageEntry, current_stages, source_of, verdicts
from reasonpix.generation.pipeline import Stage, stages_of
from reasonpix.generation.run_folder import Row, RunFolder, Shard
from reasonpix.generation.run_recipe import packages_of, recipe_of
from reasonpix.inspection.lookup import RecordRows, find_record, read_record_rows
from reasonpix.inspection.stored_answers import ReplayLedger, build_replayed
from reasonpix.llm.ledger import StoredAnswer
from reasonpix.llm.ledger_sync import ledger_file
from reasonpix.llm.planner import LLMPlanner
from reasonpix.plugin import registry
from reasonpix.plugin.components import Component, Source
from reasonpix.plugin.samples import Sample
from reasonpix.plugin.types import Problem


@dataclass(frozen=True)
class Question:
    """A request to a language model, and its raw answer."""

    task: str
    messages: list[tuple[str, str]]
    """Role and text of each turn; a repair turn follows the answer that it corrects."""
    seed: int
    answer: str
    refusal: str | None
    finish_reason: str
    left_out: list[str]
    """Parameters that the server refused, so that it was asked without them."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    seconds: float
    attempts: int
    time: str


@dataclass
class Step:
    """What one stage did with a record.

    `status` is ok, rejected or failed; "to do" if the stage has not processed the record yet, and
    "not reached" if an earlier stage ended the record.
    """

    stage: str
    folder: str
    status: str
    reason: str = ""
    component: dict[str, Any] = field(default_factory=dict)
    """What its results depend on: plugin, version, weights, options, prompts."""
    options: dict[str, Any] = field(default_factory=dict)
    package: str = ""
    output: Any = None
    image: dict[str, Any] | None = None
    """bytes, width, height and sha256 of the image that it made."""
    verdict: str | None = None
    """A filter's: accepted, or why it rejects the record; None until that is known."""
    seeds: list[int] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    unanswered: int = 0
    """Questions without a stored answer."""
    note: str = ""
    """Why seeds or questions cannot be reconstructed."""
    finished: str | None = None
    shard_seconds: float | None = None
    """Seconds for all records of the shard."""
    seconds: float | None = None
    """This record's share."""


@dataclass
class Lineage:
    """What a run did with a record, from its source to its outcome, or as far as it got."""

    run: str
    record_id: str
    shard: str
    source: dict[str, Any]
    item: dict[str, Any]
    status: str
    """accepted, rejected, failed, or "to do"."""
    stage: str
    """Where it ended, or the next stage."""
    reason: str
    steps: list[Step]
    published: dict[str, Any] | None
    """The columns of the published dataset, without images."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


Visit = Callable[[Stage | None, StageEntry, Sample, Row, ReplayLedger], None]
"""Called for each stage with a row of the record; the sample is the stage's input."""


def trace_record(run: RunFolder, reference: str, visit: Visit | None = None) -> Lineage:
    """What the run did with a record; see `find_record` for `reference`.

    No result is computed and no language model is called. Raises `RunError` if there is no such
    record.
    """
    shard, record_id = find_record(run, reference)
    entries = current_stages(run)
    stages, problem = _stages(run)
    packages = packages_of(run)
    with closing(source_of(run)) as source, ledger_file(run.storage, write_back=False) as path:
        [trace] = read_record_rows(run, entries, shard, [record_id], source)
        with ReplayLedger(path) as ledger:
            tracer = _StageTrace(run, entries, shard, packages, source, ledger)
            steps = []
            for entry in entries:
                stage = stages.get(entry.stage)
                row = trace.rows.get(entry.folder)
                steps.append(tracer.step(trace, entry, stage, problem))
                if row is not None and trace.sample is not None:
                    if visit is not None:
                        visit(stage, entry, trace.sample, row, ledger)
                    if row.status == "ok" and entry.spec is not None:
                        trace.sample.add_stored(entry.spec, row.output, row.image)
    status, last_stage, reason = _outcome(trace, steps)
    published = None
    if status == "accepted" and trace.sample is not None:
        columns = RunColumns(part_of(entries), score_columns(trace.scores(entries)))
        published = columns.facts(
            Outcome(trace.sample, "ok", last_stage, "", trace.scores(entries))
        )
    plan = run.plan()
    return Lineage(
        run=str(run),
        record_id=record_id,
        shard=shard.name,
        source={**plan.source, "options": plan.source_options}
        | {"package": _package(plan.source["use"], packages)},
        item=trace.item.model_dump(mode="json"),
        status=status,
        stage=last_stage,
        reason=reason,
        steps=steps,
        published=published,
    )


def _stages(run: RunFolder) -> tuple[dict[str, Stage], str]:
    """The stages of the run's recipe by name, or none and the reason."""
    try:
        return {stage.name: stage for stage in stages_of(recipe_of(run))}, ""
    except ReasonpixError as error:
        return {}, str(error)


def _package(plugin: str | None, packages: dict[str, str]) -> str:
    """The package of a plugin, with the version that made the run."""
    if plugin is None:
        return ""
    try:
        dist = registry.entry(plugin).dist
    except PluginError:
        return "not installed here"
    return f"{dist.name} {packages.get(dist.name, dist.version)}" if dist else "?"


def _outcome(trace: RecordRows, steps: Sequence[Step]) -> tuple[str, str, str]:
    """How, where and why the record ended."""
    if trace.planned.status != "ok":
        return trace.planned.status, "source", trace.planned.reason
    for step in steps:
        if step.status in ("rejected", "failed", "to do"):
            return step.status, step.stage, step.reason
        if step.verdict not in (None, "accepted"):
            return "rejected", step.stage, step.verdict or ""
        if step.status == "ok" and step.stage.startswith("score-") and step.verdict is None:
            return "to do", step.stage, "the filter decides once all records are measured"
    return "accepted", steps[-1].stage if steps else "source", ""


class _StageTrace:
    """Reads from the run folder what each stage did with one record."""

    def __init__(
        self,
        run: RunFolder,
        entries: Sequence[StageEntry],
        shard: Shard,
        packages: dict[str, str],
        source: Source[Any],
        ledger: ReplayLedger,
    ) -> None:
        self._packages = packages
        self._source = source
        self._ledger = ledger
        names = {shard.name for shard in run.shards()}
        done = {entry.folder: run.done(entry.folder) for entry in entries}
        self._finished = {folder for folder, shards in done.items() if shard.name in shards}
        measured = [e for e in entries if e.is_score and names <= done[e.folder]]
        self._judged = {entry.folder for entry in measured}
        self._rejected = verdicts(run, measured)
        self._lines = {
            line["stage"]: line for line in run.journal() if line.get("shard") == shard.name
        }
        last = max(i for i, entry in enumerate(entries) if not entry.is_score)
        self._gates = {entry.folder for entry in entries[:last] if entry.is_score}
        self._ended = False

    def step(self, trace: RecordRows, entry: StageEntry, stage: Stage | None, problem: str) -> Step:
        """What a stage did. Call it for the stages in order."""
        row = trace.rows.get(entry.folder)
        step = Step(
            stage=entry.stage,
            folder=entry.folder,
            status=row.status if row else "not reached" if self._has_ended(trace) else "to do",
            reason=row.reason if row else "",
            component=entry.component,
            options=entry.options,
            package=_package(entry.component["use"], self._packages),
        )
        if row is None:
            if entry.folder in self._finished:
                step.status = "not reached"
            return step
        if row.status != "ok":
            self._ended = True
        if row.output:
            step.output = json.loads(row.output)
        if row.image is not None:
            step.image = _image_facts(row.image)
        if entry.folder in self._judged and row.status == "ok":
            rejection = self._rejected[entry.folder].get(row.record_id)
            step.verdict = rejection or "accepted"
            if rejection and entry.folder in self._gates:
                self._ended = True
        self._add_time(step)
        if trace.sample is not None and "run_seed" in entry.component.get("settings", {}):
            if stage is None or stage.entry.component != entry.component:
                step.note = problem or (
                    "the component has changed since this run, so its LLM questions cannot be "
                    "reconstructed"
                )
            else:
                self._add_questions(step, stage, trace.sample)
        return step

    def _has_ended(self, trace: RecordRows) -> bool:
        return self._ended or trace.planned.status != "ok"

    def _add_time(self, step: Step) -> None:
        line = self._lines.get(step.folder)
        if line is None or "seconds" not in line:  # its shard was reopened
            return
        records = line["ok"] + line["rejected"] + line["failed"]
        step.shard_seconds = line["seconds"]
        step.seconds = round(line["seconds"] / records, 9) if records else None
        if "time" in line:
            step.finished = _time(line["time"])

    def _add_questions(self, step: Step, stage: Stage, sample: Sample) -> None:
        """Recover a stage's seeds and LLM questions by rerunning it against stored answers."""
        assert stage.use is not None
        parts: dict[str, Any] = {"source": self._source}
        for use in stage.components:
            parts[use.slot] = build_replayed(use, self._ledger)
        recorder = _SeedRecorder(parts[stage.use.slot])
        try:
            stage.compute([sample], parts | {stage.use.slot: recorder})
            step.seeds = recorder.seeds
            if any(isinstance(part, LLMPlanner) for part in parts.values()):
                self._ledger.clear_lookups()
                stage.compute([sample], parts)
                answers = self._ledger.lookups
                step.questions = [_question(answer) for answer in answers if answer]
                step.unanswered = len(answers) - len(step.questions)
        except Exception as error:  # the image is gone, or the component fails on the record
            step.note = f"its questions cannot be reconstructed: {type(error).__name__}: {error}"


class _SeedRecorder:
    """Stands in for a component: records the seeds that it receives, and computes nothing."""

    def __init__(self, component: Component[Any]) -> None:
        self.name = component.name
        self.seeds: list[int] = []

    def __getattr__(self, method: str) -> Callable[..., list[Problem]]:
        """Any method of a slot: it takes a batch of requests."""
        return self._record

    def _record(self, requests: Sequence[Any], *_: Any) -> list[Problem]:
        self.seeds += [request.seed for request in requests if hasattr(request, "seed")]
        return [Problem(status="failed", reason="nothing was computed") for _ in requests]


def _image_facts(image: bytes) -> dict[str, Any]:
    width, height = decode(image).size
    digest = hashlib.sha256(image).hexdigest()
    return {"bytes": len(image), "width": width, "height": height, "sha256": digest}


def _question(answer: StoredAnswer) -> Question:
    completion = answer.completion
    return Question(
        task=answer.task,
        messages=[(turn.role, turn.content) for turn in answer.conversation.messages],
        seed=answer.conversation.seed,
        answer=completion.text,
        refusal=completion.refusal,
        finish_reason=completion.finish_reason,
        left_out=list(completion.left_out),
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        cost=answer.cost,
        seconds=answer.seconds,
        attempts=answer.attempts,
        time=_time(answer.time),
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
