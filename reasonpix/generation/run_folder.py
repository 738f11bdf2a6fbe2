"""The run folder: a plan that only grows, and one file per stage and shard, complete or absent.

```
run/
  recipe.yaml                                  resolved
  plan.json                                    the shards
  stages.json                                  which stage folders are current
  stages/source/<shard>.parquet                the planned rows
  stages/<stage>-<fingerprint>/<shard>.parquet rows of (record_id, status, reason, output, image)
                              <shard>.partial.parquet   rows kept of a reopened shard
  llm.sqlite                                   every raw answer of an LLM, with its cost
  journal.jsonl                                seconds and counts of each shard, for people
  holder                                       the running process
```
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from reasonpix.core.files.ignored import IgnoredCounts
from reasonpix.core.remote_storage import open_storage
from reasonpix.errors import RunError

Status = Literal["ok", "rejected", "failed"]


RowTuple = tuple[str, Status, str, str, bytes | None]
"""The values of a `Row`."""


class Row(NamedTuple):
    """The result of a stage for one record. `output` is JSON, `image` an encoded image."""

    record_id: str
    status: Status
    reason: str = ""
    output: str = ""
    image: bytes | None = None


_SCHEMA = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("output", pa.string(), nullable=False),
        pa.field("image", pa.binary()),
    ]
)
_SUFFIX = ".parquet"
_PARTIAL = ".partial"


class Shard(NamedTuple):
    """A slice of the plan: `name` is the stem of its files."""

    name: str
    rows: int


@dataclass(frozen=True)
class Plan:
    """The records of a run."""

    source: dict[str, Any]
    """The identity of the source."""
    source_options: dict[str, Any]
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    """Whether the source has no further rows."""
    ignored: IgnoredCounts = field(default_factory=IgnoredCounts)
    """What the source ignored, as far as it was listed."""

    @property
    def rows(self) -> int:
        """Records planned."""
        return sum(shard.rows for shard in self.shards)

    def may_grow(self, wanted: float) -> bool:
        """Whether the source must be listed again for `wanted` records.

        A complete listing is repeated only if all records are wanted.
        """
        return wanted > self.rows and (not self.complete or math.isinf(wanted))


class RunFolder:
    """A run folder on disk, or at a URL that fsspec knows. No file is ever half written."""

    def __init__(self, where: str | Path) -> None:
        self.where = str(where)
        """The location as given. It may be a URL with a password: never show it."""
        self.storage = open_storage(where)

    def __str__(self) -> str:
        """The location, without a password."""
        return str(self.storage)

    @property
    def name(self) -> str:
        """The last part of the location."""
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan."""
        return self.storage.exists("plan.json")

    def plan(self) -> Plan:
        """The plan. Raises `RunError` if the folder is not a run."""
        where = f"{self}/plan.json"
        try:
            plan = json.loads(self.storage.read("plan.json"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(
                f"{self} is not a run folder (it has no plan.json); "
                "make one with `reasonpix generate RECIPE --out DIR`"
            ) from error
        except ValueError as error:
            raise RunError(f"{where} is damaged: {error}; start a new run") from error
        try:
            shards = tuple(Shard(*shard) for shard in plan["shards"])
            ignored = IgnoredCounts.from_json(plan["ignored"])
            return Plan(plan["source"], plan["source_options"], shards, plan["complete"], ignored)
        except (KeyError, TypeError) as error:
            raise RunError(f"{where} is not the plan of a run; start a new run") from error

    def shards(self) -> tuple[Shard, ...]:
        """The shards of the plan, in order."""
        return self.plan().shards

    def freeze(self, plan: Plan) -> None:
        """Write the plan. A plan that replaces another one only adds shards."""
        facts = {**vars(plan), "shards": list(plan.shards), "ignored": plan.ignored.as_json()}
        self.storage.write("plan.json", json.dumps(facts).encode() + b"\n")

    def done(self, stage: str) -> set[str]:
        """The names of the shards that `stage` has finished: one directory listing."""
        names = self.storage.names(f"stages/{stage}")
        stems = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        return {stem for stem in stems if not stem.endswith(_PARTIAL)}

    def write(self, stage: str, shard: Shard, rows: Sequence[RowTuple]) -> None:
        """Commit a shard: its file appears complete or not at all."""
        columns = zip(*rows, strict=True) if rows else ((),) * len(_SCHEMA)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
        sink = pa.BufferOutputStream()
        # Dictionary encoding costs time and space where values rarely repeat.
        pq.write_table(
            pa.table(arrays, _SCHEMA), sink, compression="zstd", use_dictionary=["status", "reason"]
        )
        self.storage.write(_path(stage, shard), sink.getvalue().to_pybytes())

    def read(self, stage: str, shard: Shard) -> list[Row]:
        """The rows of a finished shard."""
        table = self._table(_path(stage, shard), _SCHEMA.names)
        columns = (column.to_pylist() for column in table.columns)
        return [Row(*values) for values in zip(*columns, strict=True)]

    def ends(self, stage: str, shard: Shard) -> list[tuple[str, Status, str]]:
        """Record id, status and reason of each row of a finished shard."""
        table = self._table(_path(stage, shard), _SCHEMA.names[:3])
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def outputs(self, stage: str, shard: Shard) -> Iterator[tuple[str, str]]:
        """Record id and output of each row of a finished shard that is ok."""
        table = self._table(_path(stage, shard), ["record_id", "status", "output"])
        for record_id, status, output in zip(*(c.to_pylist() for c in table.columns), strict=True):
            if status == "ok":
                yield record_id, output

    def _table(self, name: str, columns: list[str]) -> pa.Table:
        try:
            file = pq.ParquetFile(pa.BufferReader(self.storage.read(name)))
            # Starting threads takes longer than reading files of this size.
            table = file.read(columns, use_threads=False)
            if table.schema != pa.schema([_SCHEMA.field(column) for column in columns]):
                raise pa.ArrowInvalid("it has other columns")
        except (OSError, pa.ArrowException) as error:
            what = " ".join(str(error).split())
            is_source = name.startswith("stages/source/")
            fix = "start a new run" if is_source else "delete it and run again"
            raise RunError(f"{self}/{name} cannot be read: {what}; {fix}") from error
        return table

    # -- Reopened shards

    def reopen(self, stage: str, shard: Shard) -> None:
        """Mark a shard as unfinished: failed rows are computed again, the others are kept."""
        self.storage.rename(_path(stage, shard), _path(stage, shard, _PARTIAL))
        self.note(stage=stage, shard=shard.name, reopened=True)

    def known(self, stage: str, shard: Shard) -> dict[str, Row]:
        """The kept rows of a reopened shard, by record id."""
        name = _path(stage, shard, _PARTIAL)
        try:
            columns = (c.to_pylist() for c in self._table(name, _SCHEMA.names).columns)
        except RunError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return {}
            raise
        rows = (Row(*values) for values in zip(*columns, strict=True))
        return {row.record_id: row for row in rows if row.status != "failed"}

    def reopened(self, stage: str) -> set[str]:
        """The names of the shards of `stage` that were reopened and not completed."""
        names = self.storage.names(f"stages/{stage}")
        end = _PARTIAL + _SUFFIX
        stems = {name.removesuffix(end) for name in names if name.endswith(end)}
        # If a killed process left both files, the finished one counts.
        return {stem for stem in stems if stem + _SUFFIX not in names}

    def completed(self, stage: str, shard: Shard) -> None:
        """Remove the kept rows: the shard is finished again."""
        self.storage.remove(_path(stage, shard, _PARTIAL))

    # -- The journal

    def note(self, **facts: Any) -> None:
        """Append a line to the journal, with the time."""
        line = {**facts, "time": round(time.time(), 3)}
        self.storage.append("journal.jsonl", json.dumps(line))

    def journal(self) -> Iterator[dict[str, Any]]:
        """The journal's lines; an incomplete last line is skipped."""
        with suppress(FileNotFoundError):
            for line in self.storage.read("journal.jsonl").splitlines():
                with suppress(ValueError):
                    yield json.loads(line)


def _path(stage: str, shard: Shard, kind: str = "") -> str:
    return f"stages/{stage}/{shard.name}{kind}{_SUFFIX}"


def refuse_inside_run(out: Path, verb: str) -> None:
    """Raise `RunError` if the folder to write is a run folder, or lies inside one."""
    place = Path(os.path.abspath(out)).resolve()
    for folder in (place, *place.parents):
        if (folder / "plan.json").is_file() and (folder / "stages").is_dir():
            inside = "is a run folder" if folder == place else f"lies inside the run {folder}"
            raise RunError(f"{out} {inside}; {verb} to a folder outside of it")
