"""The command that exports a model for another runtime."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reasonpix.cli import console, options
from reasonpix.errors import require_extra

if TYPE_CHECKING:
    from reasonpix.deployment.export.exporter import ExportResult
    from reasonpix.editing.runtimes.manifest import Precision
    from reasonpix.editing.runtimes.names import Format


@click.command("export")
@click.argument("model")
@click.option(
    "--to",
    "format",
    type=click.Choice(["onnx", "openvino", "tensorrt"]),
    required=True,
    help="The runtime to export for.",
)
@click.option(
    "--samples",
    required=True,
    metavar="BENCHMARK",
    help="Benchmark to verify the export on: a folder written by `reasonpix benchmark`, or another "
    "that `reasonpix evaluate` reads.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="Number of cases of BENCHMARK to use, in order, each with all its instructions.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="New folder for the whole model except the UNet's PyTorch weights, or one that already "
    "holds exports of the same weights. By default the export goes into the folder MODEL.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="Precision of the networks; int8 applies to weights only.",
)
@click.option("--vae", is_flag=True, help="Export the VAE's encoder and decoder too.")
@click.option("--force", is_flag=True, help="Replace an export of the same format.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Denoising steps of each edit. By default the model's own.",
)
@click.option("--clip", metavar="MODEL", help="Model for CLIP-I and CLIP-T.")
@click.option("--dino", metavar="MODEL", help="Model for DINO.")
@click.option("--split", default="test", show_default=True, help="Split of BENCHMARK to read.")
@options.revision_option
@options.variant_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
def export_command(
    model: str,
    format: Format,
    samples: str,
    count: int,
    out: Path | None,
    precision: Precision,
    vae: bool,
    force: bool,
    steps: int | None,
    clip: str | None,
    dino: str | None,
    split: str,
    revision: str | None,
    variant: str | None,
    device: str,
) -> None:
    """Export MODEL's UNet for another runtime and verify its edits against PyTorch's on BENCHMARK.

    If the edits differ too much, the command fails and nothing is written.
    """
    with require_extra("edit"):
        from reasonpix.deployment.export.exporter import ExportRequest, export_model
    from reasonpix.evaluation.benchmark import BenchmarkOptions
    from reasonpix.evaluation.metrics import MetricsOptions
    from reasonpix.plugin.components import ModelOptions

    measures = {"clip": clip, "dino": dino}
    request = ExportRequest(
        model=ModelOptions(model=model, revision=revision, variant=variant, device=device),
        format=format,
        benchmark=BenchmarkOptions(path=samples, split=split, limit=count),
        precision=precision,
        vae=vae,
        steps=steps,
        metrics=MetricsOptions.model_validate({k: v for k, v in measures.items() if v}),
    )
    try:
        with console.graceful_shutdown():
            result = export_model(
                request, out, force=force, log=lambda step: click.echo(step, err=True)
            )
    except KeyboardInterrupt as stopped:
        click.echo("stopped; nothing was written", err=True)
        sys.exit(128 + (stopped.args or (2,))[0])
    _show(result)


def _show(result: ExportResult) -> None:
    parity, manifest = result.parity, result.manifest
    click.echo(f"{parity.edits} edits of {parity.steps} steps, compared with PyTorch in float32:")
    for check in parity.checks():
        click.echo(f"  {check.name:<48} {check.value:>10}  {check.limit}")
    size = f"{result.size / 1e6:.1f} MB"
    click.echo(
        f"{manifest.format} {manifest.precision}, {size}, in {result.folder}; to edit with it:"
    )
    folder = shlex.quote(str(result.folder.parent))
    click.echo(
        f"reasonpix edit IMAGE --instruction TEXT --model {folder} --runtime {manifest.format}"
    )


COMMANDS = (export_command,)
