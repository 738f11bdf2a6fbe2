"""What a checkpoint records of its training data, and how texts and images are compared with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasonpix.datasets.training_data import (
    FILE,
    TrainedDataset,
    TrainingData,
    dataset_name,
    image_hash,
    read_training_data,
    text_hash,
    training_data_of_dataset,
)
from reasonpix.errors import SourceError, WeightsError
from reasonpix.plugin.weights import digest
from tests.support.pair_files import parquet, picture, png, rows

DATA = TrainingData.of_dataset(
    "part1",
    2,
    [picture(1), picture(2)],
    ["Turn the bee into an owl.", "Something that purrs, please."],
    ["purrs on a warm lap"],
)


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("turn the BEE into an owl", True),
        ("Turn the bée, into an owl!", True),
        ("Turn the bee into an owl now.", False),
        ("Show what purrs on a warm lap instead", True),
        ("Show what purrs on a cold lap instead", False),
        ("Purrs on a warm lap", True),
        ("", False),
    ],
)
def test_instructions_are_compared_by_words_and_phrases_inside_them(
    text: str, shared: bool
) -> None:
    assert DATA.has_instruction(text) is shared


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("🐝", "🦋", False),  # neither has a word
        ("🐝", " 🐝 ", True),
        ("把蜜蜂换成猫头鹰", "把蜜蜂换成蝴蝶", False),
        ("Café", "cafe", True),
        ("!!", "??", False),
    ],
)
def test_texts_without_english_words_are_told_apart(one: str, other: str, same: bool) -> None:
    assert (text_hash(one) == text_hash(other)) is same


def test_an_instruction_that_contains_a_phrase_is_recorded_by_it() -> None:
    phrase = ["purrs on a warm lap"]
    both = TrainingData.of_dataset("x", 1, (), ["A thing that purrs on a warm lap."], phrase)
    assert not both.instructions and both.has_instruction("A thing that purrs on a warm lap.")


def test_images_are_compared_by_pixels() -> None:
    assert DATA.has_image([image_hash(picture(2))])
    assert not DATA.has_image([image_hash(picture(3))])
    changed = np.asarray(picture(1)).copy()
    changed[0, 0, 0] ^= 1
    assert not DATA.has_image([image_hash(Image.fromarray(changed))])


def test_the_file_is_read_as_it_was_written_and_is_no_part_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = digest(tmp_path)
    DATA.write(tmp_path)
    assert read_training_data(tmp_path / FILE) == DATA
    assert digest(tmp_path) == before  # edits do not depend on the record
    first = (tmp_path / FILE).read_bytes()
    read_training_data(tmp_path / FILE).write(tmp_path)
    assert (tmp_path / FILE).read_bytes() == first
    stored = json.loads(first)
    assert stored["images"] == sorted(stored["images"]) and len(stored["images"][0]) == 12


@pytest.mark.parametrize("text", ["", "[]", '{"images": 5}', '{"pictures": []}', "\udcff"])
def test_a_damaged_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match=r"training_data\.json is damaged: .*restore it"):
        read_training_data(tmp_path / FILE)


def test_data_of_several_trainings_are_joined_once_each() -> None:
    other = TrainingData(
        datasets=(TrainedDataset(name="part2", pairs=3),), unrecorded=("timbrooks/ip2p",)
    )
    joined = DATA | other | DATA
    assert [dataset.name for dataset in joined.datasets] == ["part1", "part2"]
    assert joined.unrecorded == ("timbrooks/ip2p",)
    assert joined.images == DATA.images


def test_a_dataset_is_recorded_with_both_instructions_and_both_images(tmp_path: Path) -> None:
    content = rows(3)
    for row in content:
        row["direct_instruction"] = "Plain words."
    parquet(tmp_path / "part3" / "train.parquet", content)
    data = training_data_of_dataset(str(tmp_path / "part3"))
    assert data.datasets == (TrainedDataset(name="part3", pairs=3),)
    assert data.has_instruction("plain words")
    assert data.has_instruction(str(content[1]["edit_prompt"]))
    assert len(data.images) == len({png for row in content for png in _pictures(row)})
    content[1]["input_image"] = {"bytes": b"no image", "path": None}
    parquet(tmp_path / "broken.parquet", content)
    with pytest.raises(SourceError, match=r"row 1: .*cannot be compared"):
        training_data_of_dataset(str(tmp_path / "broken.parquet"))


def _pictures(row: dict[str, object]) -> list[bytes]:
    cells = (row["input_image"], row["edited_image"])
    return [cell["bytes"] for cell in cells if isinstance(cell, dict)]


def test_names_do_not_tell_where_a_dataset_lies(tmp_path: Path) -> None:
    assert dataset_name(str(tmp_path)) == tmp_path.name
    assert dataset_name("timbrooks/instructpix2pix") == "timbrooks/instructpix2pix"
    assert png(picture(1)) != png(picture(2))
