"""Six no-op stages by `datasets.map`:  python hf_datasets.py RECORDS

Batches of 1,000, in memory, in one process: with several, starting them and writing their results
for one another takes longer than these stages.
"""

import sys

from measured import BATCH, STAGES, emit, records, timer

import datasets


def no_op(batch: dict[str, list[str]]) -> dict[str, list[str]]:
    return batch


def main(count: int) -> None:
    datasets.disable_progress_bars()
    datasets.disable_caching()
    data = datasets.Dataset.from_list(records(count))
    data.select(range(10)).map(no_op, batched=True)
    with timer() as timed:
        for _ in range(STAGES):
            data = data.map(no_op, batched=True, batch_size=BATCH, keep_in_memory=True)
    assert len(data) == count
    settings = f"batched, batch_size={BATCH}, keep_in_memory"
    emit("datasets.map", datasets.__version__, count, timed.seconds, settings)


if __name__ == "__main__":
    main(int(sys.argv[1]))
