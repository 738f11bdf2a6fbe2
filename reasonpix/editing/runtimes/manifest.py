"""The exports of an editing model: folders beside its other files, one for each format.

```
MODEL/onnx/export.json      what was exported, by which versions, and how exact it is
MODEL/onnx/unet.onnx        the UNet; its weights in unet.onnx.data
MODEL/onnx/vae_encoder.onnx, vae_decoder.onnx    where they were asked for
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


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Port(_Facts):
    """A tensor that goes in or comes out. Sides that may be any number have a name."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


class Graph(_Facts):
    """One network of an export."""

    file: str
    inputs: tuple[Port, ...]
    output: Port


class Shapes(_Facts):
    """The sizes that an engine is built for: the smallest, the commonest, the largest."""

    batch: tuple[int, int, int]
    height: tuple[int, int, int]
    """Of the latents, as the width."""
    width: tuple[int, int, int]
    sequence: tuple[int, int, int]


class Manifest(_Facts):
    """What stands in `export.json`."""

    version: Literal[1] = 1
    format: Format
    precision: Precision
    source: str
    """The model as the user named it."""
    weights: str
    """SHA-256 of the UNet's weights that were exported."""
    packages: dict[str, str]
    """Versions of what made the export."""
    files: Annotated[dict[str, str], Field(min_length=1)]
    """SHA-256 of each file, by its name in the folder."""
    graphs: dict[Part, Graph]
    profile: Shapes | None = None
    """For TensorRT."""
    parity: dict[str, Any]
    """How far the export is from PyTorch: see `reasonpix.deployment.export.parity`."""


@dataclass(frozen=True)
class Export:
    """An export on disk."""

    folder: Path
    manifest: Manifest

    def file(self, part: Part) -> Path:
        """The network's file."""
        return self.folder / self.manifest.graphs[part].file


def exists(model: Path, format: Format) -> bool:
    """Whether the model's folder holds an export of this format."""
    return (model / format / MANIFEST).is_file()


def read_manifest(model: Path, format: Format) -> Manifest | None:
    """What the export of a model's folder says of itself; None where there is none.

    Raises `WeightsError`.
    """
    if not exists(model, format):
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
    """The export of a model's folder, every byte of it checked; None where there is none.

    Raises `WeightsError` for a file that is absent or is not what was exported.
    """
    manifest = read_manifest(model, format)
    if manifest is None:
        return None
    folder = model / format
    for name, expected in manifest.files.items():
        file = folder / name
        try:
            found = sha256(file)
        except OSError as error:
            what = f"{file} cannot be read: {error.strerror}"
            raise WeightsError(f"{what}; {_mend(model, format)}") from error
        if found != expected:
            raise WeightsError(f"{file} is not the file that was exported; {_mend(model, format)}")
    return Export(folder, manifest)


def _mend(model: Path, format: Format) -> str:
    return f"export it again: reasonpix export {model} --to {format} --samples BENCHMARK --force"


def sha256(file: Path) -> str:
    """In hex, of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
