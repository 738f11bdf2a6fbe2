"""The plugin `gligen`: its geometry, its sampler, and edits by the mini checkpoint."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from reasonpix_gligen import Gligen, GligenOptions
from reasonpix_gligen.geometry import Window, cells, too_small
from reasonpix_mini import world

from reasonpix.errors import WeightsError
from reasonpix.plugin.edits import EditRequest
from reasonpix.plugin.testing import EditorContract
from reasonpix.plugin.types import Box, Problem
from tests.support.tiny_model import overwrite_number

MINI = Path(str(resources.files("reasonpix_mini"))) / "checkpoints" / "gligen"
QUICK: dict[str, Any] = {
    "model": str(MINI),
    "device": "cpu",
    "num_inference_steps": 3,
    "guidance_scale": 1.5,
    "batch_size": 4,
}


def loaded(**options: Any) -> Gligen:
    editor = Gligen(GligenOptions(**QUICK | options))
    editor.load()
    return editor


@pytest.fixture(scope="module")
def editor() -> Gligen:
    return loaded()


def request_for(
    image: Image.Image,
    box: tuple[float, float, float, float],
    target: str = "rabbit",
    seed: int = 0,
    **other: Any,
) -> EditRequest:
    sized = Box(
        **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)),
        width=image.width,
        height=image.height,
    )
    words = {
        "selected": "bee",
        "target": target,
        "caption": "a bee",
        "edited_caption": f"a {target}",
    }
    return EditRequest(image, sized, seed=seed, **words | other)


def replacement(index: int, target: str | None = None) -> tuple[EditRequest, np.ndarray]:
    """Test scene `index`, its first object to be replaced, and the rendered ground truth."""
    scene = world.scene("test", index)
    old = scene.placements[0]
    group = [c.name for c in world.categories().values() if c.name != old.category]
    new = target or group[index % len(group)]
    request = request_for(
        Image.fromarray(scene.render()),
        old.box,
        new,
        seed=index,
        selected=old.category,
        caption=scene.caption,
    )
    return request, scene.replaced(0, new).render()


class TestContract(EditorContract):
    component = Gligen
    options: ClassVar = QUICK | {"num_inference_steps": 2}


# Geometry

sides = st.integers(16, 700)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    width, height = draw(sides), draw(sides)

    def interval(length: int) -> list[float]:
        ends = st.tuples(st.floats(0, length), st.floats(0, length))
        return sorted(draw(ends.filter(lambda pair: abs(pair[0] - pair[1]) > 0.1)))

    (x0, x1), (y0, y1) = interval(width), interval(height)
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, width=width, height=height)


@given(boxes())
def test_a_window_lies_in_the_image_and_holds_the_box(box: Box) -> None:
    window = Window.around(box)
    x0, y0, x1, y1 = box.pixels()
    assert 0 <= window.left <= x0 and x1 <= window.right <= box.width
    assert 0 <= window.top <= y0 and y1 <= window.bottom <= box.height
    short = min(box.width, box.height)
    assert window.size == (max(short, x1 - x0), max(short, y1 - y0))


@given(boxes())
def test_shares_map_back_to_the_box(box: Box) -> None:
    window = Window.around(box)
    shares = window.shares(box)
    assert all(0 <= share <= 1 for share in shares)
    width, height = window.size
    back = (
        window.left + shares[0] * width,
        window.top + shares[1] * height,
        window.left + shares[2] * width,
        window.top + shares[3] * height,
    )
    assert back == pytest.approx(box.xyxy, abs=1e-6)


@given(boxes(), st.integers(4, 128))
def test_cells_cover_the_box_and_no_more_than_they_must(box: Box, side: int) -> None:
    shares = Window.around(box).shares(box)
    x0, y0, x1, y1 = cells(shares, side)
    assert 0 <= x0 < x1 <= side and 0 <= y0 < y1 <= side
    for cell, share in ((x0, shares[0]), (y0, shares[1])):
        assert cell / side <= share + 1e-6 and share < (cell + 1) / side + 1e-6
    for cell, share in ((x1, shares[2]), (y1, shares[3])):
        assert share <= cell / side + 1e-6 and (cell - 1) / side < share + 1e-6


def test_a_square_image_is_seen_whole_and_unchanged() -> None:
    image = Image.fromarray(world.scene("test", 0).render())
    window = Window.around(Box(x0=3, y0=5, x1=20, y1=20, width=64, height=64))
    assert window == Window(0, 0, 64, 64)
    assert window.cut(image, 64).tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (101, 37), (33, 97), (640, 211)])
def test_what_is_painted_lands_in_the_box_of_any_image(size: tuple[int, int]) -> None:
    """A square that is red where the box is and blue elsewhere must give exactly a red box."""
    image = Image.new("RGB", size, "white")
    width, height = size
    box = Box(x0=width * 0.4, y0=4, x1=width * 0.9, y1=height - 8, width=width, height=height)
    window = Window.around(box)
    square = Image.new("RGB", (64, 64), "blue")
    x0, y0, x1, y1 = window.shares(box)
    square.paste("red", tuple(round(64 * share) for share in (x0, y0, x1, y1)))
    pixels = np.asarray(window.paste(image, square, box)).astype(int)
    left, top, right, bottom = box.pixels()
    middle = pixels[(top + bottom) // 2, (left + right) // 2]
    assert tuple(middle) == (255, 0, 0)
    inside = pixels[top:bottom, left:right]
    assert (inside[..., 0] > 127).mean() > 0.75
    pixels[top:bottom, left:right] = 255
    assert (pixels == 255).all()


def test_boxes_that_vanish_in_the_latents_are_too_small() -> None:
    assert too_small((0.5, 0.1, 0.5 + 1 / 65, 0.9))
    assert not too_small((0.5, 0.1, 0.5 + 1 / 64, 0.9))


# The words


@pytest.mark.parametrize("prompt", ["{category}", "{}", "{target.name}", "{target"])
def test_prompts_that_cannot_be_filled_are_refused(prompt: str) -> None:
    with pytest.raises(ValidationError, match="may only use"):
        GligenOptions(prompt=prompt)


# Edits


def test_an_edit_does_not_depend_on_its_batch(editor: Gligen) -> None:
    requests = [replacement(index)[0] for index in range(9)]
    together = [image.tobytes() for image in editor.edit(requests)]
    assert len(set(together)) == len(together)
    assert [editor.edit([request])[0].tobytes() for request in requests[:3]] == together[:3]
    order = [4, 8, 1, 7, 0, 2]
    mixed = [image.tobytes() for image in editor.edit([requests[number] for number in order])]
    assert mixed == [together[number] for number in order]


def test_an_edit_does_not_depend_on_the_batch_size(editor: Gligen) -> None:
    requests = [replacement(index)[0] for index in range(5)]
    expected = [image.tobytes() for image in editor.edit(requests)]
    for size in (1, 8):
        edited = loaded(batch_size=size).edit(requests)
        assert [image.tobytes() for image in edited] == expected


def test_an_edit_does_not_depend_on_the_threads(editor: Gligen) -> None:
    request, _ = replacement(3)
    before = torch.get_num_threads()
    try:
        images = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            images.append(editor.edit([request])[0].tobytes())
    finally:
        torch.set_num_threads(before)
    assert images[0] == images[1]


def test_the_seed_decides(editor: Gligen) -> None:
    image = Image.fromarray(world.scene("test", 1).render())
    first, second, again = editor.edit(
        [request_for(image, (8, 8, 50, 50), seed=seed) for seed in (1, 2, 1)]
    )
    assert first.tobytes() == again.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (64, 64)), ("RGB", (101, 37)), ("L", (33, 97)), ("RGBA", (150, 131))]
)
def test_outside_the_box_nothing_changes(editor: Gligen, mode: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").convert(mode)
    box = (size[0] * 0.31, size[1] * 0.2, size[0] * 0.77, size[1] * 0.8)
    request = request_for(image, box)
    (edited,) = editor.edit([request])
    assert isinstance(edited, Image.Image)
    assert (edited.mode, edited.size) == ("RGB", size)
    before, after = np.array(image.convert("RGB")), np.array(edited)
    x0, y0, x1, y1 = request.box.pixels()
    assert (before[y0:y1, x0:x1] != after[y0:y1, x0:x1]).mean() > 0.5
    before[y0:y1, x0:x1] = after[y0:y1, x0:x1]
    assert (before == after).all()


def test_a_box_of_nothing_is_rejected_and_its_neighbours_are_edited(editor: Gligen) -> None:
    good, _ = replacement(0)
    wide = Image.new("RGB", (640, 320), "grey")
    small = request_for(wide, (10, 10, 14.9, 200))
    foreign = EditRequest(wide, good.box, "bee", "rabbit", "a bee", "a rabbit", 0)
    edited, rejected, failed, again = editor.edit([good, small, foreign, good])
    assert isinstance(edited, Image.Image) and isinstance(again, Image.Image)
    assert edited.tobytes() == again.tobytes()
    assert isinstance(rejected, Problem) and rejected.status == "rejected"
    assert "4.9x190 pixels is under 1/64 of the 320x320" in rejected.reason
    assert isinstance(failed, Problem) and failed.status == "failed"
    assert "belongs to an image of 64x64" in failed.reason


@pytest.mark.parametrize(
    ("part", "tensor", "value"),
    [
        ("unet", "conv_in.bias", float("nan")),
        ("unet", "position_net.linears.0.bias", float("inf")),
        ("vae", "decoder.conv_out.bias", float("nan")),
    ],
)
def test_what_is_not_finite_is_a_problem(
    part: str, tensor: str, value: float, tmp_path: Path
) -> None:
    folder = shutil.copytree(MINI, tmp_path / "gligen")
    overwrite_number(folder / part, tensor, value)
    request, _ = replacement(0)
    small = request_for(Image.new("RGB", (640, 320)), (10, 10, 14.9, 200))
    failed, rejected = loaded(model=str(folder)).edit([request, small])
    assert isinstance(failed, Problem) and failed.status == "failed"
    assert "the network's output is not finite" in failed.reason
    assert isinstance(rejected, Problem) and rejected.status == "rejected"


def test_the_prompt_is_the_edited_caption(editor: Gligen) -> None:
    image = Image.fromarray(world.scene("test", 5).render())
    [asked] = editor.edit([request_for(image, (8, 8, 40, 40), edited_caption="a rabbit and a bee")])
    spelled = loaded(prompt="a rabbit and a bee")
    [same] = spelled.edit([request_for(image, (8, 8, 40, 40), edited_caption="a donut")])
    [other] = editor.edit([request_for(image, (8, 8, 40, 40), edited_caption="a donut")])
    assert asked.tobytes() == same.tobytes() != other.tobytes()


def test_the_phrase_and_the_box_alone_decide_what_is_drawn() -> None:
    """With an empty prompt, the edit is nearer to its own ground truth than to another's."""
    editor = loaded(prompt="", num_inference_steps=8)
    image = Image.fromarray(world.scene("test", 5).render())
    scene = world.scene("test", 5)
    names = ["rocket", "watermelon", "penguin", "sunflower"]
    edits = editor.edit([request_for(image, scene.placements[0].box, name) for name in names])
    truths = [scene.replaced(0, name).render().astype(float) for name in names]
    for number, edit in enumerate(edits):
        distances = [float(((np.asarray(edit) - truth) ** 2).mean()) for truth in truths]
        assert int(np.argmin(distances)) == number


