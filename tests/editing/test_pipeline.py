from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from reasonpix.editing.checkpoint import LoadedModel
from reasonpix.editing.config import ConnectorKind
from reasonpix.editing.pipeline import CPU_ROWS, EditTask, ReasonPix2Pix
from reasonpix.editing.pipeline_parts import working_image, working_size
from reasonpix.editing.sampler import GuidanceBranches
from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.components import MLLMEncoder, Options
from reasonpix.plugin.fakes import FakeEncoder
from reasonpix.plugin.types import Problem
from tests.support.tiny_model import RESOLUTION, tiny_model, tiny_scheduler, write_tiny

# Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GUIDED = {"guidance_scale": 4.0, "image_guidance_scale": 1.5}


def picture(seed: int = 0, size: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> Image.Image:
    """Random blobs."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


class OwnText(MLLMEncoder[Options]):
    """The text encoder of the model itself, as InstructPix2Pix has it."""

    name: ClassVar[str] = "own-text"

    def __init__(self, checkpoint: LoadedModel) -> None:
        super().__init__(Options())
        self.text = checkpoint.model.text

    def encode(
        self, images: Sequence[Image.Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        return [self.text([words])[0].numpy() for words in instructions]


class Picky(FakeEncoder):
    """Declines what it is told to decline."""

    def encode(
        self, images: Sequence[Image.Image], instructions: Sequence[str]
    ) -> list[NDArray[np.float32] | Problem]:
        states = super().encode(images, instructions)
        for number, words in enumerate(instructions):
            if "declined" in words:
                states[number] = Problem(status="rejected", reason="this is declined")
        return states


def editing(
    kind: ConnectorKind = "text_tokens", encoder: MLLMEncoder[Any] | None = None, **options: Any
) -> ReasonPix2Pix:
    checkpoint = tiny_model(kind, **options)
    if encoder is None:
        encoder = OwnText(checkpoint) if kind == "identity" else Picky(Options())
    return ReasonPix2Pix(
        checkpoint, encoder, device=torch.device("cpu"), dtype=torch.float32, batch_size=8
    )


@pytest.fixture(scope="module")
def model() -> ReasonPix2Pix:
    return editing()


def different(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


# -- the same as diffusers -----------------------------------------------------------------------

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DDPMScheduler": {"clip_sample": False},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}
MINI = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def by_diffusers(
    checkpoint: LoadedModel, encoder: MLLMEncoder[Any], tasks: Sequence[EditTask], **settings: Any
) -> list[Image.Image]:
    """What diffusers' pipeline makes of images in the working size, from the same noise."""
    pipeline = StableDiffusionInstructPix2PixPipeline(
        checkpoint.vae, None, None, checkpoint.model.unet, checkpoint.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(task.seed) for task in tasks]
    width, height = tasks[0].image.size
    noise = [torch.randn(1, 4, height // 4, width // 4, generator=it) for it in generators]
    words = [task.instruction for task in tasks]
    h = encoder.encode([task.image for task in tasks], words)
    with torch.inference_mode():
        given = checkpoint.model.condition([torch.from_numpy(one) for one in h], words)
    assert given.mask is None or given.mask.all(), "diffusers' pipeline takes no mask"
    return pipeline(
        image=[task.image for task in tasks],
        prompt_embeds=given.states,
        negative_prompt_embeds=checkpoint.model.uncond_states.expand(len(tasks), -1, -1),
        latents=torch.cat(noise),
        generator=generators,
        **settings,
    ).images


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [*SCHEDULERS.items(), ("DDIMScheduler", MINI)],
    ids=[*SCHEDULERS, "v-prediction"],
)
def test_parity_with_diffusers(scheduler: str, options: dict[str, Any]) -> None:
    checkpoint = tiny_model("query_resampler", tiny_scheduler(scheduler, **options))
    encoder = FakeEncoder(Options())
    ours = ReasonPix2Pix(checkpoint, encoder, device=torch.device("cpu"), dtype=torch.float32)
    words = ("make it rain", "it is late", "no")
    tasks = [EditTask(picture(i, (32, 24)), words[i], seed=7 + i) for i in range(3)]
    sampled = GUIDED | {"num_inference_steps": 4}
    theirs = by_diffusers(checkpoint, encoder, tasks, **sampled)
    results = ours([t.image for t in tasks], words, seed=[t.seed for t in tasks], **sampled)
    for one, other in zip(results, theirs, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
        assert different(one, other) < 0.01
    assert different(results[0], picture(0, (32, 24))) > 5, "and it is no copy"


@pytest.mark.parametrize("kind", ["identity", "text_tokens", "full_sequence", "clip_residual"])
def test_parity_by_other_connectors(kind: ConnectorKind) -> None:
    checkpoint = tiny_model(kind)
    encoder = OwnText(checkpoint) if kind == "identity" else FakeEncoder(Options())
    ours = ReasonPix2Pix(checkpoint, encoder, device=torch.device("cpu"), dtype=torch.float32)
    task = EditTask(picture(3), "a b c d e f g h i j k l", seed=1)  # no token is padding
    (theirs,) = by_diffusers(checkpoint, encoder, [task], num_inference_steps=3, **GUIDED)
    (result,) = ours([task.image], task.instruction, seed=1, **GUIDED)
    assert np.abs(np.asarray(result, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("scales", [(1.0, 1.0), (5.0, 1.0), (3.0, 3.0), (1.2, 2.0)])
def test_parity_where_predictions_are_left_out(scales: tuple[float, float]) -> None:
    checkpoint = tiny_model("query_resampler")
    encoder = FakeEncoder(Options())
    ours = ReasonPix2Pix(checkpoint, encoder, device=torch.device("cpu"), dtype=torch.float32)
    task = EditTask(picture(4), "make it rain", seed=2)
    guided = {"guidance_scale": scales[0], "image_guidance_scale": scales[1]}
    (theirs,) = by_diffusers(checkpoint, encoder, [task], num_inference_steps=3, **guided)
    (result,) = ours([task.image], task.instruction, seed=2, **guided)
    assert np.abs(np.asarray(result, int) - np.asarray(theirs, int)).max() <= 1


# -- guidance ------------------------------------------------------------------------------------

scales = st.one_of(st.sampled_from([0.0, 1.0, 1.5, 7.5]), st.floats(0, 20))


@given(scales, scales)
def test_the_sum_is_the_guidance_of_instruct_pix2pix(s_t: float, s_i: float) -> None:
    branches = GuidanceBranches.of(s_t, s_i)
    both, image, none = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    predictions = {(True, True): both, (False, True): image, (False, False): none}
    made = [predictions[pair] for pair in zip(branches.text, branches.image, strict=True)]
    expected = none + s_i * (image - none) + s_t * (both - image)
    torch.testing.assert_close(branches.guided(torch.cat(made)), expected)
    assert 0 not in branches.weights


def test_only_what_counts_is_predicted() -> None:
    assert len(GuidanceBranches.of(7.5, 1.5).weights) == 3
    assert GuidanceBranches.of(1, 1) == GuidanceBranches((1,), (True,), (True,))
    assert GuidanceBranches.of(7.5, 1).text == (True, False)
    assert GuidanceBranches.of(1.5, 1.5).image == (True, False)
    assert GuidanceBranches.of(0, 0) == GuidanceBranches((1,), (False,), (False,))


def test_each_thing_that_should_count_counts(model: ReasonPix2Pix) -> None:
    (plain,) = model([picture()], "make it rain", **GUIDED)
    changed = {
        "image": model([picture(1)], "make it rain", **GUIDED),
        "instruction": model([picture()], "it is late", **GUIDED),
        "seed": model([picture()], "make it rain", seed=1, **GUIDED),
        "guidance_scale": model(
            [picture()], "make it rain", guidance_scale=1, image_guidance_scale=1.5
        ),
        "image_guidance_scale": model(
            [picture()], "make it rain", guidance_scale=4, image_guidance_scale=1
        ),
        "steps": model([picture()], "make it rain", num_inference_steps=5, **GUIDED),
        "resolution": model([picture()], "make it rain", resolution=48, **GUIDED),
    }
    for what, (other,) in changed.items():
        assert different(plain, other) > 0.5, what


def test_without_instruction_guidance_the_instruction_does_not_count(model: ReasonPix2Pix) -> None:
    one, other = model([picture()] * 2, ["make it rain", "it is late"], guidance_scale=0)
    assert one.tobytes() == other.tobytes()


# -- an edit depends on itself alone -------------------------------------------------------------

OTHERS = [
    ("make it rain", (32, 32)),
    ("it got late", (32, 32)),
    ("a b c d e f g h i j k l m n o", (32, 32)),
    ("no", (20, 50)),
    ("cold", (64, 64)),
    ("warm and quiet", (100, 40)),
    ("quiet", (31, 33)),
]
"""Lengths of h, and sizes, of all kinds; most share a batch."""


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("text_tokens", "EulerAncestralDiscreteScheduler"),
        ("query_resampler", "DDIMScheduler"),
        ("full_sequence", "HeunDiscreteScheduler"),
        ("clip_residual", "DDPMScheduler"),
        ("identity", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_alone_among_others_and_in_any_order(kind: ConnectorKind, scheduler: str) -> None:
    ours = editing(kind, scheduler=tiny_scheduler(scheduler))
    images = [picture(i, size) for i, (_, size) in enumerate(OTHERS)]
    words = [text for text, _ in OTHERS]
    seeds = list(range(5, 5 + len(OTHERS)))
    together = [it.tobytes() for it in ours(images, words, seed=seeds, **GUIDED)]
    alone = [
        ours([image], text, seed=seed, **GUIDED)[0].tobytes()
        for image, text, seed in zip(images, words, seeds, strict=True)
    ]
    assert alone == together
    order = np.random.default_rng(0).permutation(len(OTHERS)).tolist()
    permuted = ours(
        [images[i] for i in order], [words[i] for i in order], seed=[seeds[i] for i in order],
        **GUIDED,
    )  # fmt: skip
    assert [it.tobytes() for it in permuted] == [together[i] for i in order]


@settings(max_examples=15)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_any_batch_gives_the_same(model: ReasonPix2Pix, order: list[int], count: int) -> None:
    chosen = order[:count]
    words = [f"edit number {i}" for i in chosen]
    results = model([picture(i) for i in chosen], words, seed=chosen, num_inference_steps=1)
    for i, result in zip(chosen, results, strict=True):
        assert result.tobytes() == alone(model, i)


@cache
def alone(model: ReasonPix2Pix, number: int) -> bytes:
    (result,) = model(
        [picture(number)], f"edit number {number}", seed=number, num_inference_steps=1
    )
    return result.tobytes()


def test_the_same_image_may_come_with_many_seeds(model: ReasonPix2Pix) -> None:
    image = picture()
    many = model([image] * 6, "make it rain", seed=range(6))
    assert len({it.tobytes() for it in many}) == 6
    (fourth,) = model([picture()], "make it rain", seed=3)
    assert many[3].tobytes() == fourth.tobytes()


def test_tasks_are_taken_as_there_is_room(model: ReasonPix2Pix) -> None:
    taken = 0

    def endless() -> Iterator[EditTask]:
        nonlocal taken
        while True:
            taken += 1
            yield EditTask(picture(taken), "make it rain", taken)

    results = model.edit(endless(), model.resolve_settings(num_inference_steps=1))
    numbers = [next(results)[0] for _ in range(CPU_ROWS)]
    assert numbers == list(range(CPU_ROWS))
    assert taken < 20


def test_progress_adds_up_to_the_edits(model: ReasonPix2Pix) -> None:
    steps: list[float] = []
    tasks = [EditTask(picture(i), "make it rain", i) for i in range(5)]
    done = list(model.edit(tasks, model.resolve_settings(num_inference_steps=2), steps.append))
    assert len(done) == 5
    assert steps == [2, 2, 0.5, 0.5]
    steps.clear()
    twice = editing(scheduler=tiny_scheduler("HeunDiscreteScheduler"))
    list(twice.edit(tasks[:1], twice.resolve_settings(num_inference_steps=2), steps.append))
    assert sum(steps) == pytest.approx(1)


# -- sizes and modes -----------------------------------------------------------------------------


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.integers(8, 1024),
    st.sampled_from([8, 16, 64]),
)
def test_the_working_size(size: tuple[int, int], resolution: int, stride: int) -> None:
    width, height = working_size(size, resolution, stride)
    assert width % stride == height % stride == 0
    longer, shorter = max(width, height), min(width, height)
    assert shorter >= stride
    assert longer == stride or abs(longer - resolution) <= stride / 2
    if size[0] != size[1] and width != height:
        assert (width > height) == (size[0] > size[1])
    if shorter > stride:  # or it had to be widened
        exact = min(size) / max(size) * resolution
        assert abs(shorter - exact) <= stride / 2


def test_the_working_size_of_usual_photographs() -> None:
    assert working_size((256, 256), 256, 64) == (256, 256)
    assert working_size((4000, 3000), 256, 64) == (256, 192)
    assert working_size((1080, 1920), 512, 64) == (256, 512)
    assert working_size((1080, 1900), 512, 64) == (320, 512)
    assert working_size((10, 4000), 256, 64) == (64, 256)


@pytest.mark.parametrize("size", [(40, 40), (64, 48), (48, 64), (128, 72), (126, 54), (300, 20)])
def test_the_model_works_on_the_whole_image(size: tuple[int, int]) -> None:
    image = picture(0, size)
    shown = working_image(image, 32, 8)
    expected = image.resize(working_size(size, 32, 8), Image.Resampling.LANCZOS)
    assert shown.size == expected.size and shown.tobytes() == expected.tobytes()
    assert working_image(shown, 32, 8) is shown
    for x, y in ((0, 0), (size[0] - 1, size[1] - 1)):
        edge = image.copy()
        edge.paste((255, 0, 0), (max(0, x - 4), max(0, y - 4), x + 1, y + 1))
        assert working_image(edge, 32, 8).tobytes() != shown.tobytes()


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 90), (500, 3), (33, 31), (RESOLUTION, RESOLUTION), (200, 120)]
)
def test_any_size_comes_back(model: ReasonPix2Pix, size: tuple[int, int]) -> None:
    (edited,) = model([picture(0, size)], "make it rain", num_inference_steps=1)
    assert (edited.size, edited.mode) == (size, "RGB")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_any_mode_is_edited_as_what_is_seen(model: ReasonPix2Pix, mode: str) -> None:
    if mode == "I;16":
        grey = np.asarray(picture().convert("L"))
        image, seen = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey)
    elif mode in ("LA", "RGBA"):
        image = picture().convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        white = Image.new("RGBA", image.size, "white")
        seen = Image.alpha_composite(white, image.convert("RGBA"))
    else:
        image = seen = picture().convert(mode)
    before = image.tobytes()
    edited, expected = model([image, seen.convert("RGB")], "make it rain")
    assert edited.tobytes() == expected.tobytes()
    assert (image.tobytes(), image.mode) == (before, mode)


# -- what goes wrong -----------------------------------------------------------------------------


def test_problems_stand_in_the_place_of_their_task(model: ReasonPix2Pix) -> None:
    floats = Image.fromarray(np.zeros((9, 9), np.float32))
    lost = Problem(status="failed", reason="it was lost")
    tasks: list[EditTask | Problem] = [
        EditTask(picture(), "this is declined"),
        EditTask(picture(), "make it rain"),
        EditTask(picture(), "  "),
        EditTask(floats, "make it rain"),
        lost,
        EditTask(picture(1), "make it rain"),
    ]
    results = dict(model.edit(tasks, model.resolve_settings(num_inference_steps=1)))
    assert {number: it.reason for number, it in results.items() if isinstance(it, Problem)} == {
        0: "this is declined",
        2: "the instruction is empty",
        3: "its greys are not 8-bit or 16-bit integers; convert it to 8 bits",
        4: "it was lost",
    }
    assert sorted(results) == list(range(6))
    (alone,) = model([picture(1)], "make it rain", num_inference_steps=1)
    assert results[5].tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": -1}, "guidance_scale: input should be greater than or equal to 0"),
        ({"image_guidance_scale": float("nan")}, "image_guidance_scale: input should be"),
        ({"num_inference_steps": 0}, "num_inference_steps: input should be greater"),
        ({"num_inference_steps": 1001}, "1001 steps exceed the 1000"),
        ({"resolution": 2}, "resolution: input should be greater"),
        ({"seed": [1, 2]}, "1 images, 1 instructions and 2 seeds"),
    ],
)
def test_settings_that_make_no_sense(
    model: ReasonPix2Pix, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ReasonpixError, match=message):
        model([picture()], ["make it rain"], **arguments)


