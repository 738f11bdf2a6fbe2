"""The plugin `blip2`, through real weights: the mini checkpoint of the sticker world."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from reasonpix_blip2 import Blip2, Blip2Options
from reasonpix_mini import world
from reasonpix_mini.measure.captions import mentioned

from reasonpix.errors import WeightsError
from reasonpix.plugin.testing import CaptionerContract
from reasonpix.plugin.types import Caption, Problem

MINI = Path(str(resources.files("reasonpix_mini"))) / "checkpoints" / "blip2"


class TestContract(CaptionerContract):
    component = Blip2
    options: ClassVar = {"model": str(MINI), "device": "cpu"}


def loaded(**options: object) -> Blip2:
    captioner = Blip2(Blip2Options(**{"model": str(MINI), "device": "cpu"} | options))
    captioner.load()
    return captioner


def texts(captioner: Blip2, images: list[Image.Image]) -> list[str]:
    captions = captioner.caption(images)
    assert all(isinstance(caption, Caption) for caption in captions)
    return [caption.text for caption in captions if isinstance(caption, Caption)]


@pytest.fixture(scope="module")
def blip2() -> Iterator[Blip2]:
    captioner = loaded()
    yield captioner
    captioner.close()


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.scene("test", index) for index in range(24)]


@pytest.fixture(scope="module")
def images(scenes: list[world.Scene]) -> list[Image.Image]:
    return [Image.fromarray(scene.render()) for scene in scenes]


def test_captions_name_what_the_scenes_show(
    blip2: Blip2, scenes: list[world.Scene], images: list[Image.Image]
) -> None:
    captions = texts(blip2, images)
    right = [set(mentioned(c)) == set(s.names) for c, s in zip(captions, scenes, strict=True)]
    assert np.mean(right) >= 0.8
    # Left to right, and in the very words of the world.
    assert np.mean([c == s.caption for c, s in zip(captions, scenes, strict=True)]) >= 0.7


def test_a_caption_depends_on_its_image_alone(blip2: Blip2, images: list[Image.Image]) -> None:
    together = texts(blip2, images)
    assert len(set(together)) > 12
    assert texts(loaded(batch_size=1), images) == together
    assert texts(blip2, images[::-1]) == together[::-1]


@pytest.mark.parametrize("size", [(64, 64), (37, 91), (640, 427), (1, 1), (50, 3)])
def test_images_of_any_size_get_a_sentence(blip2: Blip2, size: tuple[int, int]) -> None:
    from skimage import data

    photographs = [data.astronaut(), data.camera(), data.logo(), data.coffee()]
    rgb = [Image.fromarray(pixels).convert("RGB").resize(size) for pixels in photographs]
    for text in texts(blip2, rgb):
        assert text
        assert text == text.strip()


@pytest.mark.parametrize(
    ("size", "where"),
    [
        ((128, 64), (0, 0)),
        ((128, 64), (64, 0)),
        ((64, 128), (0, 64)),
        ((192, 64), (0, 0)),
        ((192, 64), (128, 0)),
    ],
)
def test_the_sides_of_an_image_are_seen(
    blip2: Blip2, size: tuple[int, int], where: tuple[int, int]
) -> None:
    """BLIP-2's processor squeezes an image into a square and crops nothing."""
    scene = world.scene("test", 3)
    pixels = scene.render()
    image = Image.new("RGB", size, tuple(int(value) for value in pixels[0, 0]))
    image.paste(Image.fromarray(pixels), where)
    assert texts(blip2, [image]) == [scene.caption] == ["a bee and an airplane"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_says_the_same(dtype: str, blip2: Blip2, images: list[Image.Image]) -> None:
    # transformers keeps the Q-Former of a float16 model in float32: the parts must still fit.
    half, full = texts(loaded(dtype=dtype), images), texts(blip2, images)
    assert np.mean([a == b for a, b in zip(half, full, strict=True)]) >= 0.9


def test_max_new_tokens_is_obeyed(images: list[Image.Image], blip2: Blip2) -> None:
    short = texts(loaded(max_new_tokens=2), images[:4])
    # The mini tokenizer has a token for every word: two words, and a beginning of the caption.
    assert [len(text.split()) for text in short] == [2, 2, 2, 2]
    for text, whole in zip(short, texts(blip2, images[:4]), strict=True):
        assert whole.startswith(text)


def test_a_prompt_is_continued_and_not_repeated(scenes: list[world.Scene]) -> None:
    first, second = "bee", "tractor"
    scene = next(
        s
        for s in (world.scene("test", i, names=[first, second]) for i in range(50))
        if s.names == [first, second]
    )
    captioner = loaded(prompt=f"a {first}")
    assert texts(captioner, [Image.fromarray(scene.render())] * 2) == [f"and a {second}"] * 2


def test_nothing_said_is_a_problem_and_no_empty_caption(scenes: list[world.Scene]) -> None:
    scene = next(s for s in scenes if len(s.names) == 1)
    captioner = loaded(prompt=scene.caption)
    (result,) = captioner.caption([Image.fromarray(scene.render())])
    assert isinstance(result, Problem)
    assert result.status == "rejected"
    # Neither a folder of this machine nor anything else that others do not have.
    assert result.reason == "blip2 said nothing"


def changed(folder: Path, **values: object) -> Path:
    """A copy of the mini checkpoint with other values in config.json."""
    shutil.copytree(MINI, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def test_checkpoints_that_do_not_name_the_image_token_load(
    tmp_path: Path, blip2: Blip2, images: list[Image.Image]
) -> None:
    folder = changed(tmp_path / "old", image_token_index=None)
    (folder / "processor_config.json").rename(folder / "preprocessor_config.json")
    config = json.loads((folder / "preprocessor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert texts(loaded(model=str(folder)), images[:4]) == texts(blip2, images[:4])


def test_a_tokenizer_of_another_revision_is_an_error(tmp_path: Path) -> None:
    folder = changed(tmp_path / "mixed", image_token_index=7)
    with pytest.raises(WeightsError, match="image_token_index is 7"):
        loaded(model=str(folder))


def test_encoder_decoder_language_models_caption_too(
    tmp_path: Path, images: list[Image.Image]
) -> None:
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, T5Config

    torch.manual_seed(0)
    config = Blip2Config.from_pretrained(MINI)
    t5 = T5Config(
        vocab_size=config.text_config.vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=70,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    whole = Blip2Config(
        vision_config=config.vision_config.to_dict(),
        qformer_config=config.qformer_config.to_dict(),
        text_config=t5.to_dict(),
        num_query_tokens=config.num_query_tokens,
        image_token_index=config.image_token_index,
    )
    model = Blip2ForConditionalGeneration(whole).eval()
    model.save_pretrained(tmp_path)
    processor = Blip2Processor.from_pretrained(MINI)
    processor.save_pretrained(tmp_path)
    ids = model.generate(**processor(images=images[:2], return_tensors="pt"), max_new_tokens=6)
    expected = [t.strip() for t in processor.batch_decode(ids, skip_special_tokens=True)]
    assert all(expected)
    assert texts(loaded(model=str(tmp_path), max_new_tokens=6), images[:2]) == expected


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no folder '.*/nowhere'"):
        loaded(model=str(tmp_path / "nowhere"))


def test_a_folder_without_a_checkpoint_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the folder is empty"):
        loaded(model=str(tmp_path))


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(MINI, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="it has pickles only"):
        loaded(model=str(folder))


def test_offline_without_the_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    # The hub reads the variable when it is imported, which other tests may have done already.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set") as caught:
        loaded(model="Salesforce/blip2-opt-2.7b", revision="main")
    assert "Salesforce/blip2-opt-2.7b" in str(caught.value)


def test_options_are_checked() -> None:
    assert Blip2Options().model == "Salesforce/blip2-opt-2.7b"
    assert Blip2Options().max_new_tokens == 30
    for wrong in ({"max_new_tokens": 0}, {"prompt": ""}, {"beams": 3}):
        with pytest.raises(ValidationError):
            Blip2Options(**wrong)
