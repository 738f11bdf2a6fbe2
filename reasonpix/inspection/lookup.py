"""Single records of a run: the rows that the stages hold of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasonpix.errors import RunError
from reasonpix.generation.outcomes import StageEntry, samples_reaching
from reasonpix.generation.run_folder import Row, RunFolder, Shard
from reasonpix.generation.samples import Sample, Scores
from reasonpix.plugin.components import Source, SourceItem


@dataclass(frozen=True)
class RecordRows:
    """What a run holds of one record."""

    shard: Shard
    planned: Row
    item: SourceItem
    rows: Mapping[str, Row]
    """By the folders of the stages that it reached."""
    sample: Sample | None
    """As it was planned, before any stage; None of a record that the source could not give."""

    def followed(self, entries: Sequence[StageEntry]) -> Sample | None:
        """The sample with all that the stages found out."""
        for entry in entries:
            row = self.rows.get(entry.folder)
            if self.sample is not None and row is not None and row.status == "ok":
                self.sample.take_row(entry.stage, row)
        return self.sample

    def scores(self, entries: Sequence[StageEntry]) -> dict[str, float]:
        """What the filters measured, by `<filter>.<score>`."""
        scores: dict[str, float] = {}
        for entry in entries:
            row = self.rows.get(entry.folder)
            if entry.is_score and row is not None and row.status == "ok":
                values = Scores.model_validate_json(row.output).scores
                use = entry.component["use"]
                scores |= {f"{use}.{name}": value for name, value in values.items()}
        return scores


def read_record_rows(
    run: RunFolder,
    entries: Sequence[StageEntry],
    shard: Shard,
    record_ids: Collection[str],
    source: Source[Any],
) -> Iterator[RecordRows]:
    """What the finished stages among `entries` hold of some records of a shard."""
    samples = {
        sample.record_id: sample
        for sample in samples_reaching(run, (), {}, shard, source)
        if sample.record_id in record_ids
    }
    rows: dict[str, dict[str, Row]] = {}
    for entry in entries:
        if shard.name in run.done(entry.folder):
            for row in run.read(entry.folder, shard):
                if row.record_id in record_ids:
                    rows.setdefault(row.record_id, {})[entry.folder] = row
    for planned in run.read("source", shard):
        if planned.record_id in record_ids:
            yield RecordRows(
                shard,
                planned,
                SourceItem.model_validate_json(planned.output),
                rows.get(planned.record_id, {}),
                samples.get(planned.record_id),
            )


def find_record(run: RunFolder, wanted: str) -> tuple[Shard, str]:
    """The shard and the id of a record: by its id, its name in the source, or how its id begins.

    Raises `RunError` when there is none, or more than one.
    """
    # How the output of a planned row with this name begins: parsing them all would take long.
    name = SourceItem(native_id=wanted, content="").model_dump_json().partition('"content":')[0]
    named: list[tuple[Shard, str]] = []
    begun: list[tuple[Shard, str]] = []
    for shard in run.shards():
        for row in run.read("source", shard):
            if row.record_id == wanted:
                return shard, wanted
            if row.record_id.startswith(wanted):
                begun.append((shard, row.record_id))
            if row.output.startswith(name):
                named.append((shard, row.record_id))
    found = named or begun
    if not found:
        raise RunError(
            f"{run} has no record {wanted!r}: give a record's id, the first digits of one, or its "
            "name in the source; `reasonpix gallery` shows both"
        )
    if len(found) > 1:
        ids = ", ".join(record_id for _, record_id in found[:8])
        more = ", …" if len(found) > 8 else ""
        raise RunError(f"{len(found)} records of {run} are meant by {wanted!r}: {ids}{more}")
    return found[0]
