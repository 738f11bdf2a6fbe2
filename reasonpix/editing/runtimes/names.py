"""The names of runtimes, and what each of them needs. Imports nothing heavy: the CLI reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Runtime = Literal["auto", "torch", "compile", "onnx", "openvino", "tensorrt"]
Format = Literal["onnx", "openvino", "tensorrt"]
"""A runtime that computes an export of the model."""

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
FORMATS: tuple[Format, ...] = get_args(Format)
PACKAGES: Mapping[Format, str] = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
}
"""The package that computes each format."""
DEVICES: Mapping[Format, tuple[str, ...]] = {
    "onnx": ("cpu", "cuda"),
    "openvino": ("cpu",),
    "tensorrt": ("cuda",),
}
"""The device types on which each format runs."""
