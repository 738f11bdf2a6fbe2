"""Look up single records of a run: the rows that its stages stored for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasonpix.errors import RunError
from reasonpix.generation.outcomes import StageEntry, samples_reaching
from reasonpix.generation.run_folder import Row, RunFolder, Shard
from reasonpix.plugin.components import Source, SourceItem
from reasonpix.plugin.samples import Sample, Scores


@dataclass(frozen=True)
class RecordRows:
    """What a run stores of one record."""

    shard: Shard
    planned: Row
    item: SourceItem
    rows: Mapping[str, Row]
    """By folder, for each stage that it reached."""
    sample: Sample | None
    """As planned, before any stage; None if the source could not provide it."""

    def final_sample(self, entries: Sequence[StageEntry]) -> Sample | None:
        """The sample with the results of all stages."""
        for entry in entries:
            row = self.rows.get(entry.folder)
            if self.sample is None or row is None or entry.spec is None:
                continue
            if row.status == "ok":
                self.sample.add_stored(entry.spec, row.output, row.image)
        return self.sample

    def scores(self, entries: Sequence[StageEntry]) -> dict[str, float]:
        """The scores that filters measured, by `<filter>.<score>`."""
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
    """What the finished stages among `entries` store of some records of a shard."""
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


def find_record(run: RunFolder, reference: str) -> tuple[Shard, str]:
    """The shard and the id of a record, by its id, a prefix of it, or its name in the source.

    Raises `RunError` if no record matches, or several do.
    """
    # The start of the JSON of a planned row with this name. Parsing all rows would be slow.
    named_json = (
        SourceItem(native_id=reference, content="").model_dump_json().partition('"content":')[0]
    )
    named: list[tuple[Shard, str]] = []
    prefixed: list[tuple[Shard, str]] = []
    for shard in run.shards():
        for row in run.read("source", shard):
            if row.record_id == reference:
                return shard, reference
            if row.record_id.startswith(reference):
                prefixed.append((shard, row.record_id))
            if row.output.startswith(named_json):
                named.append((shard, row.record_id))
    matches = named or prefixed
    if not matches:
        raise RunError(
            f"{run} has no record {reference!r}: give a record id, a prefix of one, or a name in "
            "the source; `reasonpix gallery` shows both"
        )
    if len(matches) > 1:
        ids = ", ".join(record_id for _, record_id in matches[:8])
        more = ", …" if len(matches) > 8 else ""
        raise RunError(f"{reference!r} matches {len(matches)} records of {run}: {ids}{more}")
    return matches[0]
