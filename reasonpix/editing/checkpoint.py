"""The folder of an editing model: diffusers' InstructPix2Pix layout, and what stands beside it.

```
model_index.json          StableDiffusionInstructPix2PixPipeline; what is absent is null
unet/ vae/ scheduler/     as diffusers writes them
text_encoder/ tokenizer/  where the connector or the encoder reads them
connector/                config.json, model.safetensors: the connector and the null states
reasonpix.json            the encoder by reference, and how to sample
```

diffusers' pipeline reads it; where there is no text encoder it wants to be told so, by
`from_pretrained(folder, text_encoder=None, tokenizer=None)`, and takes `prompt_embeds`.

A plain InstructPix2Pix pipeline is such a folder too: its encoder is its own CLIP text, its
connector passes the states on, and its null states are those of the empty text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from reasonpix.core import yaml_locations
from reasonpix.editing.model import (
    ClipTextEncoder,
    Connector,
    ConnectorConfig,
    EditingModel,
    build_connector,
    expand_input_channels,
    pad,
)
from reasonpix.errors import WeightsError
from reasonpix.plugin import registry
from reasonpix.plugin.components import MLLMEncoder, ModelOptions
from reasonpix.plugin.spec import ComponentSpec, check, read_spec
from reasonpix.plugin.weights import check_weights, pretrained

HERE = "."
"""As an encoder's `model`: the folder of the editing model itself."""

_FACTS = "reasonpix.json"


class Settings(BaseModel):
    """How a model is meant to be sampled; what the user says wins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int = Field(ge=8, description="Longer side that the model sees, in pixels")
    num_inference_steps: int = Field(100, ge=1, description="Denoising steps")
    guidance_scale: float = Field(
        7.5, ge=0, allow_inf_nan=False, description="s_T: how much the instruction counts"
    )
    image_guidance_scale: float = Field(
        1.5, ge=0, allow_inf_nan=False, description="s_I: how much the image counts"
    )


@dataclass(frozen=True)
class LoadedModel:
    """An editing model and all that it is used with."""

    model: EditingModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    encoder: ComponentSpec
    """The MLLM encoder. `HERE` has become the folder's path."""
    own_text: bool
    """Whether the encoder is the text encoder of the model itself."""
    settings: Settings

    def build_encoder(self, **options: Any) -> MLLMEncoder[Any]:
        """The encoder, checked but not loaded. Where it loads weights it takes these `options`."""
        use = self.encoder
        if isinstance(use.options, ModelOptions):
            use = replace(use, options=use.options.model_copy(update=options))
        encoder = use.build()
        assert isinstance(encoder, MLLMEncoder)
        encoder.check()
        return encoder


@dataclass(frozen=True)
class PipelineParts:
    """What a Stable Diffusion pipeline consists of, editing or not. Float32, on the CPU."""

    options: ModelOptions
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    text: ClipTextEncoder | None

    @property
    def tokens(self) -> int:
        """Tokens that stand for no instruction: CLIP's number of them, 77."""
        if self.text is not None:
            return self.text.tokens
        known = _json(self.options, "connector/config.json")
        return int(known["tokens"]) if known else 77

    @property
    def resolution(self) -> int:
        """Side that the UNet was made for, in pixels."""
        return int(self.unet.config.sample_size * vae_scale_factor(self.vae))


