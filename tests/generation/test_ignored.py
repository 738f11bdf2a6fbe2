"""What a source ignores, and captions that it lacks, as `generate` and `status` tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from tests.conftest import Distribution, Shell, WriteRecipe


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "navy").save(folder / name, "PNG")
    return folder


def test_ignored_files_are_told_while_planning_and_by_status(
    shell: Shell, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = images(tmp_path / "images", "a.png", "b", ".hidden.png")
    for name in ("notes.txt", "more.txt", "photo.heic"):
        (folder / name).write_text("no image")
    recipe = write_recipe(source={"use": "image-folder", "path": str(folder)})
    lines = [
        "ignored 2: not an image (.txt): more.txt, notes.txt",
        "ignored 1: hidden: .hidden.png",
        "ignored 1: an image in a format that cannot be read (.heic); convert it to PNG or JPEG: "
        "photo.heic",
    ]
    done = shell("generate", recipe, "--out", "run")
    assert done.returncode == 0, done.stderr
    for line in lines:
        assert f"source image-folder: {line}\n" in done.stderr
    assert "the source ignored 4; `reasonpix status run` says what" in done.stdout
    status = shell("status", "run").stdout
    assert [line.strip() for line in status.splitlines() if "ignored" in line] == lines
    again = shell("generate", recipe, "--out", "run")
    assert "ignored" not in again.stderr  # nothing was listed again


def test_a_folder_without_images_says_what_it_holds(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.svg").write_text("<svg/>")
    recipe = load_recipe(
        write_recipe(source={"use": "image-folder", "path": str(tmp_path / "images")})
    )
    with pytest.raises(RunError, match=r"has no images\n  ignored 1: .*\(\.svg\).*: a\.svg$"):
        generate(recipe, tmp_path / "run")


def test_a_run_that_grows_counts_each_file_once(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "a.png", "c.png", "e.png")
    for name in ("b.txt", "d.txt", "f.txt"):
        (folder / name).write_text("no image")
    recipe = load_recipe(write_recipe(source={"use": "image-folder", "path": str(folder)}))
    counts = []
    for limit in (1, 2, float("inf")):
        plan = generate(recipe, tmp_path / "run", limit).plan()
        counts.append((plan.rows, len(plan.ignored)))
    assert counts == [(1, 0), (2, 1), (3, 3)]


def test_files_that_annotations_do_not_name_are_counted(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = images(tmp_path / "images", "a/1.png", "a/2.png", "b/3.png")
    annotations = folder / "val.json"
    listed = {"images": [{"id": 1, "file_name": "a/1.png"}], "note": "é"}
    annotations.write_bytes(json.dumps(listed, ensure_ascii=False).encode("utf-16"))
    source = {"use": "v3det", "annotations": str(annotations), "images": str(folder)}
    run = generate(load_recipe(write_recipe(source=source)), tmp_path / "run")
    assert list(run.plan().ignored.lines()) == [
        "ignored 2: a file that val.json does not name: a/2.png, b/3.png",
        "ignored 1: a column that is not read: note",
    ]


def test_prompts_in_utf_16_are_read_and_other_files_are_counted(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = images(tmp_path / "data", "1/7_0.jpg", "1/7_1.jpg", "1/8_0.jpg", "2/9_0.jpg")
    texts = {"input": "a bee", "edit": "make it a cat", "output": "a cat", "url": "x"}
    prompt = json.dumps(texts)
    (folder / "1/prompt.json").write_bytes(prompt.encode("utf-16"))
    (folder / "seeds.json").write_bytes('[["1", [7]]]'.encode("utf-8-sig"))
    recipe = write_recipe(
        part="rewrite",
        source={"use": "instruct-pix2pix", "path": str(folder), "pairs": True},
    )
    run = generate(load_recipe(recipe), tmp_path / "run")
    assert run.plan().rows == 1
    assert list(run.plan().ignored.lines()) == [
        "ignored 2: a file that seeds.json does not name: 1/8_0.jpg, 2/9_0.jpg",
        "ignored 1: a column that is not read: url",
    ]


# -- Captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "part", "why"),
    [
        (
            {"use": "hf-dataset", "path": "x", "edited_image": "b", "instruction": "c"},
            "rewrite",
            "'hf-dataset' gives pairs without captions, and `part: rewrite` needs those of both",
        ),
        (
            {"use": "hf-dataset", "path": "x", "edited_image": "b", "instruction": "c",
             "caption": "d"},
            "rewrite",
            "'hf-dataset' gives pairs without captions, and `part: rewrite` needs those of both",
        ),
        ({"use": "hf-dataset", "path": "x"}, "replace", "gives no captions, .*add `captioner:`"),
        ({"use": "image-folder", "path": "x"}, "replace", "gives no captions, .*add `captioner:`"),
        (
            {"use": "v3det", "annotations": "x", "images": "y"},
            "replace",
            "gives no captions, .*add `captioner:`",
        ),
    ],
)  # fmt: skip
def test_a_source_that_cannot_give_captions_is_a_mistake_of_the_recipe(
    source: dict[str, str], part: str, why: str, write_recipe: WriteRecipe
) -> None:
    path = write_recipe(part=part, source=source, captioner=None)
    with pytest.raises(RecipeError, match=why) as raised:
        load_recipe(path)
    assert f"{path}:2:1: source: " in str(raised.value)


SILENT = """
from reasonpix.plugin import Options, Source, SourceItem, SourcePair, hookimpl

class Silent(Source):
    "Pairs without captions."
    name = "silent"
    gives_pairs = True

    def items(self):
        for number in range(3):
            pair = SourcePair(content="1", instruction="make it red", caption={caption!r})
            yield SourceItem(native_id=str(number), content="0", pair=pair)

    def read(self, native_id):
        raise AssertionError("nothing is computed")

@hookimpl
def sources():
    return [Silent]
"""


@pytest.mark.parametrize("caption", [None, "a red bee"])
def test_pairs_that_lack_captions_stop_the_run_before_it_begins(
    caption: str | None, distribution: Distribution, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    distribution(
        "silent", {"silent": "silent"}, silent=SILENT.replace("{caption!r}", repr(caption))
    )
    recipe = load_recipe(write_recipe(part="rewrite", source="silent"))
    with pytest.raises(RunError, match="none of 3 pairs has captions of both images"):
        generate(recipe, tmp_path / "run")
    assert not RunFolder(tmp_path / "run").is_planned


def test_a_source_without_captions_needs_a_captioner(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = {"use": "fake-source", "count": 2, "caption": None}
    recipe = load_recipe(write_recipe(source=source, captioner=None))
    with pytest.raises(RunError, match="none of 2 images has a caption; add `captioner:`"):
        generate(recipe, tmp_path / "run")
    assert generate(load_recipe(write_recipe(source=source)), tmp_path / "run").plan().rows == 2
