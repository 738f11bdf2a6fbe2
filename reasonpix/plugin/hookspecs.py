"""The hooks a plugin may implement. Each returns classes; nothing is imported or loaded before use.

A plugin is a module named by an entry point of the group `reasonpix`:

```toml
[project.entry-points.reasonpix]
my-captioner = "my_package"
```

The entry point's name is the word after `use:` in a recipe and the `name` of the class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pluggy

from reasonpix.plugin.components import (
    Captioner,
    Editor,
    EntityExtractor,
    Grounder,
    Method,
    MLLMEncoder,
    Planner,
    Scorer,
    Source,
)

hookspec = pluggy.HookspecMarker("reasonpix")
hookimpl = pluggy.HookimplMarker("reasonpix")


@hookspec
def captioners() -> list[type[Captioner[Any]]]:  # type: ignore[empty-body]
    """Return the captioners this plugin offers."""


@hookspec
def extractors() -> list[type[EntityExtractor[Any]]]:  # type: ignore[empty-body]
    """Return the entity extractors this plugin offers."""


@hookspec
def grounders() -> list[type[Grounder[Any]]]:  # type: ignore[empty-body]
    """Return the grounders this plugin offers."""


@hookspec
def planners() -> list[type[Planner[Any]]]:  # type: ignore[empty-body]
    """Return the planners this plugin offers."""


@hookspec
def editors() -> list[type[Editor[Any]]]:  # type: ignore[empty-body]
    """Return the editors this plugin offers."""


@hookspec
def encoders() -> list[type[MLLMEncoder[Any]]]:  # type: ignore[empty-body]
    """Return the MLLM encoders this plugin offers."""


@hookspec
def sources() -> list[type[Source[Any]]]:  # type: ignore[empty-body]
    """Return the sources of input images this plugin offers."""


@hookspec
def scorers() -> list[type[Scorer[Any]]]:  # type: ignore[empty-body]
    """Return the scorers, usable as filters, this plugin offers."""


@hookspec
def methods() -> list[type[Method[Any]]]:  # type: ignore[empty-body]
    """Return the editing methods, to be compared in an evaluation, this plugin offers."""


@hookspec
def checkpoints() -> dict[str, Path]:  # type: ignore[empty-body]
    """Return the folders or files of weights this plugin carries, by names like `mini/blip2`."""