def vae_scale_factor(vae: AutoencoderKL) -> int:
    """Pixels to a side of one latent cell: 8 for Stable Diffusion."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def read_parts(options: ModelOptions, unet_weights: bool = True) -> PipelineParts:
    """Read the pipeline that `options.model` names: a folder, a hub id, or `mini/…`.

    Without `unet_weights` the UNet is one of torch's device "meta", which says what it is like.
    Raises `WeightsError` for what is absent or damaged.
    """
    options, index = _opened(options)
    text = None
    if (index.get("text_encoder") or [None])[0]:
        text = ClipTextEncoder(
            pretrained(CLIPTextModel, options, subfolder="text_encoder", use_safetensors=True),
            pretrained(CLIPTokenizer, options, subfolder="tokenizer"),
        )
        text.encoder.float()
    return PipelineParts(
        options,
        _unet(options, unet_weights),
        pretrained(AutoencoderKL, options, subfolder="vae", use_safetensors=True).float(),
        pretrained(_scheduler_class(index, options), options, subfolder="scheduler"),
        text,
    )


def _unet(options: ModelOptions, weights: bool) -> UNet2DConditionModel:
    if weights:
        return pretrained(
            UNet2DConditionModel, options, subfolder="unet", use_safetensors=True
        ).float()
    config = _json(options, "unet/config.json")
    if config is None:
        raise WeightsError(f"model: {options.model!r} lacks unet/config.json")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def check_pipeline(options: ModelOptions) -> None:
    """Raise `WeightsError` where `options.model` is no pipeline. No weights are read."""
    _opened(options)


def encoder_of(options: ModelOptions) -> ComponentSpec | None:
    """The encoder that an editing model names; None where it is the pipeline's own CLIP text.

    Raises `WeightsError`.
    """
    options, _ = _opened(options)
    facts = _json(options, _FACTS)
    return None if facts is None else _encoder(facts, options)[1]


def _opened(options: ModelOptions) -> tuple[ModelOptions, dict[str, Any]]:
    """The options with a carried checkpoint's path, and the pipeline's index."""
    named = options.model
    if carried := registry.checkpoint(options.model):
        options = options.model_copy(update={"model": str(carried)})
    check_weights(options)
    index = _json(options, "model_index.json")
    if index is None:
        raise WeightsError(f"model: {_why_none(named, options)}")
    return options, index


def _why_none(named: str, options: ModelOptions) -> str:
    folder = Path(options.model)
    if not folder.is_dir():
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            return (
                f"{named!r} is no folder here and not in the cache, and HF_HUB_OFFLINE is set; "
                "download it once without HF_HUB_OFFLINE, or name a local folder"
            )
    elif (folder / "model" / "model_index.json").is_file():
        return f"{named!r} is the folder of a run; its model is {str(folder / 'model')!r}"
    elif (folder / "state").is_dir() and (folder / "recipe.yaml").is_file():
        return f"{named!r} is a run that has not finished; its model/ comes at the end of training"
    return (
        f"{named!r} is no editing model: it holds no model_index.json; name what `reasonpix train` "
        "wrote, or an InstructPix2Pix pipeline"
    )


def load_checkpoint(options: ModelOptions, unet_weights: bool = True) -> LoadedModel:
    """Read the editing model that `options.model` names; `unet_weights` is as in `read_parts`.

    Raises `WeightsError` for what is absent or damaged, and for an encoder that no installed plugin
    offers.
    """
    parts = read_parts(options, unet_weights)
    facts = _json(parts.options, _FACTS)
    see_channels(parts, "ip2p")
    if facts is None:
        connector, null = _plain(parts)
        facts = {"encoder": {"use": "clip-text", "model": HERE}}
    else:
        connector, null = _read_connector(parts.options)
    own_text, encoder = _encoder(facts, parts.options)
    settings = _settings(facts, parts)
    try:
        model = EditingModel(parts.unet, connector, null, parts.text)
    except ValueError as error:
        raise WeightsError(f"model: {options.model!r}: {error}") from error
    return LoadedModel(model, parts.vae, parts.scheduler, encoder, own_text, settings)


def starting_point(
    parts: PipelineParts,
    init: Literal["sd15", "ip2p"],
    encoder: ComponentSpec,
    config: ConnectorConfig,
    settings: Settings,
    h: Sequence[Tensor],
) -> LoadedModel:
    """What training starts from: the weights of `parts`, and a connector.

    `init` says what they are: "sd15", a text-to-image pipeline whose UNet is widened, or "ip2p", an
    editing model. One of ours with the very connector asked for gives its connector too; otherwise
    the connector is fresh, and sees `h` of some examples. Raises `WeightsError` for weights of the
    other kind and for a connector that does not fit.
    """
    see_channels(parts, init)
    unet = expand_input_channels(parts.unet) if init == "sd15" else parts.unet
    known = _json(parts.options, "connector/config.json") and _read_connector(parts.options)
    try:
        if known and known[0].config == config:
            connector, null = known
        else:
            connector = build_connector(config)
            connector.see(*pad([states.float() for states in h]))
            null = known[1] if known else _null(parts)
        model = EditingModel(unet, connector, null, parts.text)
    except ValueError as error:
        raise WeightsError(f"model: {error}") from error
    own_text = (
        encoder.name == "clip-text"
        and isinstance(encoder.options, ModelOptions)
        and str(registry.checkpoint(encoder.options.model) or encoder.options.model)
        == parts.options.model
        and encoder.options.revision == parts.options.revision
    )
    return LoadedModel(model, parts.vae, parts.scheduler, encoder, own_text, settings)


def see_channels(parts: PipelineParts, init: str) -> None:
    """See that the UNet is what `init` says. Raises `WeightsError`."""
    unet = parts.unet.config
    if unet.in_channels == (2 if init == "ip2p" else 1) * unet.out_channels:
        return
    raise WeightsError(
        f"model: the UNet of {parts.options.model!r} takes {unet.in_channels} channels, "
        + (
            "so it is no editing model; `reasonpix train` makes one of it with init: sd15"
            if init == "ip2p"
            else "so it is no text-to-image model; to train an editing model on, say init: ip2p"
        )
    )


def _null(parts: PipelineParts) -> Tensor:
    if parts.text is None:
        raise WeightsError(
            f"model: {parts.options.model!r} holds neither a connector nor a text encoder, so "
            "nothing says what no instruction is"
        )
    return parts.text([""])[0]


def _plain(parts: PipelineParts) -> tuple[Connector, Tensor]:
    """The connector and null states of an InstructPix2Pix pipeline that knows nothing of us."""
    null = _null(parts)
    width = parts.unet.config.cross_attention_dim
    config = ConnectorConfig(kind="identity", h_width=width, width=width, tokens=len(null))
    return build_connector(config), null


def _read_connector(options: ModelOptions) -> tuple[Connector, Tensor]:
    config = _json(options, "connector/config.json")
    weights = _file(options, "connector/model.safetensors")
    if config is None or weights is None:
        raise WeightsError(f"model: {options.model!r} lacks connector/ (config and weights)")
    try:
        connector = build_connector(ConnectorConfig(**config))
        tensors = {name: value.float() for name, value in load_file(weights).items()}
        null = tensors.pop("null")
        connector.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"model: connector/ of {options.model!r} is damaged: {error}") from error
    return connector, null


def _encoder(facts: dict[str, Any], options: ModelOptions) -> tuple[bool, ComponentSpec]:
    """Whether it is the folder's own text encoder, and the encoder."""
    block: Any = facts.get("encoder")
    problems: list[str] = []

    def complain(where: yaml_locations.Path, what: str) -> None:
        problems.append(f"{_FACTS}: {'.'.join(map(str, where))}: {what}")

    own_text = isinstance(block, dict) and block.get("model") == HERE
    if own_text:
        block = block | {"model": options.model, "revision": options.revision}
    use = read_spec("encoder", block, ("encoder",), complain)
    if use is None:
        made_with = f" (made with {facts['package']})" if "package" in facts else ""
        raise WeightsError(f"model: {options.model!r}: {'; '.join(problems)}{made_with}")
    return own_text, use


