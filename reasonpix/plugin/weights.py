"""Load pretrained weights from a hub id, a local folder or a plugin's checkpoint.

GGUF files are unpacked once, into a cache of safetensors: see `find_gguf` and `unpack_gguf`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonpix.core.atomic import atomic_dir, lock
from reasonpix.core.memory import is_out_of_memory
from reasonpix.errors import WeightsError
from reasonpix.plugin.model_files import check_folder, choose_variant, read_config

__all__ = [
    "check_weights",
    "choose_device",
    "choose_dtype",
    "digest",
    "find_gguf",
    "pretrained",
    "unpack_gguf",
    "usable_device",
]

if TYPE_CHECKING:
    import torch

    from reasonpix.plugin.components import ModelOptions


def pretrained(loader: Any, options: ModelOptions, **arguments: Any) -> Any:
    """`loader.from_pretrained` for the model that `options` names.

    `loader` is any class with the `from_pretrained` of transformers or diffusers; `arguments`
    (`subfolder`, `dtype`, …) are passed on. Remote code is never run, and weights are safetensors:
    the plain files, `options.variant`, or the only variant there. Raises `WeightsError` with the
    actual cause: a missing folder, one without weights, weights of another class, or a hub that
    cannot be reached, and `ReasonpixError` for a proxy that cannot be used.
    """
    model = options.model
    check_weights(options)
    if os.path.isfile(model):
        raise WeightsError(
            f"model: {model!r} is a GGUF file, but {loader.__name__} needs safetensors; "
            "give a hub id or a folder"
        )
    folder = os.path.isdir(model)
    if folder:
        arguments["local_files_only"] = True
    else:
        from reasonpix.plugin.hub_client import check_hub_proxy, connect_hub, is_offline

        connect_hub()
        arguments |= {"revision": options.revision, "cache_dir": options.cache_dir}
    if loader.__name__.startswith("Auto"):
        arguments["trust_remote_code"] = False  # or it may ask at the terminal
    where = arguments.get("subfolder", "")
    part = f"{loader.__name__}{f' ({where})' if where else ''}"
    _show_progress(downloads=not folder)
    try:
        if not _reads_weights(loader):
            return loader.from_pretrained(model, **arguments)
        library = loader.__module__.partition(".")[0]
        arguments["variant"] = choose_variant(options, where, library, part)
        return _load_network(loader, options, part, arguments)
    except (OSError, ValueError, ImportError) as error:
        if not folder:
            check_hub_proxy()
        if folder:
            raise WeightsError(
                f"model: folder {model!r} holds no usable {part}: {error}"
            ) from error
        if is_offline():
            raise WeightsError(
                f"model: {model!r} is not in the cache and HF_HUB_OFFLINE is set; download it once "
                f"without HF_HUB_OFFLINE, or name a local folder ({part})"
            ) from error
        raise WeightsError(
            f"model: cannot load {part} of {model!r}"
            f"{f' at revision {options.revision}' if options.revision else ''}: {error}"
        ) from error


def _reads_weights(loader: Any) -> bool:
    import torch

    return loader.__name__.startswith("AutoModel") or issubclass(loader, torch.nn.Module)


def _load_network(loader: Any, options: ModelOptions, part: str, arguments: dict[str, Any]) -> Any:
    """A network with all of its weights: libraries fill what a file lacks with random numbers."""
    report = arguments.pop("output_loading_info", False)
    with _quiet_libraries():
        try:
            network, info = loader.from_pretrained(
                options.model, **arguments, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, ImportError, MemoryError):
            raise
        # Libraries raise nearly anything for a damaged file or the weights of another class.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise WeightsError(
                f"model: {options.model!r} holds no usable {part}: {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else 'damaged'}"
                f"{_declared_class(options, arguments)}"
            ) from error
    if report:
        return network, info
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(
            f"model: {options.model!r} holds the weights of another class than {part}: "
            f"{len(missing)} of {len(network.state_dict())} tensors are missing, such as "
            f"{missing[0]}{_declared_class(options, arguments)}"
        )
    return network


def _declared_class(options: ModelOptions, arguments: dict[str, Any]) -> str:
    """The class that the configuration of a folder names, as the end of a sentence."""
    config = read_config(Path(options.model, arguments.get("subfolder", "")))
    named = [config.get("_class_name"), *(config.get("architectures") or ())]
    names = ", ".join(filter(None, named)) or config.get("model_type")
    return f"; its config.json names {names}" if names else ""


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence the reports of missing and unexpected weights; `pretrained` says what matters."""
    from transformers.utils import logging

    libraries = [logging]
    if "diffusers" in sys.modules:
        from diffusers.utils import logging as of_diffusers

        libraries.append(of_diffusers)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


def _show_progress(downloads: bool) -> None:
    """Show progress bars for downloads only; for local files they would cover the run's own."""
    from transformers.utils import logging

    (logging.enable_progress_bar if downloads else logging.disable_progress_bar)()


def check_weights(options: ModelOptions) -> None:
    """Raise `WeightsError` if `options.model` is a path without weights. Reads no weights."""
    model = options.model
    if model.endswith(".gguf"):
        if not os.path.isfile(model):
            raise WeightsError(f"model: no file {model!r}; for a file on the hub set gguf_file")
        return
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not os.path.isdir(model):
        raise WeightsError(
            f"model: no folder {model!r}; give a hub id such as 'owner/name', or a folder"
        )
    if os.path.isdir(model):
        check_folder(Path(model))


