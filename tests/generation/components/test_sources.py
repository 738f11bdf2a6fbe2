from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from reasonpix.core.files.ignored import Ignored
from reasonpix.core.images import FORMATS, decode
from reasonpix.datasets.publishing import publish
from reasonpix.errors import SourceError
from reasonpix.generation.components.instruct_pix2pix import InstructPix2Pix
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.plugin.components import Source, SourceItem, SourcePair
from reasonpix.plugin.registry import find
from reasonpix.plugin.testing import SourceContract
from reasonpix.plugin.types import Problem
from tests.conftest import WriteRecipe


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
    *items, ignored = source("image-folder", path=tmp_path).items()
    assert items == [
        SourceItem(native_id=name, content=hashlib.sha256(data[name]).hexdigest())
        for name in ("a/b.tiff", "a/c.JPG", "b.png", "d.webp")
    ]
    assert ignored == Ignored("notes.txt", "not an image (.txt)")
    assert source("image-folder", path=tmp_path).read("a/c.JPG") == data["a/c.JPG"]


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "navy").save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_the_content_decides_what_is_an_image(format: str, tmp_path: Path) -> None:
    known = [suffix for suffix, name in Image.registered_extensions().items() if name == format]
    names = {"photo", "photo.dat", "photo.jpg.part", "photo.", "photo.heic", "photo.txt"}
    names |= {f"photo{suffix}" for suffix in known} | {f"photo{suffix.upper()}" for suffix in known}
    for name in names:
        (tmp_path / name).write_bytes(encoded(format))
    items = list(source("image-folder", path=tmp_path).items())
    assert {item.native_id for item in items if isinstance(item, SourceItem)} == names
    assert len(items) == len(names)
    for item in items:
        assert isinstance(item, SourceItem)
        decode((tmp_path / item.native_id).read_bytes())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic", "an image in a format that cannot be read (.heic); "),
        ("a.SVG", b"<svg/>", "an image in a format that cannot be read (.svg); "),
        ("a.jp2", encoded("JPEG2000"), "an image in a format that cannot be read (.jp2); "),
        ("a.ico", encoded("ICO"), "an image in a format that cannot be read (.ico); "),
        # Raw photographs are TIFF files whose first image is a preview.
        ("a.dng", encoded("TIFF"), "an image in a format that cannot be read (.dng); "),
        ("a.NEF", encoded("TIFF"), "an image in a format that cannot be read (.nef); "),
        ("a", b"", "an empty file"),
        ("notes.txt", b"", "an empty file"),
        ("notes.md", b"Python is a snake", "not an image (.md)"),
        ("notes", b"P6 is a road", "not an image (no suffix)"),
        ("BMW", b"BMW is a car", "not an image (no suffix)"),
        (".a.png", encoded("PNG"), "hidden"),
        ("._a.png", encoded("PNG"), "metadata of macOS"),
        ("Thumbs.db", b"\xd0\xcf", "a file of the operating system"),
    ],
)
def test_what_is_no_image_is_named_with_the_reason(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    [ignored] = source("image-folder", path=tmp_path).items()
    assert isinstance(ignored, Ignored)
    assert ignored.name == name
    assert ignored.reason.startswith(reason)


def test_a_broken_link_and_a_pipe_without_an_images_name_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("nowhere")
    os.mkfifo(tmp_path / "b")
    assert list(source("image-folder", path=tmp_path).items()) == [
        Ignored("a", "a broken link"),
        Ignored("b", "not a regular file"),
    ]


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
    first, second, third, *ignored = source("v3det", **options).items()
    assert isinstance(first, SourceItem) and isinstance(second, SourceItem)
    assert [first.native_id, second.native_id] == ["images/n2/b.jpg", "images/n1/a.jpg"]
    assert isinstance(third, tuple) and third[0] == "images/n3/gone.jpg"
    keys = ("annotations", "categories")
    assert ignored == [Ignored(key, "a column that is not read") for key in keys]


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


BEE = {"input": "a bee", "edit": "make it a cat", "output": "a cat"}


class TestInstructPix2PixContract(SourceContract):
    component = InstructPix2Pix

    @pytest.fixture(autouse=True)
    def pairs(self, tmp_path: Path) -> None:
        path = instruct_pix2pix(tmp_path, {"1": BEE})
        self.subject = source("instruct-pix2pix", path=path, pairs=True)


def test_instruct_pix2pix_gives_input_images_with_captions(tmp_path: Path) -> None:
    path = instruct_pix2pix(
        tmp_path,
        {
            "0002": {"input": "a bee", "edit": "make it a cat", "output": "a cat"},
            "0001": {"caption": "a dog", "edit": "make it a cat", "output": "a cat"},
        },
    )
    made = source("instruct-pix2pix", path=path)
    items = list(made.items())
    assert not made.gives_pairs
    assert all(item.pair is None for item in items if isinstance(item, SourceItem))
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


def test_instruct_pix2pix_gives_pairs(tmp_path: Path) -> None:
    older = {"caption": "a dog", "edit": "make it red", "output": "a red dog"}
    path = instruct_pix2pix(tmp_path, {"0002": BEE, "0001": older})
    (path / "0001" / "22_1.jpg").write_bytes(b"an image of its own")
    made = source("instruct-pix2pix", path=path, pairs=True)
    assert made.gives_pairs
    data = {name: (path / name).read_bytes() for name in ("0002/11_1.jpg", "0001/22_1.jpg")}
    sha = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    first, second, third, fourth = made.items()
    assert (first, fourth) == (
        SourceItem(
            native_id="0002/11_0.jpg",
            content=hashlib.sha256((path / "0002/11_0.jpg").read_bytes()).hexdigest(),
            caption="a bee",
            pair=SourcePair(
                content=sha["0002/11_1.jpg"], caption="a cat", instruction="make it a cat"
            ),
        ),
        SourceItem(
            native_id="0001/22_0.jpg",
            content=hashlib.sha256((path / "0001/22_0.jpg").read_bytes()).hexdigest(),
            caption="a dog",
            pair=SourcePair(
                content=sha["0001/22_1.jpg"], caption="a red dog", instruction="make it red"
            ),
        ),
    )
    assert made.read_edited("0001/22_0.jpg") == b"an image of its own"
    # Part II knows the same images by the same names.
    inputs = list(source("instruct-pix2pix", path=path).items())
    assert inputs == [
        item.model_copy(update={"pair": None})
        for item in (first, second, third, fourth)
        if isinstance(item, SourceItem)
    ]


def test_a_pair_without_its_edited_image_is_a_problem_of_its_own(tmp_path: Path) -> None:
    path = instruct_pix2pix(tmp_path, {"1": BEE, "2": BEE})
    (path / "1" / "22_1.jpg").unlink()
    (path / "2" / "11_0.jpg").unlink()
    (path / "2" / "22_1.jpg").unlink()
    (path / "2" / "22_1.jpg").mkdir()
    first, *problems = source("instruct-pix2pix", path=path, pairs=True).items()
    assert isinstance(first, SourceItem)
    assert problems == [
        ("1/22_0.jpg", failed("1/22_1.jpg: No such file or directory")),
        ("2/11_0.jpg", failed("2/11_0.jpg: No such file or directory")),
        ("2/22_0.jpg", failed("2/22_1.jpg: Is a directory")),
    ]


def failed(reason: str) -> Problem:
    return Problem(status="failed", reason=reason)


CAPTION = '"input" (or "caption")'


@pytest.mark.parametrize(
    ("prompt", "pairs", "missing"),
    [
        ([], False, CAPTION),
        ({"edit": "x"}, False, CAPTION),
        ({"input": 5}, False, CAPTION),
        ("a bee", False, CAPTION),
        ({"input": ""}, False, CAPTION),
        ({**BEE, "input": " "}, True, CAPTION),
        ({"input": "a bee", "output": "a cat"}, True, '"edit"'),
        ({**BEE, "edit": None}, True, '"edit"'),
        ({**BEE, "output": ["a cat"]}, True, '"output"'),
        ({**BEE, "output": "half a \ud83d character"}, True, '"output"'),
        ({"input": "a bee"}, True, '"edit" and "output"'),
    ],
)
def test_a_prompt_without_its_words_fails_its_images_alone(
    prompt: object, pairs: bool, missing: str, tmp_path: Path
) -> None:
    path = instruct_pix2pix(tmp_path, {"1": BEE, "2": prompt, "3": BEE})
    items = list(source("instruct-pix2pix", path=path, pairs=pairs).items())
    names = [item.native_id for item in items if isinstance(item, SourceItem)]
    assert names == ["1/11_0.jpg", "1/22_0.jpg", "3/11_0.jpg", "3/22_0.jpg"]
    problem = failed(f"2/prompt.json: has no text for {missing}")
    assert items[2:4] == [("2/11_0.jpg", problem), ("2/22_0.jpg", problem)]


def test_prompts_need_their_words_only_where_they_are_given(tmp_path: Path) -> None:
    path = instruct_pix2pix(tmp_path, {"1": {"input": "a bee", "edit": 7}})
    assert all(
        isinstance(item, SourceItem) for item in source("instruct-pix2pix", path=path).items()
    )


def test_a_prompt_that_cannot_be_read_fails_its_images_alone(tmp_path: Path) -> None:
    path = instruct_pix2pix(tmp_path, {"1": BEE, "2": BEE, "3": BEE, "4": BEE})
    (path / "1" / "prompt.json").unlink()
    (path / "2" / "prompt.json").write_text('{"input": ')
    (path / "3" / "prompt.json").write_bytes(b'{"input": "caf\xe9"}')
    items = list(source("instruct-pix2pix", path=path, pairs=True).items())
    reasons = [item[1].reason if isinstance(item, tuple) else "" for item in items[::2]]
    assert reasons[0] == "1/prompt.json: No such file or directory"
    assert reasons[1].startswith("2/prompt.json: cannot be read: Expecting value")
    assert reasons[2].startswith("3/prompt.json: cannot be read: line 1 is not UTF-8")
    assert reasons[3] == ""


def test_a_run_goes_on_without_a_bad_prompt(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    data = instruct_pix2pix(tmp_path / "data", {"1": BEE, "2": {"input": ""}})
    recipe = write_recipe(
        source={"use": "instruct-pix2pix", "path": str(data)},
        editor={"use": "fake-editor"},
        captioner=None,
    )
    ended = list(read_outcomes(generate(load_recipe(recipe), tmp_path / "run")))
    assert [(one.stage, one.status) for one in ended[2:]] == [("source", "failed")] * 2
    assert all(one.stage != "source" for one in ended[:2])


def test_instruct_pix2pix_that_is_something_else(tmp_path: Path) -> None:
    message = refused("instruct-pix2pix", path=tmp_path)
    assert message.startswith(f"{tmp_path / 'seeds.json'}: no such file; expected seeds.json as ")


# -- hf-dataset ----------------------------------------------------------------------------------


HF = """if True:
    import hashlib, json, sys
    from pathlib import Path
    from reasonpix.errors import SourceError
    from reasonpix.core.files.ignored import Ignored
    from reasonpix.core.images import decode
    from reasonpix.plugin.registry import find

    def pair(made, item):
        if item.pair is None:
            return []
        edited = made.read_edited(item.native_id)
        assert hashlib.sha256(edited).hexdigest() == item.pair.content
        words = [item.pair.caption, item.pair.instruction]
        return [*words, decode(edited).getpixel((0, 0))]

    for options in json.loads(sys.argv[1]):
        cls = find("source", "hf-dataset")
        made = cls(cls.Options.model_validate(options))
        try:
            made.load()
            rows = [
                [item.native_id, item.caption, decode(made.read(item.native_id)).getpixel((0, 0))]
                + pair(made, item)
                if not isinstance(item, tuple) else [item[0], item[1].reason, None]
                for item in made.items() if not isinstance(item, Ignored)
            ]
            ignored = {i.name: i.reason for i in made.items() if isinstance(i, Ignored)}
            Path("ignored.jsonl").open("a").write(json.dumps(ignored) + "\\n")
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


PAIRS = {
    "image": "original_image",
    "caption": "original_prompt",
    "edited_image": "edited_image",
    "edited_caption": "edited_prompt",
    "instruction": "edit_prompt",
}


def test_hf_dataset_gives_pairs(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    make = """if True:
        import datasets
        from pathlib import Path
        from PIL import Image
        red, lime = (Image.new("RGB", (4, 4), colour) for colour in ("red", "lime"))
        text = datasets.Value("string")
        features = datasets.Features({
            "original_prompt": text, "original_image": datasets.Image(), "edit_prompt": text,
            "edited_prompt": text, "edited_image": datasets.Image(), "n": datasets.Value("int64"),
        })
        rows = [
            ["a bee", red, "turn it green", "a green bee", lime, 0],
            ["a bee", red, "turn it green", "a green bee", None, 1],
            ["a bee", None, "turn it green", "a green bee", lime, 2],
            [None, red, "turn it green", "a green bee", lime, 3],
            ["a bee", red, None, "a green bee", lime, 4],
            ["a bee", red, "turn it green", " ", lime, 5],
            ["a dog", lime, "turn it red", "a red dog", red, 6],
        ]
        data = datasets.Dataset.from_dict(dict(zip(features, zip(*rows))), features=features)
        data.save_to_disk("saved")
        Path("folder").mkdir()
        data.to_parquet("folder/train-00000-of-00001.parquet")
        Path("torn.parquet").write_bytes(Path("folder/train-00000-of-00001.parquet").read_bytes()[:99])
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", make], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    (tmp_path / "folder" / "notes.txt").write_text("notes")
    (tmp_path / "folder" / "._train-00000-of-00001.parquet").write_text("")
    (tmp_path / "folder" / "test-00000-of-00001.parquet").write_bytes(
        (tmp_path / "folder" / "train-00000-of-00001.parquet").read_bytes()
    )
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        for name in ("a.input.png", "a.input.png"):
            tar.addfile(tarfile.TarInfo(name))
    file = "folder/train-00000-of-00001.parquet"
    inputs = {"image": "original_image", "caption": "original_prompt"}
    got = hf(
        tmp_path,
        {"path": "folder", **PAIRS},
        {"path": "saved", **PAIRS},
        {"path": file, **PAIRS},
        {"path": file, **PAIRS, "caption": None, "edited_caption": None},
        {"path": file, **inputs},
        {"path": file, **PAIRS, "edited_image": "image_1"},
        {"path": file, **PAIRS, "instruction": "edit"},
        {"path": file, **PAIRS, "instruction": "n"},
        {"path": file, **PAIRS, "caption": "edited_image"},
        {"path": file, **PAIRS, "edited_image": "n"},
        {"path": file, **PAIRS, "split": "test"},
        {"path": "torn.parquet", **PAIRS},
        {"path": "tars", "image": "input.png"},
    )
    red, lime = [255, 0, 0], [0, 255, 0]
    pairs = [
        ["0", "a bee", red, "a green bee", "turn it green", lime],
        ["1", "row 1: no edited image", None],
        ["2", "row 2: no image", None],
        ["3", "row 3: no text in 'original_prompt'", None],
        ["4", "row 4: no text in 'edit_prompt'", None],
        ["5", "row 5: no text in 'edited_prompt'", None],
        ["6", "a dog", lime, "a red dog", "turn it red", red],
    ]
    assert got[0] == got[1] == got[2] == pairs
    ignored = [json.loads(line) for line in (tmp_path / "ignored.jsonl").read_text().splitlines()]
    column = {"n": "a column that is not read"}
    assert ignored[0] == column | {
        "._train-00000-of-00001.parquet": "metadata of macOS",
        "notes.txt": "not a data file",
        "test-00000-of-00001.parquet": "a file of another split",
    }
    assert ignored[1] == ignored[2] == column
    assert [row[0] for row in got[3] if len(row) == 6] == ["0", "3", "5", "6"]
    assert got[3][0] == ["0", None, red, None, "turn it green", lime]
    assert [row[2] for row in got[4]] == [red, red, None, red, red, red, lime]
    assert got[5].startswith(f"'{file}' has no column 'image_1'; it has original_prompt, ")
    assert got[6].startswith(f"'{file}' has no column 'edit'; it has original_prompt, ")
    assert got[7] == f"column 'n' of '{file}' holds int64, not text"
    assert got[8].startswith(f"column 'edited_image' of '{file}' holds ")
    assert got[9].startswith(f"column 'n' of '{file}' holds no images: ")
    assert got[10].startswith(f"path: cannot open dataset '{file}': ")
    assert got[11].startswith("path: cannot open dataset 'torn.parquet': ")
    assert got[12].startswith("path: tars/a.tar: several samples have the same key (a); rename ")


@pytest.mark.parametrize(
    ("left_out", "why"),
    [
        ({"instruction"}, "a pair needs both columns, edited_image and instruction"),
        ({"edited_image"}, "a pair needs both columns, edited_image and instruction"),
        ({"edited_image", "instruction"}, "edited_caption needs the columns edited_image and"),
    ],
)
def test_hf_dataset_wants_whole_pairs(left_out: set[str], why: str) -> None:
    columns = {name: column for name, column in PAIRS.items() if name not in left_out}
    with pytest.raises(ValidationError, match=why):
        find("source", "hf-dataset").Options.model_validate({"path": "x", **columns})
