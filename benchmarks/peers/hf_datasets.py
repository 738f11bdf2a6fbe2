"""Six no-op stages by `datasets.map`:  python hf_datasets.py RECORDS [untouched]

Batches of 1,000, in memory, in one process: with several, starting them and handing over their
results takes longer than these stages. `untouched` stages give back the batch that they got without
a look at it, and datasets then makes no values of it at all.
"""

import sys
from collections.abc import Callable
from typing import Any

# First: it switches off what calls home.
from measured import BATCH, STAGES, emit, records, results, timer

# isort: split
import datasets


def stage(number: int, untouched: bool) -> Callable[[Any], Any]:
    if untouched:
        return lambda batch: batch
    return lambda batch: {f"stage_{number}": results(batch)}


def main(count: int, untouched: bool) -> None:
    datasets.disable_progress_bars()
    datasets.disable_caching()
    data = datasets.Dataset.from_list(records(count))
    data.select(range(10)).map(stage(0, untouched), batched=True)
    with timer() as timed:
        for number in range(STAGES):
            function = stage(number, untouched)
            data = data.map(function, batched=True, batch_size=BATCH, keep_in_memory=True)
    assert len(data) == count
    peer = "datasets.map, untouched" if untouched else "datasets.map"
    settings = f"batched, batch_size={BATCH}, keep_in_memory"
    emit(peer, datasets.__version__, count, timed.seconds, settings)


if __name__ == "__main__":
    main(int(sys.argv[1]), "untouched" in sys.argv)
