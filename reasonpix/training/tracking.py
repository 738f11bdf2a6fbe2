"""Logs of a training run: a line for each step, curves, and validation images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image


class TrainingLog:
    """Writes `log.jsonl`, `validation/` and the accelerator's trackers, in the main process.

    A run resumed after step `done` drops the lines of later steps, which it takes again.
    """

    def __init__(self, out: Path, done: int, accelerator: Accelerator) -> None:
        self._out, self._accelerator = out, accelerator
        self._file: Any = None
        if accelerator.is_main_process:
            self._file = (out / "log.jsonl").open("a+", encoding="utf-8")
            self._drop_after(done)
            (out / "validation").mkdir(exist_ok=True)
        accelerator.init_trackers(
            "reasonpix", init_kwargs={"tensorboard": {"purge_step": done + 1}}
        )

    def _drop_after(self, done: int) -> None:
        self._file.seek(0)
        end = 0
        while line := self._file.readline():
            try:
                if not line.endswith("\n") or json.loads(line)["step"] > done:
                    break
            except ValueError:  # after a power cut
                break
            end = self._file.tell()
        self._file.truncate(end)

    def step(self, done: int, stage: str, loss: float, rate: float, speed: float) -> None:
        """Log step `done`: loss, learning rate `rate`, and `speed` in examples per second."""
        if self._file:
            values = {"loss": loss, "learning_rate": rate, "examples_per_second": round(speed, 2)}
            self._file.write(json.dumps({"step": done, "stage": stage} | values) + "\n")
            self._file.flush()
            self._accelerator.log(
                {f"{stage}/{name}": value for name, value in values.items()}, done
            )

    def images(self, step: int, sheet: Image, instructions: Sequence[str]) -> None:
        """Log a sheet with a row of input, edit and ground truth for each instruction."""
        name = self._out / "validation" / f"{step:08}"
        sheet.save(name.with_suffix(".png"))
        name.with_suffix(".txt").write_text("".join(f"{line}\n" for line in instructions))
        for tracker in self._accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step, **options)

    def close(self) -> None:
        """Finish the log and the trackers."""
        if self._file:
            self._file.close()
        self._accelerator.end_training()
