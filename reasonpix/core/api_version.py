"""The version of the plugin API, and the check that an installed plugin fits it.

A plugin package declares the version that it was written for as an entry point:

```toml
[project.entry-points."reasonpix.api"]
"1.0" = "my_package"
```

It is read from the package's metadata, so an incompatible plugin is reported without importing it.
"""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint

from reasonpix import __version__
from reasonpix.errors import PluginError

API_VERSION = "1.0"
"""MAJOR.MINOR: see "What stays" in `docs/plugins.md`."""

GROUP = "reasonpix.api"


def check_api_version(plugin: EntryPoint, kind: str = "plugin") -> None:
    """Raise `PluginError` if the plugin's package was written for an API that this one is not.

    A package fits if it declares the same major version and no later minor version, or nothing.
    """
    if plugin.dist is None:
        return
    package = f"{kind} {plugin.name!r}: package {plugin.dist.name} {plugin.dist.version}"
    for declared in plugin.dist.entry_points.select(group=GROUP):
        if not re.fullmatch(r"[0-9]{1,6}\.[0-9]{1,6}", declared.name):
            raise PluginError(
                f"{package} declares the plugin API version {declared.name[:20]!r}; "
                f"it must be MAJOR.MINOR, such as {API_VERSION}"
            )
        wanted, provided = _parse(declared.name), _parse(API_VERSION)
        if wanted[0] != provided[0] or wanted > provided:
            raise PluginError(
                f"{package} was written for plugin API {declared.name}, but reasonpix "
                f"{__version__} provides {API_VERSION}: upgrade "
                f"{'reasonpix' if wanted > provided else plugin.dist.name}"
            )


def _parse(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)
