"""The folder of an editing model: diffusers' InstructPix2Pix layout plus connector and encoder.

```
model_index.json          StableDiffusionInstructPix2PixPipeline; missing parts are null
unet/ vae/ scheduler/     as diffusers writes them
text_encoder/ tokenizer/  only if the connector or the encoder reads them
connector/                config.json, model.safetensors: connector and unconditional states
intended_images.json      what images it is made for, if not for any
reasonpix.json            the encoder by reference, and the sampling settings
training_data.json        what it was trained on, see `reasonpix.datasets.training_data`
```

diffusers' pipeline loads it and takes `prompt_embeds`; without a text encoder, call
`from_pretrained(folder, text_encoder=None, tokenizer=None)`.

A plain InstructPix2Pix pipeline is an editing model too: its encoder is its own CLIP text encoder,
its connector the identity, and its unconditional states those of the empty text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from reasonpix.core.files import yaml_locations
from reasonpix.datasets import training_data
from reasonpix.datasets.training_data import TrainingData
from reasonpix.editing.config import ConnectorConfig, SamplingSettings
from reasonpix.editing.connectors import Connector, build_connector, pad
from reasonpix.editing.model import EditingModel, expand_input_channels
from reasonpix.editing.pipeline_parts import (
    PipelineParts,
    check_channels,
    open_pipeline,
    read_parts,
)
from reasonpix.errors import WeightsError
from reasonpix.plugin import registry
from reasonpix.plugin.components import MLLMEncoder, ModelOptions
from reasonpix.plugin.intended_images import FILE as INTENDED
from reasonpix.plugin.intended_images import IntendedImages, read_intended_images
from reasonpix.plugin.model_files import find_file, read_json
from reasonpix.plugin.spec import ComponentSpec, check, read_spec

OWN_FOLDER = "."
"""As an encoder's `model`: the folder of the editing model itself."""

_FACTS = "reasonpix.json"
_UNCOND_KEY = "null"
"""Key of the unconditional states in `connector/model.safetensors`."""


@dataclass(frozen=True)
class LoadedModel:
    """An editing model with everything that is needed to use it."""

    model: EditingModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    encoder: ComponentSpec
    """The MLLM encoder; its `model` is never `OWN_FOLDER` but the folder's path."""
    own_text: bool
    """Whether the encoder is the model's own text encoder."""
    settings: SamplingSettings
    intended_images: IntendedImages | None = None
    """The only images that it is made for; None for any."""

    def build_encoder(self, **options: Any) -> MLLMEncoder[Any]:
        """Create and check the encoder without loading it.

        `options` override those of the checkpoint if the encoder loads weights.
        """
        spec = self.encoder
        if isinstance(spec.options, ModelOptions):
            spec = replace(spec, options=spec.options.model_copy(update=options))
        encoder = spec.build()
        assert isinstance(encoder, MLLMEncoder)
        encoder.check()
        return encoder


def load_checkpoint(options: ModelOptions, unet_weights: bool = True) -> LoadedModel:
    """Read the editing model that `options.model` names; `unet_weights` is as in `read_parts`.

    Raises `WeightsError` for missing or damaged files, and for an encoder that no installed plugin
    offers.
    """
    parts = read_parts(options, unet_weights)
    facts = read_json(parts.options, _FACTS)
    check_channels(parts, "ip2p")
    if facts is None:
        connector, uncond_states = _plain_connector(parts)
        facts = {"encoder": {"use": "clip-text", "model": OWN_FOLDER}}
    else:
        connector, uncond_states = _read_connector(parts.options)
    own_text, encoder = _encoder_of(facts, parts.options)
    settings = _settings_of(facts, parts)
    try:
        model = EditingModel(parts.unet, connector, uncond_states, parts.text)
    except ValueError as error:
        raise WeightsError(f"model: {options.model!r}: {error}") from error
    intended = read_intended_images(parts.options)
    return LoadedModel(model, parts.vae, parts.scheduler, encoder, own_text, settings, intended)


