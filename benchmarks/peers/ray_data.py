"""Six no-op stages by Ray Data:  python ray_data.py RECORDS tasks|actors

`tasks`: functions, which Ray Data fuses into one task a block, so that nothing passes between the
stages. `actors`: a class each, as its documentation has it for models; each stage is a process of
its own, here with a third of a core.
"""

import logging
import os
import sys

from measured import BATCH, STAGES, emit, records, timer

# Without this Ray listens on every interface of the machine.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import pyarrow as pa
import ray


def no_op(batch: dict) -> dict:
    return batch


class NoOp:
    def __call__(self, batch: dict) -> dict:
        return batch


def stages(data: ray.data.Dataset, kind: str) -> ray.data.Dataset:
    for _ in range(STAGES):
        if kind == "tasks":
            data = data.map_batches(no_op, batch_size=BATCH)
        else:
            pool = ray.data.ActorPoolStrategy(size=1)
            data = data.map_batches(NoOp, batch_size=BATCH, compute=pool, num_cpus=0.3)
    return data


def main(count: int, kind: str) -> None:
    ray.init(
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
    ray.data.from_arrow(blocks[0].slice(0, 10)).map_batches(no_op).materialize()
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
