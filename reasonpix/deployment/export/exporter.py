"""Export an editing model's networks to ONNX, OpenVINO or TensorRT; prove that nothing was lost.

An export appears as a whole or not at all: its files are written beside their place, the runtime
that they are for edits a benchmark with them, and only when the edits are PyTorch's do they get
their name; `reasonpix.deployment.export.parity` says what that means.

| precision | `onnx`, `tensorrt` | `openvino` |
|---|---|---|
| `fp32` | float32 | float32 |
| `fp16` | float16 | weights in float16; a CPU computes in float32 |
| `bf16` | bfloat16; onnxruntime has it on a GPU alone | weights in float32, computed in bfloat16 |
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
from reasonpix.deployment.export.parity import LIMITS, Parity, Sizes, compare
from reasonpix.editing.checkpoint import LoadedModel, load_checkpoint
from reasonpix.editing.pipeline_parts import check_pipeline
from reasonpix.editing.runtimes.manifest import (
    MANIFEST,
    Export,
    Manifest,
    Part,
    Precision,
    exists,
    sha256,
)
from reasonpix.editing.runtimes.names import FORMATS, PACKAGES, Format
from reasonpix.editing.runtimes.openvino import import_openvino
from reasonpix.editing.runtimes.select import choose_export_device
from reasonpix.errors import ReasonpixError, WeightsError, require_extra
from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.metrics import Metrics, MetricsOptions
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions

_MODEL_FILES = ("model_index.json", "reasonpix.json", "README.md", "unet/config.json")
_MODEL_FOLDERS = ("vae", "scheduler", "connector", "text_encoder", "tokenizer")
"""What a model is used with, beside its UNet: files, and folders."""
_UNUSED = ("*.bin", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.fp16.*", "*non_ema*")
"""What repositories hold of the same weights in other forms."""


@dataclass(frozen=True)
class ExportRequest:
    """What is to be exported, how, and what it is tried on."""

    model: ModelOptions
    format: Format
    benchmark: BenchmarkOptions
    precision: Precision = "fp32"
    vae: bool = False
    """The VAE's networks too; without, PyTorch computes them."""
    steps: int | None = None
    """Of the edits; None is as the model is meant to be used."""
    metrics: MetricsOptions = field(default_factory=MetricsOptions)


