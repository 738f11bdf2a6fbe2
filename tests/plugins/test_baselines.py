from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from pydantic import ValidationError
from reasonpix_baselines import Edict, EdictOptions, InstructDiffusion, NullText, NullTextOptions
from reasonpix_baselines.alignment import align
from reasonpix_baselines.attention import PromptToPrompt
from reasonpix_baselines.edict import EdictEditor
from reasonpix_baselines.instruct_diffusion import branches
from reasonpix_baselines.latents import in_batches
from reasonpix_baselines.null_text import NullTextEditor
from reasonpix_baselines.stable_diffusion import Schedule, StableDiffusion
from reasonpix_mini import world

from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.edits import MethodRequest
from reasonpix.plugin.testing import MethodContract
from reasonpix.plugin.types import Problem
from tests.support.tiny_model import (
    RESOLUTION,
    TOKENS,
    make_x_nan,
    tiny_scheduler,
    tiny_unet,
    write_pipeline,
)
from tests.support.tiny_model import write_tiny as write_editing_model

# Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
KINDS: list[dict[str, Any]] = [{}, {"prediction_type": "v_prediction"}, ZERO_SNR]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def pipeline(channels: int = 4) -> str:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return write_pipeline(folder / "model", channels)


def picture(seed: int = 0, size: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> Image.Image:
    """Random blobs."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def request(**changes: Any) -> MethodRequest:
    base = MethodRequest(picture(), "more", seed=3, caption="a bee", edited_caption="an ant")
    return replace(base, **changes)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean over the pixels, 0 to 255."""
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


def seen_by_the_vae(image: Image.Image, model: StableDiffusion) -> Image.Image:
    latents = model.latents.posterior(image).mode()[0] * model.latents.scale
    return model.latents.image(latents, image.size)


# -- what every method promises --------------------------------------------------------------------


class TestInstructDiffusion(MethodContract):
    component = InstructDiffusion
    options: ClassVar = {"model": pipeline(8), "num_inference_steps": 2}


class TestEdict(MethodContract):
    component = Edict
    options: ClassVar = {"model": pipeline(), "num_inference_steps": 3}


class TestNullText(MethodContract):
    component = NullText
    options: ClassVar = {"model": pipeline(), "num_inference_steps": 3, "num_inner_steps": 2}


METHODS = [TestInstructDiffusion, TestEdict, TestNullText]


@pytest.mark.parametrize("contract", METHODS)
def test_without_an_instruction_there_is_no_edit(contract: type[MethodContract]) -> None:
    subject = contract().subject
    nothing = request(instruction=" ", edited_caption="")
    image, problem = subject.apply([request(), nothing])
    assert isinstance(image, Image.Image)
    assert problem == Problem(status="failed", reason="the instruction is empty")


@pytest.mark.parametrize("contract", [TestEdict, TestNullText])
def test_an_edited_caption_is_instruction_enough(contract: type[MethodContract]) -> None:
    (image,) = contract().subject.apply([request(instruction="")])
    assert isinstance(image, Image.Image)


@pytest.mark.parametrize("contract", METHODS)
def test_more_steps_than_were_trained(contract: type[MethodContract]) -> None:
    options = contract.component.Options.model_validate(
        {**contract.options, "num_inference_steps": 1001}
    )
    with pytest.raises(ReasonpixError, match="num_inference_steps: 1001"):
        contract.component(options).load()


@pytest.mark.parametrize("prompt", ["{caption} {target}", "{", "{}"])
def test_a_prompt_of_unknown_fields(prompt: str) -> None:
    with pytest.raises(ValidationError, match="may only use"):
        EdictOptions(prompt=prompt)


def test_where_nothing_is_known_of_the_edited_image_the_instruction_is_in_the_prompt() -> None:
    asked = request(instruction="It is hot.", edited_caption="")
    assert EdictOptions().target(asked) == "a bee. It is hot."
    assert EdictOptions(prompt="{instruction}").target(asked) == "It is hot."
    assert EdictOptions().target(request()) == "an ant"


@pytest.mark.parametrize("method", [InstructDiffusion, Edict, NullText])
def test_what_is_not_finite_fails_alone(
    method: type[InstructDiffusion | Edict | NullText], tmp_path: Path
) -> None:
    channels = 8 if method is InstructDiffusion else 4
    model = str(make_x_nan(write_pipeline(tmp_path / "model", channels)))
    editor = method(method.Options(model=model, num_inference_steps=2, device="cpu"))
    editor.load()
    words = {"instruction": "more", "caption": "a bee", "edited_caption": "an ant"}
    bad = [request(**words | {name: "an ox"}) for name in ("instruction", *editor.requires)]
    if "caption" in editor.requires:
        bad[0] = request(**words | {"edited_caption": "an ox"})
    results = editor.apply([request(**words), *bad, request(**words)])
    assert isinstance(results[0], Image.Image) and results[0] == results[-1]
    for problem in results[1:-1]:
        assert isinstance(problem, Problem) and problem.status == "failed"
        assert "not finite" in problem.reason


def test_memory_that_runs_out() -> None:
    def compute(items: list[int]) -> Sequence[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ReasonpixError, match="batch_size"):
        in_batches([1], lambda item: 0, 4, compute)


def test_batches_are_full_and_of_one_shape() -> None:
    batches = []

    def compute(items: list[str]) -> Sequence[str]:
        batches.append("".join(items))
        return [item.upper() for item in items]

    assert in_batches(list("aBcdE"), str.isupper, 2, compute) == list("ABCDE")
    assert batches == ["ac", "dd", "BE"]


# -- InstructDiffusion -----------------------------------------------------------------------------


def test_its_guidance() -> None:
    both, image, text = predicted = torch.randn(3, 2, 5)
    guided = branches(5.0, 1.25).guided(predicted.flatten(0, 1))
    expected = 0.5 * (image + text) + 5.0 * (both - image) + 1.25 * (both - text)
    torch.testing.assert_close(guided, expected)


def test_at_half_and_half_it_is_plain_sampling() -> None:
    """All else cancels out, so this is what an editing model gives without guidance."""
    method = InstructDiffusion(
        InstructDiffusion.Options(
            model=pipeline(8),
            num_inference_steps=3,
            guidance_scale=0.5,
            image_guidance_scale=0.5,
        )
    )
    method.load()
    (edited,) = method.apply([request()])
    euler = diffusers.EulerAncestralDiscreteScheduler
    plain = ReasonPix2Pix.from_pretrained(pipeline(8))
    plain._scheduler = euler.from_config(plain._scheduler.config, timestep_spacing="linspace")
    (expected,) = plain(
        [picture()],
        "more",
        seed=3,
        num_inference_steps=3,
        guidance_scale=1,
        image_guidance_scale=1,
    )
    assert isinstance(edited, Image.Image)
    assert difference(edited, expected) < 0.01


def test_an_encoder_from_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = write_editing_model(tmp_path / "model")
    with pytest.raises(WeightsError, match="text encoder of its own"):
        InstructDiffusion(InstructDiffusion.Options(model=str(folder))).load()


# -- inversion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_diffusers(kind: dict[str, Any]) -> None:
    ddim = tiny_scheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **kind)
    schedule = Schedule.of(ddim, 10)
    ddim.set_timesteps(10)
    assert schedule.timesteps.tolist() == ddim.timesteps.tolist()
    latents, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    for number, timestep in enumerate(ddim.timesteps):
        signal = schedule.signal[number]
        predicted = noise
        if kind:  # v = √ᾱ·ε − √(1−ᾱ)·x₀, with x = √ᾱ·x₀ + √(1−ᾱ)·ε
            image = (latents - (1 - signal).sqrt() * noise) / signal.sqrt()
            predicted = signal.sqrt() * noise - (1 - signal).sqrt() * image
        expected = ddim.step(predicted, timestep, latents).prev_sample
        moved = schedule.down(latents, noise, number)
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(schedule.up(moved, noise, number), latents)


