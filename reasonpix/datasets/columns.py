"""The columns of a published dataset: their types, and the facts about a sample that fill them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa

from reasonpix.errors import RunError
from reasonpix.generation.outcomes import Outcome, StageEntry, read_stages, scores_of
from reasonpix.generation.run_folder import RunFolder

Row = dict[str, Any]

# -- Features: the types of columns, as `datasets` calls them -------------------------------------

Feature = Mapping[str, Any]

IMAGE: Feature = {"_type": "Image"}


def value(dtype: str) -> Feature:
    """A plain value, such as `string` or `float64`."""
    return {"dtype": dtype, "_type": "Value"}


def list_of(feature: Feature) -> Feature:
    """A list of values or of structs (a mapping of names to features)."""
    return {"feature": feature, "_type": "List"}


TEXT = value("string")
SCORE = value("float64")


def schema_of(features: Mapping[str, Feature]) -> pa.Schema:
    """The parquet schema of columns, with the metadata from which `datasets` reads features."""
    info = json.dumps({"info": {"features": features}})
    fields = [(name, _arrow(feature)) for name, feature in features.items()]
    return pa.schema(fields, metadata={"huggingface": info})


def _arrow(feature: Feature) -> pa.DataType:
    match feature.get("_type"):
        case "Image":
            return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        case "Value":
            return pa.type_for_alias(feature["dtype"])
        case "List":
            return pa.list_(_arrow(feature["feature"]))
        case _:
            return pa.struct([(name, _arrow(part)) for name, part in feature.items()])


# -- The columns ----------------------------------------------------------------------------------

# diffusers' InstructPix2Pix trainer reads the first three. All parts share the columns, so their
# datasets can be concatenated; columns that a part does not fill are null.
FEATURES: Mapping[str, Feature] = {
    "input_image": IMAGE,
    "edit_prompt": TEXT,
    "edited_image": IMAGE,
    "direct_instruction": TEXT,
    "part": TEXT,
    "record_id": TEXT,
    "source_id": TEXT,
    "caption": TEXT,
    "edited_caption": TEXT,
    "candidates": list_of(TEXT),
    "chosen": value("int64"),
    "selected": TEXT,
    "target": TEXT,
    "box": list_of(value("float64")),
}
"""The columns that every published dataset of edits has; those of scores follow."""

IMAGES = ("input_image", "edited_image")


@dataclass(frozen=True)
class RunColumns:
    """The columns of the samples of one run."""

    part: str
    """The part of the paper's dataset that its pipeline makes (Table 2): I, II or III."""
    scores: Mapping[str, str] = field(default_factory=dict)
    """The column of each score that a filter measured, by `<filter>.<score>`."""

    @property
    def features(self) -> dict[str, Feature]:
        """The types of all columns."""
        return {**FEATURES, **dict.fromkeys(self.scores.values(), SCORE)}

    def facts(self, outcome: Outcome) -> Row:
        """All facts about an edit except its images; None where there is no value."""
        sample = outcome.sample
        plan, pair, selection = sample.plan, sample.item.pair, sample.selection
        candidates = sample.candidates.candidates if sample.candidates else None
        return {
            "edit_prompt": sample.instruction,
            "direct_instruction": pair.instruction if pair else None,
            "part": self.part,
            "record_id": sample.record_id,
            "source_id": sample.item.native_id,
            "caption": sample.caption.text if sample.caption else None,
            "edited_caption": sample.edited_caption,
            "candidates": [c.instruction for c in candidates] if candidates is not None else None,
            "chosen": selection.chosen if selection else None,
            "selected": plan.selected if plan else None,
            "target": plan.target if plan else None,
            "box": list(sample.box.xyxy) if plan else None,
        } | {column: _float(outcome.scores.get(score)) for score, column in self.scores.items()}


def _float(score: float | None) -> float | None:
    """JSON would write a whole number without a point, and readers would infer an integer."""
    return None if score is None else float(score)


def columns_of(run: RunFolder) -> RunColumns:
    """The columns of a finished run. Raises `RunError`, also if two scores share a column."""
    entries = read_stages(run)
    scores = score_columns(
        f"{entry.component['use']}.{name}"
        for entry in entries
        if entry.is_score
        for name in sorted(scores_of(run, entry).names)
    )
    for column, twins in groupby(sorted(scores, key=scores.__getitem__), scores.__getitem__):
        if len(names := list(twins)) > 1:
            raise RunError(
                f"{run}: the scores {' and '.join(names)} would share the column {column!r}; "
                "remove one of their filters with `reasonpix refilter`"
            )
    return RunColumns(part_of(entries), scores)


def score_columns(scores: Iterable[str]) -> dict[str, str]:
    """The column of each score: `no-op.changed` is in `score_no_op_changed`."""
    return {score: "score_" + re.sub(r"\W", "_", score) for score in scores}


def part_of(entries: Sequence[StageEntry]) -> str:
    """The part of the paper's dataset that stages make: I rewrites the instructions of pairs.

    II and III replace objects: II in images whose source has captions, III after a captioner.
    """
    components = {entry.stage: entry.component["use"] for entry in entries}
    if "rewrite" in components:
        return "I"
    return "III" if components.get("caption") else "II"
