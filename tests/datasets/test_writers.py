"""Published datasets, read back by those that they are for."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from reasonpix.core.images import encode_png
from reasonpix.core.parallel import Size
from reasonpix.datasets import writers
from reasonpix.datasets.columns import FEATURES, RunColumns, columns_of
from reasonpix.datasets.publishing import publish
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import Outcome, read_outcomes
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.plugin.components import SourceItem, SourcePair
from reasonpix.plugin.samples import Sample, SampleImage
from tests.conftest import WriteRecipe

PAIRS = {"use": "fake-source", "count": 3, "caption": "a bee", "instruction": "add a hole",
         "edited_caption": "a bee with a hole"}  # fmt: skip
FILTERS = ["no-op", {"use": "eq1", "reject_fraction": 0.3}]


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> RunFolder:
    """Seven records of which the two with the smallest change are rejected."""
    return generate(load_recipe(write_recipe(shard_size=3, filters=FILTERS)), tmp_path / "run")


def accepted(run: RunFolder) -> list[Outcome]:
    return [outcome for outcome in read_outcomes(run) if outcome.status == "ok"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "data" / "train-00000.parquet").to_pylist()


def elsewhere(code: str, folder: Path) -> Any:
    """What `code` prints as JSON, in a process of its own with `folder` as its place."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def made(count: int, side: int = 16) -> Iterator[Outcome]:
    """Accepted pairs of noise; nothing is kept of those that were taken."""
    for number in range(count):

        def png(seed: int = number) -> bytes:
            pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
            return encode_png(Image.fromarray(pixels))

        pair = SourcePair(content="", caption="after", instruction="do it")
        item = SourceItem(native_id=str(number), content="", pair=pair)
        images = {"input": SampleImage(png), "paired": SampleImage(png)}
        yield Outcome(Sample(f"{number:012d}", item, images), "ok", "", "")


PLAIN = RunColumns("I")


# -- Hugging Face


def test_rows_hold_the_accepted_records(run: RunFolder, tmp_path: Path) -> None:
    assert publish(run, tmp_path / "dataset") == 5
    known, published = accepted(run), rows(tmp_path / "dataset")
    assert [row["record_id"] for row in published] == [o.sample.record_id for o in known]
    row, sample = published[0], known[0].sample
    assert row["input_image"] == {"bytes": encode_png(sample.image()), "path": None}
    assert row["edited_image"] == {"bytes": encode_png(sample.edited_image()), "path": None}
    assert row["edit_prompt"] == "Something else would look better there."
    assert (row["selected"], row["target"], row["caption"]) == ("bee", "pear", "a bee and a rabbit")
    assert row["box"] == [8.0, 8.0, 24.0, 24.0]
    assert row["source_id"] == sample.item.native_id
    assert row["part"] == "III"
    assert row["score_no_op_changed"] == 1.0
    assert [row["score_eq1_distance"] for row in published] == [
        outcome.scores["eq1.distance"] for outcome in known
    ]


def test_an_edit_is_the_input_outside_and_the_colour_inside(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "dataset")
    for row in rows(tmp_path / "dataset"):
        before, after = (
            np.asarray(Image.open(io.BytesIO(row[column]["bytes"])))
            for column in ("input_image", "edited_image")
        )
        assert (after[8:24, 8:24] == (200, 40, 40)).all()
        outside = np.ones(after.shape[:2], bool)
        outside[8:24, 8:24] = False
        assert (after[outside] == before[outside]).all()