def initialize_model(
    parts: PipelineParts,
    init: Literal["sd15", "ip2p"],
    encoder: ComponentSpec,
    config: ConnectorConfig,
    settings: SamplingSettings,
    h: Sequence[Tensor],
) -> LoadedModel:
    """The model that training starts from: the weights of `parts`, and a connector.

    `init`: "sd15" for a text-to-image pipeline, whose UNet gets more input channels, or "ip2p" for
    an editing model. If that model has a connector of the same `config`, it is kept; otherwise a
    fresh one is calibrated on `h`, states (tokens, h_width) of some examples. Raises `WeightsError`
    for weights of the other kind and for a connector that does not fit.
    """
    check_channels(parts, init)
    unet = expand_input_channels(parts.unet) if init == "sd15" else parts.unet
    saved = read_json(parts.options, "connector/config.json") and _read_connector(parts.options)
    try:
        if saved and saved[0].config == config:
            connector, uncond_states = saved
        else:
            connector = build_connector(config)
            connector.calibrate(*pad([states.float() for states in h]))
            uncond_states = saved[1] if saved else _empty_text_states(parts)
        model = EditingModel(unet, connector, uncond_states, parts.text)
    except ValueError as error:
        raise WeightsError(f"model: {error}") from error
    own_text = (
        encoder.name == "clip-text"
        and isinstance(encoder.options, ModelOptions)
        and str(registry.checkpoint(encoder.options.model) or encoder.options.model)
        == parts.options.model
        and encoder.options.revision == parts.options.revision
    )
    intended = read_intended_images(parts.options)
    return LoadedModel(model, parts.vae, parts.scheduler, encoder, own_text, settings, intended)


def read_encoder_spec(options: ModelOptions) -> ComponentSpec | None:
    """The encoder that an editing model names; None if it is the pipeline's own CLIP text encoder.

    Raises `WeightsError`.
    """
    options, _ = open_pipeline(options)
    facts = read_json(options, _FACTS)
    return None if facts is None else _encoder_of(facts, options)[1]


def read_model_training_data(options: ModelOptions) -> TrainingData | None:
    """What a checkpoint says it was trained on; None if it does not say. Raises `WeightsError`."""
    if carried := registry.checkpoint(options.model):
        options = options.model_copy(update={"model": str(carried)})
    if os.path.isfile(options.model):  # weights in a single file
        return None
    file = find_file(options, training_data.FILE)
    return None if file is None else training_data.read_training_data(file)


def _empty_text_states(parts: PipelineParts) -> Tensor:
    if parts.text is None:
        raise WeightsError(
            f"model: {parts.options.model!r} has neither a connector nor a text encoder, so "
            "the conditioning of no instruction is unknown"
        )
    return parts.text([""])[0]


def _plain_connector(parts: PipelineParts) -> tuple[Connector, Tensor]:
    """Connector and unconditional states of a plain InstructPix2Pix pipeline."""
    uncond_states = _empty_text_states(parts)
    width = parts.unet.config.cross_attention_dim
    config = ConnectorConfig(kind="identity", h_width=width, width=width, tokens=len(uncond_states))
    return build_connector(config), uncond_states


def _read_connector(options: ModelOptions) -> tuple[Connector, Tensor]:
    config = read_json(options, "connector/config.json")
    weights = find_file(options, "connector/model.safetensors")
    if config is None or weights is None:
        raise WeightsError(f"model: {options.model!r} lacks connector/ (config and weights)")
    try:
        connector = build_connector(ConnectorConfig(**config))
        tensors = {name: value.float() for name, value in load_file(weights).items()}
        uncond_states = tensors.pop(_UNCOND_KEY)
        connector.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"model: connector/ of {options.model!r} is damaged: {error}") from error
    return connector, uncond_states