def _settings(facts: dict[str, Any], parts: PipelineParts) -> Settings:
    given, problems = facts.get("settings", {}), list[str]()
    if isinstance(given, dict):
        given = {"resolution": parts.resolution} | given

    def complain(where: yaml_locations.Path, what: str) -> None:
        problems.append(f"{'.'.join(map(str, where))}: {what}")

    settings: Settings | None = check(Settings, given, ("settings",), complain)
    if settings is None:
        raise WeightsError(f"model: {_FACTS} of {parts.options.model!r}: {'; '.join(problems)}")
    return settings


def _scheduler_class(index: dict[str, Any], options: ModelOptions) -> type[SchedulerMixin]:
    import diffusers

    name = (index.get("scheduler") or [None, None])[1]
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise WeightsError(
            f"model: {options.model!r} names no scheduler of diffusers, got {name!r}"
        )
    return found


def _json(options: ModelOptions, name: str) -> dict[str, Any] | None:
    file = _file(options, name)
    if file is None:
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"model: {name} of {options.model!r} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"model: {name} of {options.model!r} holds no mapping")
    return values


def _file(options: ModelOptions, name: str) -> Path | None:
    """A file of the model, downloaded when need be; None when the model has none."""
    if os.path.isdir(options.model):
        file = Path(options.model, name)
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            options.model,
            name,
            revision=options.revision,
            cache_dir=options.cache_dir,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        raise WeightsError(
            f"model: cannot get {name} of {options.model!r}: {error}; name a local folder, or see "
            "that the hub can be reached"
        ) from error
    return Path(found) if found else None


def save_checkpoint(folder: Path, checkpoint: LoadedModel) -> None:
    """Write all files of `folder`. Half-precision weights stay as they are.

    An encoder that reads the text encoder of the model itself is named `HERE`.
    """
    model = checkpoint.model
    model.unet.save_pretrained(folder / "unet")
    checkpoint.vae.save_pretrained(folder / "vae")
    checkpoint.scheduler.save_pretrained(folder / "scheduler")
    # Device and the like are the user's, not the model's.
    encoder = {
        name: value
        for name, value in checkpoint.encoder.as_yaml().items()
        if name not in checkpoint.encoder.options.fingerprint_exclude
    }
    logging.disable_progress_bar()  # a bar for each file of a text encoder
    if model.text and (checkpoint.own_text or model.connector.needs_text):
        model.text.encoder.save_pretrained(folder / "text_encoder")
        model.text.tokenizer.save_pretrained(folder / "tokenizer")
    if checkpoint.own_text:
        encoder = {key: value for key, value in encoder.items() if key != "revision"}
        encoder |= {"model": HERE}
    (folder / "connector").mkdir(exist_ok=True)
    _write(folder / "connector" / "config.json", model.connector.config.model_dump())
    tensors = {name: value.contiguous() for name, value in model.connector.state_dict().items()}
    save_file(
        tensors | {"null": model.null.contiguous()}, folder / "connector" / "model.safetensors"
    )
    facts = {
        "encoder": encoder,
        "package": checkpoint.encoder.package,
        "settings": checkpoint.settings.model_dump(),
    }
    _write(folder / _FACTS, facts)
    _write(folder / "model_index.json", _index(folder, checkpoint))


def _index(folder: Path, checkpoint: LoadedModel) -> dict[str, Any]:
    """What diffusers reads to know the pipeline's parts."""
    import diffusers

    with_text = (folder / "text_encoder").is_dir()
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


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
