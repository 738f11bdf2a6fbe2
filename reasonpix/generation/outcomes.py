"""How each record of a run ended, read from the run folder alone. Filters are applied here."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, overload

from reasonpix.core.images import UndecodableImage
from reasonpix.errors import RunError
from reasonpix.generation.chains import declared
from reasonpix.generation.run_folder import Row, RunFolder, Shard, Status
from reasonpix.generation.run_recipe import find_component
from reasonpix.plugin import registry
from reasonpix.plugin.components import Scorer, Source, SourceItem
from reasonpix.plugin.samples import Sample, SampleImage, Scores
from reasonpix.plugin.stages import StageSpec


@dataclass(frozen=True)
class StageEntry:
    """An entry of `stages.json`: the folder of a stage's current results, and what made them."""

    stage: str
    folder: str
    component: dict[str, Any]
    """The fingerprint facts of the component; `use` is None if there is none."""
    options: dict[str, Any]

    @property
    def is_score(self) -> bool:
        """Whether it measures edits for a filter."""
        return self.stage.startswith("score-")

    @cached_property
    def spec(self) -> StageSpec | None:
        """Its declaration; None for filters, and without the plugin that adds the stage."""
        return None if self.is_score else declared(self.stage)


def write_stages(run: RunFolder, entries: Sequence[StageEntry]) -> None:
    """Write which stage folders are current."""
    body = json.dumps([asdict(entry) for entry in entries], indent=1)
    run.storage.write("stages.json", body.encode() + b"\n")


def current_stages(run: RunFolder) -> list[StageEntry]:
    """Read which stages are current, finished or not."""
    try:
        return [StageEntry(**entry) for entry in json.loads(run.storage.read("stages.json"))]
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"{run}/stages.json cannot be read: {error}; run `reasonpix generate` again to write it"
        ) from error


def read_stages(run: RunFolder) -> list[StageEntry]:
    """Read the current stages. Raises `RunError` unless all are finished."""
    shards = {shard.name for shard in run.shards()}
    entries = current_stages(run)
    for entry in entries:
        missing = shards - run.done(entry.folder)
        if missing:
            raise RunError(
                f"{run} is not finished: stage {entry.stage} lacks {len(missing)} of "
                f"{len(shards)} shards; run `reasonpix generate` again to finish it"
            )
    return entries


def _checked(read: Callable[[str], bytes], native_id: str, content: str) -> bytes:
    """The planned bytes. Raises `UndecodableImage` if the image has changed since."""
    data = read(native_id)
    if hashlib.sha256(data).hexdigest() != content:
        raise UndecodableImage("the file changed since the run was planned; start a new run")
    return data


def _sample(planned: Row, source: Source[Any]) -> Sample:
    item = SourceItem.model_validate_json(planned.output)
    images = {"input": SampleImage(partial(_checked, source.read, item.native_id, item.content))}
    if item.pair:
        load = partial(_checked, source.read_edited, item.native_id, item.pair.content)
        images["paired"] = SampleImage(load)
    return Sample(planned.record_id, item, images)


Verdicts = Mapping[str, Mapping[str, str]]
"""Why a filter rejects a record, by stage folder and record id."""


def samples_reaching(
    run: RunFolder,
    earlier: Sequence[StageEntry],
    verdicts: Verdicts,
    shard: Shard,
    source: Source[Any],
) -> Iterator[Sample]:
    """The samples of a shard that passed all `earlier` stages and their `verdicts`."""
    rows = {entry.folder: _by_id(run.read(entry.folder, shard)) for entry in earlier}
    specs = {entry.folder: entry.spec for entry in earlier}
    for planned in run.read("source", shard):
        if planned.status != "ok":
            continue
        sample = _sample(planned, source)
        for entry in earlier:
            row = rows[entry.folder].get(planned.record_id)
            if row is None:
                raise _missing(run, entry, shard, planned.record_id)
            if row.status != "ok" or planned.record_id in verdicts.get(entry.folder, ()):
                break
            if (spec := specs[entry.folder]) is not None:
                sample.add_stored(spec, row.output, row.image)
        else:
            yield sample


