from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import WriteRecipe
from PIL import Image

from reasonpix.engine import generate
from reasonpix.gallery import gallery
from reasonpix.images import decode
from reasonpix.outcomes import outcomes
from reasonpix.recipe import load_recipe

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
    filters = ["no-op", {"use": "eq1", "rank": 0.3}]
    run = generate(load_recipe(write_recipe(filters=filters)), tmp_path / "run")
    path = gallery(run)
    assert path == str(tmp_path / "run" / "gallery.html")
    page = Page(path)
    ended = list(outcomes(run))
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
    page = Page(gallery(run))
    assert page.all("script") == []
    assert {str(image["src"])[:22] for image in page.all("img")} == {"data:image/png;base64,"}
    assert f"input: {HOSTILE}" in [image["alt"] for image in page.all("img")]
    assert HOSTILE in "".join(page.text)


def test_the_page_needs_no_network(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    page = gallery(generate(load_recipe(write_recipe()), tmp_path / "run"))
    text = Path(page).read_text(encoding="utf-8")
    without_images = re.sub(r'base64,[^"]+', "", text)
    assert not re.search(r"//[a-z]|@import|url[(]", without_images)
    assert not Page(page).all("link") and not Page(page).all("script")


def test_the_limit_bounds_the_pairs_and_not_the_counts(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(filters=[{"use": "eq1", "rank": 0.3}])
    run = generate(load_recipe(path), tmp_path / "run")
    page = Page(gallery(run, limit=1))
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
    page = Page(gallery(run))
    text = "".join(page.text)
    assert "rejected at ground: no box found for ghost" in text
    assert "failed at read: b.png: the file is empty" in text
    assert "2 records, 0 accepted" in text and "None." in text
    assert len(page.all("img")) == 1
    (folder / "a.png").unlink()
    assert len(Page(gallery(run)).all("img")) == 0