@dataclass(frozen=True)
class ExportResult:
    """An export that was proven, and what it was proven by."""

    folder: Path
    manifest: Manifest
    parity: Parity

    @property
    def size(self) -> int:
        """Of its files, in bytes."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.files)


def export_model(
    request: ExportRequest,
    out: Path | None = None,
    *,
    force: bool = False,
    log: Callable[[str], None] = lambda step: None,
) -> ExportResult:
    """Export a model into its own folder, or with all that it is used with into `out`.

    `out` is a new folder, or one that holds exports of the same weights, to which it is added.
    `force` replaces an export of the same format. Everything that can be checked without work is
    checked first. Raises `ReasonpixError`, and then nothing was changed; that is also so for an
    export that does not do what PyTorch does.
    """
    device = _check_request(request)
    target = _choose_target(request, out, force)
    check_pipeline(request.model)
    _check_is_torch(request.model)
    metrics = Metrics(request.metrics)
    metrics.check()
    cases = read_benchmark(request.benchmark, Path()).cases
    log("reading the model")
    checkpoint = load_checkpoint(request.model)
    weights = weights_digest(checkpoint.model.unet)
    _check_weights(target, weights)
    encoder = checkpoint.build_encoder(device=str(device), cache_dir=request.model.cache_dir)
    # A new model's folder may be there, and empty.
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
            parity = compare(
                checkpoint,
                encoder,
                networks,
                cases,
                _probe_sizes(checkpoint, request.format),
                metrics,
                LIMITS[request.precision],
                steps=request.steps,
                device=device,
            )
        if parity.problems:
            raise ReasonpixError(_rejection(request, parity))
        tried = {"benchmark": request.benchmark.path, "cases": len(cases), "device": str(device)}
        manifest = manifest.model_copy(update={"parity": tried | parity.facts()})
        text = manifest.model_dump_json(indent=2)
        (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
    return ExportResult(target.folder / target.subfolder, manifest, parity)


# -- before any work ------------------------------------------------------------------------------


def _check_request(request: ExportRequest) -> torch.device:
    """The device to compare on. Raises `ReasonpixError` for what cannot come out well."""
    format, precision = request.format, request.precision
    if (format, precision) == ("tensorrt", "int8"):
        raise ReasonpixError(
            "--precision int8: TensorRT wants a calibration for it, which is not made here; choose "
            "fp16 or bf16"
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
            "TensorRT builds its engines on an NVIDIA GPU and computes on it, and PyTorch finds "
            "none here: export on a machine with one, or choose --to onnx or --to openvino"
        )
    device = choose_export_device(format, request.model)
    if (format, precision, device.type) == ("onnx", "bf16", "cpu"):
        raise ReasonpixError(
            "--precision bf16: onnxruntime has no bfloat16 on a CPU, so that nothing can be shown "
            "of such an export here; choose --to openvino, which has it, or fp32, or export on a "
            "machine with a GPU"
        )
    return device


@dataclass(frozen=True)
class _ExportTarget:
    """Where an export goes."""

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
    """Raises `ReasonpixError` for a place that is taken, or that belongs to somebody else."""
    named = request.model.model
    carried = registry.checkpoint(named)
    own = Path(carried or named)
    is_ours = carried is None and own.is_dir()
    if out is None and not is_ours:
        what = "is carried by a plugin" if carried else "is no folder here"
        raise ReasonpixError(f"{named} {what}, so that nothing is written to it: say --out DIR")
    model = own.absolute() if out is None else out.absolute()
    if out is not None and not (is_ours and out.exists() and out.samefile(own)):
        if out.exists() and not out.is_dir():
            raise ReasonpixError(f"--out: {out} is a file; name a folder")
        if not out.exists() or not any(out.iterdir()):
            return _ExportTarget(model, request.format, model)
        if not any(exists(out, format) for format in FORMATS):
            raise ReasonpixError(f"--out: {out} holds something else; name a new folder")
    target = model / request.format
    if os.path.lexists(target) and not force:
        raise ReasonpixError(f"{target} exists; --force replaces it")
    if os.path.lexists(target) and not exists(model, request.format):
        raise ReasonpixError(f"{target} is no export, so it is not replaced; remove it yourself")
    return _ExportTarget(target, ".", model)


def _check_is_torch(options: ModelOptions) -> None:
    folder = Path(registry.checkpoint(options.model) or options.model)
    if folder.is_dir() and not any((folder / "unet").glob("*.safetensors")):
        raise WeightsError(
            f"model: {options.model!r} holds no PyTorch weights of the UNet; name the model that "
            "its exports were made of"
        )


def _check_weights(target: _ExportTarget, weights: str) -> None:
    """Exports that stand beside each other are of the same weights."""
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
                f"{file.parent} was exported from other weights than these; remove it, or name "
                "another folder by --out"
            )


# -- files ----------------------------------------------------------------------------------------


def _copy_model(options: ModelOptions, draft: Path) -> None:
    """All that the model is used with, but the UNet's weights. Links become files."""
    source = Path(registry.checkpoint(options.model) or options.model)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(
            snapshot_download(
                options.model,
                revision=options.revision,
                cache_dir=options.cache_dir,
                allow_patterns=[*_MODEL_FILES, *(f"{part}/*" for part in _MODEL_FOLDERS)],
                ignore_patterns=list(_UNUSED),
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
                ignore=shutil.ignore_patterns(*_UNUSED),
                copy_function=shutil.copyfile,
            )


def _write_files(
    request: ExportRequest, checkpoint: LoadedModel, weights: str, folder: Path
) -> Manifest:
    """The files of the export, and its manifest without the report."""
    parts: tuple[Part, ...] = ("unet", "vae_encoder", "vae_decoder")
    wanted = parts if request.vae else parts[:1]
    try:
        graphs = convert(checkpoint, request.format, request.precision, wanted, folder)
    except Exception as error:  # exporters raise nearly anything for models that they do not know
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[:1]
        raise ReasonpixError(
            f"{request.format}: this model cannot be converted ({type(error).__name__}: "
            f"{' '.join(reason)}); run it with --runtime torch or compile"
        ) from error
    free_memory()
    used = ["reasonpix", "torch", "diffusers", "onnx", "onnxscript"]
    used += ["nncf"] if (request.format, request.precision) == ("openvino", "int8") else []
    runtime = PACKAGES[request.format]  # which may have come as another package, onnxruntime-gpu
    packages = {name: version(name) for name in used}
    packages[runtime] = str(import_module(runtime).__version__)
    return Manifest(
        format=request.format,
        precision=request.precision,
        source=request.model.model,
        weights=weights,
        packages=packages,
        files={file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()},
        graphs=graphs,
        profile=profile(checkpoint) if request.format == "tensorrt" else None,
        parity={},
    )


# -- proof ----------------------------------------------------------------------------------------


def _load_networks(export: Export, device: torch.device) -> dict[Part, Any]:
    runtime = import_module(f"reasonpix.editing.runtimes.{export.manifest.format}")
    networks: dict[Part, Any] = runtime.load(export, device)
    return networks


def _probe_sizes(checkpoint: LoadedModel, format: Format) -> list[Sizes]:
    """Sizes that the network was not traced with and the model is not made for.

    Those of TensorRT lie within its profile.
    """
    step, shapes = stride(checkpoint), profile(checkpoint)
    (least, usual, _), tokens = shapes.height, shapes.sequence[1]
    smaller = max(least, usual // 2 // step * step)
    larger = usual if format == "tensorrt" else usual + step
    return [Sizes(1, smaller, usual, tokens + 7), Sizes(5, larger, smaller, 2 * tokens)]


def _rejection(request: ExportRequest, parity: Parity) -> str:
    lines = "\n".join(f"  {problem}" for problem in parity.problems)
    mend = (
        "choose another format; and please report it"
        if request.precision == "fp32"
        else "choose a higher precision, such as fp32"
    )
    return (
        f"{request.format} {request.precision}: these edits are not PyTorch's, so nothing was "
        "written\n"
        f"{lines}\n{mend}"
    )
