"""Before the first step: checks of the recipe, the initial model, and the choice of examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonpix.core.parallel import THREADS, prefetch
from reasonpix.datasets.pairs import Pairs
from reasonpix.datasets.training_data import (
    TrainedDataset,
    TrainingData,
    dataset_name,
    image_hash,
    read_training_data,
    text_hash,
)
from reasonpix.datasets.views import VISIBLE_CHANGE
from reasonpix.editing.checkpoint import LoadedModel, initialize_model, read_model_training_data
from reasonpix.editing.config import ConnectorConfig, SamplingSettings
from reasonpix.editing.connectors import build_connector
from reasonpix.editing.model import EditingModel
from reasonpix.editing.pipeline_parts import PipelineParts, check_channels, unet_stride
from reasonpix.errors import RecipeError, SourceError, WeightsError
from reasonpix.plugin.components import ModelOptions
from reasonpix.training.feature_cache import CachedFeatures
from reasonpix.training.features import OnlineFeatures
from reasonpix.training.recipe import TrainingRecipe


def check_trackers(recipe: TrainingRecipe) -> None:
    """Raise `RecipeError` for trackers that are not installed."""
    if absent := [name for name in recipe.trackers if find_spec(name) is None]:
        raise RecipeError([f"trackers: {name} is not installed" for name in absent])


def check_recipe_fits(recipe: TrainingRecipe, parts: PipelineParts, processes: int) -> None:
    """Check that the recipe fits the model and the number of processes, before hours of features.

    Raises `RecipeError`, and `WeightsError` for a model that it cannot train.
    """
    check_channels(parts, recipe.model.init)
    _check_scheduler(recipe, parts)
    _check_connector(recipe, parts)
    _check_resolution(recipe, parts)
    _check_alignment(recipe, parts)
    _check_batches(recipe, processes)


def _check_scheduler(recipe: TrainingRecipe, parts: PipelineParts) -> None:
    config: Any = parts.scheduler.config
    if (predicted := config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
        raise WeightsError(
            f"model: its scheduler predicts {predicted!r}; epsilon or v_prediction can be trained"
        )
    steps, trained = recipe.sampling.num_inference_steps, config["num_train_timesteps"]
    if steps > trained:
        raise RecipeError(
            [f"sampling.num_inference_steps: {steps} steps exceed the model's {trained}"]
        )


def _check_connector(recipe: TrainingRecipe, parts: PipelineParts) -> None:
    """Check everything but the width of h, which is not known before h is computed."""
    config = _connector_config(recipe, parts, parts.unet.config.cross_attention_dim)
    try:
        EditingModel(parts.unet, build_connector(config), torch.zeros(0), parts.text)
    except ValueError as error:
        raise WeightsError(f"model: {error}") from error


def _connector_config(
    recipe: TrainingRecipe, parts: PipelineParts, h_width: int
) -> ConnectorConfig:
    choice = recipe.model.connector
    return ConnectorConfig(
        h_width=h_width,
        width=parts.unet.config.cross_attention_dim,
        **choice.model_dump() | {"tokens": choice.tokens or parts.tokens},
    )


def _check_resolution(recipe: TrainingRecipe, parts: PipelineParts) -> None:
    stride = unet_stride(parts.unet, parts.vae)
    if recipe.data.resolution % stride:
        raise RecipeError(
            [
                f"data.resolution: {recipe.data.resolution} is not a multiple of {stride}, the "
                "UNet's stride"
            ]
        )


def _check_alignment(recipe: TrainingRecipe, parts: PipelineParts) -> None:
    if recipe.align is None:
        return
    if parts.text is None:
        raise WeightsError(
            f"model: {recipe.model.model!r} holds no text encoder, so there is nothing to align to"
        )
    if recipe.model.connector.tokens not in (None, parts.text.tokens):
        raise RecipeError(
            [
                f"model.connector.tokens: {recipe.model.connector.tokens} tokens cannot be aligned "
                f"one by one to the {parts.text.tokens} of CLIP; leave it out"
            ]
        )


def _check_batches(recipe: TrainingRecipe, processes: int) -> None:
    sizes = {"batch_size": recipe.batch_size}
    if recipe.align:
        sizes["align.batch_size"] = recipe.align.batch_size
    problems = [
        f"{name}: {size} examples cannot be divided evenly among {processes} processes"
        for name, size in sizes.items()
        if size % processes
    ]
    if problems:
        raise RecipeError(problems)


def initial_model(recipe: TrainingRecipe, parts: PipelineParts, h: Sequence[Tensor]) -> LoadedModel:
    """The model at step 0; `h` (tokens, h_width) of some examples calibrate its connector."""
    config = _connector_config(recipe, parts, h[0].shape[-1])
    settings = SamplingSettings(resolution=recipe.data.resolution, **recipe.sampling.model_dump())
    with torch.random.fork_rng(devices=[]):
        # A fresh connector is the same in each process, and when a run starts again.
        torch.default_generator.manual_seed(recipe.seed)
        return initialize_model(parts, recipe.model.init, recipe.encoder, config, settings, h)


def examples_with_align_text(pairs: Pairs, examples: Sequence[int]) -> list[int]:
    """The examples that have a text to align to. Raises `SourceError` if none has."""
    aligned = [number for number in examples if pairs.examples[number].plain]
    if not aligned:
        raise SourceError(f"data.align: no row has text in {pairs.data.align!r}")
    return aligned


@dataclass(frozen=True)
class TrainableViews:
    """The views of each example in which its edit is visible."""

    by_example: Mapping[int, Sequence[int]]
    """By example, in order; examples without such a view are left out."""
    without_edit: Sequence[str]
    """Names of the other views of these examples' rows."""


