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

from reasonpix.core.atomic_dir import atomic_dir
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

Report = Callable[[str], None]
"""Told what is being done."""

_KEPT = ("model_index.json", "reasonpix.json", "README.md", "unet/config.json")
_PARTS = ("vae", "scheduler", "connector", "text_encoder", "tokenizer")
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
class Exported:
    """An export that was proven, and what it was proven by."""

    folder: Path
    manifest: Manifest
    parity: Parity

    @property
    def size(self) -> int:
        """Of its files, in bytes."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.files)


def export(
    wish: ExportRequest,
    out: Path | None = None,
    *,
    force: bool = False,
    report: Report = lambda what: None,
) -> Exported:
    """Export a model into its own folder, or with all that it is used with into `out`.

    `out` is a new folder, or one that holds exports of the same weights, to which it is added.
    `force` replaces an export of the same format. Everything that can be checked without work is
    checked first. Raises `ReasonpixError`, and then nothing was changed; that is also so for an
    export that does not do what PyTorch does.
    """
    device = _check(wish)
    place = _place(wish, out, force)
    check_pipeline(wish.model)
    _check_is_torch(wish.model)
    metrics = Metrics(wish.metrics)
    metrics.check()
    cases = read_benchmark(wish.benchmark, Path()).cases
    report("reading the model")
    checkpoint = load_checkpoint(wish.model)
    weights = weights_digest(checkpoint.model.unet)
    _check_weights(place, weights)
    encoder = checkpoint.build_encoder(device=str(device), cache_dir=wish.model.cache_dir)
    # A new model's folder may be there, and empty.
    with atomic_dir(place.target, "export", replace=force or place.is_new_model) as draft:
        folder = draft / place.inside
        folder.mkdir(exist_ok=True)
        if place.is_new_model:
            _copy_model(wish.model, draft)
        report(f"writing {wish.format}")
        manifest = _write(wish, checkpoint, weights, folder)
        report(f"comparing with PyTorch: {len(cases)} cases")
        networks = _opened(Export(folder, manifest), device)
        with closing(metrics), closing(encoder):
            metrics.load()
            encoder.load()
            parity = compare(
                checkpoint,
                encoder,
                networks,
                cases,
                _sizes(checkpoint, wish.format),
                metrics,
                LIMITS[wish.precision],
                steps=wish.steps,
                device=device,
            )
        if parity.problems:
            raise ReasonpixError(_refusal(wish, parity))
        tried = {"benchmark": wish.benchmark.path, "cases": len(cases), "device": str(device)}
        manifest = manifest.model_copy(update={"parity": tried | parity.facts()})
        text = manifest.model_dump_json(indent=2)
        (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
    return Exported(place.target / place.inside, manifest, parity)


# -- before any work ------------------------------------------------------------------------------


def _check(wish: ExportRequest) -> torch.device:
    """The device to compare on. Raises `ReasonpixError` for what cannot come out well."""
    format, precision = wish.format, wish.precision
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
    device = choose_export_device(format, wish.model)
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

    target: Path
    """The folder that appears."""
    inside: str
    """Where in it the export is."""
    model: Path
    """The folder of which the exports stand beside each other."""

    @property
    def is_new_model(self) -> bool:
        return bool(self.inside != ".")


def _place(wish: ExportRequest, out: Path | None, force: bool) -> _ExportTarget:
    """Raises `ReasonpixError` for a place that is taken, or that belongs to somebody else."""
    named = wish.model.model
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
            return _ExportTarget(model, wish.format, model)
        if not any(exists(out, format) for format in FORMATS):
            raise ReasonpixError(f"--out: {out} holds something else; name a new folder")
    target = model / wish.format
    if os.path.lexists(target) and not force:
        raise ReasonpixError(f"{target} exists; --force replaces it")
    if os.path.lexists(target) and not exists(model, wish.format):
        raise ReasonpixError(f"{target} is no export, so it is not replaced; remove it yourself")
    return _ExportTarget(target, ".", model)


def _check_is_torch(options: ModelOptions) -> None:
    folder = Path(registry.checkpoint(options.model) or options.model)
    if folder.is_dir() and not any((folder / "unet").glob("*.safetensors")):
        raise WeightsError(
            f"model: {options.model!r} holds no PyTorch weights of the UNet; name the model that "
            "its exports were made of"
        )


def _check_weights(place: _ExportTarget, weights: str) -> None:
    """Exports that stand beside each other are of the same weights."""
    for format in FORMATS:
        file = place.model / format / MANIFEST
        if place.is_new_model or file.parent == place.target or not file.is_file():
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
                allow_patterns=[*_KEPT, *(f"{part}/*" for part in _PARTS)],
                ignore_patterns=list(_UNUSED),
            )
        )
    for name in _KEPT:
        if (source / name).is_file():
            (draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, draft / name)
    for part in _PARTS:
        if (source / part).is_dir():
            shutil.copytree(
                source / part,
                draft / part,
                ignore=shutil.ignore_patterns(*_UNUSED),
                copy_function=shutil.copyfile,
            )


def _write(wish: ExportRequest, checkpoint: LoadedModel, weights: str, folder: Path) -> Manifest:
    """The files of the export, and its manifest without the report."""
    parts: tuple[Part, ...] = ("unet", "vae_encoder", "vae_decoder")
    wanted = parts if wish.vae else parts[:1]
    try:
        graphs = convert(checkpoint, wish.format, wish.precision, wanted, folder)
    except Exception as error:  # exporters raise nearly anything for models that they do not know
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[:1]
        raise ReasonpixError(
            f"{wish.format}: this model cannot be converted ({type(error).__name__}: "
            f"{' '.join(reason)}); run it with --runtime torch or compile"
        ) from error
    free_memory()
    used = ["reasonpix", "torch", "diffusers", "onnx", "onnxscript"]
    used += ["nncf"] if (wish.format, wish.precision) == ("openvino", "int8") else []
    runtime = PACKAGES[wish.format]  # which may have come as another package, onnxruntime-gpu
    packages = {name: version(name) for name in used}
    packages[runtime] = str(import_module(runtime).__version__)
    return Manifest(
        format=wish.format,
        precision=wish.precision,
        source=wish.model.model,
        weights=weights,
        packages=packages,
        files={file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()},
        graphs=graphs,
        profile=profile(checkpoint) if wish.format == "tensorrt" else None,
        parity={},
    )


# -- proof ----------------------------------------------------------------------------------------


def _opened(export: Export, device: torch.device) -> dict[Part, Any]:
    runtime = import_module(f"reasonpix.editing.runtimes.{export.manifest.format}")
    networks: dict[Part, Any] = runtime.load(export, device)
    return networks


def _sizes(checkpoint: LoadedModel, format: Format) -> list[Sizes]:
    """Sizes that the network was not traced with and the model is not made for.

    Those of TensorRT lie within its profile.
    """
    step, shapes = stride(checkpoint), profile(checkpoint)
    (least, usual, _), tokens = shapes.height, shapes.sequence[1]
    smaller = max(least, usual // 2 // step * step)
    larger = usual if format == "tensorrt" else usual + step
    return [Sizes(1, smaller, usual, tokens + 7), Sizes(5, larger, smaller, 2 * tokens)]


def _refusal(wish: ExportRequest, parity: Parity) -> str:
    lines = "\n".join(f"  {problem}" for problem in parity.problems)
    mend = (
        "choose another format; and please report it"
        if wish.precision == "fp32"
        else "choose a higher precision, such as fp32"
    )
    return (
        f"{wish.format} {wish.precision}: these edits are not PyTorch's, so nothing was written\n"
        f"{lines}\n{mend}"
    )
