"""A scheduler that cannot sample is refused in one line, by what it does and not by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from reasonpix.editing.method import EditingModelMethod, EditingModelOptions
from reasonpix.editing.pipeline_parts import read_parts
from reasonpix.editing.schedulers import _FITTING, check_scheduler, check_steps, read_scheduler
from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.components import ModelOptions
from tests.support.tiny_model import tiny_scheduler, write_tiny

pytestmark = [
    # Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("schedulers") / "model")


def naming(model: Path, name: str, **config: Any) -> ModelOptions:
    """The model with another scheduler: `name` and its config."""
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    values = noise | {"_class_name": name} | config
    (model / "scheduler/scheduler_config.json").write_text(json.dumps(values))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    return ModelOptions(model=str(model))


def test_those_that_are_recommended_fit(model: Path) -> None:
    for name in _FITTING:
        for kind in ("epsilon", "v_prediction"):
            options = naming(model, name, prediction_type=kind)
            assert type(read_scheduler(options)).__name__ == name
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for spacing in ("leading", "trailing", "linspace"):
        for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
            check_scheduler(tiny_scheduler(name, timestep_spacing=spacing, **zero_snr), "it")
    check_scheduler(tiny_scheduler("LCMScheduler"), "it")
    check_scheduler(tiny_scheduler("EulerDiscreteScheduler", use_karras_sigmas=True), "it")
    check_scheduler(tiny_scheduler(num_train_timesteps=4), "it")


UNFIT = {
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}, "is for models of flow matching"),
    "flow matching, Heun": ("FlowMatchHeunDiscreteScheduler", {}, "of flow matching"),
    "flow sigmas": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        "of flow matching",
    ),
    "no class": ("EulerScheduler", {}, "is not a scheduler of diffusers"),
    "a network": ("UNet2DModel", {}, "is not a scheduler of diffusers"),
    "package": ("CosineDPMSolverMultistepScheduler", {}, "needs torchsde: pip install torchsde"),
    "package, other": ("DPMSolverSDEScheduler", {}, "needs torchsde: pip install torchsde"),
    "a function": ("load_image", {}, "is not a scheduler of diffusers"),
    "other step": ("RePaintScheduler", {}, "cannot sample: TypeError: .*step"),
    "other step, video": ("CogVideoXDPMScheduler", {}, "cannot sample: TypeError: .*step"),
    "inverse": ("DDIMInverseScheduler", {}, "does not lead from noise to an image"),
    "inverse solver": ("DPMSolverMultistepInverseScheduler", {}, "does not lead from noise to an"),
    "sigmas": ("EDMEulerScheduler", {}, "not for models that were trained with a schedule of be"),
    "consistency": ("CMStochasticIterativeScheduler", {}, "schedule of betas"),
    "other arguments": ("VQDiffusionScheduler", {}, "cannot be made: TypeError"),
    "prediction": ("DDIMScheduler", {"prediction_type": "noise"}, "prediction_type 'noise'"),
    "prediction of PNDM": ("PNDMScheduler", {"prediction_type": "sample"}, "cannot sample"),
    "prediction of Euler": (
        "EulerAncestralDiscreteScheduler",
        {"prediction_type": "sample"},
        "cannot sample: NotImplementedError",
    ),
    "spacing": ("DDIMScheduler", {"timestep_spacing": "even"}, "cannot sample: ValueError: even"),
    "spacing of Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "lead"}, "cannot sample"),
    "betas": ("DDIMScheduler", {"beta_schedule": "steep"}, "cannot be made: NotImplementedError"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_one_line_with_those_that_do(name: str, model: Path) -> None:
    scheduler, config, message = UNFIT[name]
    options = naming(model, scheduler, **config)
    with pytest.raises(WeightsError, match=f"{scheduler}.*{message}") as caught:
        read_scheduler(options)
    line = str(caught.value)
    assert line.startswith("model: ") and "\n" not in line
    assert "scheduler_config.json" in line and "DDIMScheduler" in line and str(model) in line


def test_it_is_refused_before_weights_are_read(model: Path) -> None:
    options = naming(model, "FlowMatchLCMScheduler")
    with pytest.raises(WeightsError, match="FlowMatchLCMScheduler"):
        EditingModelMethod(EditingModelOptions(model=options.model)).check()
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(b"damaged")
        with pytest.raises(WeightsError, match="FlowMatchLCMScheduler"):
            read_parts(options)
    finally:
        weights.write_bytes(content)


def test_every_scheduler_of_diffusers_is_accepted_or_refused() -> None:
    accepted = set()
    for name in [name for name in dir(diffusers) if name.endswith("Scheduler")]:
        try:
            scheduler = tiny_scheduler(name)
        except (ImportError, TypeError, ValueError):
            continue  # it needs a package, or arguments that no pipeline here has
        try:
            check_scheduler(scheduler, "it")
            accepted.add(name)
        except WeightsError:
            pass
    assert set(_FITTING) <= accepted
    assert not [name for name in accepted if "Flow" in name or "Inverse" in name or "EDM" in name]


def test_numbers_of_steps() -> None:
    check_steps(tiny_scheduler(), 50)
    with pytest.raises(ReasonpixError, match="1001 steps exceed the 1000"):
        check_steps(tiny_scheduler(), 1001)
