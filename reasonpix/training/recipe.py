"""Recipes of `reasonpix train`: data, encoder, initial model and hyperparameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from reasonpix.datasets.pairs import Data
from reasonpix.editing.config import ConnectorOptions, SamplingOptions
from reasonpix.errors import PluginError, RecipeError
from reasonpix.generation import recipe_catalog
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.spec import ComponentSpec, check, read_spec, slot_schemas

Share = Annotated[float, Field(ge=0, lt=1)]


_ALIGNED = ("query_resampler", "clip_residual", "codebook")
"""Connectors whose tokens correspond to CLIP's."""


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Start(_Block):
    """The model that training starts from."""

    model: str = Field(description="Hub id, local folder, or checkpoint name")
    revision: str | None = Field(None, description="Commit or tag of the hub repository")
    variant: str | None = Field(
        None, min_length=1, description="Variant of the weight files, such as fp16"
    )
    cache_dir: Path | None = Field(None, description="Where hub downloads are kept")
    init: Literal["sd15", "ip2p"] = Field(
        "ip2p",
        description="Kind of `model`: a text-to-image pipeline, whose UNet gets more input "
        "channels, or an editing model",
    )
    connector: ConnectorOptions = ConnectorOptions()

    @field_validator("connector", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @property
    def weights(self) -> ModelOptions:
        """The weights as options of a model."""
        return ModelOptions.model_validate(
            self.model_dump(include={"model", "revision", "variant", "cache_dir"})
        )


class Align(_Block):
    """A first stage that trains only the connector, to match CLIP's states (as in SmartEdit).

    The target of an instruction is CLIP's states of the same row's text in the column `data.align`.
    The learning rate warms up over 100 steps, then decays by a cosine.
    """

    steps: int = Field(ge=1, description="Optimizer steps")
    batch_size: int = Field(64, ge=1, description="Examples per step")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW")


class Validation(_Block):
    """Images edited during training, of held-out examples."""

    examples: int = Field(8, ge=1, description="Held-out examples, each with a different image")
    every: int = Field(1000, ge=1, description="Optimizer steps between validations")


class TrainingRecipe(_Block):
    """A recipe of `reasonpix train`. Defaults are InstructPix2Pix's, with the paper's 256 px."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all random choices")
    data: Data
    encoder: ComponentSpec
    model: Start
    cache: bool | Path = Field(
        True,
        description="Where h and latents are cached: in the run's folder, or in one that runs "
        "share; false computes them in every step",
    )
    align: Align | None = Field(None, description="A first stage that trains only the connector")
    steps: int = Field(10_000, ge=0, description="Optimizer steps")
    batch_size: int = Field(1024, ge=1, description="Examples per optimizer step, on all devices")
    micro_batch_size: int = Field(32, ge=1, description="Examples that a device computes at once")
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Learning rate after warm-up; cosine decays to zero"
    )
    warmup: int = Field(0, ge=0, description="Optimizer steps of linear warm-up")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW")
    max_gradient_norm: float | None = Field(
        1.0, gt=0, description="Gradient clipping; null disables it"
    )
    dropout: float = Field(
        0.05,
        ge=0,
        le=1 / 3,
        description="p: a share p of examples loses the instruction, p the image, p both",
    )
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="Largest decay of the averaged weights"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Mixed precision; auto is bf16 on a GPU that has it, else fp32"
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: less memory, slower"
    )
    save_every: int = Field(1000, ge=1, description="Optimizer steps between checkpoints")
    validation: Validation | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        ("tensorboard",), description="Where curves and images are logged; wandb uploads them"
    )
    sampling: SamplingOptions = SamplingOptions()

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_size % self.micro_batch_size and self.batch_size > self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.align and self.model.connector.kind not in _ALIGNED:
            raise ValueError(
                "align needs a connector whose tokens correspond to CLIP's one by one: "
                f"{', '.join(_ALIGNED)}"
            )
        if self.align and self.data.align is None:
            raise ValueError("align needs the column to align to: name it by data.align")
        return self

    @property
    def align_steps(self) -> int:
        """Optimizer steps of the alignment stage; 0 without one."""
        return self.align.steps if self.align else 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of both stages."""
        return self.align_steps + self.steps

    def learning_rate_at(self, step: int, aligning: bool) -> float:
        """Learning rate of a step, counted from 0 in its stage."""
        if aligning and self.align:
            peak, steps, warmup, cosine = self.align.learning_rate, self.align.steps, 100, True
        else:
            peak, steps, warmup = self.learning_rate, self.steps, self.warmup
            cosine = self.schedule == "cosine"
        rate = peak * min(1.0, (step + 1) / warmup) if warmup else peak
        return rate * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if cosine else rate

    def as_yaml(self) -> str:
        """The resolved recipe: every option, and the encoder's package as a comment."""
        body = self.model_dump(mode="json", exclude={"encoder"})
        body |= {"encoder": self.encoder.as_yaml()}
        ordered = {name: body[name] for name in type(self).model_fields}
        return f"# {self.encoder.package}\n" + yaml.safe_dump(
            ordered, sort_keys=False, allow_unicode=True
        )


def load_training_recipe(
    path: str | Path, overrides: recipe_catalog.Overrides = ()
) -> TrainingRecipe:
    """Read and check a training recipe, given as a file or by the name of a shipped one.

    `overrides` win over the file: `["seed=1"]`, with values in YAML, or `{"seed": 1}`. Raises
    `RecipeError` with every problem found, each as `file:line:column: path: problem`.
    """
    data, marks, problems = recipe_catalog.read(path, "train", overrides)

    complain = marks.into(problems)
    if "encoder" in data:
        # The spec replaces the block, so that the rest of the recipe is checked too.
        encoder = read_spec("encoder", data["encoder"], ("encoder",), complain)
        data["encoder"] = encoder or ComponentSpec("encoder", "", ModelOptions(model=""))
    recipe = check(TrainingRecipe, data, (), complain)
    try:
        if recipe:
            registry.checkpoint(recipe.model.model)
    except PluginError as error:
        complain(("model", "model"), str(error))
    if problems or recipe is None:
        raise RecipeError(problems)
    checked: TrainingRecipe = recipe
    return checked


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of training recipes, with the options of all encoders."""
    document = TrainingRecipe.model_json_schema()
    definitions = document["$defs"]
    for name in ("ComponentSpec", "Options"):
        definitions.pop(name, None)
    document["properties"]["encoder"] = {"$ref": "#/$defs/encoder"}
    connector = definitions["Start"]["properties"]["connector"]
    kinds = definitions["ConnectorOptions"]["properties"]["kind"]["enum"]
    connector["anyOf"] = [{"enum": kinds}, {"$ref": connector.pop("$ref")}]
    return {
        **recipe_catalog.schema_head(),
        **document,
        "title": "reasonpix training recipe",
        "$defs": definitions | slot_schemas("encoder"),
    }