def test_other_resolutions_and_latents_fit(tmp_path: Path) -> None:
    """Nothing is made for 64 px, four latent channels or f = 4: 48 px, three channels, f = 2."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    model = shutil.copytree(MINI, tmp_path / "gligen")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=3,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=48,
    ).save_pretrained(model / "vae")
    text = json.loads((model / "text_encoder" / "config.json").read_text())
    UNet2DConditionModel(
        sample_size=24,
        in_channels=7,
        out_channels=3,
        attention_type="gated",
        cross_attention_dim=text["hidden_size"],
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(model / "unet")
    editor = loaded(model=str(model))
    requests = [replacement(index)[0] for index in range(3)]
    together = [image.tobytes() for image in editor.edit(requests)]
    assert [editor.edit([request])[0].tobytes() for request in requests] == together
    assert all(
        image != request.image.tobytes() for image, request in zip(together, requests, strict=True)
    )


# The trajectory, against diffusers


def without_posterior_variance(model: Path) -> None:
    """Change the VAE so that samples of its posterior equal the mode, up to rounding."""
    import diffusers

    vae = diffusers.AutoencoderKL.from_pretrained(model, subfolder="vae")
    with torch.no_grad():
        vae.quant_conv.weight.chunk(2)[1].zero_()
        vae.quant_conv.bias.chunk(2)[1].fill_(-30)  # the logarithm of the variance
    vae.save_pretrained(model / "vae")


def contiguous_images() -> Any:
    """For the pipeline, whose noise follows the memory order of the image's tensor."""
    from diffusers.image_processor import VaeImageProcessor

    class Contiguous(VaeImageProcessor):
        def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().preprocess(image, *args, **kwargs).contiguous()

    return Contiguous(do_convert_rgb=True)


