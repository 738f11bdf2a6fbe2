"""The exports of an editing model: a folder for each format, beside the model's other files.

```
MODEL/onnx/export.json      what was exported, by which versions, and its parity with PyTorch
MODEL/onnx/unet.onnx        the UNet; its weights in unet.onnx.data
MODEL/onnx/vae_encoder.onnx, vae_decoder.onnx    optional
MODEL/openvino/…  MODEL/tensorrt/…               likewise
```
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reasonpix.editing.runtimes.names import Format
from reasonpix.errors import WeightsError

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Part = Literal["unet", "vae_encoder", "vae_decoder"]
Dtype = Literal["float32", "float16", "bfloat16", "bool"]

MANIFEST = "export.json"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Port(_Section):
    """An input or output tensor. Dynamic dimensions have a name."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


class Graph(_Section):
    """One network of an export."""

    file: str
    inputs: tuple[Port, ...]
    output: Port


class Shapes(_Section):
    """The sizes that an engine is built for: smallest, most common, largest."""

    batch: tuple[int, int, int]
    height: tuple[int, int, int]
    """Of the latents, like the width."""
    width: tuple[int, int, int]
    sequence: tuple[int, int, int]


class Manifest(_Section):
    """The contents of `export.json`."""

    version: Literal[1] = 1
    format: Format
    precision: Precision
    source: str
    """The model's name as the user gave it."""
    weights: str
    """SHA-256 of the exported UNet's weights."""
    packages: dict[str, str]
    """Versions of the packages that made the export."""
    files: Annotated[dict[str, str], Field(min_length=1)]
    """SHA-256 of each file, by its name in the folder."""
    graphs: dict[Part, Graph]
    profile: Shapes | None = None
    """TensorRT only."""
    parity: dict[str, Any]
    """Differences from PyTorch: see `reasonpix.deployment.export.parity`."""


@dataclass(frozen=True)
class Export:
    """An export on disk."""

    folder: Path
    manifest: Manifest

    def file(self, part: Part) -> Path:
        """The network's file."""
        return self.folder / self.manifest.graphs[part].file


def has_export(model: Path, format: Format) -> bool:
    """Whether the model's folder holds an export of this format."""
    return (model / format / MANIFEST).is_file()


def read_manifest(model: Path, format: Format) -> Manifest | None:
    """Read the manifest of an export in a model's folder; None if there is no such export.

    Raises `WeightsError`.
    """
    if not has_export(model, format):
        return None
    file = model / format / MANIFEST
    try:
        return Manifest.model_validate(json.loads(file.read_bytes()))
    except (ValidationError, ValueError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise WeightsError(
            f"{file} is not a valid manifest ({what}); {_mend(model, format)}"
        ) from error


def read_export(model: Path, format: Format) -> Export | None:
    """Open an export in a model's folder and verify all checksums; None if there is none.

    Raises `WeightsError` for a file that is missing or has changed.
    """
    manifest = read_manifest(model, format)
    if manifest is None:
        return None
    folder = model / format
    for name, expected in manifest.files.items():
        file = folder / name
        try:
            found = file_sha256(file)
        except OSError as error:
            what = f"{file} cannot be read: {error.strerror}"
            raise WeightsError(f"{what}; {_mend(model, format)}") from error
        if found != expected:
            raise WeightsError(f"{file} is not the file that was exported; {_mend(model, format)}")
    return Export(folder, manifest)


def _mend(model: Path, format: Format) -> str:
    return f"export it again: reasonpix export {model} --to {format} --samples BENCHMARK --force"


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
