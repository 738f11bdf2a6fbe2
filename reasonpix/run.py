"""The run folder: a frozen plan, and for each stage one file a shard that is complete or absent.

```
run/
  recipe.yaml                                  resolved
  plan.json                                    seed, shards
  stages/<stage>-<fingerprint>/<shard>.parquet rows of (record_id, status, reason, output, image)
  llm.sqlite                                   every raw answer of an LLM, and what it cost
  journal.jsonl                                seconds and counts of each shard, for people
  holder                                       locked by the process that is at work, and its name
```
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from reasonpix.errors import RunError

Status = Literal["ok", "rejected", "failed"]


@dataclass(frozen=True)
class Row:
    """What a stage has to say of one record. `output` is JSON; `image` an encoded image."""

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


def fingerprint(facts: Any) -> str:
    """Twelve hex digits that change when `facts` (JSON values) do."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def seed_of(*parts: str | int) -> int:
    """A seed in [0, 2**63) that follows from `parts` alone."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Shard:
    """A slice of the plan: `name` is the stem of its files."""

    name: str
    rows: int


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. Files appear by atomic rename, so what is there is complete."""

    root: Path

    @property
    def plan_path(self) -> Path:
        """Where the frozen plan is."""
        return self.root / "plan.json"

    @property
    def llm_path(self) -> Path:
        """Where the raw answers of LLMs are."""
        return self.root / "llm.sqlite"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process; it is let go when the process ends, however it does.

        Raises `RunError` when another process holds it: two would pay for the same answers.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "holder").open("a+", encoding="utf-8") as holder:
            try:
                fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder.seek(0)
                who = holder.read().strip() or "another process"
                raise RunError(
                    f"{self.root} is in use by {who}; wait for it, or stop it first"
                ) from error
            holder.truncate(0)
            holder.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            holder.flush()
            yield
            holder.truncate(0)

    def plan(self) -> dict[str, Any]:
        """The frozen plan. Raises `RunError` when the folder is no run."""
        try:
            plan: dict[str, Any] = json.loads(self.plan_path.read_text())
        except FileNotFoundError as error:
            raise RunError(
                f"{self.root} is no run folder (it has no plan.json); "
                "make one with `reasonpix generate RECIPE --out DIR`"
            ) from error
        except ValueError as error:
            raise RunError(f"{self.plan_path} is damaged: {error}; start a new run") from error
        if not isinstance(plan, dict) or not {"asked", "source_options", "shards"} <= set(plan):
            raise RunError(f"{self.plan_path} is no plan of a run; start a new run")
        return plan

    def shards(self) -> list[Shard]:
        """The shards of the plan, in order."""
        return [Shard(**shard) for shard in self.plan()["shards"]]

    def freeze(self, plan: dict[str, Any]) -> None:
        """Write the plan. It is not changed afterwards."""
        write_atomically(self.plan_path, json.dumps(plan, indent=1).encode() + b"\n")

    def shard_path(self, stage: str, shard: Shard) -> Path:
        """The file of a shard of `stage` (its name with its fingerprint)."""
        return self.root / "stages" / stage / f"{shard.name}.parquet"

    def done(self, stage: str) -> set[str]:
        """The names of the shards that `stage` has finished: one directory listing."""
        folder = self.root / "stages" / stage
        return {path.stem for path in folder.glob("*.parquet")} if folder.is_dir() else set()

    def write(self, stage: str, shard: Shard, rows: Sequence[Row]) -> None:
        """Commit a shard: its file appears complete or not at all."""
        table = pa.Table.from_pylist([vars(row) for row in rows], schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_atomically(self.shard_path(stage, shard), sink.getvalue().to_pybytes())

    def read(self, stage: str, shard: Shard) -> list[Row]:
        """The rows of a finished shard."""
        path = self.shard_path(stage, shard)
        try:
            return [Row(**row) for row in pq.read_table(path, schema=_SCHEMA).to_pylist()]
        except (OSError, pa.ArrowException) as error:
            what = " ".join(str(error).split())
            raise RunError(f"{path} cannot be read: {what}; delete it and run again") from error

    def note(self, **facts: Any) -> None:
        """Append a line to the journal."""
        with (self.root / "journal.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(facts) + "\n")

    def journal(self) -> Iterator[dict[str, Any]]:
        """The journal's lines; a torn last line is passed over."""
        with suppress(FileNotFoundError), (self.root / "journal.jsonl").open() as journal:
            for line in journal:
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or does not exist, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
