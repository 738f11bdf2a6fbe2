"""What a training run tells while it learns: lines, curves and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image


class Log:
    """`log.jsonl`, one line a step; `validation/`; and the trackers of the accelerator.

    A run that goes on from a checkpoint forgets the lines of the steps it takes again.
    """

    def __init__(self, out: Path, done: int, accelerator: Accelerator) -> None:
        self._out, self._accelerator = out, accelerator
        self._file: Any = None
        if accelerator.is_main_process:
            self._file = (out / "log.jsonl").open("a+", encoding="utf-8")
            self._forget(done)
            (out / "validation").mkdir(exist_ok=True)
        accelerator.init_trackers(
            "reasonpix", init_kwargs={"tensorboard": {"purge_step": done + 1}}
        )

    def _forget(self, done: int) -> None:
        self._file.seek(0)
        kept = 0
        # Read line by line, since the file is longer than memory should be asked for.
        while line := self._file.readline():
            try:
                if not line.endswith("\n") or json.loads(line)["step"] > done:
                    break
            except ValueError:  # what a power cut left
                break
            kept = self._file.tell()
        self._file.truncate(kept)

    def step(self, done: int, stage: str, loss: float, rate: float, speed: float) -> None:
        """After step `done` of a stage: its loss, learning rate, and examples a second."""
        if self._file:
            values = {"loss": loss, "learning_rate": rate, "examples_per_second": round(speed, 2)}
            self._file.write(json.dumps({"step": done, "stage": stage} | values) + "\n")
            self._file.flush()
            self._accelerator.log(
                {f"{stage}/{name}": value for name, value in values.items()}, done
            )

    def pictures(self, step: int, sheet: Image, instructions: Sequence[str]) -> None:
        """Input, edit and truth in a row for each instruction."""
        name = self._out / "validation" / f"{step:08}"
        sheet.save(name.with_suffix(".png"))
        name.with_suffix(".txt").write_text("".join(f"{line}\n" for line in instructions))
        for tracker in self._accelerator.trackers:
            told = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step, **told)

    def close(self) -> None:
        """No more steps follow."""
        if self._file:
            self._file.close()
        self._accelerator.end_training()
