"""Six no-op stages by Ray Data:  python ray_data.py RECORDS tasks|actors

`tasks`: functions, which Ray Data fuses into one task a block, so that nothing passes between the
stages. `actors`: a class each, as its documentation has it for models; each stage is a process of
its own, here with a third of a core.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

# First: it switches off what calls home.
from measured import BATCH, STAGES, emit, records, results, timer

# isort: split
import pyarrow as pa
import ray


class NoOp:
    def __init__(self, number: int) -> None:
        self._column = f"stage_{number}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, self._column: results(batch)}


def function(number: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    no_op = NoOp(number)
    return lambda batch: no_op(batch)


def stages(data: ray.data.Dataset, kind: str) -> ray.data.Dataset:
    for number in range(STAGES):
        if kind == "tasks":
            data = data.map_batches(function(number), batch_size=BATCH)
        else:
            pool = ray.data.ActorPoolStrategy(size=1)
            arguments = {"fn_constructor_args": (number,), "compute": pool, "num_cpus": 0.3}
            data = data.map_batches(NoOp, batch_size=BATCH, **arguments)
    return data


def main(count: int, kind: str) -> None:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level=logging.ERROR,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    table = pa.Table.from_pylist(records(count))
    blocks = [table.slice(start, BATCH) for start in range(0, count, BATCH)]
    # The first use starts worker processes.
    ray.data.from_arrow(blocks[0].slice(0, 10)).map_batches(function(0)).materialize()
    with timer() as timed:
        done = stages(ray.data.from_arrow(blocks), kind).materialize()
    assert done.count() == count
    settings = {
        "tasks": f"functions, fused, batch_size={BATCH}",
        "actors": f"an actor a stage, batch_size={BATCH}, num_cpus=0.3",
    }
    emit(f"Ray Data, {kind}", ray.__version__, count, timed.seconds, settings[kind])
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
