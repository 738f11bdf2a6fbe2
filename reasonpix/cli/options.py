"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from reasonpix.editing.runtimes.names import RUNTIMES

run_argument = click.argument("run")

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the recipe, such as seed=1 or pipeline.planner=lexicon.",
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
