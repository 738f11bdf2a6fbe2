from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from reasonpix.core.images import decode
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import Ending, StageEntry, read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import Shard
from reasonpix.inspection.gallery import write_gallery
from reasonpix.inspection.lineage import trace_record
from reasonpix.inspection.reasons import Tally
from reasonpix.llm.ledger import Ledger, Settlement
from reasonpix.llm.requests import Request
from reasonpix.llm.types import Completion, Conversation
from tests.conftest import WriteRecipe

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = """a <script>alert("x")</script> and a "quote' &amp; </div><img src=//evil.example>"""


class Page(HTMLParser):
    """Collects elements, and checks that every one is closed in turn."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_record_is_shown_with_its_images(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    filters = ["no-op", {"use": "eq1", "reject_fraction": 0.3}]
    run = generate(load_recipe(write_recipe(filters=filters)), tmp_path / "run")
    path = write_gallery(run)
    assert path == str(tmp_path / "run" / "gallery.html")
    page = Page(path)
    ended = list(read_outcomes(run))
    ids = [o.sample.record_id for o in ended]
    accepted = [o.sample.record_id for o in ended if o.status == "ok"]
    shown = [article["id"] for article in page.all("article")]
    assert shown == [*accepted, *(i for i in ids if i not in accepted)]
    assert len(accepted) == 5 and len(ids) == 7
    text = "".join(page.text)
    assert "7 records, 5 accepted" in text
    assert "rejected at score-eq1: distance" in text

    sources = [str(image["src"]) for image in page.all("img")]
    assert len(sources) == 2 * 7
    first = decode(base64.b64decode(sources[0].removeprefix("data:image/png;base64,")))
    assert first.tobytes() == ended[0 if accepted[0] == ids[0] else 2].sample.image().tobytes()
    boxes = [div for div in page.all("div") if "box" in str(div.get("class")).split()]
    assert len(boxes) == 2 * 7  # bee and rabbit
    assert boxes[0]["style"] == "left:25.00%;top:25.00%;width:50.00%;height:50.00%"
    assert boxes[0]["class"] == "box selected" and boxes[1]["class"] == "box"


def test_hostile_words_stay_words(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    captioner = {"use": "fake-captioner", "caption": HOSTILE}
    planner = {"use": "fake-planner", "target": HOSTILE}
    path = write_recipe(captioner=captioner, planner=planner)
    run = generate(load_recipe(path), tmp_path / "run")
    path = write_gallery(run)
    page = Page(path)
    text = Path(path).read_text(encoding="utf-8")
    assert page.all("script") == [{"type": "application/json", "id": "index"}, {}]
    assert "<script>alert" not in text and "<img src=//" not in text
    assert {str(image["src"])[:22] for image in page.all("img")} == {"data:image/png;base64,"}
    assert f"input: {HOSTILE}" in [image["alt"] for image in page.all("img")]
    assert HOSTILE in "".join(page.text)


def test_the_page_needs_no_network(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    page = write_gallery(generate(load_recipe(write_recipe()), tmp_path / "run"))
    text = Path(page).read_text(encoding="utf-8")
    without_images = re.sub(r'base64,[^"]+', "", text)
    assert not re.search(r"//[a-z]|@import|url[(]", without_images)
    assert not Page(page).all("link")
    assert not [script for script in Page(page).all("script") if "src" in script]


def test_the_limit_bounds_the_pairs_and_not_the_counts(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(filters=[{"use": "eq1", "reject_fraction": 0.3}])
    run = generate(load_recipe(path), tmp_path / "run")
    page = Page(write_gallery(run, limit=1))
    assert len(page.all("article")) == 2  # an accepted one and another
    assert "7 records, 5 accepted" in "".join(page.text)


@pytest.mark.usefixtures("trial")
def test_records_that_ended_early_are_shown_too(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20), "navy").save(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    path = write_recipe(source={"use": "image-folder", "path": str(folder)})
    changes = ["pipeline.captioner.caption=a ghost", "pipeline.grounder=trial-grounder"]
    run = generate(load_recipe(path, changes), tmp_path / "run")
    page = Page(write_gallery(run))
    text = "".join(page.text)
    assert "rejected at ground: no box found for ghost" in text
    assert "failed at read: b.png: the file is empty" in text
    assert "2 records, 0 accepted" in text
    assert len(page.all("img")) == 1
    (folder / "a.png").unlink()
    assert len(Page(write_gallery(run)).all("img")) == 0


def test_what_cannot_be_shown_is_said(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (20, 20), "navy").save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no image")
    path = write_recipe(source={"use": "image-folder", "path": str(folder)})
    run = generate(load_recipe(path), tmp_path / "run")
    (folder / "a.png").unlink()
    (folder / "b.png").write_bytes(b"torn")
    Image.new("RGB", (20, 20), "pink").save(folder / "c.png")
    text = "".join(Page(write_gallery(run)).text)
    assert "not shown: input image: " in text and "No such file" in text
    assert text.count("not shown: input image: the file changed since the run was planned") == 2
    assert "The source ignored 1" in text and "notes.txt" in text


@pytest.mark.usefixtures("trial")
def test_reasons_are_counted_by_their_kind_and_each_is_shown(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    captions = ["a bee", "a fox", "torn", "unlisted", "torn", "nobody", "nothing"]
    ghosts = [f"a ghost and a giant{n}" for n in range(3)]
    path = write_recipe(
        source={"use": "trial-source", "captions": [*captions, *["a ghost"] * 5, *ghosts]},
        captioner=None,
        extractor="trial-extractor",
        grounder="trial-grounder",
        filters=[{"use": "eq1", "value": 9.0}],
    )
    run = generate(load_recipe(path), tmp_path / "run")
    page = Page(write_gallery(run, limit=6))
    text = " ".join("".join(page.text).split())
    for words in (
        "source failed 1 1 source declined",
        "read failed 2 2 not an image",
        "extract rejected 2 1 no entity in …",
        "ground rejected 5 1 no box found for ghost",
        "score-eq1 rejected 5 1 distance … < τ 9.0",
        "ground: no box found for ghost (1)",
        "9 records not shown here (9 rejected or failed)",
    ):
        assert re.sub(r"\s", "", words) in re.sub(r"\s", "", text), words
    # Six places, five kinds of reasons: each has one, and the first of the next round a second.
    assert len(page.all("article")) == 6
    ended = {o.sample.record_id: o.stage for o in read_outcomes(run)}
    shown = [ended[str(article["id"])] for article in page.all("article")]
    assert sorted(set(shown)) == ["extract", "ground", "read", "score-eq1", "source"]


def bars(page: Page) -> list[list[str]]:
    """The widths of the parts of each bar."""
    styles = [str(span.get("style")) for span in page.all("span") if "width" in str(span)]
    widths = [style.removeprefix("width:") for style in styles]
    return [widths[i : i + 3] for i in range(0, len(widths), 3)]


def test_the_funnel_is_drawn(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    filters = [{"use": "eq1", "reject_fraction": 0.5}, "no-op"]
    recipe = write_recipe(source={"use": "fake-source", "count": 8}, filters=filters)
    page = Page(write_gallery(generate(load_recipe(recipe), tmp_path / "run")))
    whole, half = ["100.00%", "0.00%", "0.00%"], ["50.00%", "50.00%", "0.00%"]
    assert bars(page) == [whole] * 7 + [half, ["50.00%", "0.00%", "0.00%"]]


def test_many_reasons_of_a_stage_are_told_together() -> None:
    shard = Shard("000000", 1)
    entry = StageEntry("ground", "ground-0", {"use": "x"}, {})
    tally = Tally([entry], limit=4)
    for number in range(1000):
        category = "abcdefghij"[number % 10] * (1 + number // 10)
        reason = f"no box found for {category}"
        tally.add(Ending(shard, str(number), "rejected", "ground", reason))
    tally.add(Ending(shard, "x", "failed", "ground", "ValueError: stumbled"))
    told = [(reason.kind, reason.count) for reason in tally.reasons()]
    assert told == [("no box found for …", 1000), ("ValueError: stumbled", 1)]
    assert len(tally.shown()) == 4
    assert tally.funnel()[-1] == {"stage": "ground", "ok": 0, "rejected": 1000, "failed": 1}


@pytest.mark.parametrize(
    ("reasons", "kind"),
    [
        (["airplane, donut, bee", "ghost", "owl, cup"], "no box found for …"),
        (["ghost", "ghost"], "no box found for ghost"),
        (["a, b", "c, d"], "no box found for …"),
    ],
)
def test_what_a_reason_names_does_not_make_it_another(reasons: list[str], kind: str) -> None:
    tally = tallied(*(f"no box found for {names}" for names in reasons))
    assert [(it.kind, it.count) for it in tally.reasons()] == [(kind, len(reasons))]


def test_an_options_value_stays_and_what_was_measured_does_not() -> None:
    tally = tallied(*(f"distance 0.0{n}12{n} is among the lowest 30%" for n in range(1, 5)))
    assert [it.kind for it in tally.reasons()] == ["distance … is among the lowest 30%"]
    tally = tallied("3.1% of the box changed", "0.0% of the box changed", "not an image", "empty")
    told = {it.kind: it.count for it in tally.reasons()}
    assert told == {"…% of the box changed": 2, "not an image": 1, "empty": 1}
    tally = tallied("no entity in 'a b'", 'no entity in "it\'s, c"', "no entity in 'd'")
    assert [(it.kind, it.count) for it in tally.reasons()] == [("no entity in …", 3)]


def tallied(*reasons: str) -> Tally:
    tally = Tally([StageEntry("ground", "ground-0", {"use": "x"}, {})], limit=4)
    for number, reason in enumerate(reasons):
        tally.add(Ending(Shard("000000", 9), str(number), "rejected", "ground", reason))
    return tally


@pytest.mark.usefixtures("trial")
def test_a_run_that_was_completed_has_its_page(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    captions = ["a bee", "a raises-in-planner", "a bee"]
    path = write_recipe(
        source={"use": "trial-source", "captions": captions},
        captioner=None,
        extractor="trial-extractor",
        grounder="trial-grounder",
        planner="trial-planner",
    )
    run = generate(load_recipe(path), tmp_path / "run")
    generate(load_recipe(path), tmp_path / "run", retry_failed=True)
    assert any(line.get("reopened") for line in run.journal())
    assert "3 records, 2 accepted" in "".join(Page(write_gallery(run)).text)


def test_a_run_of_part_one_that_grew_has_its_page(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = {"use": "fake-source", "count": 9, "caption": "a bee", "instruction": "add a hole",
              "edited_caption": "a bee with a hole"}  # fmt: skip
    filters = [{"use": "eq1", "reject_fraction": 0.3}]
    recipe = load_recipe(write_recipe(source=source, filters=filters, shard_size=2, part="rewrite"))
    generate(recipe, tmp_path / "run", limit=5)
    run = generate(recipe, tmp_path / "run", limit=9)
    assert any(line.get("reopened") for line in run.journal())
    text = "".join(Page(write_gallery(run)).text)
    assert "9 records, 7 accepted" in text
    told = trace_record(run, "0")
    assert all(step.seconds is not None for step in told.steps if step.status != "not reached")
    # As when the process is killed between a commit and its line.
    run.note(stage=told.steps[0].folder, shard=told.shard, reopened=True)
    assert [step.seconds is None for step in trace_record(run, "0").steps][:2] == [True, False]


def test_photographs_are_shown_smaller(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.effect_noise((900, 600), 60).convert("RGB").save(folder / "a.png")
    recipe = write_recipe(source={"use": "image-folder", "path": str(folder)})
    path = write_gallery(generate(load_recipe(recipe), tmp_path / "run"))
    sources = [str(image["src"]) for image in Page(path).all("img")]
    assert len(sources) == 2
    for source in sources:
        data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        assert decode(data).size == (256, 171)
    assert Path(path).stat().st_size < (folder / "a.png").stat().st_size


def test_cost_is_told_by_what_was_asked(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = generate(load_recipe(write_recipe()), tmp_path / "run")
    assert "language model" not in "".join(Page(write_gallery(run)).text)
    conversation = Conversation(messages=(), answer_schema={}, seed=0)
    with Ledger(tmp_path / "run" / "llm.sqlite") as ledger:
        calls = [Request(verb, f"{n:064x}", conversation) for n, verb in enumerate(["rewrite"] * 3)]
        sent = ledger.send([*calls, Request("select", "f" * 64, conversation, 0.7)], {})
        answer = Completion(text="", prompt_tokens=100, completion_tokens=5)
        ledger.settle([Settlement(it, answer, cost=0.25) for it in sent[:3]])
        ledger.settle([Settlement(sent[3], may_be_charged=True)])
    text = " ".join("|".join(Page(write_gallery(run)).text).split())
    assert "rewrite|3|300|15|0.7500|0.107143" in re.sub(r"\|\s*\|?", "|", text)
    assert "select|0|0|0|0.7000|0.100000" in re.sub(r"\|\s*\|?", "|", text)
    assert "1 lost call may have been charged; they are counted as 0.7" in text