def test_a_path_is_not_an_image(model: ReasonPix2Pix) -> None:
    with pytest.raises(ReasonpixError, match="expected PIL images, got str"):
        model("scene.png", "make it rain")  # type: ignore[arg-type]


def test_steps_that_a_scheduler_cannot_take() -> None:
    ours = editing(scheduler=tiny_scheduler("PNDMScheduler"))  # its Runge-Kutta steps need four
    with pytest.raises(ReasonpixError, match="PNDMScheduler cannot take 3: "):
        ours([picture()], "make it rain", num_inference_steps=3)
    ours([picture()], "make it rain", num_inference_steps=4)


class Full(DDIMScheduler):
    """A step that no memory is left for."""

    def step(self, *arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out() -> None:
    ours = editing(scheduler=Full())
    told = f"memory ran out while editing {CPU_ROWS} images of 32x16 pixels at once; lower the"
    with pytest.raises(ReasonpixError, match=told):
        ours([picture(0, (320, 160))], "make it rain")


def test_one_that_cannot_be_edited_is_named(model: ReasonPix2Pix) -> None:
    with pytest.raises(ReasonpixError, match="image 1: this is declined"):
        model([picture(), picture()], ["make it rain", "this is declined"])


def test_nothing_to_edit(model: ReasonPix2Pix) -> None:
    assert model([], []) == []
    assert model([], "make it rain") == []


def test_another_encoder_is_found_out() -> None:
    checkpoint = tiny_model("text_tokens")
    ours = editing("text_tokens", OwnText(checkpoint))
    with pytest.raises(WeightsError, match=r"gives states of width 16, and the .* reads 8"):
        ours([picture()], "make it rain")


# -- from a folder -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text_tokens", "clip_residual"])
def test_a_folder_gives_the_same(tmp_path: Path, kind: ConnectorKind) -> None:
    folder = write_tiny(tmp_path / "tiny", kind, guidance_scale=3.0, num_inference_steps=2)
    ours = ReasonPix2Pix.from_pretrained(folder, device="cpu")
    assert ours.settings.guidance_scale == 3
    (edited,) = ours([picture()], "make it rain", seed=4)
    (expected,) = editing(kind, guidance_scale=3.0, num_inference_steps=2)(
        [picture()], "make it rain", seed=4
    )
    assert edited.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["text_tokens", "clip_residual"])
def test_half_precision_is_near(tmp_path: Path, kind: ConnectorKind) -> None:
    folder = write_tiny(tmp_path / "tiny", kind, num_inference_steps=2)
    (half,) = ReasonPix2Pix.from_pretrained(folder, device="cpu", dtype="bfloat16")(
        [picture()], "make it rain", **GUIDED
    )
    (full,) = ReasonPix2Pix.from_pretrained(folder, device="cpu")(
        [picture()], "make it rain", **GUIDED
    )
    assert 0 < different(half, full) < 10


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="device: 'cuda:99' cannot be used: "):
        ReasonPix2Pix.from_pretrained(tmp_path, device="cuda:99")
    with pytest.raises(WeightsError, match="device: 'gpu' cannot be used: "):
        ReasonPix2Pix.from_pretrained(tmp_path, device="gpu")


def test_a_model_that_is_not_named() -> None:
    model: Any = None
    with pytest.raises(
        WeightsError, match=r"^None is not a model; give a folder, a hub id or a name$"
    ):
        ReasonPix2Pix.from_pretrained(model)
