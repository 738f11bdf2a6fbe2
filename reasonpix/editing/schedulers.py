"""The scheduler that a pipeline names: read it, and check that it can sample.

The check is behavioural, not a list of classes: with a network that predicts perfectly, sampling
must lead from noise to the image.
"""

from __future__ import annotations

import inspect
import warnings
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import DummyObject
from torch import Tensor

from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.model_files import read_json
from reasonpix.plugin.weights import pretrained

_CONFIG = "scheduler/scheduler_config.json"
_FITTING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Named in errors; others may fit too."""
_STEPS = 20
_TOLERANCE = 0.1
"""Mean error of pixels in [-1, 1]. Schedulers that fit stay below 0.08, others are above 0.5."""


def read_scheduler(options: ModelOptions) -> Any:
    """The scheduler of the pipeline that `options.model` names (a folder or a hub id), checked.

    Reads no weights. Raises `WeightsError` if it is missing, or cannot sample.
    """
    index = read_json(options, "model_index.json") or {}
    config = read_json(options, _CONFIG)
    if config is None:
        return pretrained(diffusers.DDIMScheduler, options, subfolder="scheduler")  # explains it
    name = (index.get("scheduler") or [None, None])[1] or config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if packages := _missing_packages(kind):
        raise _unfit(options.model, name, f"needs {packages}: pip install {packages}")
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise _unfit(options.model, name, "is not a scheduler of diffusers")
    try:
        scheduler = pretrained(kind, options, subfolder="scheduler")
    except WeightsError:
        raise
    except Exception as error:  # options of another scheduler, or a package that is missing
        raise _unfit(options.model, name, f"cannot be made: {_first_line(error)}") from error
    check_scheduler(scheduler, options.model)
    return scheduler


def _missing_packages(kind: Any) -> str:
    """The packages that diffusers lacks for a scheduler, for which it then has a placeholder."""
    placeholders = isinstance(kind, DummyObject) and kind.__name__.endswith("Scheduler")
    backends = kind._backends if placeholders else ()
    return " ".join(name for name in backends if find_spec(name) is None)


def check_scheduler(scheduler: Any, model: str) -> None:
    """Raise `WeightsError` if the sampler of this package cannot use the scheduler of `model`."""
    reason = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers about numpy; sampling shows them
            error = _sampling_error(deepcopy(scheduler))
        if not error < _TOLERANCE:
            reason = "does not lead from noise to an image"
    except Exception as caught:  # another protocol fails in any way
        reason = f"cannot sample: {_first_line(caught)}"
    if not reason:
        return
    config = scheduler.config
    if getattr(scheduler, "betas", None) is None or config.get("use_flow_sigmas"):
        reason = (
            "is for models of flow matching"
            if "Flow" in type(scheduler).__name__ or config.get("use_flow_sigmas")
            else "is not for models that were trained with a schedule of betas"
        )
    raise _unfit(model, type(scheduler).__name__, reason, config.get("prediction_type"))


def _sampling_error(scheduler: Any) -> float:
    """Mean absolute error after sampling a known image with perfect predictions."""
    image = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    generators = [torch.Generator().manual_seed(0)]
    noise = torch.randn(image.shape, generator=generators[0])
    signal = torch.cumprod(1 - scheduler.betas.double(), 0).float()
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generators else {}
    scheduler.set_timesteps(min(_STEPS, len(signal)), device="cpu")
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        predicted = _prediction(scheduler, image, seen, _interpolated(signal, float(timestep)))
        latents = scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]
    error = float((latents - image).abs().mean())
    if error < _TOLERANCE:
        scheduler.add_noise(image, noise, scheduler.timesteps[:1])  # as inpainting does
    return error


def _interpolated(values: Tensor, place: float) -> Tensor:
    """A value between two timesteps, as some schedulers have fractional ones."""
    low = min(max(int(place), 0), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return torch.lerp(values[low], values[high], place - int(place))


def _prediction(scheduler: Any, image: Tensor, seen: Tensor, signal: Tensor) -> Tensor:
    noise = (seen - signal.sqrt() * image) / (1 - signal).sqrt().clamp(min=1e-6)
    match kind := scheduler.config.get("prediction_type", "epsilon"):
        case "epsilon":
            return noise
        case "v_prediction":
            return signal.sqrt() * noise - (1 - signal).sqrt() * image
        case "sample":
            return image
    raise ValueError(f"prediction_type {kind!r} is not epsilon, v_prediction or sample")


def check_steps(scheduler: Any, steps: int) -> None:
    """Raise `ReasonpixError` if the scheduler cannot sample in so many steps."""
    trained = int(scheduler.config.num_train_timesteps)
    if steps > trained:
        raise ReasonpixError(
            f"num_inference_steps: {steps} steps exceed the {trained} that the model was "
            "trained with"
        )
    try:
        # On a copy, as another thread may be sampling.
        deepcopy(scheduler).set_timesteps(steps)
    except ValueError as error:  # such as fewer than the solver's order
        raise ReasonpixError(
            f"num_inference_steps: {type(scheduler).__name__} cannot take {steps}: {error}"
        ) from error


def _unfit(model: str, name: Any, reason: str, predicts: Any = None) -> WeightsError:
    with_type = f" with prediction_type {predicts!r}" if predicts not in (None, "epsilon") else ""
    return WeightsError(
        f"model: {model!r} names the scheduler {name}{with_type} in {_CONFIG}, which {reason}; "
        f"name a model whose scheduler fits, or write one there (and in model_index.json), such as "
        f"{', '.join(_FITTING)}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