# diffusers' Euler scheduler converts tensors in a way that NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "beta", "guidance_scale"),
    [
        ("DDIMScheduler", 1.0, 1.5),
        ("PNDMScheduler", 0.5, 3.0),
        ("EulerDiscreteScheduler", 1.0, 1.0),
    ],
)
def test_the_trajectory_is_that_of_diffusers(
    tmp_path: Path, scheduler: str, beta: float, guidance_scale: float
) -> None:
    """The same noise through `StableDiffusionGLIGENPipeline` gives the same latents at the end.

    The pipeline samples the input's latents, we take the mode: the VAE must make both equal.
    """
    import diffusers
    from reasonpix_gligen.sampler import Sampler, Task

    model = shutil.copytree(MINI, tmp_path / "gligen")
    without_posterior_variance(model)
    if scheduler != "DDIMScheduler":
        other = getattr(diffusers, scheduler)(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        )
        other.save_pretrained(model / "scheduler")
    steps = 6
    options = GligenOptions(
        **QUICK
        | {
            "model": str(model),
            "batch_size": 1,
            "num_inference_steps": steps,
            "beta": beta,
            "guidance_scale": guidance_scale,
        }
    )
    sampler = Sampler(options)
    image = Image.fromarray(world.scene("test", 2).render())
    # On the latent grid: the pipeline floors the box's far sides and so repaints less of others.
    task = Task(image, (0.25, 0.125, 0.75, 0.875), "a rabbit", "a rabbit and a tree", seed=3)
    with torch.inference_mode():
        ours = sampler.latents([task])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline warns that it is deprecated
        pipeline = diffusers.StableDiffusionGLIGENPipeline(
            vae=diffusers.AutoencoderKL.from_pretrained(model, subfolder="vae"),
            text_encoder=sampler._text_encoder,
            tokenizer=sampler._tokenizer,
            unet=diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet"),
            scheduler=sampler._scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.image_processor = contiguous_images()
        # The pipeline draws from torch's own generator: for the posterior's sample, which takes
        # the place of our initial latents, then for each step.
        first = torch.randn(ours.shape, generator=torch.Generator().manual_seed(task.seed))
        torch.manual_seed(task.seed)
        theirs = pipeline(
            prompt=task.prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            gligen_scheduled_sampling_beta=beta,
            gligen_phrases=[task.phrase],
            gligen_boxes=[list(task.box)],
            gligen_inpaint_image=image,
            latents=first,
            output_type="latent",
        ).images
    x0, y0, x1, y1 = cells(task.box, ours.shape[-1])
    inside = (slice(None), slice(None), slice(y0, y1), slice(x0, x1))
    assert theirs.shape == ours.shape
    assert theirs[inside].std() > 0.1
    assert torch.allclose(ours[inside], theirs[inside], atol=1e-4, rtol=1e-4)


# What can go wrong


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no folder"):
        loaded(model=str(tmp_path / "nothing"))


# diffusers passes on an argument that huggingface_hub has deprecated.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_a_hub_that_cannot_be_reached_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        loaded(model="nobody/gligen", cache_dir=tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_part_is_named(tmp_path: Path, part: str) -> None:
    model = shutil.copytree(MINI, tmp_path / "gligen")
    shutil.rmtree(model / part)
    with pytest.raises(WeightsError, match=rf"holds no usable .*\({part}\)"):
        loaded(model=str(model))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = shutil.copytree(MINI, tmp_path / "gligen")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"holds no usable .*\(unet\)"):
        loaded(model=str(model))