def _missing(run: RunFolder, entry: StageEntry, shard: Shard, record_id: str) -> RunError:
    """A stage lacks a record that reaches it: an earlier stage was computed again."""
    return RunError(
        f"{run}/stages/{entry.folder}/{shard.name}.parquet lacks record {record_id}; "
        "delete it and run `reasonpix generate` again"
    )


def _by_id(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.record_id: row for row in rows}


@dataclass(frozen=True)
class Outcome:
    """How a record ended: `ok` if it is in the dataset, else the stage and the reason."""

    sample: Sample
    status: Status
    stage: str
    reason: str
    scores: Mapping[str, float] = field(default_factory=dict)


def read_outcomes(run: RunFolder) -> Iterator[Outcome]:
    """Every planned record, in the order of the plan, with its outcome and its scores."""
    entries = read_stages(run)
    rejected = verdicts(run, entries)
    source = source_of(run)
    try:
        for shard in run.shards():
            rows = {entry.folder: _by_id(run.read(entry.folder, shard)) for entry in entries}
            for planned in run.read("source", shard):
                yield _outcome(run, shard, planned, entries, rows, rejected, source)
    finally:
        source.close()


def source_of(run: RunFolder) -> Source[Any]:
    """The source that the run was planned from, loaded."""
    plan = run.plan()
    cls = find_component(run, "source", plan.source["use"])
    source = cls(cls.Options.model_validate(plan.source_options))
    assert isinstance(source, Source)
    source.load()
    return source


def _outcome(
    run: RunFolder,
    shard: Shard,
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
    end: tuple[Status, str, str] = ("ok", "", "")
    for entry in entries:
        row = rows[entry.folder].get(planned.record_id)
        if row is None:
            if end[0] == "ok":
                raise _missing(run, entry, shard, planned.record_id)
            break
        if row.status != "ok":
            if end[0] == "ok":
                end = (row.status, entry.stage, row.reason)
            continue
        if entry.spec is not None:
            sample.add_stored(entry.spec, row.output, row.image)
        if entry.is_score:
            values = Scores.model_validate_json(row.output).scores
            prefix = entry.component["use"]
            scores |= {f"{prefix}.{name}": value for name, value in values.items()}
            reason = verdicts.get(entry.folder, {}).get(planned.record_id)
            if reason and end[0] == "ok":
                end = ("rejected", entry.stage, reason)
    return Outcome(sample, *end, scores=scores)


class ScoreTable(Sequence[Mapping[str, float]]):
    """One scorer's scores of a whole run, stored as columns: a run may have 400,000 records."""

    def __init__(self, rows: Iterable[Mapping[str, float]]) -> None:
        self._columns: dict[str, array[float]] = {}
        self._length = 0
        for scores in rows:
            for name, value in scores.items():
                column = self._columns.setdefault(name, array("d"))
                column.extend([math.nan] * (self._length - len(column)))  # scores are finite
                column.append(value)
            self._length += 1

    @property
    def names(self) -> list[str]:
        """The names of the scores."""
        return list(self._columns)

    def __len__(self) -> int:
        """The number of records."""
        return self._length

    @overload
    def __getitem__(self, index: int) -> Mapping[str, float]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, float]]: ...

    def __getitem__(
        self, index: int | slice
    ) -> Mapping[str, float] | Sequence[Mapping[str, float]]:
        """The scores of one record."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        values = {name: column[index : index + 1] for name, column in self._columns.items()}
        return {name: v[0] for name, v in values.items() if v and not math.isnan(v[0])}


def scores_of(run: RunFolder, entry: StageEntry) -> ScoreTable:
    """The stored scores of a filter's stage, for all records that it could score."""
    return ScoreTable(json.loads(output)["scores"] for _, output in _measured(run, entry))


def _measured(run: RunFolder, entry: StageEntry) -> Iterator[tuple[str, str]]:
    return (row for shard in run.shards() for row in run.outputs(entry.folder, shard))


