"""What the report says of "Target found" when a grounder filtered the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reasonpix.errors import SourceError
from reasonpix.evaluation.grounder_filters import (
    GrounderFilter,
    GrounderFilters,
    read_grounder_filters,
    target_found_note,
    weights_of,
)
from reasonpix.plugin import registry
from reasonpix.plugin.components import Options


def facts(**weights: Any) -> dict[str, Any]:
    return {"slot": "grounder", "use": "grounding-dino", "options": {"threshold": 0.3}} | weights


LOCAL = facts(weights={"model": "5ha"})
HUB = facts(options={"model": "IDEA-Research/grounding-dino-base", "revision": None})
PINNED = facts(options={"model": "IDEA-Research/grounding-dino-base", "revision": "abc"})
FAKE = registry.fingerprint_facts("grounder", "fake-grounder", Options())


@pytest.mark.parametrize("grounder", [LOCAL, HUB, PINNED, FAKE])
def test_the_same_weights_are_told_whatever_the_other_options(grounder: dict[str, Any]) -> None:
    used = GrounderFilter(
        filter="regrounded", grounder="grounding-dino", model="m", weights=weights_of(grounder)
    )
    note = target_found_note(GrounderFilters(filters=(used,)), grounder)
    assert "also filtered this benchmark (grounding-dino m, filter regrounded)" in note
    others = [it for it in (LOCAL, HUB, PINNED, FAKE) if it is not grounder]
    for other in others:
        note = target_found_note(GrounderFilters(filters=(used,)), other)
        assert "was filtered by a different grounder" in note


def test_a_benchmark_without_such_filters_and_one_without_a_record(tmp_path: Path) -> None:
    assert target_found_note(GrounderFilters(), LOCAL).startswith("No filter of the benchmark")
    assert "not recorded" in target_found_note(read_grounder_filters(tmp_path), LOCAL)
    assert read_grounder_filters(tmp_path / "a" / "b.parquet") is None
    GrounderFilters().write(tmp_path)
    assert read_grounder_filters(tmp_path) == GrounderFilters()
    for text in ("", "[]", '{"filters": [{"filter": "regrounded"}]}'):
        (tmp_path / "benchmark.json").write_text(text)
        with pytest.raises(SourceError, match=r"benchmark\.json: cannot be read"):
            read_grounder_filters(tmp_path)
