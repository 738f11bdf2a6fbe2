"""How each record of a run ended, read from the run folder alone; filters are applied here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from reasonpix import plugins
from reasonpix.errors import RunError
from reasonpix.images import UndecodableImage
from reasonpix.run import Row, RunFolder, Shard, Status, write_atomically
from reasonpix.samples import Sample, Scores
from reasonpix.slots import Scorer, Source, SourceItem


@dataclass(frozen=True)
class StageEntry:
    """A line of `stages.json`: which folder holds a stage's current results, and what made them."""

    stage: str
    folder: str
    component: dict[str, Any]
    """The identity of the component; `use` is None where there is none."""
    options: dict[str, Any]

    @property
    def is_score(self) -> bool:
        """Whether it measures edits for a filter."""
        return self.stage.startswith("score-")


def write_stages(run: RunFolder, entries: Sequence[StageEntry]) -> None:
    """Say which stage folders are current."""
    body = json.dumps([vars(entry) for entry in entries], indent=1)
    write_atomically(run.root / "stages.json", body.encode() + b"\n")


def read_stages(run: RunFolder) -> list[StageEntry]:
    """The current stages. Raises `RunError` unless all of them are finished."""
    shards = {shard.name for shard in run.shards()}
    path = run.root / "stages.json"
    try:
        entries = [StageEntry(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read: {error}; run `reasonpix generate` again to write it"
        ) from error
    for entry in entries:
        missing = shards - run.done(entry.folder)
        if missing:
            raise RunError(
                f"{run.root} is not finished: stage {entry.stage} lacks {len(missing)} of "
                f"{len(shards)} shards; run `reasonpix generate` again to finish it"
            )
    return entries


def _checked(read: Callable[[str], bytes], native_id: str, content: str) -> bytes:
    """The bytes that were planned; an image that changed since is not taken for it."""
    data = read(native_id)
    if hashlib.sha256(data).hexdigest() != content:
        raise UndecodableImage("the file changed since the run was planned; start a new run")
    return data


def _sample(planned: Row, source: Source[Any]) -> Sample:
    item = SourceItem.model_validate_json(planned.output)
    load = partial(_checked, source.read, item.native_id, item.content)
    edited = (
        partial(_checked, source.read_edited, item.native_id, item.pair.content)
        if item.pair
        else None
    )
    return Sample(planned.record_id, item, load, load_edited=edited)


Verdicts = Mapping[tuple[str, str], str]
"""Why a filter rejects a record, by (stage folder, record id)."""


def samples_reaching(
    run: RunFolder,
    earlier: Sequence[StageEntry],
    verdicts: Verdicts,
    shard: Shard,
    source: Source[Any],
) -> Iterator[Sample]:
    """The samples of a shard that all `earlier` stages and their `verdicts` let through."""
    rows = {entry.folder: _by_id(run.read(entry.folder, shard)) for entry in earlier}
    for planned in run.read("source", shard):
        if planned.status != "ok":
            continue
        sample = _sample(planned, source)
        for entry in earlier:
            row = rows[entry.folder][planned.record_id]
            if row.status != "ok" or (entry.folder, planned.record_id) in verdicts:
                break
            sample = sample.after(entry.stage, row)
        else:
            yield sample


def _by_id(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.record_id: row for row in rows}


@dataclass(frozen=True)
class Outcome:
    """The end of a record: `ok` when it is part of the dataset, else where and why it ended."""

    sample: Sample
    status: Status
    stage: str
    reason: str
    scores: Mapping[str, float] = field(default_factory=dict)


def outcomes(run: RunFolder) -> Iterator[Outcome]:
    """Every planned record, in the order of the plan, with its end and its scores."""
    entries = read_stages(run)
    source = _source(run)
    rejected = verdicts(run, entries)
    for shard in run.shards():
        rows = {entry.folder: _by_id(run.read(entry.folder, shard)) for entry in entries}
        for planned in run.read("source", shard):
            yield _outcome(planned, entries, rows, rejected, source)


def _source(run: RunFolder) -> Source[Any]:
    plan = run.plan()
    cls = plugins.find("source", plan["asked"]["source"]["use"])
    source = cls(cls.Options.model_validate(plan["source_options"]))
    assert isinstance(source, Source)
    source.load()
    return source


def _outcome(
    planned: Row,
    entries: Sequence[StageEntry],
    rows: Mapping[str, Mapping[str, Row]],
    verdicts: Verdicts,
    source: Source[Any],
) -> Outcome:
    sample = _sample(planned, source)
    if planned.status != "ok":
        return Outcome(sample, planned.status, "source", planned.reason)
    scores: dict[str, float] = {}
    ended: tuple[Status, str, str] = ("ok", "", "")
    for entry in entries:
        row = rows[entry.folder].get(planned.record_id)
        if row is None:
            break  # it had ended before
        if row.status != "ok":
            if ended[0] == "ok":
                ended = (row.status, entry.stage, row.reason)
            continue
        sample = sample.after(entry.stage, row)
        if entry.is_score:
            values = Scores.model_validate_json(row.output).scores
            prefix = entry.component["use"]
            scores |= {f"{prefix}.{name}": value for name, value in values.items()}
            reason = verdicts.get((entry.folder, planned.record_id))
            if reason and ended[0] == "ok":
                ended = ("rejected", entry.stage, reason)
    return Outcome(sample, *ended, scores=scores)


def verdicts(run: RunFolder, entries: Sequence[StageEntry]) -> Verdicts:
    """What the filters among `entries` reject of the whole run, by its stored scores."""
    rejected: dict[tuple[str, str], str] = {}
    for entry in entries:
        if not entry.is_score:
            continue
        scored = [
            row
            for shard in run.shards()
            for row in run.read(entry.folder, shard)
            if row.status == "ok"
        ]
        cls = plugins.find("filter", entry.component["use"])
        scorer = cls(cls.Options.model_validate(entry.options))
        assert isinstance(scorer, Scorer)
        reasons = scorer.reject([Scores.model_validate_json(row.output).scores for row in scored])
        for row, reason in zip(scored, reasons, strict=True):
            if reason:
                rejected[entry.folder, row.record_id] = reason
    return rejected


@dataclass(frozen=True)
class Endings:
    """How many records each stage let through, in order, and why the others ended."""

    stages: list[tuple[str, Counter[str]]]
    """For each stage how many records ended ok, rejected or failed there."""
    examples: Mapping[tuple[str, Status], str]
    """Of each (stage, status) in which records ended, the reason of the first of them."""


def endings(run: RunFolder) -> Endings:
    """The endings of all records, in one walk over the run."""
    counts = {entry.stage: Counter[str]() for entry in read_stages(run)}
    counts = {"source": Counter[str](), **counts}
    examples: dict[tuple[str, Status], str] = {}
    for outcome in outcomes(run):
        for stage, counter in counts.items():
            if stage == outcome.stage:
                counter[outcome.status] += 1
                examples.setdefault((stage, outcome.status), outcome.reason)
                break
            counter["ok"] += 1
    return Endings(list(counts.items()), examples)


def funnel(run: RunFolder) -> list[tuple[str, Counter[str]]]:
    """For each stage, in order, how many records ended ok, rejected or failed there."""
    return endings(run).stages
