"""GPT-3.5 becomes a local LLM by one line of a recipe; both run, and share what came before."""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from reasonpix.engine import generate
from reasonpix.outcomes import outcomes
from reasonpix.recipe import load_recipe
from reasonpix.run import RunFolder

RECIPE = """\
source: {{use: stickers, split: test, count: 3, captions: true}}
pipeline:
  extractor: spacy
  grounder: fake-grounder
  planner: {planner}
  editor: fake-editor
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    script = Path(__file__).parents[1] / "openai_server.py"
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        yield f"{process.stdout.readline().strip()}/v1"
        process.stdin.close()


def computed(run: RunFolder) -> Counter[str]:
    """How many records each stage computed, by the run's own journal."""
    counts = Counter[str]()
    for line in run.journal():
        counts[line["stage"].rpartition("-")[0]] += line["records"]
    return counts


def test_one_line_swaps_gpt_for_a_local_llm(url: str, tmp_path: Path) -> None:
    gpt, local = tmp_path / "gpt.yaml", tmp_path / "local.yaml"
    gpt.write_text(
        RECIPE.format(planner=f"{{use: openai, model: gpt-3.5-turbo, base_url: '{url}'}}")
    )
    local.write_text(
        RECIPE.format(planner="{use: local-llm, model: mini/smollm2, max_tokens: 100}")
    )
    changes = [
        line
        for line in difflib.ndiff(gpt.read_text().splitlines(), local.read_text().splitlines())
        if line[:2] in ("- ", "+ ")
    ]
    assert [line[:11] for line in changes] == ["-   planner", "+   planner"]

    out = tmp_path / "run"
    run = generate(load_recipe(gpt), out)
    first = computed(run)
    assert [outcome.status for outcome in outcomes(run)] == ["ok"] * 3
    assert first == dict.fromkeys(["read", "caption", "extract", "ground", "plan", "edit"], 3)

    generate(load_recipe(local), out)
    # No image is read, no caption, entity or box computed again.
    again = computed(run) - first
    assert set(again) <= {"plan", "edit"} and again["plan"] == 3
    ended = list(outcomes(run))
    assert {(o.status, o.stage) for o in ended} <= {("ok", ""), ("rejected", "plan")}
    # A small model may write nothing usable; what it wrote is kept either way.
    assert all(o.reason for o in ended if o.status == "rejected")