def scorer_of(entry: StageEntry, **options: Any) -> Scorer[Any]:
    """The filter of a stage; `options` override the stored ones."""
    cls = registry.find("filter", entry.component["use"])
    scorer = cls(cls.Options.model_validate({**entry.options, **options}))
    assert isinstance(scorer, Scorer)
    return scorer


def verdicts(run: RunFolder, entries: Sequence[StageEntry]) -> Verdicts:
    """The records of the run that the filters among `entries` reject by their stored scores."""
    rejected: dict[str, dict[str, str]] = {}
    for entry in entries:
        if entry.is_score:
            name, table = entry.component["use"], scores_of(run, entry)
            find_component(run, "filter", name)  # says which package is missing
            try:
                reasons = scorer_of(entry).reject(table)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise RunError(f"filter {name!r} cannot decide: {reason}") from error
            if len(reasons) != len(table):
                raise RunError(
                    f"filter {name!r} gave {len(reasons)} verdicts on {len(table)} records; "
                    "a filter must give one for each, in the same order"
                )
            # The files are read a second time, so that not all ids are in memory.
            by_id = zip(_measured(run, entry), reasons, strict=True)
            rejected[entry.folder] = {record_id: why for (record_id, _), why in by_id if why}
    return rejected


class Ending(NamedTuple):
    """Where and why a record ended. An accepted record has status ok and the last stage."""

    shard: Shard
    record_id: str
    status: Status
    stage: str
    reason: str


def endings_of(
    run: RunFolder, entries: Sequence[StageEntry], rejected: Verdicts
) -> Iterator[Ending]:
    """Every planned record, shard by shard, without reading outputs and images."""
    for shard in run.shards():
        going: list[str] = []
        for record_id, status, reason in run.ends("source", shard):
            if status == "ok":
                going.append(record_id)
            else:
                yield Ending(shard, record_id, status, "source", reason)
        for entry in entries:
            rows = {row[0]: row for row in run.ends(entry.folder, shard)} if going else {}
            reasons = rejected.get(entry.folder, {})
            reached, going = going, []
            for record_id in reached:
                if record_id not in rows:
                    raise _missing(run, entry, shard, record_id)
                _, status, reason = rows[record_id]
                if status == "ok" and record_id in reasons:
                    status, reason = "rejected", reasons[record_id]
                if status == "ok":
                    going.append(record_id)
                else:
                    yield Ending(shard, record_id, status, entry.stage, reason)
        for record_id in going:
            yield Ending(shard, record_id, "ok", entries[-1].stage, "")


@dataclass(frozen=True)
class OutcomeCounts:
    """How many records passed each stage, in order, and why the others ended."""

    stages: list[tuple[str, Counter[str]]]
    """How many records ended ok, rejected or failed in each stage."""
    examples: Mapping[tuple[str, Status], str]
    """The reason of the first record that ended with each (stage, status)."""

    @property
    def accepted(self) -> int:
        """Records that are part of the dataset."""
        return self.stages[-1][1]["ok"]

    @property
    def total(self) -> int:
        """All records."""
        return sum(self.stages[0][1].values())


def outcome_counts(run: RunFolder) -> OutcomeCounts:
    """Count how all records ended, in one pass over the statuses."""
    entries = read_stages(run)
    ended = Counter[tuple[str, Status]]()
    examples: dict[tuple[str, Status], str] = {}
    for ending in endings_of(run, entries, verdicts(run, entries)):
        ended[ending.stage, ending.status] += 1
        if ending.status != "ok":
            examples.setdefault((ending.stage, ending.status), ending.reason)
    stages: list[tuple[str, Counter[str]]] = []
    going = ended.total()
    for stage in ("source", *(entry.stage for entry in entries)):
        counts = Counter[str](rejected=ended[stage, "rejected"], failed=ended[stage, "failed"])
        going -= counts.total()
        stages.append((stage, counts + Counter(ok=going)))
    return OutcomeCounts(stages, examples)


def funnel(run: RunFolder) -> list[tuple[str, Counter[str]]]:
    """How many records ended ok, rejected or failed in each stage, in order."""
    return outcome_counts(run).stages
