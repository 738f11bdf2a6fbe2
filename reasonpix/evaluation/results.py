"""The folder of an evaluation: what was to be done, every edit, every score.

```
recipe.yaml                   resolved: methods, options, packages
evaluation.json               kinds of instructions, methods and their folders
cases.jsonl                   one line for each case: its words and groups
input/<id>.png truth/<id>.png the benchmark's images
edits/<folder>/<kind>/<id>.png   an edit; or <id>.json, why there is none
scores/<folder>/<kind>.jsonl     one line for each case: id and what was measured
report.html report.csv report.json
```

Each file appears complete or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict

from reasonpix.core.images import encode_png
from reasonpix.core.storage import write_atomically
from reasonpix.errors import RunError
from reasonpix.plugin.types import Problem

TRUTH = "ground truth"
"""The row of the ground truth itself: 0, 0, 1, 1, and the oracle of CLIP-T."""
COPY = "copy of the input"
"""The row that edits nothing."""


class CaseRecord(BaseModel):
    """What is known of a case beside its images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    row: str
    instructions: dict[str, str]
    caption: str
    edited_caption: str
    groups: dict[str, str]
    target: str | None = None
    box: tuple[float, ...] | None = None
    mask: str | None = None
    """SHA-256 of what the mask marks, in hex."""


class EvaluationFolder:
    """Reads and writes the folder. Raises `RunError` for one that is not an evaluation."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _index(self) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = json.loads((self.root / "evaluation.json").read_bytes())
        except FileNotFoundError as error:
            raise RunError(
                f"{self.root} is no evaluation; make one: reasonpix evaluate RECIPE --out DIR"
            ) from error
        return found

    @property
    def benchmark(self) -> str:
        """Where the benchmark was read from, as the recipe says it."""
        return str(self._index["benchmark"])

    @property
    def kinds(self) -> list[str]:
        """The kinds of instructions."""
        return list(self._index["kinds"])

    @property
    def methods(self) -> list[str]:
        """The methods by the recipe's names, in its order, after `TRUTH` and `COPY`."""
        return list(self._index["folders"])

    @cached_property
    def entries(self) -> dict[str, CaseRecord]:
        """The cases by id, in their order."""
        lines = (self.root / "cases.jsonl").read_text(encoding="utf-8").splitlines()
        entries = map(CaseRecord.model_validate_json, lines)
        return {entry.id: entry for entry in entries}

    def input(self, case: str) -> Path:
        """The input image, PNG."""
        return self.root / "input" / f"{case}.png"

    def truth(self, case: str) -> Path | None:
        """The ground-truth edit, PNG, where there is one."""
        path = self.root / "truth" / f"{case}.png"
        return path if path.is_file() else None

    def edit(self, method: str, kind: str, case: str) -> Path | Problem | None:
        """A method's edit, PNG; why there is none; or None when it was not tried yet."""
        if method == COPY:
            return self.input(case)
        if method == TRUTH:
            return self.truth(case)
        path = self._edit(method, kind, case)
        if path.is_file() and _is_whole(path):
            return path
        try:
            return Problem.model_validate_json(path.with_suffix(".json").read_bytes())
        except FileNotFoundError:
            return None

    def scores(self, method: str, kind: str) -> dict[str, dict[str, float]]:
        """What was measured, by case; failed edits are not in it. Empty before it is measured."""
        _, rows = self._measured(method, kind)
        return {
            case: row
            for case, row in rows.items()
            if "problem" not in row and case in self.entries  # there may have been more
        }

    def failures(self, method: str, kind: str) -> dict[str, str]:
        """Why cases are not in `scores`: they could not be edited, or the edit not be measured."""
        _, rows = self._measured(method, kind)
        reasons: dict[str, str] = {}
        for entry in self.entries.values():
            found = self.edit(method, kind, entry.id) if kind in entry.instructions else None
            if isinstance(found, Problem):
                reasons[entry.id] = found.reason
            elif "problem" in rows.get(entry.id, {}):
                reasons[entry.id] = f"cannot be measured: {rows[entry.id]['problem']}"
        return reasons

    @property
    def identity(self) -> Mapping[str, Any]:
        """What was measured with: models, their digests, versions."""
        return next(
            (found for m in self.methods for k in self.kinds if (found := self._measured(m, k)[0])),
            {},
        )

    def measured(self, method: str, kind: str) -> tuple[Mapping[str, Any], set[str]]:
        """What was measured with, and the cases: of the scores that there are."""
        identity, rows = self._measured(method, kind)
        return identity, set(rows)

    def keep(self, method: str, kind: str, case: str, edited: Image.Image | Problem) -> None:
        """Write an edit, or why there is none. Raises `RunError` when it cannot."""
        path = self._edit(method, kind, case)
        if isinstance(edited, Problem):
            write_atomically(path.with_suffix(".json"), edited.model_dump_json().encode())
        else:
            write_atomically(path, encode_png(edited))

    def keep_scores(
        self,
        method: str,
        kind: str,
        identity: Mapping[str, Any],
        cases: Sequence[str],
        found: Sequence[Mapping[str, float] | Problem],
    ) -> None:
        """Write what was measured, in the place of what was there."""
        rows = (
            {"id": case} | ({"problem": row.reason} if isinstance(row, Problem) else dict(row))
            for case, row in zip(cases, found, strict=True)
        )
        write_atomically(self._scores(method, kind), lines([identity, *rows]))

    def _measured(
        self, method: str, kind: str
    ) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
        try:
            text = self._scores(method, kind).read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}, {}
        try:
            identity, *rows = map(json.loads, text.splitlines())
            return identity, {row.pop("id"): row for row in rows}
        except (ValueError, KeyError, AttributeError):  # damaged: as if it were not there
            return {}, {}

    def _edit(self, method: str, kind: str, case: str) -> Path:
        return self.root / "edits" / str(self._index["folders"][method]) / kind / f"{case}.png"

    def _scores(self, method: str, kind: str) -> Path:
        return self.root / "scores" / str(self._index["folders"][method]) / f"{kind}.jsonl"


def _is_whole(png: Path) -> bool:
    """Whether a PNG's end is there; one that was cut by others is as good as none."""
    with png.open("rb") as file:
        file.seek(max(0, png.stat().st_size - len(_END)))
        return file.read() == _END


_END = b"\0\0\0\0IEND\xaeB`\x82"


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines, in ASCII: a text may hold what counts as the end of a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
