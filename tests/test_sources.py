from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe
from PIL import Image

from reasonpix.engine import generate
from reasonpix.errors import SourceError
from reasonpix.plugins import find
from reasonpix.publish import publish
from reasonpix.recipe import load_recipe
from reasonpix.records import Problem
from reasonpix.slots import Source, SourceItem


def source(name: str, **options: object) -> Source[Any]:
    cls = find("source", name)
    made = cls(cls.Options.model_validate(options))
    assert isinstance(made, Source)
    made.load()
    return made


def image(path: Path, colour: str = "navy") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path.read_bytes()


def refused(name: str, **options: object) -> str:
    with pytest.raises(SourceError) as raised:
        list(source(name, **options).items())
    return str(raised.value)


# -- image-folder --------------------------------------------------------------------------------


def test_a_folder_is_listed_by_name_with_its_subfolders(tmp_path: Path) -> None:
    data = {name: image(tmp_path / name) for name in ("b.png", "a/c.JPG", "d.webp", "a/b.tiff")}
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    items = list(source("image-folder", path=tmp_path).items())
    assert items == [
        SourceItem(native_id=name, content=hashlib.sha256(data[name]).hexdigest())
        for name in ("a/b.tiff", "a/c.JPG", "b.png", "d.webp")
    ]
    assert source("image-folder", path=tmp_path).read("a/c.JPG") == data["a/c.JPG"]


def test_a_file_that_cannot_be_read_is_a_problem_of_its_own(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere.png")
    first, second = source("image-folder", path=tmp_path).items()
    assert isinstance(first, SourceItem)
    reason = "b.png: No such file or directory"
    assert second == ("b.png", Problem(status="failed", reason=reason))


def test_no_such_folder(tmp_path: Path) -> None:
    assert refused("image-folder", path=tmp_path / "x") == f"path: no folder '{tmp_path}/x'"


# -- v3det ---------------------------------------------------------------------------------------


def v3det(folder: Path, content: object) -> dict[str, Path]:
    annotations = folder / "v3det_2023_v1_train.json"
    text = content if isinstance(content, str) else json.dumps(content)
    annotations.write_text(text)
    return {"annotations": annotations, "images": folder}


def test_v3det_is_listed_by_id(tmp_path: Path) -> None:
    image(tmp_path / "images" / "n1" / "a.jpg")
    image(tmp_path / "images" / "n2" / "b.jpg", "pink")
    rows = [
        {"id": 7, "file_name": "images/n1/a.jpg", "width": 8, "height": 8},
        {"id": 3, "file_name": "images/n2/b.jpg"},
        {"id": 9, "file_name": "images/n3/gone.jpg"},
    ]
    options = v3det(tmp_path, {"images": rows, "annotations": [], "categories": []})
    first, second, third = source("v3det", **options).items()
    assert isinstance(first, SourceItem) and isinstance(second, SourceItem)
    assert [first.native_id, second.native_id] == ["images/n2/b.jpg", "images/n1/a.jpg"]
    assert isinstance(third, tuple) and third[0] == "images/n3/gone.jpg"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "cannot be read: Expecting"),
        ({"annotations": []}, "KeyError('images')"),
        ([], "TypeError("),
        ({"images": [{"id": 1}]}, "KeyError('file_name')"),
        ({"images": [{"id": 1, "file_name": 5}]}, "TypeError("),
    ],
)
def test_v3det_layout(content: object, what: str, tmp_path: Path) -> None:
    message = refused("v3det", **v3det(tmp_path, content))
    assert message.startswith(f"{tmp_path / 'v3det_2023_v1_train.json'}: ")
    assert '{"images": [{"id": …, "file_name": …}, …]}' in message
    assert what in message


def test_v3det_without_its_file_or_folder(tmp_path: Path) -> None:
    gone = tmp_path / "none.json"
    message = refused("v3det", annotations=gone, images=tmp_path)
    assert message.startswith(f"{gone}: no such file; expected ")
    options = v3det(tmp_path, {"images": [{"id": 1, "file_name": "a.jpg"}]})
    options["images"] = tmp_path / "none"
    assert refused("v3det", **options) == f"images: no folder '{tmp_path}/none'"


# -- instruct-pix2pix ----------------------------------------------------------------------------


def instruct_pix2pix(folder: Path, prompts: dict[str, object], seeds: object = None) -> Path:
    for name, prompt in prompts.items():
        for seed in ("11", "22"):
            image(folder / name / f"{seed}_0.jpg")
            image(folder / name / f"{seed}_1.jpg", "pink")
        (folder / name / "prompt.json").write_text(json.dumps(prompt))
    listed = [[name, ["11", 22]] for name in prompts] if seeds is None else seeds
    (folder / "seeds.json").write_text(json.dumps(listed))
    return folder


