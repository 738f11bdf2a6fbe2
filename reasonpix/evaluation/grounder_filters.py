"""Which grounder filtered a benchmark, and whether the same one measures "Target found".

`reasonpix benchmark` writes `benchmark.json` beside the data:

```
{"filters": [{"filter": "regrounded", "grounder": "grounding-dino",
              "model": "mini/grounding-dino", "weights": "<SHA-256, or hub id and revision>"}]}
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from reasonpix.core.hashing import fingerprint
from reasonpix.errors import SourceError
from reasonpix.generation.outcomes import read_stages, scorer_of
from reasonpix.generation.run_folder import RunFolder

FILE = "benchmark.json"


class GrounderFilter(BaseModel):
    """A filter that used a grounder."""

    model_config = ConfigDict(frozen=True)

    filter: str
    grounder: str
    """Its name, as after `use:`."""
    model: str | None = None
    """Its weights, as the recipe names them."""
    weights: str
    """What identifies its weights, see `weights_of`."""

    def __str__(self) -> str:
        """Grounder, weights and filter, for messages."""
        return f"{self.grounder}{f' {self.model}' if self.model else ''}, filter {self.filter}"


class GrounderFilters(BaseModel):
    """All filters of a benchmark that used a grounder."""

    model_config = ConfigDict(frozen=True)

    filters: tuple[GrounderFilter, ...] = ()

    def __str__(self) -> str:
        """All of them, for messages."""
        return "; ".join(map(str, self.filters))

    def write(self, folder: Path) -> None:
        """Write `benchmark.json` into the folder of a benchmark."""
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False)
        (folder / FILE).write_text(f"{text}\n", encoding="utf-8")

    def sentence(self) -> str:
        """For the card."""
        if not self.filters:
            return 'No filter used a grounder, so any grounder may measure "Target found".'
        return f'A grounder filtered the samples ({self}): measure "Target found" with another one.'


def weights_of(grounder: Mapping[str, Any]) -> str:
    """What identifies the weights in a grounder's fingerprint facts."""
    if digest := grounder.get("weights", {}).get("model"):
        return str(digest)
    options = grounder["options"]
    if model := options.get("model"):
        revision = options.get("revision")
        return f"{model}{f'@{revision}' if revision else ''}"
    return fingerprint([grounder])


def filters_by_grounder(run: RunFolder) -> GrounderFilters:
    """The filters of a finished run that used a grounder."""
    pipeline = yaml.safe_load(run.storage.read("recipe.yaml"))["pipeline"]
    return GrounderFilters(
        filters=tuple(
            GrounderFilter(
                filter=scorer_of(entry).name,
                grounder=used["use"],
                model=(pipeline.get("grounder") or {}).get("model"),
                weights=weights_of(used),
            )
            for entry in read_stages(run)
            if entry.is_score
            for used in entry.component.get("uses", ())
            if used["slot"] == "grounder"
        )
    )


def read_grounder_filters(folder: Path) -> GrounderFilters | None:
    """Those of a benchmark's folder; None if they are not recorded. Raises `SourceError`."""
    file = folder / FILE
    try:
        return GrounderFilters.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise SourceError(f"{file}: cannot be read: {error}; build the benchmark again") from error


def target_found_note(filters: GrounderFilters | None, grounder: Mapping[str, Any]) -> str:
    """How far "Target found" is independent of the benchmark's filters.

    `grounder` are the fingerprint facts of the one that measures it.
    """
    if filters is None:
        return (
            "It is not recorded whether the grounder that measures Target found also filtered "
            "this benchmark; if so, the metric favours the edits that it recognises."
        )
    if same := [it for it in filters.filters if it.weights == weights_of(grounder)]:
        return (
            f"The grounder that measures Target found also filtered this benchmark ({same[0]}), "
            "so the ground truth is found by construction and the metric favours the edits that "
            "this grounder recognises."
        )
    if filters.filters:
        return f"The benchmark was filtered by a different grounder ({filters})."
    return "No filter of the benchmark used a grounder."
