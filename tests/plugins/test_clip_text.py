"""The plugin `clip-text`: a tiny pipeline folder of real classes, and the mini checkpoint's."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reasonpix_llava import ClipText, ClipTextOptions
from reasonpix_mini.training import text as mini_text
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from reasonpix.errors import WeightsError
from reasonpix.plugin.testing import EncoderContract, photographs

MINI = Path(str(resources.files("reasonpix_mini"))) / "checkpoints" / "gligen"
TOKENS, WIDTH = 12, 16


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer` and `text_encoder`, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("pipeline")
    words = mini_text.tokenizer(["make", "it", "red", "more", "snow"], length=TOKENS)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        initializer_factor=5.0,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    words.save_pretrained(folder / "tokenizer")
    return folder


def loaded(model: Path, **options: Any) -> ClipText:
    encoder = ClipText(ClipTextOptions(**{"model": str(model), "device": "cpu"} | options))
    encoder.load()
    return encoder


def as_diffusers_does(folder: Path, text: str) -> Any:
    """`encode_prompt` of Stable Diffusion, for one text."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    ids = tokenizer(
        text,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        return model(ids, attention_mask=None)[0][0].numpy()


class TestContract(EncoderContract):
    component = ClipText

    @pytest.fixture(autouse=True)
    def _checkpoint(self, pipeline: Path) -> None:
        type(self).options = {"model": str(pipeline), "device": "cpu"}

    options: ClassVar = {}


TEXTS = ["make it red", "", "more", "it {x} is <|endoftext|> snow", "more snow " * 20]


def test_states_are_those_that_diffusers_attends_to(pipeline: Path) -> None:
    found = loaded(pipeline).encode(photographs(), TEXTS)
    for states, text in zip(found, TEXTS, strict=True):
        assert isinstance(states, np.ndarray)
        assert states.shape == (TOKENS, WIDTH)
        np.testing.assert_allclose(states, as_diffusers_does(pipeline, text), rtol=0, atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.1


def test_long_instructions_are_cut(pipeline: Path) -> None:
    image = photographs()[0]
    longer, other = (f"{'more ' * TOKENS}{end}" for end in ("red", "snow"))
    one, two = loaded(pipeline).encode([image] * 2, [longer, other])
    np.testing.assert_array_equal(one, two)


def test_the_image_is_not_looked_at(pipeline: Path) -> None:
    one, two = loaded(pipeline).encode(photographs()[:2], ["more snow"] * 2)
    np.testing.assert_array_equal(one, two)


def test_the_batch_size_changes_nothing(pipeline: Path) -> None:
    texts = TEXTS * 3
    images = [photographs()[0]] * len(texts)
    whole, small = (loaded(pipeline, batch_size=n).encode(images, texts) for n in (8, 1))
    for one, two in zip(whole, small, strict=True):
        np.testing.assert_array_equal(one, two)
    assert loaded(pipeline).encode([], []) == []


def test_the_text_encoder_of_the_mini_pipeline_reads() -> None:
    encoder = loaded(MINI)
    (states,) = encoder.encode(photographs()[:1], ["a bee and a rabbit"])
    np.testing.assert_allclose(
        states, as_diffusers_does(MINI, "a bee and a rabbit"), rtol=0, atol=1e-4
    )


def test_what_is_missing_is_named(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no folder '.*/nowhere'"):
        loaded(tmp_path / "nowhere")
    folder = tmp_path / "textless"
    shutil.copytree(pipeline / "tokenizer", folder / "tokenizer")
    with pytest.raises(WeightsError, match=r"has tokenizer/tokenizer.json, .* and no weights"):
        loaded(folder)


def test_weights_that_are_not_safetensors_are_refused(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(pipeline, folder)
    encoder = folder / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="in text_encoder/ it has pickles only"):
        loaded(folder)


def test_parts_of_different_pipelines_are_refused(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(pipeline, folder)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(MINI / "tokenizer", folder / "tokenizer")
    with pytest.raises(WeightsError, match=r"tokenizer and text_encoder of .* do not match"):
        loaded(folder)


def test_options_are_checked() -> None:
    assert ClipTextOptions().model == "timbrooks/instruct-pix2pix"
    with pytest.raises(ValidationError):
        ClipTextOptions(layer=3)