def trainable_views(features: CachedFeatures | OnlineFeatures) -> TrainableViews:
    """Leave out the views, and rows, in which no edit is visible.

    They would teach the model to change nothing, like the pairs that Eq. 1 rejects. Raises
    `SourceError` if no row is left.
    """
    pairs = features.pairs
    by_example: dict[int, list[int]] = {}
    without_edit: dict[str, None] = {}  # a row may have several examples
    left_out: dict[str, str] = {}
    for number in features.usable():
        changes = [features.change(number, view) for view in range(pairs.views)]
        row = pairs.examples[number].row
        if shows := [view for view, change in enumerate(changes) if change > VISIBLE_CHANGE]:
            by_example[number] = shows
            without_edit |= {
                f"{row} view {view}": None for view in range(pairs.views) if view not in shows
            }
        else:
            left_out[row] = (
                "no edit is visible: colours of what training sees change by "
                f"{max(changes)} of 255 levels"
            )
    pairs.leave_out(left_out)
    return TrainableViews(by_example, list(without_edit))


def data_digest(pairs: Pairs, views: Mapping[int, Sequence[int]], features: str) -> str:
    """SHA-256 of the training examples with their views, and of their features' fingerprint."""
    total = sha256(features.encode())
    for number, seen in views.items():
        example = pairs.examples[number]
        facts = (example.input_image, example.edited_image, example.instruction, example.plain)
        total.update(f"{tuple(seen)}".encode())
        total.update(f"{facts}".encode())
    return total.hexdigest()


def recorded_training_data(
    model: ModelOptions, pairs: Pairs, examples: Sequence[int], previous: Path
) -> TrainingData:
    """What the trained model was trained on, with what it started from.

    Images of the file `previous`, if it is of the same data, are not read again.
    """
    before = read_model_training_data(model)
    if before is None:
        before = TrainingData(unrecorded=(dataset_name(model.model),))
    own = TrainingData(datasets=tuple(_trained_datasets(pairs, examples)))
    if previous.is_file():
        recorded = read_training_data(previous)
        if (recorded.datasets, recorded.unrecorded) == (
            (before | own).datasets,
            before.unrecorded,
        ):
            return recorded
    texts = ((pairs.examples[i].instruction, pairs.examples[i].plain) for i in examples)
    instructions = frozenset(text_hash(text) for both in texts for text in both if text)
    rows = {pairs.examples[i].row: i for i in examples}
    images = prefetch(
        lambda example: [image_hash(image) for image in pairs.images(example)],
        iter(rows.values()),
        THREADS,
    )
    hashes = frozenset(image for both in images for image in both)
    return before | own.model_copy(update={"images": hashes, "instructions": instructions})


def _trained_datasets(pairs: Pairs, examples: Sequence[int]) -> Iterator[TrainedDataset]:
    by_name: dict[str, list[int]] = {}
    for number in examples:
        by_name.setdefault(pairs.dataset(number), []).append(number)
    for path, numbers in by_name.items():
        rows = {pairs.examples[number].row for number in numbers}
        digest = data_digest(pairs, dict.fromkeys(numbers, ()), "")
        yield TrainedDataset(name=dataset_name(path), pairs=len(rows), sha256=digest)


def split_examples(
    recipe: TrainingRecipe, pairs: Pairs, usable: list[int]
) -> tuple[list[int], list[int]]:
    """The examples to train on, and one for each input image that is held out for validation."""
    if recipe.validation is None:
        return usable, []
    first: dict[str, int] = {}
    for number in usable:
        first.setdefault(pairs.examples[number].input_image, number)
    images = sorted(first, key=lambda image: sha256(f"{recipe.seed} {image}".encode()).digest())
    held_out = dict.fromkeys(images[: recipe.validation.examples])
    if len(held_out) == len(images):
        raise SourceError(
            f"data: {len(images)} input images are too few to hold out "
            f"{recipe.validation.examples} for validation; lower validation.examples"
        )
    training = [n for n in usable if pairs.examples[n].input_image not in held_out]
    return training, [first[image] for image in held_out]
