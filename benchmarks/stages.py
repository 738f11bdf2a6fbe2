"""Records per second through six no-op stages: reasonpix, every shard durable, against its peers.

    benchmarks/peers/setup.sh .peers                                     # once
    python benchmarks/stages.py [--peers .peers] [--records 20000] [--rounds 3]

Each stage takes each record and has one result for it, an empty one, which is kept. Here that is a
row in a file that was synced to the disk before the next is written; the peers keep it in memory,
or pass it between processes. Planning the records is not timed, nor are the peers' imports and the
start of their processes. Everything runs one after the other, in processes of its own, round by
round; of each the best round counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from reasonpix.generation.engine.local_executor import LocalExecutor
from reasonpix.generation.outcomes import StageEntry
from reasonpix.generation.pipeline import Stage
from reasonpix.generation.run_folder import Plan, Row, RunFolder, Shard
from reasonpix.plugin.components import SourceItem
from reasonpix.plugin.fakes import FakeSource, FakeSourceOptions
from reasonpix.plugin.samples import Sample
from reasonpix.plugin.stages import Result, StageSpec
from reasonpix.plugin.types import Record

STAGES = 6
SHARD = 1000
PEERS = {
    "datasets.map": ("hf_datasets.py", 1 / 3),
    "datasets.map, untouched": ("hf_datasets.py untouched", None),
    "Data-Juicer": ("with_data_juicer.py", 5.0),
    "Data-Juicer, bare": ("with_data_juicer.py bare", None),
    "distilabel": ("with_distilabel.py", 10.0),
    "Ray Data, tasks": ("ray_data.py tasks", None),
    "Ray Data, actors": ("ray_data.py actors", None),
}
"""The script of each, and how many times as fast we want to be."""
NOTHING = Record()


def no_op(samples: Sequence[Sample], _: None) -> list[Result]:
    return [NOTHING for _sample in samples]


def six_stages() -> list[Stage]:
    stages: list[Stage] = []
    for number in range(STAGES):
        spec = StageSpec(name=f"stage-{number}", function=no_op, output=Record)
        entry = StageEntry(spec.name, spec.name, {"use": None}, {})
        stages.append(Stage(spec, None, entry, tuple(stage.entry for stage in stages)))
    return stages


def planned(run: RunFolder, records: int) -> tuple[Shard, ...]:
    """The plan of so many records."""
    shards = []
    for start in range(0, records, SHARD):
        numbers = range(start, min(start + SHARD, records))
        items = {
            f"{n:012x}": SourceItem(
                native_id=str(n), content=f"{n:064x}", caption=f"a bee and a rabbit, {n}"
            )
            for n in numbers
        }
        rows = [Row(name, "ok", output=item.model_dump_json()) for name, item in items.items()]
        shards.append(Shard(f"{len(shards):06d}", len(rows)))
        run.write("source", shards[-1], rows)
    run.freeze(Plan({}, {}, tuple(shards), complete=True))
    return tuple(shards)


def ours(records: int, folder: Path) -> None:
    """Print our own line."""
    run = RunFolder(folder)
    stages = six_stages()
    with closing(FakeSource(FakeSourceOptions())) as source, run.storage.lock():
        shards = planned(run, records)
        todo = [{shard.name for shard in shards} for _ in stages]
        with LocalExecutor(run, source, None) as execute:
            started = time.perf_counter()
            execute.run_stages(stages, todo, shards, lambda done: run.note(**vars(done)))
            seconds = time.perf_counter() - started
    for stage in stages:
        assert sum(len(run.read(stage.entry.folder, shard)) for shard in shards) == records
    rate = round(records / seconds)
    print(json.dumps({"records_per_s": rate, "settings": f"shards of {SHARD}, synced"}))


def measured(command: list[str]) -> dict[str, Any]:
    """The line that a process of its own prints last."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def compare(python: Path, records: int, rounds: int, folder: str | None) -> None:
    scripts = Path(__file__).parent / "peers"
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("reasonpix", *PEERS)}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as work:
            own = [sys.executable, __file__, "--own", work, "--records", str(records)]
            found["reasonpix"].append(measured(own))
        for name, (words, _) in PEERS.items():
            script, *arguments = words.split()
            command = [str(python), str(scripts / script), str(records), *arguments]
            found[name].append(measured(command))
    best = {name: max(f["records_per_s"] for f in facts) for name, facts in found.items()}
    print(f"{records} records, {STAGES} stages, the best of {rounds} rounds")
    print(f"{'':>23} {'records/s':>9}  ours is  {'wanted':>14}  settings")
    for name, facts in found.items():
        ratio = best["reasonpix"] / best[name]
        target = PEERS[name][1] if name in PEERS else None
        wanted = ""
        if target is not None:
            wanted = f"{target:.2g}x {'reached' if ratio >= target else 'missed'}"
        settings = f"{facts[0].get('version', '')} {facts[0]['settings']}".strip()
        print(f"{name:>23} {best[name]:9} {ratio:7.2f}x  {wanted:>14}  {settings}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="see peers/setup.sh")
    parser.add_argument(
        "--folder", help="where our run is written; a temporary folder's by default"
    )
    parser.add_argument("--own", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.own:
        return ours(given.records, given.own)
    python = given.peers / "bin" / "python"
    if not python.exists():
        parser.error(f"no {python}; make it with benchmarks/peers/setup.sh {given.peers}")
    compare(python, given.records, given.rounds, given.folder)


if __name__ == "__main__":
    main()
