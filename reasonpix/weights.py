"""Pretrained weights: from a hub id, a local folder or a plugin's checkpoint, or a clear error."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonpix.errors import WeightsError

if TYPE_CHECKING:
    import torch

    from reasonpix.slots import ModelOptions


def pretrained(loader: Any, options: ModelOptions, **arguments: Any) -> Any:
    """`loader.from_pretrained` for the model that `options` names.

    `loader` is any class with the `from_pretrained` of transformers or diffusers; `arguments`
    (`subfolder`, `dtype`, `use_safetensors`, …) are passed on. Remote code is never run.
    Raises `WeightsError` that says what is really wrong: no such folder, a folder without the
    file, or a hub that cannot be reached.
    """
    model = options.model
    check_weights(options)
    folder = os.path.isdir(model)
    if folder:
        arguments["local_files_only"] = True
    else:
        arguments |= {"revision": options.revision, "cache_dir": options.cache_dir}
    if loader.__name__.startswith("Auto"):
        arguments["trust_remote_code"] = False  # or it may ask at the terminal
    _show_progress(downloads=not folder)
    try:
        return loader.from_pretrained(model, **arguments)
    except (OSError, ValueError) as error:
        where = arguments.get("subfolder")
        part = f"{loader.__name__}{f' ({where})' if where else ''}"
        if folder:
            raise WeightsError(
                f"model: folder {model!r} holds no usable {part}: {error}"
            ) from error
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise WeightsError(
                f"model: {model!r} is not in the cache and HF_HUB_OFFLINE is set; download it once "
                f"without HF_HUB_OFFLINE, or name a local folder ({part})"
            ) from error
        raise WeightsError(
            f"model: cannot load {part} of {model!r}"
            f"{f' at revision {options.revision}' if options.revision else ''}: {error}"
        ) from error


def _show_progress(downloads: bool) -> None:
    """Bars for downloads; for files at hand they would only be drawn over the run's own."""
    from transformers.utils import logging

    (logging.enable_progress_bar if downloads else logging.disable_progress_bar)()


def check_weights(options: ModelOptions) -> None:
    """Raise `WeightsError` when `options.model` can only be a folder, and is none."""
    model = options.model
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not os.path.isdir(model):
        raise WeightsError(
            f"model: no folder {model!r}; give a hub id such as 'owner/name', or a folder"
        )


def choose_device(options: ModelOptions) -> torch.device:
    """The device of `options.device`; auto takes a GPU when there is one."""
    import torch

    if options.device != "auto":
        return torch.device(options.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """The computing precision of `options.dtype` on `device`."""
    import torch

    if options.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files in `folder` but its card, in hex."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "README.md":
            total.update(str(path.relative_to(folder)).encode() + b"\0")
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