def test_a_checkpoint_without_gates_is_refused(tmp_path: Path) -> None:
    model = shutil.copytree(MINI, tmp_path / "gligen")
    config = model / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_type": "default"}))
    with (
        pytest.raises(WeightsError, match="is no GLIGEN for inpainting"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # diffusers warns of the weights left over
        loaded(model=str(model))


# What the mini checkpoint can do


def test_the_mini_checkpoint_draws_the_target_and_leaves_the_rest() -> None:
    from reasonpix_mini.measure.editing import measure

    figures = measure(scenes=12)
    assert figures["judge_accuracy"] == 1
    assert figures["judged_target"] >= 0.8
    assert figures["judged_target_empty_prompt"] >= 0.7
    assert figures["psnr_in_box"] > figures["psnr_in_box_no_edit"] + 3
    assert figures["outside_equal"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", "is for models of flow matching"),
        ("RePaintScheduler", "cannot sample"),
        ("AutoencoderKL", "is not a scheduler of diffusers"),
    ],
)
def test_a_scheduler_that_does_not_fit(tmp_path: Path, name: str, message: str) -> None:
    model = shutil.copytree(MINI, tmp_path / "gligen")
    (model / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    editor = Gligen(GligenOptions(model=str(model)))
    for refuse in (editor.check, editor.load):
        with pytest.raises(WeightsError, match=f"scheduler {name} .*{message}.*DDIMScheduler"):
            refuse()
