"""The training loop, on accelerate, resumable to the bit.

Eq. 9 of ReasonPix2Pix with the training of InstructPix2Pix (Brooks et al., CVPR 2023): the UNet
learns to predict the noise of the edited image's latents, given the input image's latents and h.

```
out/
  recipe.yaml       resolved
  features/         h and latents, if the recipe says cache: true
  state/<step>/     checkpoints: weights, averages, optimizer
  log.jsonl         a line for each step
  left-out.jsonl    a line for each row, or view of a row, that was not trained on
  tensorboard/      the same as curves, and the validation images
  validation/       rows of input, edit, ground truth
  model/            the trained model, averaged: see `reasonpix.editing.checkpoint`
```
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
)

from reasonpix.core.parallel import Report
from reasonpix.core.storage import LocalStorage
from reasonpix.datasets.training_data import FILE as TRAINING_DATA
from reasonpix.editing.checkpoint import save_checkpoint
from reasonpix.errors import RunError
from reasonpix.training.checkpointing import claim_folder, replace_dir, write_state
from reasonpix.training.distributed import explain_out_of_memory
from reasonpix.training.optimization import optimizer_step
from reasonpix.training.recipe import TrainingRecipe, load_training_recipe
from reasonpix.training.session import Session, build_optimizer, prepare_session
from reasonpix.training.setup import check_trackers, recorded_training_data
from reasonpix.training.tracking import LeftOut, TrainingLog
from reasonpix.training.validation import validation_grid

_TIMEOUT = timedelta(hours=6)
"""For other processes, whose share of the features may take longer."""


@dataclass(frozen=True)
class Progress:
    """How far training is."""

    stage: str
    """rows, features, align or train."""
    done: int
    total: int
    loss: float | None = None
    rate: float | None = None
    """Examples per second."""


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a finished run."""

    model: Path
    """The folder of the trained model."""
    skipped: list[tuple[str, str]]
    """The rows that were left out, each with its reason."""
    views_without_edit: list[str]
    """The views without a visible edit that were left out, of rows with other views."""


def train(
    recipe: TrainingRecipe | str | Path,
    out: str | Path,
    report: ProgressCallback = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train by `recipe` in the folder `out`; call it in each process of `accelerate launch`.

    `recipe` is a loaded recipe, a file, or the name of a shipped recipe.
    Called again, it resumes from the last checkpoint. Once `should_stop` returns true in any
    process, all of them save a checkpoint after the current step and raise `KeyboardInterrupt`.
    Raises, before any step, `SourceError` for data, `WeightsError` for models, and `RunError` if
    `out` belongs to another recipe; later `RunError` if memory runs out or the loss is not finite.
    """
    if not isinstance(recipe, TrainingRecipe):
        recipe = load_training_recipe(recipe)
    out = Path(out)
    check_trackers(recipe)
    accelerator = Accelerator(
        mixed_precision=_precision(recipe),
        log_with=list(recipe.trackers) or None,
        project_dir=out / "tensorboard",
        kwargs_handlers=[
            # During alignment the UNet gets no gradients.
            DistributedDataParallelKwargs(find_unused_parameters=recipe.align is not None),
            InitProcessGroupKwargs(timeout=_TIMEOUT),
        ],
    )

    def report_stage(stage: str) -> Report:
        return lambda done, total: report(Progress(stage, done, total))

    with LocalStorage(out).lock() if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            claim_folder(recipe, out)
        accelerator.wait_for_everyone()
        session = prepare_session(recipe, out, accelerator, report_stage)
        # Each process has checked only the images of its share.
        left_out = LeftOut(dict(gather_object(session.pairs.skipped)), session.views_without_edit)
        if accelerator.is_main_process:
            left_out.write(out / "left-out.jsonl")
        model = _training_loop(session, left_out, report, should_stop)
        return TrainingResult(model, list(left_out.rows.items()), list(left_out.views))


def _precision(recipe: TrainingRecipe) -> str:
    if recipe.precision == "auto":
        # Older GPUs emulate bfloat16, slowly.
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "no"
    return "no" if recipe.precision == "fp32" else recipe.precision


def _training_loop(
    session: Session, left_out: LeftOut, report: ProgressCallback, should_stop: Callable[[], bool]
) -> Path:
    """Take every step that is left, alignment first; return the folder of the model."""
    recipe, state = session.recipe, session.state
    total = recipe.total_steps
    log = TrainingLog(session.out, state.step, session.accelerator)
    with closing(log), closing(session.batches.steps(state.step, total)) as batches:
        speed = _Speed()
        while state.step < total:
            stage = session.batches.stage_at(state.step)
            if state.step == recipe.align_steps:
                _start_training_stage(session)
                speed = _Speed()

            learning_rate = recipe.learning_rate_at(state.step - stage.first, stage.aligning)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate
            with explain_out_of_memory(
                "lower micro_batch_size, or set gradient_checkpointing: true"
            ):
                loss, stop = optimizer_step(session, next(batches), stage.aligning, should_stop)
            state.step += 1
            if not math.isfinite(loss):
                raise RunError(
                    f"{session.out}: the loss of step {state.step} is {loss}; the last checkpoint "
                    "is kept. Use a lower learning rate in a new folder, or check the data"
                )

            speed.add(stage.sampler.batch_size)
            log.step(state.step, stage.name, loss, learning_rate, speed.examples_per_second)
            step = state.step - stage.first
            if not stage.aligning:
                state.update_average(step, recipe.ema_decay)
                if recipe.validation and step % recipe.validation.every == 0:
                    _validate(session, log, step)
            if stop or state.step % recipe.save_every == 0 or state.step == total:
                _save_state(session)
            report(Progress(stage.name, step, stage.steps, loss, speed.examples_per_second))
            if stop and state.step < total:
                raise KeyboardInterrupt
        return _save_model(session, left_out)


class _Speed:
    """Examples per second since it was created."""

    def __init__(self) -> None:
        self._start, self._examples = time.monotonic(), 0

    def add(self, examples: int) -> None:
        self._examples += examples

    @property
    def examples_per_second(self) -> float:
        return self._examples / (time.monotonic() - self._start)


def _start_training_stage(session: Session) -> None:
    """From here on UNet and connector learn together, and their weights are averaged."""
    recipe, state = session.recipe, session.state
    if recipe.align_steps:
        state.optimizer = build_optimizer(recipe, session.model, aligning=False)
    if not state.average:
        state.start_average()


def _validate(session: Session, log: TrainingLog, step: int) -> None:
    """Edit the examples that are held out from training, and log the images."""
    if session.accelerator.is_main_process:
        with session.state.averaged():
            sheet, instructions = validation_grid(
                session.checkpoint,
                session.features,
                session.validation_views,
                session.accelerator.device,
            )
        session.model.requires_grad_(True)  # inference has frozen it
        log.images(step, sheet, instructions)


def _save_state(session: Session) -> None:
    if session.accelerator.is_main_process:
        write_state(session.out, session.state)
    session.accelerator.wait_for_everyone()


def _save_model(session: Session, left_out: LeftOut) -> Path:
    folder = session.out / "model"
    if session.accelerator.is_main_process:
        training_data = recorded_training_data(
            session.recipe.model.weights,
            session.pairs,
            session.training_examples,
            folder / TRAINING_DATA,
        )
        with session.state.averaged(), replace_dir(folder) as draft:
            save_checkpoint(draft, session.checkpoint)
            training_data.write(draft)
            card = left_out.card(session.recipe, len(session.batches.stages[-1].sampler.examples))
            (draft / "README.md").write_text(card, encoding="utf-8")
    session.accelerator.wait_for_everyone()
    return folder
