"""The files of a model: find its weights, or explain what is there instead.

A model is a folder or a repository of the hub; a pipeline of diffusers has its parts in subfolders.
Weights are safetensors, plain or as a variant: `model.safetensors`, `model.fp16.safetensors`, and
the same in shards with an index. Pickles are never read, because they can run code.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonpix.core.figures import listed
from reasonpix.errors import WeightsError

if TYPE_CHECKING:
    from reasonpix.plugin.components import ModelOptions

_LOG = logging.getLogger(__name__)

_WEIGHTS = re.compile(
    r"(?P<stem>model|diffusion_pytorch_model)(?:"
    r"(?:\.(?P<variant>[^/]+))?\.safetensors|"
    r"\.safetensors\.index(?:\.(?P<indexed>[^/]+))?\.json)"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")

_POINTER = b"version https://git-lfs.github.com/spec/"

_DEPTH = 3
"""Folders below a model's that are searched: `snapshots/<commit>/unet` in the hub's cache."""

_OTHER_FORMATS = {
    "pickle": (".bin", ".ckpt", ".pt", ".pth", ".pkl"),
    "ONNX": (".onnx", ".onnx_data"),
    "GGUF": (".gguf",),
    "Flax": (".msgpack",),
    "TensorFlow": (".h5",),
}


def choose_variant(options: ModelOptions, part: str, library: str, network: str) -> str | None:
    """The variant of the weights to load of `part` (a subfolder, or ""); None for the plain files.

    `library`: "transformers" or "diffusers", whose file names differ. `network`: what it is for,
    for the message.
    `options.variant` must exist in the model; a part that lacks it is loaded from its plain files.
    By default the plain files are loaded, or else the only variant that is there. Raises
    `WeightsError` that says what the part holds if it cannot be loaded.
    """
    names = list_files(options)
    if names is None:  # neither the hub nor its cache could say; loading will
        return options.variant
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    here = _names_in(names, part)
    variants = variants_of(here, stem)
    where = repr(options.model) + (f", {part}/," if part else "")
    if not variants:
        raise WeightsError(
            f"model: {options.model!r} holds no usable {network}, which reads {stem}.safetensors: "
            f"{_explain(options.model, part, names)}"
        )
    chosen = _choose(options, where, variants, _all_variants(names))
    folder = Path(options.model, part)
    if folder.is_dir():
        _check_files(folder, here, stem, chosen)
    return chosen


def _choose(
    options: ModelOptions, where: str, variants: set[str | None], everywhere: set[str]
) -> str | None:
    there = ", ".join(sorted(filter(None, variants)))
    if options.variant is not None:
        if options.variant in variants:
            return options.variant
        if options.variant in everywhere and None in variants:
            return None
        plain = ["plain weights"] if None in variants else []
        raise WeightsError(
            f"variant: {where} has no weights of the variant {options.variant!r}; it has "
            f"{' and '.join(plain + [there] * bool(there))}; set one of those, or leave it out"
        )
    if None in variants:
        return None
    if len(variants) > 1:
        raise WeightsError(
            f"model: {where} has weights only as variants: {there}; choose one with `variant:`"
        )
    _say_once(f"model: {options.model!r} has weights only as the variant {there}, which is loaded")
    return there


@cache
def _say_once(message: str) -> None:
    _LOG.warning(message)


def automatic_variants(options: ModelOptions) -> list[str]:
    """The variants that are loaded because the model lacks the plain files."""
    found: set[str] = set()
    names = list_files(options) or ()
    for part in {name.rpartition("/")[0] for name in names}:
        for stem in ("model", "diffusion_pytorch_model"):
            variants = variants_of(_names_in(names, part), stem)
            found |= {it for it in variants if it and variants == {it}}
    return sorted(found)


def variants_of(names: Sequence[str], stem: str) -> set[str | None]:
    """The variants whose weights are among the file names, None for plain weights."""
    found: set[str | None] = set()
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match and match["stem"] == stem and not _SHARD.search(name):
            found.add(match["variant"] or match["indexed"])
    return found


def _all_variants(names: Sequence[str]) -> set[str]:
    last = [name.rpartition("/")[2] for name in names]
    both = variants_of(last, "model") | variants_of(last, "diffusion_pytorch_model")
    return {it for it in both if it}


def check_folder(folder: Path) -> None:
    """Raise `WeightsError` if a folder has no weights in any part, or placeholders for them."""
    names = _files_in(folder)
    weights = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if not weights:
        raise WeightsError(
            f"model: folder {str(folder)!r} holds no safetensors weights: "
            f"{_explain(str(folder), '', names)}"
        )
    _check_pointers(folder, weights)


def _check_files(folder: Path, names: Sequence[str], stem: str, variant: str | None) -> None:
    """Raise `WeightsError` if the chosen files are incomplete or placeholders."""
    suffix = f".{variant}" if variant else ""
    single, index = f"{stem}{suffix}.safetensors", f"{stem}.safetensors.index{suffix}.json"
    if single in names:
        _check_pointers(folder, [single])
        return
    try:
        shards = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        _check_pointers(folder, [index])
        raise WeightsError(
            f"model: {str(folder / index)!r} is damaged; download the model again"
        ) from error
    if missing := [shard for shard in shards if shard not in names]:
        raise WeightsError(
            f"model: {str(folder)!r} lacks {listed(missing)}, of {len(shards)} files that {index} "
            "names; download the model again"
        )
    _check_pointers(folder, shards)


def _check_pointers(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        with (folder / name).open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise WeightsError(
                    f"model: {str(folder / name)!r} is a Git LFS pointer, not the weights; run "
                    f"`git lfs pull` in that folder, or `hf download` the model"
                )


def read_json(options: ModelOptions, name: str) -> dict[str, Any] | None:
    """Read a JSON mapping of the model; None if the model has no such file."""
    file = find_file(options, name)
    return None if file is None else read_json_file(file, options, name)


def read_json_file(file: Path, options: ModelOptions, name: str) -> dict[str, Any]:
    """The JSON mapping in `file`, which is `name` of the model. Raises `WeightsError`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(
            f"model: {name} of {options.model!r} is not valid JSON: {error}"
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(f"model: {name} of {options.model!r} is not a JSON object")
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` in a folder; empty if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def find_cached(options: ModelOptions, name: str) -> Path | None:
    """Find a file of the model in its folder or the hub's cache, without a request."""
    if os.path.isdir(options.model):
        return find_file(options, name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(
            options.model, name, cache_dir=options.cache_dir, revision=options.revision
        )
    except HFValidationError:  # a GGUF file
        return None
    return Path(file) if isinstance(file, str) else None


def find_file(options: ModelOptions, name: str) -> Path | None:
    """Find a file of the model, downloading it if needed; None if the model does not have it."""
    if os.path.isdir(options.model):
        file = Path(options.model, name)
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    from reasonpix.plugin.hub_client import check_hub_proxy, connect_hub

    connect_hub()
    try:
        downloaded = cached_file(
            options.model,
            name,
            revision=options.revision,
            cache_dir=options.cache_dir,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ImportError) as error:
        check_hub_proxy()
        raise WeightsError(
            f"model: cannot get {name} of {options.model!r}: {error}; name a local folder, or "
            "check the connection to the hub"
        ) from error
    return Path(downloaded) if downloaded else None


# -- What is there instead -------------------------------------------------------------------------


def list_files(options: ModelOptions) -> tuple[str, ...] | None:
    """The paths of a model's files, from the folder or the hub; None if they are unknown."""
    if os.path.isdir(options.model):
        return _files_in(Path(options.model))
    return _files_of_repository(options.model, options.revision, options.cache_dir)


def _files_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(_walk(folder, "", _DEPTH)))


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield prefix + entry.name
        elif depth:
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", depth - 1)


@cache
def _files_of_repository(
    name: str, revision: str | None, cache_dir: Path | None
) -> tuple[str, ...] | None:
    """What the hub lists, or without a connection what its cache holds."""
    from huggingface_hub import HfApi, snapshot_download

    from reasonpix.plugin.hub_client import connect_hub

    connect_hub()
    try:
        return tuple(HfApi().list_repo_files(name, revision=revision))
    except Exception:  # no connection, no permission, no such repository: loading explains it
        pass
    try:
        cached = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, local_files_only=True
        )
    except Exception:
        return None
    return _files_in(Path(cached))


def _names_in(names: Sequence[str], part: str) -> list[str]:
    prefix = f"{part}/" if part else ""
    inside = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return [name for name in inside if "/" not in name]


def _explain(model: str, part: str, names: Sequence[str]) -> str:
    """What a part without usable weights contains, and how to fix it."""
    folder = Path(model, part)
    here = _names_in(names, part)
    if not names:
        return "the folder is empty; download the model again, or name another folder"
    if part and not here:
        parts = sorted({name.partition("/")[0] for name in names if "/" in name})
        return f"there is no {part}/ in it, only {listed(parts)}; download the model again"
    formats = {
        kind: files
        for kind, suffixes in _OTHER_FORMATS.items()
        if (files := [name for name in here if name.endswith(suffixes)])
    }
    if any(name.endswith(".xml") for name in here):  # its weights are .bin, but not pickles
        formats.pop("pickle", None)
        formats["OpenVINO"] = [name for name in here if name.endswith(".xml")]
    if "pickle" in formats:
        return (
            f"it has pickles only ({listed(formats['pickle'])}), which can run code and are not "
            f"read; if you trust them, convert them with `{_conversion(model, folder, here)}`"
        )
    if formats:
        kind, files = next(iter(formats.items()))
        use = (
            "GGUF is read by the planner `local-llm` and as `language_model` of `llava`; otherwise "
            if kind == "GGUF"
            else ""
        )
        return f"it has {kind} only ({listed(files)}); {use}name the model in safetensors"
    if others := [name for name in here if name.endswith(".safetensors")]:
        return _explain_names(others)
    elsewhere = {name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}
    if elsewhere and not part:
        place = Path(model, min(it.partition("/unet")[0] for it in elsewhere))
        if "snapshots" in place.parts:  # of the hub's cache
            place = Path(*place.parts[: place.parts.index("snapshots") + 2])
        return (
            f"its weights lie in {listed(sorted(elsewhere))}; name a folder such as {str(place)!r}"
        )
    suffixes = tuple(suffix for several in _OTHER_FORMATS.values() for suffix in several)
    nested = [name.rpartition("/")[0] for name in names if "/" in name and name.endswith(suffixes)]
    if nested and not part:
        return f"in {nested[0]}/ {_explain(model, nested[0], names)}"
    held = listed(here or list(names))
    return f"it has {held} and no weights; download the model again, or name another folder"


def _explain_names(others: Sequence[str]) -> str:
    if any(_SHARD.search(name) for name in others):
        return (
            f"it has shards ({listed(others)}) without their index (….safetensors.index.json); "
            "download the model again"
        )
    if {_WEIGHTS.fullmatch(name) is not None for name in others} == {True}:
        return (
            f"it has {listed(others)}: transformers and diffusers name their weights differently, "
            "and this is the other library's name; name a model of the right kind"
        )
    return (
        f"it has {listed(others)}, which neither transformers nor diffusers reads; convert a "
        'Stable Diffusion checkpoint with `python -c "from diffusers import '
        "StableDiffusionPipeline as P; P.from_single_file('FILE').save_pretrained('FOLDER')\"`"
    )


def _conversion(model: str, folder: Path, here: Sequence[str]) -> str:
    """A command that writes safetensors beside the pickles of a folder."""
    config = read_config(folder)
    place, then = str(folder), ""
    if not Path(model).is_dir():
        place, then = "FOLDER", f"hf download {model} --local-dir FOLDER && "
    if name := config.get("_class_name"):
        library, read = "diffusers", f"from_pretrained({place!r}, use_safetensors=False)"
    else:
        library, read = "transformers", f"from_pretrained({place!r})"
        name = (config.get("architectures") or ["AutoModel"])[0]
    code = f"from {library} import {name} as M; M.{read}.save_pretrained({place!r})"
    return f'{then}python -c "{code}"'
