"""Six no-op stages by Data-Juicer:  python with_data_juicer.py RECORDS [bare]

Batched operators and its defaults: batches of 1,000, as many processes as it finds right, and the
monitor of resources that `dj-process` has on. `bare` switches off monitor and processes; what is
left is a call of `datasets.map` in memory.
"""

import sys

# First: it switches off what calls home.
from measured import STAGES, emit, records, results, timer

# isort: split
import data_juicer
from data_juicer.core.data import NestedDataset
from data_juicer.ops.base_op import OPERATORS, Mapper
from loguru import logger


@OPERATORS.register_module("no_op_mapper")
class NoOpMapper(Mapper):
    _batched_op = True

    def __init__(self, column: str, **options: object) -> None:
        super().__init__(**options)
        self._column = column

    def process_batched(self, samples):  # type: ignore[no-untyped-def]
        samples[self._column] = results(samples)
        return samples


def main(count: int, bare: bool) -> None:
    logger.remove()
    options: dict[str, object] = {"auto_op_parallelism": False} if bare else {}
    ops = [NoOpMapper(f"stage_{number}", text_key="caption", **options) for number in range(STAGES)]
    # The first call imports what later ones find there.
    NestedDataset.from_list(records(10)).process(ops[:1], open_monitor=False)
    data = NestedDataset.from_list(records(count))
    with timer() as timed:
        data = data.process(ops, open_monitor=not bare)
    assert len(data) == count
    processes = ops[0].runtime_np()
    settings = f"batched, batch_size={ops[0].batch_size}, num_proc={processes}"
    if bare:
        emit(
            "Data-Juicer, bare",
            data_juicer.__version__,
            count,
            timed.seconds,
            f"{settings}, no monitor",
        )
    else:
        emit("Data-Juicer", data_juicer.__version__, count, timed.seconds, settings)


if __name__ == "__main__":
    main(int(sys.argv[1]), "bare" in sys.argv)
