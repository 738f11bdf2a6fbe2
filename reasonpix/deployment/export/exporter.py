"""Export an editing model's networks to ONNX, OpenVINO or TensorRT, and verify the export.

An export appears as a whole or not at all: its files are written to a temporary folder, the target
runtime edits a benchmark with them, and the folder is renamed only if the edits match PyTorch's
within the limits of `reasonpix.deployment.export.parity`.

| precision | `onnx`, `tensorrt` | `openvino` |
|---|---|---|
| `fp32` | float32 | float32 |
| `fp16` | float16 | weights in float16; a CPU computes in float32 |
| `bf16` | bfloat16; onnxruntime needs a GPU | weights in float32, computed in bfloat16 |
| `int8` | `onnx`: weights of matrix products | weights of all layers |
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from reasonpix.core.atomic import output_dir
from reasonpix.core.memory import free_memory, is_out_of_memory
from reasonpix.deployment.export.converters import convert, profile, quiet, stride, weights_digest
from reasonpix.deployment.export.parity import LIMITS, InputShape, ParityReport, measure_parity
from reasonpix.editing.checkpoint import LoadedModel, load_checkpoint
from reasonpix.editing.pipeline_parts import check_pipeline
from reasonpix.editing.runtimes.manifest import (
    MANIFEST,
    Export,
    Manifest,
    Part,
    Precision,
    file_sha256,
    has_export,
)
from reasonpix.editing.runtimes.names import FORMATS, PACKAGES, Format
from reasonpix.editing.runtimes.openvino import import_openvino
from reasonpix.editing.runtimes.select import choose_export_device
from reasonpix.errors import ReasonpixError, WeightsError, require_extra
from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.metrics import Metrics, MetricsOptions
from reasonpix.plugin import intended_images, registry
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.model_files import automatic_variants

_MODEL_FILES = (
    "model_index.json",
    "reasonpix.json",
    intended_images.FILE,
    "README.md",
    "unet/config.json",
)
_MODEL_FOLDERS = ("vae", "scheduler", "connector", "text_encoder", "tokenizer")
"""Files and folders of a model other than the UNet's weights."""
_UNUSED = ("*.bin", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.fp16.*", "*non_ema*")
"""The same weights in other formats, as hub repositories may hold them."""


@dataclass(frozen=True)
class ExportRequest:
    """What to export, how, and the benchmark to verify it on."""

    model: ModelOptions
    format: Format
    benchmark: BenchmarkOptions
    precision: Precision = "fp32"
    vae: bool = False
    """Export the VAE's networks too; otherwise PyTorch runs them."""
    steps: int | None = None
    """Denoising steps of the edits; None is the model's own setting."""
    metrics: MetricsOptions = field(default_factory=MetricsOptions)


@dataclass(frozen=True)
class ExportResult:
    """A verified export and the measurements."""

    folder: Path
    manifest: Manifest
    parity: ParityReport

    @property
    def size(self) -> int:
        """Size of its files, in bytes."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.files)


def export_model(
    request: ExportRequest,
    out: Path | None = None,
    *,
    force: bool = False,
    log: Callable[[str], None] = lambda step: None,
) -> ExportResult:
    """Export a model into its own folder, or, with the rest of the model, into `out`.

    `out` is a new folder, or one with exports of the same weights, to which this one is added.
    `force` replaces an export of the same format. Cheap checks come first. `log` is called with a
    line for each phase. Raises `ReasonpixError` and writes nothing if something is wrong or the
    export's edits differ from PyTorch's.
    """
    device = _check_request(request)
    target = _choose_target(request, out, force)
    check_pipeline(request.model)
    _check_is_torch(request.model)
    metrics = Metrics(request.metrics)
    metrics.check()
    cases = read_benchmark(request.benchmark, Path()).cases
    log("loading the model")
    checkpoint = load_checkpoint(request.model)
    weights = weights_digest(checkpoint.model.unet)
    _check_weights(target, weights)
    encoder = checkpoint.build_encoder(device=str(device), cache_dir=request.model.cache_dir)
    # The folder of a new model may exist if it is empty.
    with output_dir(target.folder, "export", replace=force or target.is_new_model) as draft:
        folder = draft / target.subfolder
        folder.mkdir(exist_ok=True)
        if target.is_new_model:
            _copy_model(request.model, draft)
        log(f"writing {request.format}")
        manifest = _write_files(request, checkpoint, weights, folder)
        log(f"comparing with PyTorch: {len(cases)} cases")
        networks = _load_networks(Export(folder, manifest), device)
        with closing(metrics), closing(encoder):
            metrics.load()
            encoder.load()
            parity = measure_parity(
                checkpoint,
                encoder,
                networks,
                cases,
                _probe_shapes(checkpoint, request.format),
                metrics,
                LIMITS[request.precision],
                steps=request.steps,
                device=device,
            )
        if parity.problems:
            raise ReasonpixError(_rejection(request, parity))
        tried = {"benchmark": request.benchmark.path, "cases": len(cases), "device": str(device)}
        manifest = manifest.model_copy(update={"parity": tried | parity.as_dict()})
        text = manifest.model_dump_json(indent=2)
        (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
    return ExportResult(target.folder / target.subfolder, manifest, parity)


# -- checks ------------------------------------------------------------------------------


def _check_request(request: ExportRequest) -> torch.device:
    """The device to verify on. Raises `ReasonpixError` for requests that cannot succeed."""
    format, precision = request.format, request.precision
    if (format, precision) == ("tensorrt", "int8"):
        raise ReasonpixError(
            "--precision int8: TensorRT needs a calibration for it, which reasonpix does not do; "
            "use fp16 or bf16"
        )
    with require_extra(format):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        if format == "openvino":
            import_openvino()
        else:
            import_module(PACKAGES[format])
        if (format, precision) == ("openvino", "int8"):
            with quiet():
                import nncf  # noqa: F401
    if format == "tensorrt" and not torch.cuda.is_available():
        raise ReasonpixError(
            "--to tensorrt: TensorRT needs an NVIDIA GPU to build and run its engines, and PyTorch "
            "finds none here; export on a machine with one, or use --to onnx or --to openvino"
        )
    device = choose_export_device(format, request.model)
    if (format, precision, device.type) == ("onnx", "bf16", "cpu"):
        raise ReasonpixError(
            "--precision bf16: onnxruntime has no bfloat16 on a CPU, so the export cannot be "
            "verified here; use --to openvino, which has it, or fp32, or export on a machine with "
            "a GPU"
        )
    return device


@dataclass(frozen=True)
class _ExportTarget:
    """Where an export is written."""

    folder: Path
    """The folder that is created."""
    subfolder: str
    """Path of the export inside `folder`; "." if the folder is the export."""
    model: Path
    """The model's folder, which holds one export for each format."""

    @property
    def is_new_model(self) -> bool:
        return self.subfolder != "."


def _choose_target(request: ExportRequest, out: Path | None, force: bool) -> _ExportTarget:
    """Raises `ReasonpixError` for a folder that exists or holds something else."""
    name = request.model.model
    plugin_folder = registry.checkpoint(name)
    own = Path(plugin_folder or name)
    is_local = plugin_folder is None and own.is_dir()
    if out is None and not is_local:
        what = "comes with a plugin" if plugin_folder else "is not a local folder"
        raise ReasonpixError(f"{name} {what}, so the export cannot go into it; add --out DIR")
    model = own.absolute() if out is None else out.absolute()
    if out is not None and not (is_local and out.exists() and out.samefile(own)):
        if out.exists() and not out.is_dir():
            raise ReasonpixError(f"--out: {out} is a file; give a folder")
        if not out.exists() or not any(out.iterdir()):
            return _ExportTarget(model, request.format, model)
        if not any(has_export(out, format) for format in FORMATS):
            raise ReasonpixError(f"--out: {out} holds something else; give a new folder")
    target = model / request.format
    if os.path.lexists(target) and not force:
        raise ReasonpixError(f"{target} already exists; --force replaces it")
    if os.path.lexists(target) and not has_export(model, request.format):
        raise ReasonpixError(
            f"{target} is not an export, so --force does not replace it; remove it yourself"
        )
    return _ExportTarget(target, ".", model)


def _check_is_torch(options: ModelOptions) -> None:
    folder = Path(registry.checkpoint(options.model) or options.model)
    if folder.is_dir() and not any((folder / "unet").glob("*.safetensors")):
        raise WeightsError(
            f"model: {options.model!r} has no PyTorch weights of the UNet; give the model that "
            "its exports were made from"
        )


def _check_weights(target: _ExportTarget, weights: str) -> None:
    """Raise `ReasonpixError` if the model's other exports were made from different weights."""
    for format in FORMATS:
        file = target.model / format / MANIFEST
        if target.is_new_model or file.parent == target.folder or not file.is_file():
            continue
        try:
            same = Manifest.model_validate_json(file.read_bytes()).weights == weights
        except ValidationError:
            same = False
        if not same:
            raise ReasonpixError(
                f"{file.parent} was exported from different weights; remove it, or choose "
                "another folder with --out"
            )


# -- files ----------------------------------------------------------------------------------------


def _copy_model(options: ModelOptions, draft: Path) -> None:
    """Copy the model without the UNet's weights. Symbolic links become files."""
    source = Path(registry.checkpoint(options.model) or options.model)
    options = options.model_copy(update={"model": str(source)}) if source.is_dir() else options
    variants = {options.variant or "", *automatic_variants(options)} - {""}
    unused = [it for it in _UNUSED if not any(variant in it for variant in variants)]
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        from reasonpix.plugin.hub_client import connect_hub

        connect_hub()
        source = Path(
            snapshot_download(
                options.model,
                revision=options.revision,
                cache_dir=options.cache_dir,
                allow_patterns=[*_MODEL_FILES, *(f"{part}/*" for part in _MODEL_FOLDERS)],
                ignore_patterns=unused,
            )
        )
    for name in _MODEL_FILES:
        if (source / name).is_file():
            (draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, draft / name)
    for part in _MODEL_FOLDERS:
        if (source / part).is_dir():
            shutil.copytree(
                source / part,
                draft / part,
                ignore=shutil.ignore_patterns(*unused),
                copy_function=shutil.copyfile,
            )


def _write_files(
    request: ExportRequest, checkpoint: LoadedModel, weights: str, folder: Path
) -> Manifest:
    """Write the networks; returns the manifest without the parity report."""
    parts: tuple[Part, ...] = ("unet", "vae_encoder", "vae_decoder")
    selected = parts if request.vae else parts[:1]
    try:
        graphs = convert(checkpoint, request.format, request.precision, selected, folder)
    except Exception as error:  # exporters raise nearly anything for unknown models
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[:1]
        raise ReasonpixError(
            f"{request.format}: this model cannot be converted ({type(error).__name__}: "
            f"{' '.join(reason)}); run it with --runtime torch or compile"
        ) from error
    free_memory()
    names = ["reasonpix", "torch", "diffusers", "onnx", "onnxscript"]
    names += ["nncf"] if (request.format, request.precision) == ("openvino", "int8") else []
    runtime = PACKAGES[request.format]  # possibly installed as another package, onnxruntime-gpu
    packages = {name: version(name) for name in names}
    packages[runtime] = str(import_module(runtime).__version__)
    return Manifest(
        format=request.format,
        precision=request.precision,
        source=request.model.model,
        weights=weights,
        packages=packages,
        files={file.name: file_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()},
        graphs=graphs,
        profile=profile(checkpoint) if request.format == "tensorrt" else None,
        parity={},
    )


# -- verification --------------------------------------------------------------------------------


def _load_networks(export: Export, device: torch.device) -> dict[Part, Any]:
    runtime = import_module(f"reasonpix.editing.runtimes.{export.manifest.format}")
    networks: dict[Part, Any] = runtime.load(export, device)
    return networks


def _probe_shapes(checkpoint: LoadedModel, format: Format) -> list[InputShape]:
    """Input shapes other than those used for tracing and by the model.

    For TensorRT they are within its profile.
    """
    step, shapes = stride(checkpoint), profile(checkpoint)
    (smallest, usual, _), tokens = shapes.height, shapes.sequence[1]
    smaller = max(smallest, usual // 2 // step * step)
    larger = usual if format == "tensorrt" else usual + step
    return [InputShape(1, smaller, usual, tokens + 7), InputShape(5, larger, smaller, 2 * tokens)]


def _rejection(request: ExportRequest, parity: ParityReport) -> str:
    lines = "\n".join(f"  {problem}" for problem in parity.problems)
    fix = (
        "use another format, and please report this"
        if request.precision == "fp32"
        else "use a higher precision, such as fp32"
    )
    return (
        f"{request.format} {request.precision}: the edits differ too much from PyTorch's, so "
        "nothing was written\n"
        f"{lines}\n{fix}"
    )