def find_gguf(options: ModelOptions, gguf_file: str | None = None) -> Path | None:
    """The GGUF file that `options.model` and `gguf_file` name; None when they name safetensors.

    `model` is a GGUF file, a folder with one, or a hub id; `gguf_file` is its name in the folder or
    in the hub's repository, from which it is downloaded. Raises `WeightsError` if there is no such
    file, or more than one.
    """
    check_weights(options)
    model = Path(options.model)
    if model.is_file():
        if gguf_file not in (None, model.name):
            raise WeightsError(f"gguf_file: model is the file {str(model)!r} itself; leave one out")
        return model
    if model.is_dir():
        files = sorted(path.name for path in model.glob("*.gguf"))
        if gguf_file is not None and not (model / gguf_file).is_file():
            raise WeightsError(
                f"gguf_file: no {gguf_file!r} in folder {str(model)!r}; "
                f"it has {', '.join(files) or 'no GGUF file'}"
            )
        if gguf_file is None and len(files) > 1 and not any(model.glob("*.safetensors")):
            raise WeightsError(
                f"model: folder {str(model)!r} has {', '.join(files)}; choose one with gguf_file"
            )
        if gguf_file is None and (not files or any(model.glob("*.safetensors"))):
            return None
        return model / (gguf_file or files[0])
    if gguf_file is None:
        return None

    from transformers.utils.hub import cached_file

    from reasonpix.plugin.hub_client import check_hub_proxy, connect_hub

    connect_hub()
    _show_progress(downloads=True)
    try:
        return Path(
            cached_file(
                options.model, gguf_file, revision=options.revision, cache_dir=options.cache_dir
            )
        )
    except (OSError, ImportError) as error:
        check_hub_proxy()
        raise WeightsError(
            f"model: cannot get {gguf_file!r} of {options.model!r}: {error}"
        ) from error


def unpack_gguf(file: Path, dtype: torch.dtype, cache_dir: Path | None = None) -> Path:
    """A folder with the causal language model, tokenizer and generation config of a GGUF file.

    Reading GGUF takes transformers about a minute per gigabyte, so the result is cached as
    safetensors of `dtype` in `cache_dir`, by default `$XDG_CACHE_HOME/reasonpix` or
    `~/.cache/reasonpix`. An entry is named by the file's SHA-256, the version of transformers and
    `dtype`. It is written atomically, verified by its digest on each use, and rebuilt if damaged.
    Processes that need the same entry wait for the first. Raises `WeightsError`.
    """
    import transformers
    from safetensors import SafetensorError

    home = cache_dir or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "reasonpix"
    )
    name = f"{digest(file)}-{transformers.__version__}-{str(dtype).removeprefix('torch.')}"
    entry = home / "gguf" / name
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with lock(entry.with_name(f"{name}.lock"), wait=True):
            if not _is_whole(entry):
                shutil.rmtree(entry, ignore_errors=True)  # damaged
                with atomic_dir(entry) as draft:
                    _unpack(file, dtype, draft / "model")
                    (draft / "sha256").write_text(digest(draft / "model"))
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"model: cannot unpack {file.name} into {entry.parent}: {error}; "
            "set cache_dir to a folder with free space"
        ) from error
    return entry / "model"


def _is_whole(entry: Path) -> bool:
    try:
        return (entry / "sha256").read_text() == digest(entry / "model")
    except (OSError, UnicodeDecodeError):
        return False


def _unpack(file: Path, dtype: torch.dtype, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _show_progress(downloads=False)
    source: dict[str, Any] = {
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **source)
        # Otherwise, with GGUF kernels installed, the weights would stay quantized.
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), **source, dtype=dtype, quantization_config=unpacked
        )
    # The readers validate little: other files and unknown architectures raise any exception.
    except Exception as error:
        raise WeightsError(
            f"model: transformers cannot read {str(file)!r} as a GGUF file of a causal language "
            f"model: {type(error).__name__}: {error}"
        ) from error
    # The weights are plain now; transformers refuses to save them while these attributes are set.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def choose_device(options: ModelOptions) -> torch.device:
    """The device of `options.device`; auto takes a GPU when there is one.

    Raises `WeightsError` if it is not the name of a device.
    """
    import torch

    if options.device != "auto":
        try:
            return torch.device(options.device)
        except RuntimeError as error:
            raise _unusable(options, error) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(options: ModelOptions) -> torch.device:
    """The device of `options.device`, tested. Raises `WeightsError` if it cannot be used."""
    import torch

    device = choose_device(options)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable(options, error) from error
    return device


def _unusable(options: ModelOptions, error: Exception) -> WeightsError:
    reason = str(error).splitlines()[0]
    return WeightsError(f"device: {options.device!r} cannot be used: {reason}")


def choose_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """The computing precision of `options.dtype` on `device`."""
    import torch

    if options.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def digest(path: Path) -> str:
    """SHA-256 in hex: of a file's bytes, or over the names and bytes of all files in a folder.

    Ignores a folder's README.md and training_data.json, hidden files and `__pycache__`, and
    subfolders with exports of the weights (those with an `export.json`).
    """
    if path.is_file():
        return _sha256(path).hexdigest()
    total = hashlib.sha256()
    exports = {file.parent for file in path.glob("*/export.json")}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        counts = file.name not in ("README.md", "training_data.json") and not any(
            part == "__pycache__" or part.startswith(".") for part in name.parts
        )
        counts = counts and exports.isdisjoint(file.parents)
        if counts and file.is_file():
            total.update(str(name).encode() + b"\0")
            total.update(_sha256(file).digest())
    return total.hexdigest()


def _sha256(file: Path) -> hashlib._Hash:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256")
