"""Licences of what went into a dataset, as far as they are stated on this machine."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reasonpix.core.files.encodings import read_front_matter
from reasonpix.errors import PluginError
from reasonpix.plugin import registry


def licence_of(name: str, options: Mapping[str, Any], kind: str) -> str | None:
    """The licence that the card of a local folder or cached hub repository states.

    `kind` is "dataset" or "model". None if it is unknown.
    """
    try:
        path = registry.checkpoint(name) or Path(name)
    except PluginError:
        return None
    if path.exists():
        readme: Path | None = (path if path.is_dir() else path.parent) / "README.md"
    else:
        readme = _cached_card(name, options, kind)
    if readme is None:
        return None
    licence = read_front_matter(readme).get("license")
    return licence.lower() if isinstance(licence, str) else None  # the hub's spelling


def _cached_card(name: str, options: Mapping[str, Any], kind: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        path = try_to_load_from_cache(
            name,
            "README.md",
            cache_dir=options.get("cache_dir"),
            revision=options.get("revision"),
            repo_type=kind,
        )
    except HFValidationError:
        return None  # not the name of a repository
    return Path(path) if isinstance(path, str) else None


def package_licence(package: str) -> str:
    """The licence that a package's metadata states."""
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return "not stated"
    stated = (metadata.get_all("License-Expression") or metadata.get_all("License") or [""])[0]
    classified = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    # Some packages put the whole licence text there.
    return stated if stated and "\n" not in stated else ", ".join(classified) or "not stated"
