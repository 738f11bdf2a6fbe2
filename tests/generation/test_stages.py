"""Part I: instructions of given edits are rewritten and selected."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reasonpix.datasets.publishing import publish
from reasonpix.errors import RecipeError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import funnel, read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.rewrite_stages import rewrite, select
from reasonpix.generation.run_folder import RunFolder
from reasonpix.generation.statistics import position_bias
from reasonpix.inspection.gallery import write_gallery
from reasonpix.plugin.components import Options, Planner, SourceItem, SourcePair
from reasonpix.plugin.samples import Candidates, Sample, Selection
from reasonpix.plugin.types import (
    Caption,
    Choice,
    Problem,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)
from tests.conftest import Distribution, Shell, WriteRecipe

PAIRS = """
import hashlib
import io

from PIL import Image
from pydantic import Field

from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Choice, Problem, Rewriting
from reasonpix.plugin.components import Options, Planner, Source, SourceItem, SourcePair


class PairsOptions(Options):
    count: int = Field(6, description="Number of pairs")


class Pairs(Source[PairsOptions]):
    "Grey squares; each edit is brighter by as much as its number."

    name = "pairs"
    Options = PairsOptions
    gives_pairs = True

    def items(self):
        for number in range(self.options.count):
            yield SourceItem(
                native_id=str(number),
                content=hashlib.sha256(self.read(str(number))).hexdigest(),
                caption="a bee",
                pair=SourcePair(
                    content=hashlib.sha256(self.read_edited(str(number))).hexdigest(),
                    caption=None if number == 4 else "a rabbit",
                    instruction="turn the bee into a rabbit",
                ),
            )

    def read(self, native_id):
        return png(100, (24, 16))

    def read_edited(self, native_id):
        return png(100 + int(native_id), (16, 16) if native_id == "5" else (24, 16))


def png(level, size):
    buffer = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


class WriterOptions(Options):
    word: str = Field("ears", description="What it writes about")


class Writer(Planner[WriterOptions]):
    "Writes by seed, and selects what comes last in the alphabet."

    name = "writer"
    Options = WriterOptions

    def rewrite(self, requests):
        return [
            Rewriting(instruction=f"{self.options.word} {r.seed % 1000}", revealing=("bunny",))
            for r in requests
        ]

    def select(self, requests):
        return [Choice(index=r.candidates.index(max(r.candidates))) for r in requests]


@hookimpl
def sources():
    return [Pairs]


@hookimpl
def planners():
    return [Writer]
