"""Every error reasonpix raises on purpose.

```
ReasonpixError            the message says where, what, and how to mend it
├── RecipeError           a recipe (or a --set) is wrong; carries every problem at once
├── PluginError           a plugin is unknown, broken, or named twice
├── WeightsError          weights cannot be found or read
├── SourceError           a source's folder or index cannot be read
├── RunError              a run folder is missing, foreign or damaged
├── CostLimit             the next call could pass --max-cost; the run can go on with a higher one
├── batcher.ServerBusy    the server cannot edit now; says when to try again
├── batcher.EditRejected  the model cannot edit this image with this instruction
├── batcher.EditError     the model failed on an edit
└── InvalidBox            coordinates that do not make a box inside the image
```

What goes wrong with one record is no exception but a row: see `reasonpix.plugin.types.Problem`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ReasonpixError(Exception):
    """Base of every error that is explained to the user without a traceback."""


class RecipeError(ReasonpixError):
    """A recipe is wrong. `problems` holds one line for each thing to mend."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PluginError(ReasonpixError):
    """A plugin is unknown, broken, or its name is taken twice."""


class WeightsError(ReasonpixError):
    """Weights cannot be found or read."""


class SourceError(ReasonpixError):
    """A source's folder or index cannot be read."""


class RunError(ReasonpixError):
    """A run folder is missing, belongs to another recipe, or is damaged."""


class InvalidBox(ReasonpixError):
    """Coordinates that do not make a box inside the image."""


class CostLimit(ReasonpixError):
    """The next call could pass the cost limit. What was answered is kept."""


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Imports of packages that only `reasonpix[extra]` brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ReasonpixError(
            f"this needs the package {error.name}: pip install 'reasonpix[{extra}]'"
        ) from error
