"""Training the editing model: one loop, on accelerate, that goes on exactly where it stopped.

Eq. 9 of ReasonPix2Pix with the training of InstructPix2Pix (Brooks et al., CVPR 2023): the UNet
learns to predict the noise of the edited image's latents, given the input image's latents and h.

```
out/
  recipe.yaml       resolved
  features/         h and latents, where the recipe says cache: true
  state/<step>/     weights, averages, optimizer: all that going on needs
  log.jsonl         a line for each step
  tensorboard/      the same, and the pictures of validation
  validation/       these pictures: input, edit, truth
  model/            the trained model, averaged: see `reasonpix.editing.checkpoint`
```
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reasonpix.core.memory import is_out_of_memory
from reasonpix.core.storage import LocalStorage
from reasonpix.datasets.pairs import read_pairs
from reasonpix.editing.checkpoint import LoadedModel, save_checkpoint
from reasonpix.editing.connectors import CONNECTORS
from reasonpix.editing.model import EditingModel
from reasonpix.editing.pipeline_parts import PipelineParts, read_parts, vae_scale_factor
from reasonpix.errors import ReasonpixError, RunError
from reasonpix.training.checkpointing import (
    State,
    checkpoints,
    claim,
    read_state,
    replace_dir,
    write_state,
)
from reasonpix.training.feature_cache import CachedFeatures, OnlineFeatures
from reasonpix.training.loss import Batch, DiffusionLoss
from reasonpix.training.randomness import StepSampler, reseed
from reasonpix.training.recipe import TrainingRecipe
from reasonpix.training.setup import digest, see_fit, see_trackers, split, start, with_text
from reasonpix.training.tracking import Log
from reasonpix.training.validation import sheet

_PATIENCE = timedelta(hours=6)
"""For another process, such as one whose share of the features takes longer."""


@dataclass(frozen=True)
class Progress:
    """How far training is."""

    stage: str
    """rows, features, align or train."""
    done: int
    total: int
    loss: float | None = None
    rate: float | None = None
    """Examples a second."""


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Trained:
    """What training came to."""

    model: Path
    """The folder of the trained model."""
    skipped: list[tuple[str, str]]
    """The rows that were left out, and why."""


def train(
    recipe: TrainingRecipe,
    out: Path,
    report: Report = lambda progress: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train as `recipe` says into the folder `out`, in each of the processes that a launcher made.

    Called again it goes on from the last checkpoint. Once `stopped` says so in any of the
    processes, all save a checkpoint after the step they are at, and raise `KeyboardInterrupt`.
    Raises `SourceError` for data that cannot be used, before any step; `WeightsError` for models;
    `RunError` when `out` was made by another recipe, memory ran out, or the loss is no number any
    more.
    """
    see_trackers(recipe)
    accelerator = Accelerator(
        mixed_precision=_precision(recipe),
        log_with=list(recipe.trackers) or None,
        project_dir=out / "tensorboard",
        kwargs_handlers=[
            # While the connector learns alone, the UNet has no gradients to wait for.
            DistributedDataParallelKwargs(find_unused_parameters=recipe.align is not None),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )
    alone = LocalStorage(out).lock() if accelerator.is_main_process else nullcontext()
    with alone:
        if accelerator.is_main_process:
            claim(recipe, out)
        accelerator.wait_for_everyone()
        run = _Run(recipe, out, accelerator, report, stopped)
        # Each process has looked at the images of its share.
        skipped = dict(gather_object(run.pairs.skipped))
        return Trained(run.finish(), list(skipped.items()))


@contextmanager
def _together() -> Iterator[None]:
    """Wait for all processes; what goes wrong in the share of one is raised in each."""
    wrong: list[tuple[type[ReasonpixError], str]] = []
    try:
        yield
    except ReasonpixError as error:
        wrong = [(type(error), str(error))]
    if wrong := gather_object(wrong):
        raise wrong[0][0]("\n".join(dict.fromkeys(text for _, text in wrong)))


@contextmanager
def _memory(advice: str) -> Iterator[None]:
    """Raise `RunError` with `advice` when memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"memory ran out; {advice}, and run the same command again") from error


def _precision(recipe: TrainingRecipe) -> str:
    if recipe.precision == "auto":
        # Older ones emulate it, slowly.
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "no"
    return "no" if recipe.precision == "fp32" else recipe.precision


class _Run:
    def __init__(
        self,
        recipe: TrainingRecipe,
        out: Path,
        accelerator: Accelerator,
        report: Report,
        stopped: Callable[[], bool],
    ) -> None:
        self.recipe, self.out, self.accelerator, self.report = recipe, out, accelerator, report
        self.stopped = stopped
        parts = read_parts(recipe.model.weights)
        see_fit(recipe, parts, accelerator.num_processes)
        self.pairs = read_pairs(
            recipe.data, report=lambda done, total: report(Progress("rows", done, total))
        )
        self.features = self._features(parts)
        examples, self.shown = split(recipe, self.pairs, self.features.usable())
        self.digest = digest(self.pairs, examples, self.features.fingerprint)
        seen = examples[
            :: max(1, len(examples) // CONNECTORS[recipe.model.connector.kind].calibration_examples)
        ]
        h = [feature.h for feature in self.features.get([(number, 0) for number in seen])]
        self.checkpoint = start(recipe, parts, h)
        objective = DiffusionLoss(self.checkpoint.model, self.checkpoint.scheduler)
        if recipe.gradient_checkpointing:
            self.checkpoint.model.unet.enable_gradient_checkpointing()
        side = recipe.data.resolution // vae_scale_factor(parts.vae)
        self.scaling = float(parts.vae.config.scaling_factor)
        shape = (parts.vae.config.latent_channels, side, side)
        steps = int(objective.noise.config.num_train_timesteps)
        self.aligning = recipe.align.steps if recipe.align else 0
        self.draws = {
            aligning: StepSampler(
                recipe.seed,
                with_text(self.pairs, examples) if aligning and recipe.align else examples,
                self.pairs.views,
                recipe.align.batch_size if aligning and recipe.align else recipe.batch_size,
                shape=shape,
                timesteps=steps,
                dropout=recipe.dropout,
            )
            for aligning in (True, False)
        }
        self.objective = accelerator.prepare(objective.to(accelerator.device).train())
        if text := self.checkpoint.model.text:
            text.encoder.to(accelerator.device)
        self.state = self._state()
        self.log = Log(out, self.state.done, accelerator)

    # -- What a run starts from --------------------------------------------------------------------

    def _features(self, parts: PipelineParts) -> CachedFeatures | OnlineFeatures:
        recipe, accelerator = self.recipe, self.accelerator
        encoder = recipe.encoder
        vae = parts.vae.requires_grad_(False).eval().to(accelerator.device)

        def report(done: int, total: int) -> None:
            self.report(Progress("features", done, total))

        if recipe.cache is False:
            online = OnlineFeatures(self.pairs, encoder, vae)
            online.compute(report)
            return online
        folder = self.out / "features" if recipe.cache is True else recipe.cache
        cached = CachedFeatures(folder, self.pairs, encoder, vae, batch=128)
        with _together(), _memory("set a lower batch_size of the encoder"):
            cached.compute(report, accelerator.process_index, accelerator.num_processes)
        return cached

    def _state(self) -> State:
        model = self._model
        named = dict(model.named_parameters())
        optimizer = self._optimizer(aligning=self.aligning > 0)
        state = State(0, named, {}, optimizer, self.digest)
        if found := checkpoints(self.out):
            if int(found[-1].name) > self.aligning:
                state.optimizer = self._optimizer(aligning=False)
            read_state(found[-1], state)
        return state

    @property
    def _model(self) -> EditingModel:
        model: EditingModel = self.accelerator.unwrap_model(self.objective).model
        return model

    def _optimizer(self, aligning: bool) -> torch.optim.AdamW:
        recipe, model = self.recipe, self._model
        trained = model.connector.parameters() if aligning else model.parameters()
        decay = recipe.align.weight_decay if aligning and recipe.align else recipe.weight_decay
        return torch.optim.AdamW(list(trained), betas=recipe.betas, weight_decay=decay, fused=True)

    # -- The loop ----------------------------------------------------------------------------------

    def finish(self) -> Path:
        """Train to the end, saving on the way."""
        recipe, state = self.recipe, self.state
        total = self.aligning + recipe.steps
        with closing(self.log), closing(self._batches(state.done, total)) as prefetched:
            began, seen = time.monotonic(), 0
            while state.done < total:
                aligning = state.done < self.aligning
                if state.done == self.aligning:
                    self._begin_editing()
                    began, seen = time.monotonic(), 0
                step = state.done if aligning else state.done - self.aligning
                rate = recipe.learning_rate_at(step, aligning)
                for group in state.optimizer.param_groups:
                    group["lr"] = rate
                with _memory("lower micro_batch_size, or set gradient_checkpointing: true"):
                    loss, stopped = self._step(next(prefetched), aligning)
                state.done += 1
                if not math.isfinite(loss):
                    raise RunError(
                        f"{self.out}: the loss of step {state.done} is {loss}; the last checkpoint "
                        "is kept. Lower the learning rate in a new folder, or look at the data"
                    )
                seen += self.draws[aligning].batch_size
                speed = seen / (time.monotonic() - began)
                self.log.step(state.done, "align" if aligning else "train", loss, rate, speed)
                if not aligning:
                    self._average(step + 1)
                    self._validate(step + 1)
                if stopped or state.done % recipe.save_every == 0 or state.done == total:
                    self._save()
                self.report(
                    Progress("align", state.done, self.aligning, loss, speed)
                    if aligning
                    else Progress("train", step + 1, recipe.steps, loss, speed)
                )
                if stopped and state.done < total:
                    raise KeyboardInterrupt
            return self._save_model()

    def _begin_editing(self) -> None:
        """From here on UNet and connector learn together, and their averages are kept."""
        state = self.state
        if self.aligning:
            state.optimizer = self._optimizer(aligning=False)
        if not state.average:
            state.average = {name: value.detach().clone() for name, value in state.named.items()}

    def _step(self, batches: Sequence[Batch], aligning: bool) -> tuple[float, bool]:
        """One step of the optimizer over micro-batches.

        The mean loss over all devices, and whether any of them was told to stop.
        """
        accelerator, optimizer = self.accelerator, self.state.optimizer
        # A connector that was aligned drops nothing any more: the UNet is to trust what it says.
        self._model.train().connector.train(aligning or not self.aligning)
        optimizer.zero_grad(set_to_none=True)
        count = sum(len(batch.h) for batch in batches)
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            part = accelerator.process_index * len(batches) + number
            reseed(self.recipe.seed, self.state.done, part)
            with nullcontext() if last else accelerator.no_sync(self.objective), self._kernels():
                loss = self.objective(batch, aligning) * (len(batch.h) / count)
                accelerator.backward(loss)
            total += loss.detach()
        if self.recipe.max_gradient_norm is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.recipe.max_gradient_norm)
        optimizer.step()
        told = torch.stack([total, total.new_tensor(float(self.stopped()))])
        loss, stopped = accelerator.reduce(told, "mean").tolist()
        return loss, stopped > 0

    def _kernels(self) -> AbstractContextManager[Any]:
        """On a CPU the flash kernel's backward pass is several times slower in bfloat16."""
        slow = self.accelerator.device.type == "cpu" and self.accelerator.mixed_precision == "bf16"
        return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()

    def _average(self, step: int) -> None:
        decay = min(self.recipe.ema_decay, (1 + step) / (10 + step))
        state = self.state
        torch._foreach_lerp_(
            list(state.average.values()),
            [value.detach() for value in state.named.values()],
            1 - decay,
        )

    # -- Batches -----------------------------------------------------------------------------------

    def _batches(self, begin: int, end: int) -> Generator[list[Batch]]:
        """The micro-batches of each step; the next step's are made while this one is computed."""
        if isinstance(self.features, OnlineFeatures):
            yield from map(self._of_step, range(begin, end))
            return
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._of_step, begin) if begin < end else None
            for step in range(begin, end):
                assert coming is not None
                ready = coming.result()
                coming = pool.submit(self._of_step, step + 1) if step + 1 < end else None
                yield ready

    def _of_step(self, done: int) -> list[Batch]:
        aligning = done < self.aligning
        draws, step = self.draws[aligning], done if aligning else done - self.aligning
        share = draws.batch_size // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        size = min(self.recipe.micro_batch_size, share)
        return [
            self._batch(draws, step, range(place, min(place + size, first + share)))
            for place in range(first, first + share, size)
        ]

    def _batch(self, draws: StepSampler, step: int, places: range) -> Batch:
        device = self.accelerator.device
        drawn = [draws.draw(step, place) for place in places]
        features = self.features.get([(draw.example, draw.view) for draw in drawn])
        examples = [self.pairs.examples[draw.example] for draw in drawn]

        def stacked(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(tensors)).to(device, torch.float32)

        deviation = (0.5 * stacked([feature.logvar for feature in features])).exp()
        posterior = stacked([draw.posterior for draw in drawn])
        mean = stacked([feature.mean for feature in features])
        return Batch(
            h=[feature.h.to(device) for feature in features],
            instructions=[example.instruction for example in examples],
            source=stacked([feature.source for feature in features]),
            target=(mean + deviation * posterior) * self.scaling,
            noise=stacked([draw.noise for draw in drawn]),
            timesteps=torch.tensor([draw.timestep for draw in drawn], device=device),
            drop_text=[draw.drop_text for draw in drawn],
            drop_image=torch.tensor([draw.drop_image for draw in drawn], device=device),
            align_text=[example.plain or "" for example in examples],
        )

    # -- What is kept ------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            write_state(self.out, self.state)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _averaged(self) -> Iterator[LoadedModel]:
        """The model with its averaged weights, until training goes on."""
        average, named, model = self.state.average, self.state.named, self._model

        def swap() -> None:
            for name in average:
                named[name].data, average[name] = average[name], named[name].data

        swap()
        try:
            yield self.checkpoint
        finally:
            swap()
            model.requires_grad_(True)

    def _save_model(self) -> Path:
        folder = self.out / "model"
        if self.accelerator.is_main_process:
            with self._averaged() as checkpoint, replace_dir(folder) as draft:
                save_checkpoint(draft, checkpoint)
        self.accelerator.wait_for_everyone()
        return folder

    def _validate(self, step: int) -> None:
        """Edit what was kept out of training, and keep the pictures."""
        settings = self.recipe.validation
        if settings is None or step % settings.every or not self.accelerator.is_main_process:
            return
        with self._averaged() as checkpoint:
            device = self.accelerator.device
            self.log.pictures(step, *sheet(checkpoint, self.features, self.shown, device))