def test_pure_noise_is_left_out() -> None:
    schedule = Schedule.of(tiny_scheduler(**ZERO_SNR), 1000)
    assert len(schedule) == 999
    assert (schedule.signal > 0).all()


def test_noise_whatever_is_predicted(tmp_path: Path) -> None:
    """What a UNet calls v means this noise."""
    model = StableDiffusion(EdictOptions(model=write_pipeline(tmp_path / "v", **ZERO_SNR)))
    latents = torch.randn(1, 4, 8, 8)
    states = model.states("a bee")[None]
    with torch.no_grad():
        velocity = model.unet(latents, model.schedule.timesteps[20], states).sample
        noise = model.noise(latents, 20, states)
    signal = model.schedule.signal[20].float()
    image = signal.sqrt() * latents - (1 - signal).sqrt() * velocity
    torch.testing.assert_close(signal.sqrt() * image + (1 - signal).sqrt() * noise, latents)


def test_an_editing_model_draws_nothing_from_text() -> None:
    with pytest.raises(WeightsError, match="takes 8 channels and returns 4"):
        StableDiffusion(EdictOptions(model=pipeline(8)))


def test_a_model_that_predicts_the_image(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "x", prediction_type="sample")
    with pytest.raises(WeightsError, match="'sample'"):
        StableDiffusion(EdictOptions(model=folder))