def _encoder_of(facts: dict[str, Any], options: ModelOptions) -> tuple[bool, ComponentSpec]:
    """Whether the encoder is the folder's own text encoder, and the encoder."""
    block: Any = facts.get("encoder")
    problems: list[str] = []

    def complain(where: yaml_locations.Path, what: str) -> None:
        problems.append(f"{_FACTS}: {'.'.join(map(str, where))}: {what}")

    own_text = isinstance(block, dict) and block.get("model") == OWN_FOLDER
    if own_text:
        block = block | {
            "model": options.model,
            "revision": options.revision,
            "variant": options.variant,
        }
    spec = read_spec("encoder", block, ("encoder",), complain)
    if spec is None:
        made_with = f" (made with {facts['package']})" if "package" in facts else ""
        raise WeightsError(f"model: {options.model!r}: {'; '.join(problems)}{made_with}")
    return own_text, spec


def _settings_of(facts: dict[str, Any], parts: PipelineParts) -> SamplingSettings:
    values, problems = facts.get("settings", {}), list[str]()
    if isinstance(values, dict):
        values = {"resolution": parts.resolution} | values

    def complain(where: yaml_locations.Path, what: str) -> None:
        problems.append(f"{'.'.join(map(str, where))}: {what}")

    settings: SamplingSettings | None = check(SamplingSettings, values, ("settings",), complain)
    if settings is None:
        raise WeightsError(f"model: {_FACTS} of {parts.options.model!r}: {'; '.join(problems)}")
    return settings


def save_checkpoint(folder: Path, checkpoint: LoadedModel) -> None:
    """Write the model into `folder`. Weights in half precision stay so.

    An encoder that is the model's own text encoder is saved as `OWN_FOLDER`, so the folder may
    move.
    """
    model = checkpoint.model
    model.unet.save_pretrained(folder / "unet")
    checkpoint.vae.save_pretrained(folder / "vae")
    checkpoint.scheduler.save_pretrained(folder / "scheduler")
    # Options such as the device belong to the user, not to the model.
    encoder = {
        name: value
        for name, value in checkpoint.encoder.as_yaml().items()
        if name not in checkpoint.encoder.options.fingerprint_exclude
    }
    with_text = bool(model.text and (checkpoint.own_text or model.connector.needs_text))
    if with_text and model.text:
        logging.disable_progress_bar()  # transformers draws one for each file of a text encoder
        model.text.encoder.save_pretrained(folder / "text_encoder")
        model.text.tokenizer.save_pretrained(folder / "tokenizer")
    if checkpoint.own_text:
        encoder.pop("revision", None)
        encoder.pop("variant", None)
        encoder |= {"model": OWN_FOLDER}
    (folder / "connector").mkdir(exist_ok=True)
    _write_json(folder / "connector" / "config.json", model.connector.config.model_dump())
    tensors = {name: value.contiguous() for name, value in model.connector.state_dict().items()}
    tensors[_UNCOND_KEY] = model.uncond_states.contiguous()
    save_file(tensors, folder / "connector" / "model.safetensors")
    facts = {
        "encoder": encoder,
        "package": checkpoint.encoder.package,
        "settings": checkpoint.settings.model_dump(),
    }
    _write_json(folder / _FACTS, facts)
    if checkpoint.intended_images:
        _write_json(folder / INTENDED, checkpoint.intended_images.model_dump())
    _write_json(folder / "model_index.json", _pipeline_index(checkpoint, with_text))


def _pipeline_index(checkpoint: LoadedModel, with_text: bool) -> dict[str, Any]:
    """`model_index.json`, from which diffusers knows the classes of the parts."""
    import diffusers

    absent = [None, None]
    return {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": absent,
        "image_encoder": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": ["diffusers", type(checkpoint.scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"] if with_text else absent,
        "tokenizer": ["transformers", "CLIPTokenizer"] if with_text else absent,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
