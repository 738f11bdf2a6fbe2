"""Six no-op stages by distilabel:  python with_distilabel.py RECORDS

Each step is a process of its own; batches of 1,000 instead of the 50 of its defaults, which is
faster. Timed from the first batch that the first step gets to the last that the last step gives.
"""

import sys
import tempfile
import time
from pathlib import Path

# First: it switches off what calls home.
from measured import BATCH, STAGES, emit, records

# isort: split
import distilabel
from distilabel.pipeline import Pipeline
from distilabel.steps import Step, StepInput


class NoOp(Step):
    """Gives each record an empty result, and says when."""

    clock: str

    @property
    def outputs(self) -> list[str]:
        return [self.name]

    def process(self, inputs: StepInput):  # type: ignore[no-untyped-def]
        with open(self.clock, "a") as clock:
            clock.write(f"{time.time()}\n")
        for record in inputs:
            record[self.name] = "{}"
        yield inputs
        with open(self.clock, "a") as clock:
            clock.write(f"{time.time()}\n")


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with Pipeline("six-no-ops", cache_dir=folder) as pipeline:
            before = None
            for number in range(STAGES):
                step = NoOp(
                    name=f"stage_{number}", clock=f"{folder}/{number}", input_batch_size=BATCH
                )
                if before is not None:
                    before >> step
                before = step
        done = pipeline.run(dataset=records(count), dataset_batch_size=BATCH, use_cache=False)
        assert len(done["default"]["train"]) == count
        first, last = (Path(folder, str(n)).read_text().split() for n in (0, STAGES - 1))
    seconds = float(last[-1]) - float(first[0])
    settings = f"a process a step, input_batch_size={BATCH}, no cache"
    emit("distilabel", distilabel.__version__, count, seconds, settings)


if __name__ == "__main__":
    main(int(sys.argv[1]))