# -- EDICT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [5, 10])
@torch.inference_mode()
def test_what_is_inverted_is_restored(kind: dict[str, Any], steps: int, tmp_path: Path) -> None:
    model = write_pipeline(tmp_path / "model", **kind)
    editor = EdictEditor(EdictOptions(model=model, num_inference_steps=steps, strength=1))
    latents = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    states = torch.stack([editor.model.states(text) for text in [""] * 4 + ["a bee"] * 4])
    noisy = editor.inverted(torch.stack([latents, latents]), states)
    assert (noisy - latents).abs().mean() > 0.1
    restored = editor.generated(noisy, states)
    assert (restored - latents).abs().max() < 1e-6


def test_edict_redraws_under_another_prompt_only() -> None:
    editor = EdictEditor(EdictOptions(model=pipeline(), num_inference_steps=10))
    same, other = editor.edit([request(edited_caption="a bee"), request()])
    expected = seen_by_the_vae(picture(), editor.model)
    # Its latents are drawn from the VAE's posterior, which is wide in a random one.
    assert difference(same, expected) < difference(other, same) < 60


def test_strength_is_how_far_edict_goes() -> None:
    def edited(strength: float) -> Image.Image:
        options = EdictOptions(model=pipeline(), num_inference_steps=10, strength=strength)
        (image,) = EdictEditor(options).edit([request()])
        return image

    (unedited,) = EdictEditor(EdictOptions(model=pipeline(), num_inference_steps=10)).edit(
        [request(edited_caption="a bee")]
    )
    assert difference(edited(0.2), unedited) < difference(edited(1.0), unedited)


# -- null-text inversion ---------------------------------------------------------------------------


def null_text(**options: Any) -> NullTextEditor:
    defaults = {"model": pipeline(), "num_inference_steps": 4, "num_inner_steps": 3}
    return NullTextEditor(NullTextOptions(**defaults | options))


def test_the_source_prompt_gives_what_the_vae_gives() -> None:
    """With a model that has learnt to draw: a random one cannot be led anywhere."""
    scene = world.scene("validation", 0)
    image = Image.fromarray(scene.render())
    unchanged = request(image=image, caption=scene.caption, edited_caption=scene.caption)
    errors = []
    for inner in (0, 20):
        editor = null_text(
            model="mini/stable-diffusion",
            num_inference_steps=8,
            num_inner_steps=inner,
            learning_rate=0.05,
            guidance_scale=3,
        )
        (restored,) = editor.edit([unchanged])
        errors.append(difference(restored, seen_by_the_vae(image, editor.model)))
    without, optimised = errors
    assert optimised < 0.5 * without
    assert optimised < 8


def test_another_prompt_gives_another_image() -> None:
    editor = null_text()
    same, other = editor.edit([request(edited_caption="a bee"), request()])
    assert difference(same, other) > 0.5


def test_the_null_text_is_learnt_until_it_is_good_enough() -> None:
    def nulls(**options: Any) -> torch.Tensor:
        editor = null_text(**options)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        states = torch.stack([editor.model.states("a bee")] * 2)
        with torch.no_grad():
            return editor.inverted(latents, states).nulls

    once = nulls(num_inner_steps=1)
    torch.testing.assert_close(nulls(early_stop=1e9), once, rtol=0, atol=0)
    assert not torch.equal(nulls(early_stop=0), once)


