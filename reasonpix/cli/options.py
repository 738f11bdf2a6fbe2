"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import click

from reasonpix.editing.runtimes.names import RUNTIMES, Runtime
from reasonpix.errors import require_extra

if TYPE_CHECKING:
    from reasonpix.editing.pipeline import ReasonPix2Pix

run_argument = click.argument("run")


def set_option(examples: str) -> Callable[[Any], Any]:
    """The option `--set` of commands that read a recipe, with examples of what it overrides."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Override a value of the recipe, such as {examples}. May be repeated.",
    )


host_option = click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 listens on all network interfaces.",
)
port_option = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 picks a free one.",
)
revision_option = click.option("--revision", help="Commit or tag of the hub repository.")
variant_option = click.option(
    "--variant",
    metavar="NAME",
    help="Variant of the weight files, such as fp16. By default the plain files, or the "
    "model's only variant.",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Floating-point precision; auto is float32 on a CPU and float16 on a GPU.",
)


def runtime_option(default: str | None) -> Callable[[Any], Any]:
    """The option `--runtime` of commands that run an editing model."""
    return click.option(
        "--runtime",
        type=click.Choice(RUNTIMES),
        default=default,
        show_default=default is not None,
        help="Runtime of the UNet; onnx, openvino and tensorrt need an export made by "
        "`reasonpix export`.",
    )


@dataclass(frozen=True)
class EditingModelArguments:
    """An editing model as the command line names it."""

    model: str
    revision: str | None
    variant: str | None
    runtime: Runtime
    device: str
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    batch_size: int

    def load(self) -> ReasonPix2Pix:
        """Load the model, and print what it is made for. Raises `ReasonpixError`."""
        with require_extra("edit"):
            from reasonpix.editing.pipeline import ReasonPix2Pix
            from reasonpix.plugin.intended_images import domain_warnings

        model = ReasonPix2Pix.from_pretrained(
            self.model,
            revision=self.revision,
            variant=self.variant,
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            runtime=self.runtime,
        )
        for line in domain_warnings([(self.model, model.intended_images)], "", "your images"):
            click.echo(f"warning: {line}", err=True)
        return model


def editing_model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an editing model; `command` gets `model`, an `EditingModelArguments`."""

    @wraps(command)
    def with_model(
        *,
        model: str,
        revision: str | None,
        variant: str | None,
        runtime: Runtime,
        device: str,
        dtype: Literal["auto", "float32", "float16", "bfloat16"],
        batch_size: int,
        **others: Any,
    ) -> Any:
        named = EditingModelArguments(model, revision, variant, runtime, device, dtype, batch_size)
        return command(model=named, **others)

    for option in (
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            metavar="N",
            help="Edits computed together on a GPU; another number may change the last bits.",
        ),
        dtype_option,
        device_option,
        runtime_option("auto"),
        variant_option,
        revision_option,
        click.option(
            "--model",
            required=True,
            metavar="MODEL",
            help="A folder that `reasonpix train` or `reasonpix export` wrote, a hub id, or a name "
            "such as mini/reasonpix2pix.",
        ),
    ):
        with_model = option(with_model)
    return with_model
