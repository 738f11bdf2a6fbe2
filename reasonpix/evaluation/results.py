"""The folder of an evaluation: its cases, every edit, every score.

```
recipe.yaml                   resolved: methods, options, packages
evaluation.json               kinds of instructions, methods and their folders
cases.jsonl                   one line for each case: its texts and groups
input/<id>.png truth/<id>.png the benchmark's images
edits/<folder>/<kind>/<id>.png   an edit; or <id>.json, the reason why it failed
scores/<folder>/<kind>.jsonl     what was measured with, then one line for each case
report.html report.csv report.json
grid-<kind>.png               input and methods side by side
```

Every file is written atomically.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict

from reasonpix.core.atomic import write_atomically
from reasonpix.core.images import encode_png
from reasonpix.errors import RunError
from reasonpix.evaluation.training_overlap import TrainingOverlap
from reasonpix.plugin.types import Problem

TRUTH = "ground truth"
"""The row of the ground truth itself: L1 0, L2 0, CLIP-I 1, DINO 1, and the oracle of CLIP-T."""
COPY = "copy of the input"
"""The row of a method that changes nothing."""


class CaseRecord(BaseModel):
    """A case of the benchmark without its images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    row: str
    instructions: dict[str, str]
    """By kind."""
    caption: str
    edited_caption: str
    local_caption: str | None = None
    """What CLIP-T compares with instead of `edited_caption`, see `Case`."""
    groups: dict[str, str]
    target: str | None = None
    box: tuple[float, ...] | None = None
    """XYXY in pixels of the input image."""
    mask: str | None = None
    """SHA-256 of the mask's pixels, in hex."""


class EvaluationFolder:
    """Reads and writes the folder. Raises `RunError` if it does not hold an evaluation."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _index(self) -> Mapping[str, Any]:
        try:
            index: Mapping[str, Any] = json.loads((self.root / "evaluation.json").read_bytes())
        except FileNotFoundError as error:
            raise RunError(
                f"{self.root} is not an evaluation; create one with "
                "`reasonpix evaluate RECIPE --out DIR`"
            ) from error
        return index

    @property
    def benchmark(self) -> str:
        """The benchmark's path or hub id, as in the recipe."""
        return str(self._index["benchmark"])

    @property
    def notes(self) -> dict[str, list[str]]:
        """By metric, what the reader of its values should know, such as the captions of CLIP-T."""
        return dict(self._index["notes"])

    @property
    def training_overlaps(self) -> dict[str, TrainingOverlap | None]:
        """What the benchmark shares with the training data of each method; None if unknown."""
        return {
            method: found and TrainingOverlap.model_validate(found)
            for method, found in self._index["training_overlaps"].items()
        }

    @property
    def kinds(self) -> list[str]:
        """The kinds of instructions."""
        return list(self._index["kinds"])

    @property
    def methods(self) -> list[str]:
        """`TRUTH`, `COPY`, and the methods by the recipe's names, in its order."""
        return list(self._index["folders"])

    @cached_property
    def records(self) -> dict[str, CaseRecord]:
        """The cases by id, in the benchmark's order."""
        lines = (self.root / "cases.jsonl").read_text(encoding="utf-8").splitlines()
        return {record.id: record for record in map(CaseRecord.model_validate_json, lines)}

    def input(self, case: str) -> Path:
        """The input image, PNG."""
        return self.root / "input" / f"{case}.png"

    def truth(self, case: str) -> Path | None:
        """The ground-truth edit, PNG, if the benchmark has one."""
        path = self.root / "truth" / f"{case}.png"
        return path if path.is_file() else None

    def edit(self, method: str, kind: str, case: str) -> Path | Problem | None:
        """A method's edit, PNG; the reason why it failed; or None if it was not tried yet."""
        if method == COPY:
            return self.input(case)
        if method == TRUTH:
            return self.truth(case)
        path = self._edit_path(method, kind, case)
        if path.is_file() and _is_complete(path):
            return path
        try:
            return Problem.model_validate_json(path.with_suffix(".json").read_bytes())
        except FileNotFoundError:
            return None

    def scores(self, method: str, kind: str) -> dict[str, dict[str, float]]:
        """The scores by case, then by metric. Cases that failed or were not measured are absent."""
        _, rows = self.score_rows(method, kind)
        return {
            case: row
            for case, row in rows.items()
            if "problem" not in row and case in self.records  # an earlier run may have had more
        }

    def failures(self, method: str, kind: str) -> dict[str, str]:
        """By case, why it could not be edited, or why its edit could not be measured."""
        _, rows = self.score_rows(method, kind)
        reasons: dict[str, str] = {}
        for record in self.records.values():
            edit = self.edit(method, kind, record.id) if kind in record.instructions else None
            if isinstance(edit, Problem):
                reasons[record.id] = edit.reason
            elif "problem" in rows.get(record.id, {}):
                reasons[record.id] = f"cannot be measured: {rows[record.id]['problem']}"
        return reasons

    @property
    def measured_with(self) -> Mapping[str, Any]:
        """The models of the metrics, their digests and versions; empty before any score."""
        headers = (
            self.score_rows(method, kind)[0] for method in self.methods for kind in self.kinds
        )
        return next(filter(None, headers), {})

    def score_rows(
        self, method: str, kind: str
    ) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
        """`measured_with`, and by case its scores or `problem`; both are empty without scores."""
        try:
            text = self._scores_path(method, kind).read_text(encoding="utf-8")
            measured_with, *rows = map(json.loads, text.splitlines())
            return measured_with, {row.pop("id"): row for row in rows}
        except (FileNotFoundError, ValueError, KeyError, AttributeError):  # or damaged
            return {}, {}

    def write_edit(self, method: str, kind: str, case: str, edit: Image.Image | Problem) -> None:
        """Write an edit, or the reason why it failed. Raises `RunError` if it cannot be written."""
        path = self._edit_path(method, kind, case)
        if isinstance(edit, Problem):
            write_atomically(path.with_suffix(".json"), edit.model_dump_json().encode())
        else:
            write_atomically(path, encode_png(edit))

    def write_scores(
        self,
        method: str,
        kind: str,
        measured_with: Mapping[str, Any],
        cases: Sequence[str],
        scores: Sequence[Mapping[str, float] | Problem],
    ) -> None:
        """Write the scores of `cases`; they replace earlier ones."""
        rows = (
            {"id": case} | ({"problem": row.reason} if isinstance(row, Problem) else dict(row))
            for case, row in zip(cases, scores, strict=True)
        )
        write_atomically(self._scores_path(method, kind), json_lines([measured_with, *rows]))

    def _edit_path(self, method: str, kind: str, case: str) -> Path:
        return self.root / "edits" / str(self._index["folders"][method]) / kind / f"{case}.png"

    def _scores_path(self, method: str, kind: str) -> Path:
        return self.root / "scores" / str(self._index["folders"][method]) / f"{kind}.jsonl"


_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def _is_complete(png: Path) -> bool:
    """Whether a PNG has its last chunk; one that was truncated counts as missing."""
    with png.open("rb") as file:
        file.seek(max(0, png.stat().st_size - len(_PNG_END)))
        return file.read() == _PNG_END


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON Lines in ASCII, because texts may hold Unicode line separators."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