def test_an_image_is_inverted_once_for_all_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    for editor in (null_text(), EdictEditor(EdictOptions(model=pipeline(), num_inference_steps=3))):
        invert, calls = editor.inverted, []

        def counted(*given: Any, invert: Any = invert, calls: list[int] = calls) -> Any:
            calls.append(1)
            return invert(*given)

        monkeypatch.setattr(editor, "inverted", counted)
        requests = [request(), request(edited_caption="", image=picture())] * 4
        images = editor.edit(requests)
        assert len(calls) == 1
        assert images[0].tobytes() == images[2].tobytes() != images[1].tobytes()


# -- prompt-to-prompt ------------------------------------------------------------------------------


def spelled(text: str) -> list[int]:
    """A token for each letter."""
    return [ord(letter) for letter in text if letter != " "]


def sources(caption: str, edited: str, tokens: int = 12) -> list[str]:
    """For each token of the edited caption, the tokens of the caption that it looks to."""
    weights, kept = align(caption, edited, spelled, tokens)
    names = ["<", *caption.replace(" ", ""), ">", *"." * tokens][:tokens]
    return [
        "".join(name for name, weight in zip(names, column, strict=True) if weight)
        if keeps
        else "-"
        for column, keeps in zip(weights.T, kept, strict=True)
    ]


@pytest.mark.parametrize(
    ("caption", "edited", "expected"),
    [
        ("a bee", "a bee", ["<", "a", "b", "e", "e", ">", *"......"]),
        ("a bee", "a cow", ["<", "a", "b", "e", "e", ">", *"......"]),
        # A word of another length: all its tokens share the word's attention.
        ("a ox", "a cow", ["<", "a", "ox", "ox", "ox", ">", *"......"]),
        ("a cow", "a ox", ["<", "a", "cow", "cow", ">", *"......."]),
        # More words: what is new attends by itself.
        ("a bee", "a shy bee", ["<", "a", "-", "-", "-", "b", "e", "e", ">", *"..."]),
        # Longer than there is room.
        ("a bee", "a bee on a daisy", ["<", "a", "b", "e", "e", *"-------"]),
    ],
)
def test_alignment(caption: str, edited: str, expected: list[str]) -> None:
    assert sources(caption, edited) == expected


@pytest.mark.parametrize("edited", ["a bee", "a cow", "a ladybird"])
def test_replaced_words_get_all_the_attention_of_the_old_ones(edited: str) -> None:
    weights, _ = align("a bee", edited, spelled, 20)
    assert torch.allclose(weights[:3].sum(1), torch.ones(3))


def forward(processor: Any, injected: dict[str, bool] | None) -> torch.Tensor:
    """What a random UNet says of three parts, one row each."""
    torch.manual_seed(0)
    unet = tiny_unet(4).eval()
    unet.set_attn_processor(processor)
    latents, states = torch.randn(3, 4, 8, 8), torch.randn(3, TOKENS, 16)
    with torch.no_grad():
        if injected is None:
            return unet(latents, 500, states).sample
        same = align("a bee", "a bee", spelled, TOKENS)
        with processor.injecting([same], **injected):
            return unet(latents, 500, states).sample


@pytest.mark.parametrize("injected", [None, {"in_cross": False, "in_self": False}])
def test_where_nothing_is_handed_over_attention_is_plain(injected: dict[str, bool] | None) -> None:
    plain = forward(AttnProcessor2_0(), None)
    torch.testing.assert_close(forward(PromptToPrompt(), injected), plain)


@pytest.mark.parametrize("injected", [{"in_cross": True}, {"in_self": True}])
def test_only_the_edited_part_is_changed(injected: dict[str, bool]) -> None:
    plain = forward(AttnProcessor2_0(), None)
    changed = forward(PromptToPrompt(), {"in_cross": False, "in_self": False} | injected)
    torch.testing.assert_close(changed[[0, 2]], plain[[0, 2]])
    assert (changed[1] - plain[1]).abs().max() > 1e-4