def test_instruct_pix2pix_gives_input_images_with_captions(tmp_path: Path) -> None:
    path = instruct_pix2pix(
        tmp_path,
        {
            "0002": {"input": "a bee", "edit": "make it a cat", "output": "a cat"},
            "0001": {"caption": "a dog", "edit": "make it a cat", "output": "a cat"},
        },
    )
    items = list(source("instruct-pix2pix", path=path).items())
    assert [(item.native_id, item.caption) for item in items if isinstance(item, SourceItem)] == [
        ("0002/11_0.jpg", "a bee"),
        ("0002/22_0.jpg", "a bee"),
        ("0001/11_0.jpg", "a dog"),
        ("0001/22_0.jpg", "a dog"),
    ]


@pytest.mark.parametrize("seeds", [{"0001": 1}, [["0001", 5]], [["0001"]], 7])
def test_instruct_pix2pix_seeds(seeds: object, tmp_path: Path) -> None:
    path = instruct_pix2pix(tmp_path, {"0001": {"input": "a bee"}}, seeds)
    message = refused("instruct-pix2pix", path=path)
    assert message.startswith(
        f"{path / 'seeds.json'}: expected seeds.json as [[dir, [seed, …]], …]"
    )


@pytest.mark.parametrize("prompt", [[], {"edit": "x"}, {"input": 5}, "a bee", {"input": ""}])
def test_instruct_pix2pix_prompts(prompt: object, tmp_path: Path) -> None:
    path = instruct_pix2pix(tmp_path, {"0001": prompt})
    message = refused("instruct-pix2pix", path=path)
    assert message.startswith(f"{path / '0001' / 'prompt.json'}: expected ")
    assert '"input"' in message


def test_instruct_pix2pix_that_is_something_else(tmp_path: Path) -> None:
    message = refused("instruct-pix2pix", path=tmp_path)
    assert message.startswith(f"{tmp_path / 'seeds.json'}: no such file; expected seeds.json as ")


# -- hf-dataset ----------------------------------------------------------------------------------


HF = """if True:
    import json, sys
    from pathlib import Path
    from reasonpix.errors import SourceError
    from reasonpix.images import decode
    from reasonpix.plugins import find

    for options in json.loads(sys.argv[1]):
        cls = find("source", "hf-dataset")
        made = cls(cls.Options.model_validate(options))
        try:
            made.load()
            rows = [
                [item.native_id, item.caption, decode(made.read(item.native_id)).getpixel((0, 0))]
                if not isinstance(item, tuple) else [item[0], item[1].reason, None]
                for item in made.items()
            ]
        except SourceError as error:
            rows = str(error)
        print(json.dumps(rows))
"""


def hf(tmp_path: Path, *options: dict[str, object]) -> list[Any]:
    """What `hf-dataset` gives, in a process of its own: datasets is heavy, and caches."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HF, json.dumps(options)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hf_dataset_reads_what_we_publish_and_what_is_saved(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    run = generate(
        load_recipe(write_recipe(source={"use": "fake-source", "count": 3})), tmp_path / "run"
    )
    publish(run, tmp_path / "dataset")
    make = """if True:
        import datasets
        from PIL import Image
        images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")] + [None]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": images, "text": ["one", "two", "three"]}
        data = datasets.Dataset.from_dict(rows, features=features)
        data.save_to_disk("saved")
        datasets.DatasetDict({"validation": data}).save_to_disk("splits")
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", make], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    parquet = {"path": "dataset", "image": "input_image", "caption": "caption"}
    got = hf(
        tmp_path,
        parquet,
        {**parquet, "image": "edited_image", "caption": None},
        {"path": "saved", "caption": "text"},
        {"path": "splits", "split": "validation"},
        {**parquet, "split": "test"},
        {**parquet, "image": "picture"},
        {"path": "saved", "caption": "title"},
        {"path": "splits", "split": "test"},
        {"path": "./nowhere"},
        {"path": "saved", "image": "text"},
    )
    shown = "a bee and a rabbit"
    assert got[0] == [[str(i), shown, [60 + i, 120, 200]] for i in range(3)]
    assert [row[1] for row in got[1]] == [None] * 3
    saved = [["0", "one", [255, 0, 0]], ["1", "two", [0, 255, 0]], ["2", "row 2: no image", None]]
    assert got[2] == saved
    assert [row[0] for row in got[3]] == ["0", "1", "2"]
    assert got[4].startswith("path: cannot open dataset 'dataset': ")
    columns = "input_image, edit_prompt, edited_image, "
    assert got[5].startswith(f"'dataset' has no column 'picture'; it has {columns}")
    assert got[6] == "'saved' has no column 'title'; it has image, text"
    assert got[7].startswith("path: cannot open dataset 'splits': ")
    assert got[8].startswith("path: cannot open dataset './nowhere': ")
    # Strings are taken for file names; here there are no such files.
    assert got[9][0][1].startswith("row 0: ")