"""


@pytest.fixture
def pairs(distribution: Distribution) -> Path:
    return distribution(
        "pairs", {"pairs": "pairs_plugin", "writer": "pairs_plugin"}, pairs_plugin=PAIRS
    )


def recipe(
    tmp_path: Path, text: str = "", filters: str = "[{use: eq1, reject_fraction: 0.3}]"
) -> Path:
    path = tmp_path / "part1.yaml"
    path.write_text(
        "part: rewrite\nshard_size: 2\nsource: pairs\n"
        f"pipeline:\n  planner: writer\nfilters: {filters}\n{text}"
    )
    return path


def computed(run: RunFolder) -> list[str]:
    return [line["stage"].rpartition("-")[0] for line in run.journal() if "ok" in line]


@pytest.mark.usefixtures("pairs")
def test_pairs_become_reasoning_instructions(tmp_path: Path) -> None:
    run = generate(load_recipe(recipe(tmp_path)), tmp_path / "run")
    ends = {o.sample.item.native_id: (o.status, o.stage, o.reason) for o in read_outcomes(run)}
    # Of the four that come so far, the one whose images are equal goes before the planner is asked.
    assert ends["0"][:2] == ("rejected", "score-eq1")
    assert ends["4"] == ("rejected", "caption", "the source has no caption of the edited image")
    assert ends["5"][:2] == ("rejected", "read")
    assert "edited image of (16, 16)" in ends["5"][2]
    assert [ends[i][0] for i in "123"] == ["ok"] * 3
    assert dict(funnel(run))["rewrite"] == {"ok": 3}

    publish(run, tmp_path / "dataset")
    rows = pq.read_table(tmp_path / "dataset" / "data").to_pylist()
    assert [row["source_id"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert row["direct_instruction"] == "turn the bee into a rabbit"
        assert (row["caption"], row["edited_caption"]) == ("a bee", "a rabbit")
        assert len(row["candidates"]) == 4
        assert row["edit_prompt"] == row["candidates"][row["chosen"]] == max(row["candidates"])
        level = 100 + int(row["source_id"])
        edited = Image.open(io.BytesIO(row["edited_image"]["bytes"]))
        assert edited.getpixel((0, 0)) == (level,) * 3
        assert row["box"] is row["selected"] is row["target"] is None
    page = Path(write_gallery(run)).read_text()
    assert rows[0]["edit_prompt"] in page and "turn the bee into a rabbit" in page


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("pipeline.planner.word=tail", ["rewrite", "select"]),
        ("candidates=3", ["rewrite", "select"]),
        ("selection_orders=3", ["select"]),
        ("filters.0.reject_fraction=0.6", ["rewrite", "select"]),
    ],
)
def test_a_change_recomputes_what_follows_from_it(
    change: str, stages: list[str], tmp_path: Path
) -> None:
    path, out = recipe(tmp_path), tmp_path / "run"
    generate(load_recipe(path), out)
    (out / "journal.jsonl").unlink()
    run = generate(load_recipe(path, [change]), out)
    assert sorted(computed(run)) == [stage for stage in stages for _ in range(3)]


@pytest.mark.usefixtures("pairs")
def test_what_eq1_rejects_is_asked_nobody(tmp_path: Path) -> None:
    run = generate(
        load_recipe(recipe(tmp_path), ["filters.0.reject_fraction=0.8"]), tmp_path / "run"
    )
    assert dict(funnel(run))["rewrite"] == {"ok": 1}


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("shard_size", [1, 100])
def test_shards_change_nothing(shard_size: int, tmp_path: Path) -> None:
    made = []
    for name, overrides in (("a", []), ("b", [f"shard_size={shard_size}"])):
        run = generate(load_recipe(recipe(tmp_path), overrides), tmp_path / name)
        publish(run, tmp_path / f"dataset-{name}")
        made.append((tmp_path / f"dataset-{name}" / "data" / "train-00000.parquet").read_bytes())
    assert made[0] == made[1]


@pytest.mark.usefixtures("pairs")
def test_the_summary_tells_of_position_bias(tmp_path: Path, pairs: Path, shell: Shell) -> None:
    done = shell("generate", recipe(tmp_path), "--out", tmp_path / "run", path=(pairs,))
    assert done.returncode == 0, done.stderr
    assert (
        "P_select, asked in several orders about 3 records: 100% of choices agree (50% at least)"
        in done.stdout
    )
    bias = position_bias(RunFolder(tmp_path / "run"))
    assert bias is not None
    assert (bias.agreement, bias.unanimous, bias.expected) == (1, 1, 0.25)


@pytest.mark.usefixtures("pairs")
def test_a_source_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'fake-source' gives no edited images"):
        load_recipe(recipe(tmp_path), ["source=fake-source"])


@pytest.mark.usefixtures("pairs")
def test_rewritten_and_replaced_samples_make_one_dataset(
    tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    publish(generate(load_recipe(recipe(tmp_path)), tmp_path / "one"), tmp_path / "rewritten")
    publish(generate(load_recipe(write_recipe()), tmp_path / "three"), tmp_path / "replaced")
    code = """if True:
        import datasets, json
        parts = [datasets.load_dataset(part, split="train") for part in ("rewritten", "replaced")]
        both = datasets.concatenate_datasets(parts)
        columns = ("edit_prompt", "direct_instruction", "target", "chosen")
        print(json.dumps([[row[column] for column in columns] for row in both]))
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 3 + 7
    assert [row[2] for row in rows] == [None] * 3 + ["pear"] * 7
    assert all(row[0] for row in rows)
    assert [row[1] is None for row in rows] == [row[3] is None for row in rows]


# -- the stages by themselves ---------------------------------------------------------------------