def test_datasets_loads_it_with_images(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    publish(run, tmp_path / "dataset")
    code = """if True:
        import datasets, json, yaml
        import pyarrow.parquet as pq
        data = datasets.load_dataset("dataset")
        train = data["train"]
        schema = pq.read_schema("dataset/data/train-00000.parquet")
        head = yaml.safe_load(open("dataset/README.md").read().split("---\\n")[1])
        told = datasets.Features._from_yaml_list(head["dataset_info"]["features"])
        print(json.dumps([
            list(data), train.column_names, str(train.features["box"]),
            [[row["input_image"].getpixel((0, 0)), row["edited_image"].getpixel((9, 9))]
             for row in train],
            train.features == datasets.Features.from_arrow_schema(schema) == told,
        ]))
    """
    splits, columns, box, pixels, same = elsewhere(code, tmp_path)
    assert splits == ["train"]
    assert columns == [*FEATURES, "score_no_op_changed", "score_eq1_distance"]
    assert columns[:3] == ["input_image", "edit_prompt", "edited_image"]
    assert "float64" in box
    natives = [outcome.sample.item.native_id for outcome in accepted(run)]
    assert pixels == [[[60 + int(i), 120, 200], [200, 40, 40]] for i in natives]
    assert same  # the head of the card, which the hub's viewer reads, says what the files say


@pytest.mark.parametrize("form", ["hf", "webdataset", "instruct-pix2pix", "preference"])
def test_datasets_has_nothing_to_warn_of(
    form: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    run = generate(load_recipe(write_recipe(source=PAIRS, part="rewrite")), tmp_path / "run")
    publish(run, tmp_path / "dataset", form)
    code = """if True:
        import json, logging, warnings
        said = []
        class Ear(logging.Handler):
            def emit(self, record):
                said.append(record.getMessage())
        logging.captureWarnings(True)
        import datasets
        for name in ("datasets", "huggingface_hub", "py.warnings"):
            logging.getLogger(name).addHandler(Ear(logging.WARNING))
        warnings.simplefilter("always")
        datasets.disable_progress_bars()
        train = datasets.load_dataset("dataset")["train"]
        print(json.dumps([len(train), said]))
    """
    rows, said = elsewhere(code, tmp_path)
    assert rows >= 3 and said == []


@pytest.mark.parametrize(
    ("recipe", "filters"),
    [
        ({}, FILTERS),
        ({"captioner": None, "source": {"use": "fake-source", "caption": "a bee"}}, ["leak"]),
        ({"part": "rewrite", "source": PAIRS}, ["leak", "diversity", "agreement"]),
    ],
)
def test_forms_can_be_concatenated(
    recipe: dict[str, Any], filters: list[Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    run = generate(load_recipe(write_recipe(**recipe, filters=filters)), tmp_path / "run")
    forms = ["hf", "instruct-pix2pix"]
    for form in forms:
        publish(run, tmp_path / form, form)
    code = f"""if True:
        import datasets, json
        parts = [datasets.load_dataset(form, split="train") for form in {forms}]
        whole = datasets.concatenate_datasets(parts)
        first, second = (
            part.remove_columns(["input_image", "edited_image"]).to_list() for part in parts
        )
        print(json.dumps([first == second, len(first), len(whole), whole.column_names,
                          whole.features == parts[0].features]))
    """
    same, count, total, columns, features = elsewhere(code, tmp_path)
    assert same and total == 2 * count > 0 and features
    assert columns == list(columns_of(run).features)


TRAINER = """if True:
    import json
    import numpy as np
    import torch
    from datasets import load_dataset
    from transformers import CLIPTokenizer

    # What diffusers' InstructPix2Pix example does with a dataset, by its default arguments.
    original_column, edited_column, prompt_column = "input_image", "edited_image", "edit_prompt"
    resolution = 24
    dataset = load_dataset("dataset", None, cache_dir=None)
    column_names = dataset["train"].column_names
    assert {original_column, edited_column, prompt_column} <= set(column_names)
    # Without these arguments it takes the columns by their place.
    assert [original_column, prompt_column, edited_column] == column_names[:3]
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)

    def to_array(image):
        image = image.convert("RGB").resize((resolution, resolution))
        return np.array(image).transpose(2, 0, 1)

    def preprocess(examples):
        originals = np.concatenate([to_array(image) for image in examples[original_column]])
        edits = np.concatenate([to_array(image) for image in examples[edited_column]])
        images = torch.tensor(np.concatenate([originals, edits]))
        images = 2 * (images / 255) - 1
        images = images.flip(-1)[..., 4:20, 4:20]  # its transforms: a flip and a crop, of both
        original, edited = images.chunk(2)
        examples["original_pixel_values"] = original.reshape(-1, 3, 16, 16)
        examples["edited_pixel_values"] = edited.reshape(-1, 3, 16, 16)
        examples["input_ids"] = tokenizer(
            list(examples[prompt_column]), max_length=tokenizer.model_max_length,
            padding="max_length", truncation=True, return_tensors="pt",
        ).input_ids
        return examples

    def collate(examples):
        return {
            name: torch.stack([example[name] for example in examples])
            for name in ("original_pixel_values", "edited_pixel_values", "input_ids")
        }

    chosen = dataset["train"].shuffle(seed=0).select(range(4))
    loader = torch.utils.data.DataLoader(
        chosen.with_transform(preprocess), shuffle=False, collate_fn=collate, batch_size=2
    )
    batches = list(loader)
    changed = [
        (b["original_pixel_values"] != b["edited_pixel_values"]).any(1).float().mean().item()
        for b in batches
    ]
    shapes = [[list(b[name].shape) for name in b] for b in batches]
    print(json.dumps([shapes, changed, float(batches[0]["edited_pixel_values"].max())]))
"""


def test_the_trainer_of_diffusers_takes_it_as_it_is(run: RunFolder, tmp_path: Path) -> None:
    for package in ("datasets", "torch", "transformers"):
        pytest.importorskip(package)
    mini = pytest.importorskip("reasonpix_mini")
    tokenizer = Path(mini.__file__).parent / "checkpoints" / "gligen" / "tokenizer"
    publish(run, tmp_path / "dataset")
    shapes, changed, largest = elsewhere(
        TRAINER.replace("TOKENIZER", repr(str(tokenizer))), tmp_path
    )
    assert [[shape[1:] for shape in batch[:2]] for batch in shapes] == [[[3, 16, 16]] * 2] * 2
    assert all(batch[2][0] == 2 for batch in shapes)
    # The box of 16 pixels of 32 is 12 of 24 after the resize, and all of it is in the crop.
    assert all(0.5 < share <= 1 for share in changed)
    assert largest <= 1


def test_files_and_row_groups_end_where_they_should(tmp_path: Path) -> None:
    written = writers.write_parquet(made(1250), tmp_path, PLAIN, Size(rows=300, bytes=1 << 40))
    assert written.rows == 1250
    files = sorted((tmp_path / "data").iterdir())
    assert [file.name for file in files] == [f"train-{n:05d}.parquet" for n in range(5)]
    assert [pq.read_metadata(file).num_rows for file in files] == [300, 300, 300, 300, 50]
    assert pq.read_metadata(files[0]).num_row_groups == 3
    ids = [row for file in files for row in pq.read_table(file)["record_id"].to_pylist()]
    assert ids == [f"{number:012d}" for number in range(1250)]


def test_files_end_by_size_as_well(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    (tmp_path / "tar").mkdir()
    size = Size(rows=1000, bytes=100_000)
    writers.write_parquet(made(250), tmp_path / "parquet", PLAIN, size)
    writers.write_webdataset(made(250), tmp_path / "tar", PLAIN, size)
    rows = [pq.read_metadata(f).num_rows for f in sorted((tmp_path / "parquet/data").iterdir())]
    assert rows == [100, 100, 50]  # after a whole row group
    tars = sorted((tmp_path / "tar" / "data").iterdir())
    assert all(100_000 < tar.stat().st_size < 250_000 for tar in tars[:-1])
    assert len(tars) > 3


@pytest.mark.parametrize("form", ["parquet", "webdataset", "instruct_pix2pix"])
def test_samples_are_written_as_they_come(tmp_path: Path, form: str) -> None:
    """However many there are, no more than a row group of them waits in memory."""
    weight = len(next(made(1)).sample.edited_png()) * 2
    waiting = []

    def watched() -> Iterator[Outcome]:
        for number, outcome in enumerate(made(400)):
            if number % 50 == 49:
                files = (path for path in tmp_path.rglob("*") if path.is_file())
                waiting.append(number - sum(path.stat().st_size for path in files) / weight)
            yield outcome

    writer = getattr(writers, f"write_{form}")
    assert writer(watched(), tmp_path, PLAIN).rows == 400
    assert max(waiting) < 150


# -- WebDataset


def test_tars_hold_what_a_key_says_and_nothing_of_the_writing(
    run: RunFolder, tmp_path: Path
) -> None:
    publish(run, tmp_path / "dataset", "webdataset")
    assert [path.name for path in (tmp_path / "dataset/data").iterdir()] == ["train-00000.tar"]
    known = accepted(run)
    with tarfile.open(tmp_path / "dataset/data/train-00000.tar") as tar:
        members = tar.getmembers()
        contents = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    kinds = ("edited.png", "input.png", "json")
    assert [member.name for member in members] == [
        f"{outcome.sample.record_id}.{kind}" for outcome in known for kind in kinds
    ]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (
            (0, 0, 0, "", "", 0o644)
        )
    assert contents[0] == encode_png(known[0].sample.edited_image())
    assert contents[1] == encode_png(known[0].sample.image())
    facts = json.loads(contents[2])
    assert facts == columns_of(run).facts(known[0])
    assert facts["score_no_op_changed"] == 1.0


def test_webdataset_reads_it(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    publish(run, tmp_path / "dataset", "webdataset")
    code = """if True:
        import json
        import webdataset
        data = webdataset.WebDataset("dataset/data/train-{00000..00000}.tar", shardshuffle=False)
        print(json.dumps([
            [sample["__key__"], sample["input.png"].getpixel((0, 0)),
             sample["edited.png"].getpixel((9, 9)), sample["json"]["edit_prompt"]]
            for sample in data.decode("pil")
        ]))
    """
    assert elsewhere(code, tmp_path) == [
        [o.sample.record_id, [60 + int(o.sample.item.native_id), 120, 200], [200, 40, 40],
         "Something else would look better there."]
        for o in accepted(run)
    ]  # fmt: skip


def test_datasets_reads_tars_as_well(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    publish(run, tmp_path / "dataset", "webdataset")
    code = """if True:
        import datasets, json
        data = datasets.load_dataset("dataset")["train"]
        by_name = datasets.load_dataset("webdataset", data_files="dataset/data/*.tar")["train"]
        stream = datasets.load_dataset("dataset", split="train", streaming=True)
        assert by_name["json"] == data["json"] == [row["json"] for row in stream]
        print(json.dumps([
            [row["__key__"], row["edited.png"].getpixel((9, 9)), row["json"]["box"]]
            for row in data
        ]))
    """
    assert elsewhere(code, tmp_path) == [
        [outcome.sample.record_id, [200, 40, 40], [8.0, 8.0, 24.0, 24.0]]
        for outcome in accepted(run)
    ]


# -- InstructPix2Pix


def test_our_own_source_reads_pairs_of_it_back(
    run: RunFolder, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    publish(run, tmp_path / "dataset", "instruct-pix2pix")
    source = {"use": "instruct-pix2pix", "path": str(tmp_path / "dataset"), "pairs": True}
    recipe = load_recipe(write_recipe("again.yaml", source=source, part="rewrite"))
    back = accepted(generate(recipe, tmp_path / "again"))
    known = accepted(run)
    assert len(back) == len(known) == 5
    for number, (one, other) in enumerate(zip(back, known, strict=True)):
        pair = one.sample.item.pair
        assert one.sample.item.native_id == f"{number:07d}/0_0.jpg"
        assert one.sample.item.caption == "a bee and a rabbit"
        assert pair is not None
        assert pair.instruction == other.sample.instruction
        assert pair.caption == "a pear and a rabbit"
        for image, lossless in (
            (one.sample.image(), other.sample.image()),
            (one.sample.edited_image(), other.sample.edited_image()),
        ):
            difference = np.abs(np.asarray(image, int) - np.asarray(lossless, int))
            assert difference.max() <= 4


def test_the_class_of_the_original_trainer_reads_it(run: RunFolder, tmp_path: Path) -> None:
    """By what it does with a folder: seeds.json, then a prompt and a seed's two images."""
    publish(run, tmp_path / "dataset", "instruct-pix2pix")
    listed = json.loads((tmp_path / "dataset" / "seeds.json").read_text())
    assert len(listed) == 5
    for name, seeds in listed:
        folder = tmp_path / "dataset" / name
        [seed] = seeds
        assert json.loads((folder / "prompt.json").read_text())["edit"]
        for side in (0, 1):
            with Image.open(folder / f"{seed}_{side}.jpg") as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
                assert {component[1:3] for component in image.layer} == {(1, 1)}
    assert {path.name for path in (tmp_path / "dataset").iterdir()} == {
        "README.md", "seeds.json", "metadata.jsonl", *(name for name, _ in listed)
    }  # fmt: skip


def test_what_that_layout_has_no_place_for_is_beside_it(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "dataset", "instruct-pix2pix")
    lines = (tmp_path / "dataset" / "metadata.jsonl").read_text().splitlines()
    for number, (line, outcome) in enumerate(zip(lines, accepted(run), strict=True)):
        facts = json.loads(line)
        assert facts["input_image_file_name"] == f"{number:07d}/0_0.jpg"
        assert facts["record_id"] == outcome.sample.record_id
        assert facts["box"] == [8.0, 8.0, 24.0, 24.0]
        assert facts["score_eq1_distance"] == outcome.scores["eq1.distance"]
        assert facts["direct_instruction"] is None


def test_a_rewritten_pair_keeps_its_own_captions(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    source = {"use": "fake-source", "count": 2, "caption": "a square", "instruction": "make a hole",
              "edited_caption": "a square with a hole"}  # fmt: skip
    run = generate(load_recipe(write_recipe(source=source, part="rewrite")), tmp_path / "run")
    publish(run, tmp_path / "dataset", "instruct-pix2pix")
    prompt = json.loads((tmp_path / "dataset/0000001/prompt.json").read_text())
    sample = accepted(run)[1].sample
    assert prompt == {
        "input": "a square", "edit": sample.instruction, "output": "a square with a hole"
    }  # fmt: skip
    facts = json.loads((tmp_path / "dataset/metadata.jsonl").read_text().splitlines()[1])
    assert facts["direct_instruction"] == "make a hole"
    assert facts["candidates"][facts["chosen"]] == sample.instruction


def test_the_card_states_the_loss_that_can_be_measured(run: RunFolder, tmp_path: Path) -> None:
    publish(run, tmp_path / "dataset", "instruct-pix2pix")
    total = count = largest = 0
    for number, outcome in enumerate(accepted(run)):
        for side, image in enumerate((outcome.sample.image(), outcome.sample.edited_image())):
            with Image.open(tmp_path / f"dataset/{number:07d}/0_{side}.jpg") as lossy:
                difference = np.abs(np.asarray(lossy, int) - np.asarray(image, int))
            total, count = total + int(difference.sum()), count + difference.size
            largest = max(largest, int(difference.max()))
    card = (tmp_path / "dataset" / "README.md").read_text()
    assert f"by {total / count:.3f} of 255 on average, and by at most {largest}." in card
    assert largest > 0
