"""What a training run reports: steps, curves, validation images, and rows that were left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image

from reasonpix.core.atomic import write_atomically
from reasonpix.training.recipe import TrainingRecipe

_NAMED_IN_CARD = 200
"""How many rows and views a model's card names at most."""


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


@dataclass(frozen=True)
class LeftOut:
    """The recipe's data that the model was not trained on."""

    rows: Mapping[str, str]
    """Rows and the reason for each."""
    views: Sequence[str]
    """Views that show no edit, of rows with other views that do."""

    def write(self, file: Path) -> None:
        """Write a line of JSON for each row and view."""
        entries = [{"row": row, "reason": reason} for row, reason in self._reasons().items()]
        text = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)
        write_atomically(file, text.encode())

    def card(self, recipe: TrainingRecipe, examples: int) -> str:
        """`README.md` of the trained model, which says what it was trained on."""
        data = recipe.data
        paths = [data.path] if isinstance(data.path, str) else data.path
        facts = {
            "start": f"`{recipe.model.model}` (`init: {recipe.model.init}`)",
            "encoder": f"`{recipe.encoder.name}`",
            "data": ", ".join(f"`{path}`" for path in paths) + f", split `{data.split}`",
            "examples": f"{examples} (a row counts once for each instruction)",
            "images": f"{data.resolution} pixels, `fit: {data.fit}`, `crops: {data.crops}`, "
            f"`flip: {str(data.flip).lower()}`",
            "steps": f"{recipe.total_steps} of {recipe.batch_size} examples",
        }
        reasons = list(self._reasons().items())
        lines = [f"- {row}: {reason}" for row, reason in reasons[:_NAMED_IN_CARD]]
        if len(reasons) > _NAMED_IN_CARD:
            lines.append(f"- … and {len(reasons) - _NAMED_IN_CARD} more")
        return "\n".join(
            [
                "---",
                "library_name: diffusers",
                "pipeline_tag: image-to-image",
                "tags: [reasonpix]",
                "---",
                "",
                "# An image editing model",
                "",
                "| | |",
                "|---|---|",
                *(f"| {name} | {fact} |" for name, fact in facts.items()),
                "",
                f"## Left out: {len(self.rows)} rows, {len(self.views)} views of other rows",
                "",
                *(lines or ["Everything was used."]),
                "",
            ]
        )

    def _reasons(self) -> dict[str, str]:
        return dict(self.rows) | dict.fromkeys(self.views, "no edit is visible in this view")