class Chooser(Planner[Options]):
    """Writes what it is told, and always chooses the same place."""

    name = "chooser"

    def __init__(self, written: Sequence[Rewriting | Problem], place: int = 0) -> None:
        super().__init__(Options())
        self.written = list(written)
        self.place = place
        self.asked: list[SelectRequest] = []

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[Rewriting | Problem]:
        return self.written

    def select(self, requests: Sequence[SelectRequest]) -> list[Choice | Problem]:
        self.asked += requests
        return [Choice(index=self.place) for _ in requests]


def sample(*candidates: str) -> Sample:
    pair = SourcePair(content="", caption="a rabbit", instruction="turn it into a rabbit")
    item = SourceItem(native_id="0", content="", caption="a bee", pair=pair)
    given = Candidates(candidates=tuple(Rewriting(instruction=text) for text in candidates))
    return Sample("id", item, {}, {"caption": Caption(text="a bee"), "rewrite": given})


FAILED = Problem(status="failed", reason="no answer")
REJECTED = Problem(status="rejected", reason="refused")


def test_candidates_that_did_not_come_are_told_of() -> None:
    written = [Rewriting(instruction="one"), FAILED, Rewriting(instruction="two"), REJECTED]
    [result] = rewrite([sample()], Chooser(written), run_seed=0, candidates=4)
    assert isinstance(result, Candidates)
    assert [one.instruction for one in result.candidates] == ["one", "two"]
    assert result.problems == ("no answer", "refused")


@pytest.mark.parametrize(
    ("problems", "told"), [([REJECTED, FAILED], FAILED), ([REJECTED, REJECTED], REJECTED)]
)
def test_without_any_candidate_the_record_ends(problems: list[Problem], told: Problem) -> None:
    assert rewrite([sample()], Chooser(problems), run_seed=0, candidates=2) == [told]


def test_a_single_candidate_is_chosen_unasked() -> None:
    chooser = Chooser([])
    [result] = select([sample("same", "same")], chooser, run_seed=0, selection_orders=2)
    assert result == Selection(chosen=0)
    assert chooser.asked == []


def test_who_always_chooses_the_first_place_is_seen_through() -> None:
    chooser = Chooser([])
    [result] = select([sample("a", "b", "c", "d")], chooser, run_seed=0, selection_orders=4)
    assert isinstance(result, Selection)
    assert result.agreement == 0.25
    assert sorted(result.choices) == [0, 1, 2, 3]


def test_a_choice_of_nothing_shown_fails() -> None:
    [result] = select([sample("a", "b")], Chooser([], place=2), run_seed=0, selection_orders=2)
    assert result == Problem(status="failed", reason="the planner chose option 3 of 2")


@given(
    st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_every_order_shows_each_candidate_once_and_elsewhere(
    texts: list[str], orders: int, seed: int
) -> None:
    chooser = Chooser([])
    [result] = select([sample(*texts)], chooser, run_seed=seed, selection_orders=orders)
    assert isinstance(result, Selection)
    distinct = set(texts)
    assert all(sorted(asked.candidates) == sorted(distinct) for asked in chooser.asked)
    wanted = min(orders, len(distinct)) if len(distinct) > 1 else 0
    assert len(result.orders) == len(chooser.asked) == wanted
    for place in range(len(distinct)):
        shown = [order[place] for order in result.orders]
        assert len(set(shown)) == len(shown)
    assert json.loads(result.model_dump_json())["chosen"] == result.chosen < len(texts)


def asked_seeds(planner: Chooser) -> list[int]:
    return [request.seed for request in planner.asked]


def test_an_order_without_an_answer_counts_against_agreement() -> None:
    class Half(Chooser):
        def select(self, requests: Sequence[SelectRequest]) -> list[Choice | Problem]:
            return [Choice(index=0), FAILED]

    [result] = select([sample("a", "b", "c")], Half([]), run_seed=0, selection_orders=2)
    assert isinstance(result, Selection)
    assert (len(result.orders), result.asked, result.agreement) == (1, 2, 0.5)


def test_each_order_has_a_seed_of_its_own() -> None:
    chooser = Chooser([])
    select([sample("a", "b", "c")], chooser, run_seed=0, selection_orders=3)
    assert len(set(asked_seeds(chooser))) == 3
