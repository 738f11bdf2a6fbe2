"""Everything that a training run consists of, built from its recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from reasonpix.core.parallel import Report
from reasonpix.datasets.pairs import Pairs, read_pairs
from reasonpix.editing.checkpoint import LoadedModel
from reasonpix.editing.connectors import CONNECTORS
from reasonpix.editing.model import EditingModel
from reasonpix.editing.pipeline_parts import (
    PipelineParts,
    read_parts,
    unet_stride,
    vae_scale_factor,
)
from reasonpix.plugin.intended_images import (
    domain_of_dataset,
    domain_warnings,
    read_intended_images,
)
from reasonpix.training.batches import BatchLoader, Stage
from reasonpix.training.checkpointing import checkpoints, read_state
from reasonpix.training.distributed import explain_out_of_memory, raise_in_all_processes
from reasonpix.training.feature_cache import CachedFeatures
from reasonpix.training.features import OnlineFeatures
from reasonpix.training.loss import DiffusionLoss
from reasonpix.training.randomness import StepSampler
from reasonpix.training.recipe import TrainingRecipe
from reasonpix.training.setup import (
    check_recipe_fits,
    data_digest,
    examples_with_align_text,
    initial_model,
    split_examples,
    trainable_views,
)
from reasonpix.training.state import TrainingState

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A run in one of its processes, ready to take the next step."""

    recipe: TrainingRecipe
    out: Path
    accelerator: Accelerator
    features: CachedFeatures | OnlineFeatures
    training_examples: Sequence[int]
    validation_views: Sequence[tuple[int, int]]
    """The held-out examples, each with a view of it."""
    views_without_edit: Sequence[str]
    """Views of rows that show no edit, and are not trained on."""
    checkpoint: LoadedModel
    """The model; its networks are those that `loss` trains."""
    loss: DiffusionLoss
    """Wrapped for several devices."""
    batches: BatchLoader
    state: TrainingState

    @property
    def pairs(self) -> Pairs:
        """The training data."""
        return self.features.pairs

    @property
    def model(self) -> EditingModel:
        """The networks that learn."""
        return self.checkpoint.model


def prepare_session(
    recipe: TrainingRecipe,
    out: Path,
    accelerator: Accelerator,
    report: Callable[[str], Report],
) -> Session:
    """Read data and models, compute features, and load the last checkpoint, if there is one.

    `report(stage)` gives the progress callback of "rows" and of "features".
    """
    parts = read_parts(recipe.model.weights)
    check_recipe_fits(recipe, parts, accelerator.num_processes)
    if accelerator.is_main_process:
        _warn_of_domains(recipe, parts)
    pairs = read_pairs(recipe.data, report=report("rows"))
    vae = parts.vae.requires_grad_(False).eval().to(accelerator.device)
    stride = unet_stride(parts.unet, parts.vae)
    features = _prepare_features(recipe, out, pairs, vae, stride, accelerator, report("features"))
    views = trainable_views(features)
    training, held_out = split_examples(recipe, pairs, list(views.by_example))
    training_views = {number: views.by_example[number] for number in training}
    data = data_digest(pairs, training_views, features.fingerprint)

    count = CONNECTORS[recipe.model.connector.kind].calibration_examples
    calibration = training[:: max(1, len(training) // count)]
    h = [feature.h for feature in features.get([(n, training_views[n][0]) for n in calibration])]
    checkpoint = initial_model(recipe, parts, h)
    model = checkpoint.model
    if recipe.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    loss = DiffusionLoss(model, checkpoint.scheduler)
    timesteps = int(loss.noise.config.num_train_timesteps)
    batches = BatchLoader(
        stages=_stages(recipe, parts, pairs, training_views, timesteps),
        features=features,
        scaling_factor=float(vae.config.scaling_factor),
        micro_batch_size=recipe.micro_batch_size,
        device=accelerator.device,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    loss = accelerator.prepare(loss.to(accelerator.device).train())
    if model.text:
        model.text.encoder.to(accelerator.device)
    state = _resume(recipe, out, model, data)
    return Session(
        recipe=recipe,
        out=out,
        accelerator=accelerator,
        features=features,
        training_examples=training,
        validation_views=[(number, views.by_example[number][0]) for number in held_out],
        views_without_edit=views.without_edit,
        checkpoint=checkpoint,
        loss=loss,
        batches=batches,
        state=state,
    )


def _warn_of_domains(recipe: TrainingRecipe, parts: PipelineParts) -> None:
    paths = [recipe.data.path] if isinstance(recipe.data.path, str) else recipe.data.path
    domains = {domain_of_dataset(path) for path in paths}
    made_for = [
        (recipe.model.model, read_intended_images(parts.options)),
        (f"encoder {recipe.encoder.name}", recipe.encoder.build().intended_images),
    ]
    domain = domains.pop() if len(domains) == 1 else ""
    for line in domain_warnings(made_for, domain, "the training images"):
        _LOG.warning(line)


def _prepare_features(
    recipe: TrainingRecipe,
    out: Path,
    pairs: Pairs,
    vae: AutoencoderKL,
    stride: int,
    accelerator: Accelerator,
    report: Report,
) -> CachedFeatures | OnlineFeatures:
    if recipe.cache is False:
        online = OnlineFeatures(pairs, recipe.encoder, vae, stride)
        online.compute(report)
        return online
    folder = out / "features" if recipe.cache is True else recipe.cache
    cached = CachedFeatures(folder, pairs, recipe.encoder, vae, stride, batch=128)
    with (
        raise_in_all_processes(),
        explain_out_of_memory("set a lower batch_size of the encoder"),
    ):
        cached.compute(report, accelerator.process_index, accelerator.num_processes)
    return cached


def _stages(
    recipe: TrainingRecipe,
    parts: PipelineParts,
    pairs: Pairs,
    views: Mapping[int, Sequence[int]],
    timesteps: int,
) -> list[Stage]:
    side = recipe.data.resolution // vae_scale_factor(parts.vae)

    def sampler(examples: Sequence[int], batch_size: int) -> StepSampler:
        return StepSampler(
            recipe.seed,
            examples,
            views,
            batch_size,
            shape=(parts.vae.config.latent_channels, side, side),
            timesteps=timesteps,
            dropout=recipe.dropout,
        )

    stages: list[Stage] = []
    if recipe.align:
        aligned = sampler(examples_with_align_text(pairs, list(views)), recipe.align.batch_size)
        stages.append(Stage("align", 0, recipe.align.steps, aligned))
    train = sampler(list(views), recipe.batch_size)
    return [*stages, Stage("train", recipe.align_steps, recipe.steps, train)]


def _resume(recipe: TrainingRecipe, out: Path, model: EditingModel, data: str) -> TrainingState:
    saved = checkpoints(out)
    aligning = recipe.align is not None and not (saved and int(saved[-1].name) > recipe.align_steps)
    optimizer = build_optimizer(recipe, model, aligning)
    state = TrainingState(0, dict(model.named_parameters()), {}, optimizer, data)
    if saved:
        read_state(saved[-1], state)
    return state


def build_optimizer(
    recipe: TrainingRecipe, model: EditingModel, aligning: bool
) -> torch.optim.AdamW:
    """AdamW for the connector alone, or for UNet and connector."""
    trained = model.connector.parameters() if aligning else model.parameters()
    decay = recipe.align.weight_decay if aligning and recipe.align else recipe.weight_decay
    return torch.optim.AdamW(list(trained), betas=recipe.betas, weight_decay=decay, fused=True)
