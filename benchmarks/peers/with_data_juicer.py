"""Six no-op stages by Data-Juicer:  python with_data_juicer.py RECORDS

Batched operators, batches of 1,000, in one process: see `--processes` for more. Its resource
monitor, which is on by default and samples for a second an operator, is off.
"""

import sys

# First: it switches off what calls home.
from measured import BATCH, STAGES, emit, records, results, timer

# isort: split
import data_juicer
from data_juicer.core.data import NestedDataset
from data_juicer.ops.base_op import OPERATORS, Mapper


@OPERATORS.register_module("no_op_mapper")
class NoOpMapper(Mapper):
    _batched_op = True

    def __init__(self, column: str, **options: object) -> None:
        super().__init__(**options)
        self._column = column

    def process_batched(self, samples):  # type: ignore[no-untyped-def]
        samples[self._column] = results(samples)
        return samples


def main(count: int, processes: int) -> None:
    from loguru import logger

    logger.remove()
    data = NestedDataset.from_list(records(count))
    options = {"text_key": "caption", "batch_size": BATCH, "num_proc": processes or None}
    ops = [
        NoOpMapper(f"stage_{number}", auto_op_parallelism=False, **options)
        for number in range(STAGES)
    ]
    with timer() as timed:
        data = data.process(ops, open_monitor=False)
    assert len(data) == count
    settings = f"batched, batch_size={BATCH}, num_proc={processes or None}, no monitor"
    emit("Data-Juicer", data_juicer.__version__, count, timed.seconds, settings)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
