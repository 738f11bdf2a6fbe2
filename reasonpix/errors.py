"""The errors that reasonpix raises, and explains to the user without a traceback.

```
ReasonpixError            the message says where, what, and how to mend it
├── RecipeError           a recipe (or a --set) is invalid; lists every problem
├── PluginError           a plugin is unknown, broken, incompatible, or offered twice
├── WeightsError          weights cannot be found or read
├── SourceError           a source's folder or index cannot be read
├── RunError              a run folder is missing, belongs to another recipe, or is damaged
├── CostLimit             the next call could exceed --max-cost; the run can continue with more
├── batcher.ServerBusy    the server cannot edit now; says when to try again
├── batcher.EditRejected  the model cannot edit this image with this instruction
├── batcher.EditError     the model failed on an edit
└── InvalidBox            coordinates that are not a box inside the image
```

A failure of a single record is a row rather than an exception: see `reasonpix.plugin.Problem`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class ReasonpixError(Exception):
    """Base of every error that is explained to the user without a traceback."""


class RecipeError(ReasonpixError):
    """A recipe is invalid. `problems` has one line for each problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems)  # what it is unpickled from
        self.problems = problems

    def __str__(self) -> str:
        """All problems, one a line."""
        return "\n".join(self.problems)


class PluginError(ReasonpixError):
    """A plugin is unknown, broken, incompatible, or offered by two packages."""


class WeightsError(ReasonpixError):
    """Weights cannot be found or read."""


class SourceError(ReasonpixError):
    """A source's folder or index cannot be read."""


class RunError(ReasonpixError):
    """A run folder is missing, belongs to another recipe, or is damaged."""


class InvalidBox(ReasonpixError):
    """Coordinates that are not a box inside the image."""


class CostLimit(ReasonpixError):
    """The next call could exceed the cost limit. Answers so far are stored."""


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Guard imports of packages that only `reasonpix[extra]` installs. Raises `ReasonpixError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ReasonpixError(
            f"this needs the package {error.name}: pip install 'reasonpix[{extra}]'"
        ) from error


def problems_of(error: ValidationError) -> list[str]:
    """The problems of a validation, each with its field."""
    return [
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"])))
        for item in error.errors(include_url=False, include_input=False)
    ]
