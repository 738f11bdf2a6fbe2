from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from transformers import AutoTokenizer, CLIPModel, ViTModel

from reasonpix.core.images import decode
from reasonpix.errors import PluginError, SourceError, WeightsError
from reasonpix.evaluation.cases import Case
from reasonpix.evaluation.embedders import Preprocessing
from reasonpix.evaluation.metrics import METRICS, Metrics, MetricsOptions
from reasonpix.evaluation.pixel_metrics import distances, psnr, ssim
from reasonpix.plugin.components import Options
from reasonpix.plugin.fakes import FakeGrounder
from reasonpix.plugin.types import Box, Grounding, Problem
from tests.conftest import Distribution
from tests.support.pair_files import picture
from tests.support.tiny_metrics import CLIP_SIDE, DINO_SIDE, MEAN, STD, write_clip, write_dino

Read = Callable[[], Image.Image]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_clip(root / "clip")
    write_dino(root / "dino")
    return root


def options(models: Path, **both: Any) -> MetricsOptions:
    return MetricsOptions.model_validate(
        {name: {"model": str(models / name), **both} for name in ("clip", "dino")}
    )


@pytest.fixture(scope="module")
def metrics(models: Path) -> Iterator[Metrics]:
    made = loaded(models)
    yield made
    made.close()


def loaded(models: Path, grounder: Any = None, **both: Any) -> Metrics:
    made = Metrics(options(models, **both), grounder)
    made.check()
    made.load()
    return made


def file(path: Path) -> Read:
    return lambda: decode(path.read_bytes())


def smooth(seed: int, size: tuple[int, int]) -> Image.Image:
    """Blots of colour: what resizing does to them matters less than what they are."""
    return picture(seed, (5, 4)).resize(size, Image.Resampling.BICUBIC)


SIZES = [(40, 40), (64, 48), (33, 77), (20, 26), (95, 64), (32, 32), (61, 43), (50, 31)]
"""Smaller and larger than what the models see, upright and not, with odd rests to cut off."""

CAPTIONS = ["a bee", "an ant on a leaf", "", "a bee and a very long story about what it saw", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, truths and edits in files; the edits in sizes of their own."""
    root = tmp_path_factory.mktemp("pairs")
    for number, size in enumerate(SIZES):
        kind = ("png", "jpg")[number % 2]
        smooth(number, size).save(root / f"input-{number}.png")
        smooth(100 + number, size).save(root / f"truth-{number}.{kind}")
        edited = SIZES[-1 - number] if number % 3 else size
        smooth(200 + number, edited).save(root / f"edited-{number}.{kind}", quality=90)
    return root


def path(folder: Path, role: str, number: int) -> Path:
    return next(folder.glob(f"{role}-{number}.*"))


def cases_of(folder: Path) -> list[Case]:
    return [
        Case(
            id=str(number),
            row=f"row {number}",
            read_input=file(path(folder, "input", number)),
            instructions={"direct": "do it"},
            read_truth=file(path(folder, "truth", number)),
            caption=CAPTIONS[number % 5],
            edited_caption=CAPTIONS[(number + 1) % 5],
            box=Box(x0=3, y0=2, x1=12.5, y1=17, width=size[0], height=size[1]),
        )
        for number, size in enumerate(SIZES)
    ]


def edits_of(folder: Path) -> list[Read]:
    return [file(path(folder, "edited", number)) for number in range(len(SIZES))]


# -- the definitions, once more, one image at a time ---------------------------------------------


class Straight:
    """What SPEC and papers say, without regard to time."""

    def __init__(self, models: Path) -> None:
        self.clip = CLIPModel.from_pretrained(models / "clip").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(models / "clip")
        self.dino = ViTModel.from_pretrained(models / "dino", add_pooling_layer=False).eval()

    @staticmethod
    def pixels(image: Image.Image, shorter: int, crop: int, mean: Any, std: Any) -> torch.Tensor:
        w, h = image.size
        if w <= h:
            w, h = shorter, int(shorter * h / w)
        else:
            w, h = int(shorter * w / h), shorter
        values = np.array(image.resize((w, h), Image.Resampling.BICUBIC)).astype(float) / 255
        top, left = int(np.round((h - crop) / 2)), int(np.round((w - crop) / 2))
        values = (values[top : top + crop, left : left + crop] - np.array(mean)) / np.array(std)
        return torch.tensor(values.transpose(2, 0, 1)[None], dtype=torch.float32)

    @torch.no_grad()
    def of_clip(self, image: Image.Image) -> np.ndarray:
        seen = self.pixels(image, CLIP_SIDE, CLIP_SIDE, MEAN, STD)
        pooled = self.clip.vision_model(seen).pooler_output
        return self.clip.visual_projection(pooled)[0].double().numpy()

    @torch.no_grad()
    def of_text(self, text: str) -> np.ndarray:
        ids = self.tokenizer(text, truncation=True, return_tensors="pt").input_ids
        last = self.clip.text_model(ids).last_hidden_state[:, -1]
        return self.clip.text_projection(last)[0].double().numpy()

    @torch.no_grad()
    def of_dino(self, image: Image.Image) -> np.ndarray:
        seen = self.pixels(image, 32, DINO_SIDE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return self.dino(seen).last_hidden_state[0, 0].double().numpy()

    @staticmethod
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * b).sum() / np.sqrt((a * a).sum()) / np.sqrt((b * b).sum()))

    def measure(self, case: Case, edited: Image.Image) -> dict[str, float]:
        assert case.read_truth
        truth, before = case.read_truth(), case.read_input()
        fitted = edited.resize(truth.size, Image.Resampling.BICUBIC)
        difference = np.array(fitted) / 255 - np.array(truth) / 255
        values = {
            "l1": float(np.abs(difference).mean()),
            "l2": float((difference**2).mean()),
            "clip_i": self.cosine(self.of_clip(edited), self.of_clip(truth)),
            "dino": self.cosine(self.of_dino(edited), self.of_dino(truth)),
        }
        if case.edited_caption:
            text = self.of_text(case.edited_caption)
            values["clip_t"] = self.cosine(self.of_clip(edited), text)
            if case.caption:
                images = [self.of_clip(it) for it in (before, edited)]
                texts = [self.of_text(case.caption), text]
                for vectors in (images, texts):
                    vectors[:] = [it / np.linalg.norm(it) for it in vectors]
                values["clip_direction"] = self.cosine(images[1] - images[0], texts[1] - texts[0])
        assert case.box
        x, y = np.arange(before.width), np.arange(before.height)
        touched = np.outer(
            (y + 1 > case.box.y0) & (y < case.box.y1), (x + 1 > case.box.x0) & (x < case.box.x1)
        )
        old = np.array(before) / 255
        new = np.array(edited.resize(before.size, Image.Resampling.BICUBIC)) / 255
        values["psnr_outside"] = peak_signal_noise_ratio(old[~touched], new[~touched], data_range=1)
        new[touched] = old[touched]
        values["ssim_outside"] = float(
            structural_similarity(
                old,
                new,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1,
                channel_axis=2,
                full=True,
            )[1][~touched].mean()
        )
        return values


def test_values_are_those_of_a_straight_implementation(
    metrics: Metrics, models: Path, folder: Path
) -> None:
    cases, edits = cases_of(folder), edits_of(folder)
    straight = Straight(models)
    found = metrics.measure(cases, edits)
    for case, edit, values in zip(cases, edits, found, strict=True):
        expected = straight.measure(case, edit())
        assert values == {key: pytest.approx(it, abs=1e-4) for key, it in expected.items()}
    # Models that see all images and texts alike would agree however they are prepared.
    for key in ("clip_i", "dino", "clip_t", "clip_direction"):
        column = [values[key] for values in found if key in values]
        assert np.std(column) > 0.05, key
    assert min(values.get("clip_t", 1) for values in found) < 0  # nothing is cut off at zero


# -- what must hold whatever the models are ------------------------------------------------------


def test_ground_truth_against_itself_is_perfect(metrics: Metrics, folder: Path) -> None:
    cases = cases_of(folder)
    for case, values in zip(
        cases, metrics.measure(cases, [it.read_truth for it in cases if it.read_truth]), strict=True
    ):
        assert (values["l1"], values["l2"]) == (0, 0), case.id
        assert (values["clip_i"], values["dino"]) == pytest.approx((1, 1), abs=1e-6)


def test_a_copy_of_the_input_preserves_all_and_goes_nowhere(metrics: Metrics, folder: Path) -> None:
    cases = cases_of(folder)
    found = metrics.measure(cases, [case.read_input for case in cases])
    assert all((it["psnr_outside"], it["ssim_outside"]) == (100, 1) for it in found)
    assert {it["clip_direction"] for it in found if "clip_direction" in it} == {0}


def test_values_do_not_depend_on_what_they_are_measured_with(
    models: Path, metrics: Metrics, folder: Path
) -> None:
    cases, edits = cases_of(folder), edits_of(folder)
    expected = metrics.measure(cases, edits)
    alone = loaded(models)
    assert [alone.measure([c], [e])[0] for c, e in zip(cases, edits, strict=True)] == expected
    backwards = loaded(models).measure(cases[::-1], edits[::-1])
    assert backwards[::-1] == expected
    for size in (1, 3):
        batched = loaded(models, batch_size=size).measure(cases, edits)
        assert batched == [pytest.approx(it, abs=1e-6) for it in expected]


def test_images_of_the_benchmark_are_seen_once(models: Path, folder: Path) -> None:
    cases, edits = cases_of(folder), edits_of(folder)
    metrics = loaded(models, batch_size=1)
    rows: dict[str, int] = {}

    def count(module: torch.nn.Module, *_: Any) -> None:
        name = type(module).__name__
        rows[name] = rows.get(name, 0) + 1

    def counted(edits: list[Read]) -> dict[str, int]:
        rows.clear()
        hook = torch.nn.modules.module.register_module_forward_hook(count)
        metrics.measure(cases, edits)
        hook.remove()
        kinds = ("CLIPVisionEmbeddings", "CLIPTextEmbeddings", "ViTEmbeddings")
        return {kind: rows[kind] for kind in kinds if kind in rows}

    with_inputs = sum(1 for case in cases if case.caption and case.edited_caption)
    assert counted(edits) == {
        "CLIPVisionEmbeddings": 2 * len(cases) + with_inputs,
        "CLIPTextEmbeddings": 4,  # captions that differ
        "ViTEmbeddings": 2 * len(cases),
    }
    assert counted(edits) == {"CLIPVisionEmbeddings": len(cases), "ViTEmbeddings": len(cases)}
    assert counted([it.read_truth for it in cases if it.read_truth]) == {}


def test_progress_is_told(metrics: Metrics, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    metrics.measure(cases_of(folder), edits_of(folder), lambda *it: told.append(it))
    assert told == [(8, 8)]
    assert metrics.measure([], []) == []


# -- what is left out ----------------------------------------------------------------------------


def case(**known: Any) -> Case:
    base = {"id": "1", "row": "row 1", "instructions": {}, "read_input": lambda: smooth(1, (8, 8))}
    return Case(**(base | known))


def box(x0: float, y0: float, x1: float, y1: float, size: tuple[int, int] = (8, 8)) -> Box:
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, width=size[0], height=size[1])


def image(seed: int = 2, size: tuple[int, int] = (8, 8)) -> Read:
    return lambda: smooth(seed, size)


@pytest.mark.parametrize(
    ("known", "keys"),
    [
        ({}, set()),
        ({"read_truth": image(3)}, {"l1", "l2", "clip_i", "dino"}),
        ({"edited_caption": "an ant"}, {"clip_t"}),
        ({"caption": "a bee"}, set()),
        ({"caption": "a bee", "edited_caption": "an ant"}, {"clip_t", "clip_direction"}),
        ({"caption": "a bee", "edited_caption": "a bee"}, {"clip_t"}),  # no direction
        ({"box": box(1, 1, 4, 4)}, {"psnr_outside", "ssim_outside"}),
        ({"box": box(0, 0, 8, 8)}, set()),  # nothing is outside
        ({"read_mask": lambda: np.eye(8, dtype=bool)}, {"psnr_outside", "ssim_outside"}),
        ({"target": "ant"}, set()),
        ({"target": "ant", "box": box(0, 0, 8, 8)}, {"target_found"}),
        ({"box": box(0, 0, 8, 8), "target": ""}, set()),
    ],
)
def test_a_value_is_left_out_where_the_case_lacks_what_it_needs(
    models: Path, known: dict[str, Any], keys: set[str]
) -> None:
    metrics = loaded(models, FakeGrounder(Options()))
    (values,) = metrics.measure([case(**known)], [image()])
    assert isinstance(values, dict)
    assert values.keys() == keys


def test_clip_t_is_read_with_the_local_caption_and_direction_with_those_of_images(
    metrics: Metrics,
) -> None:
    whole = {"caption": "a bee", "edited_caption": "an ant on a leaf"}
    edit = image(seed=5)
    cases = [
        case(**whole),
        case(**whole, local_caption="an ant"),
        case(**whole, local_caption=""),
        case(caption="x", edited_caption="an ant"),
    ]
    both, local, lacking, other = metrics.measure(cases, [edit] * 4)
    assert isinstance(local, dict) and isinstance(both, dict) and isinstance(other, dict)
    assert local["clip_t"] == other["clip_t"] != both["clip_t"]
    assert local["clip_direction"] == both["clip_direction"]
    assert isinstance(lacking, dict) and "clip_t" not in lacking
    assert lacking["clip_direction"] == both["clip_direction"]


def test_every_value_has_a_measure(models: Path, folder: Path) -> None:
    whole = case(
        read_truth=image(3),
        caption="a bee",
        edited_caption="an ant",
        target="ant",
        box=box(1, 1, 4, 4),
    )
    (values,) = loaded(models, FakeGrounder(Options())).measure([whole], [image()])
    assert set(values) == {it.key for it in METRICS}
    assert [it.title for it in METRICS[:5]] == ["L1", "L2", "CLIP-I", "DINO", "CLIP-T"]


def test_a_mask_wins_over_the_box(metrics: Metrics) -> None:
    def corner() -> Image.Image:
        changed = smooth(1, (8, 8))
        changed.paste("white", (0, 0, 2, 2))
        return changed

    masked = case(box=box(4, 4, 8, 8), read_mask=lambda: np.pad(np.ones((2, 2), bool), (0, 6)))
    boxed = case(box=box(4, 4, 8, 8))
    by_mask, by_box = metrics.measure([masked, boxed], [corner, corner])
    assert by_mask == {"psnr_outside": 100, "ssim_outside": 1}
    assert by_box["psnr_outside"] < 30 and by_box["ssim_outside"] < 0.95


def test_texts_that_are_too_long_are_cut(metrics: Metrics) -> None:
    texts = [
        "a bee and an ant",
        "a bee and nothing else at all",
    ]  # of 12 tokens each 10 are letters
    same, other = ([case(edited_caption=text[:n]) for text in texts] for n in (7, 12))
    one, two = metrics.measure(same, [image(), image()])
    assert one == two
    one, two = metrics.measure(other, [image(), image()])
    assert one != two
    (long,) = metrics.measure([case(edited_caption=texts[1] * 100)], [image()])
    (short,) = metrics.measure([case(edited_caption=texts[1])], [image()])
    assert long == short


# -- the grounder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xyxy", "found"),
    [
        ((2, 2, 6, 6), 1.0),  # where the fake finds everything
        ((3, 3, 5, 5), 1.0),  # within
        ((4, 2, 8, 6), 1.0),  # half of it
        ((4.1, 2, 8, 6), 0.0),
        ((0, 0, 2, 2), 0.0),
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (32, 24)])
def test_target_is_found_where_half_of_the_smaller_box_is_shared(
    models: Path, xyxy: tuple[float, ...], found: float, size: tuple[int, int]
) -> None:
    metrics = loaded(models, FakeGrounder(Options()))
    (values,) = metrics.measure([case(target="ant", box=box(*xyxy))], [image(2, size)])
    assert values["target_found"] == found


class Choosy(FakeGrounder):
    """Finds only bees, and does not look at white images."""

    def ground(self, images: Any, categories: Any) -> Any:
        found: list[Any] = []
        for it, asked, answer in zip(
            images, categories, super().ground(images, categories), strict=True
        ):
            if it.getpixel((0, 0)) == (255, 255, 255):
                found.append(Problem(status="failed", reason="too bright"))
            else:
                found.append(
                    tuple(
                        grounding if category == "bee" else Grounding(category=category)
                        for category, grounding in zip(asked, answer, strict=True)
                    )
                )
        return found


def test_what_the_grounder_does_not_find_and_what_it_has_a_problem_with(models: Path) -> None:
    metrics = loaded(models, Choosy(Options()))
    cases = [
        case(target=target, box=box(2, 2, 6, 6)) if target else case()
        for target in ("bee", "ant", None, "bee", "bee")
    ]
    edits = [image(), image(), image(), lambda: Image.new("RGB", (8, 8), "white"), image()]
    found = metrics.measure(cases, edits)
    assert [it.get("target_found") if isinstance(it, dict) else it.reason for it in found] == [
        1.0, 0.0, None, "too bright", 1.0,
    ]  # fmt: skip


# -- problems ------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_a_problem_in_its_place(
    metrics: Metrics, folder: Path, tmp_path: Path
) -> None:
    cases, edits = cases_of(folder)[:5], edits_of(folder)[:5]
    expected = metrics.measure(cases, edits)
    cut = path(folder, "edited", 0).read_bytes()[:90]

    def gone() -> Image.Image:
        raise SourceError("pairs.parquet row 3: the image is gone")

    edits[0] = lambda: Image.open(io.BytesIO(cut))  # as it comes: damaged when it is used
    edits[1] = file(tmp_path / "none.png")
    cases[2] = case(read_truth=gone)
    cases[3] = case(box=box(0, 0, 4, 4, (16, 8)))
    found = metrics.measure(cases, edits)
    assert found[4] == expected[4]
    reasons = [it.reason if isinstance(it, Problem) else "" for it in found]
    assert reasons[0].startswith("row 0: OSError: ")
    assert reasons[1].startswith("row 1: FileNotFoundError: ") and "none.png" in reasons[1]
    assert reasons[2] == "pairs.parquet row 3: the image is gone"
    assert "its mask or box is for 16x8 pixels, and the input image has 8x8" in reasons[3]


def test_memory_that_runs_out_is_no_problem_of_the_image(metrics: Metrics) -> None:
    def huge() -> Image.Image:
        raise MemoryError

    with pytest.raises(MemoryError):
        metrics.measure([case()], [huge])


def test_values_that_are_no_numbers_are_problems(models: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(models, tmp_path / "models")
    model = ViTModel.from_pretrained(broken / "dino", add_pooling_layer=False)
    with torch.no_grad():
        model.layernorm.bias[0] = torch.inf
    model.save_pretrained(broken / "dino")
    whole, without_dino = loaded(broken).measure(
        [case(read_truth=image(3)), case(edited_caption="x")], [image(), image()]
    )
    assert isinstance(whole, Problem)
    assert "row 1: dino: not a finite number" in whole.reason
    assert "clip_t" in without_dino


# -- pixels --------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@given(seeds, seeds, sizes)
def test_l1_and_l2_are_symmetric_and_bounded(one: int, other: int, size: tuple[int, int]) -> None:
    a, b = picture(one, size), picture(other, size)
    l1, l2 = distances(a, b)
    assert distances(b, a) == (l1, l2)
    assert 0 <= l1**2 <= l2 + 1e-12  # Jensen
    assert l2 <= l1 <= 1
    assert (l1 == 0) == (l2 == 0) == (a.tobytes() == b.tobytes())


def test_the_largest_distance_is_one() -> None:
    black, white = (Image.new("RGB", (3, 2), it) for it in ("black", "white"))
    assert distances(black, white) == (1, 1)
    assert psnr(black, white, np.ones((2, 3), bool)) == 0


@given(seeds, sizes, st.data())
def test_what_changes_inside_is_not_seen_outside(
    seed: int, size: tuple[int, int], data: st.DataObject
) -> None:
    before, other = picture(seed, size), picture(seed + 1, size)
    shape = size[::-1]
    outside = np.random.default_rng(seed).random(shape) < data.draw(st.floats(0, 1))
    outside[0, 0] = True
    after = Image.fromarray(
        np.where(outside[..., None], np.asarray(before), np.asarray(other)).astype(np.uint8)
    )
    assert psnr(after, before, outside) == 100
    assert ssim(after, before, outside) == 1


@given(seeds, st.tuples(st.integers(11, 40), st.integers(11, 40)))
def test_ssim_is_symmetric_and_that_of_scikit_image(seed: int, size: tuple[int, int]) -> None:
    a, b = picture(seed, size), smooth(seed, size)
    whole = np.ones(size[::-1], bool)
    _, map_ = structural_similarity(
        np.asarray(a),
        np.asarray(b),
        gaussian_weights=True,
        use_sample_covariance=False,
        channel_axis=2,
        full=True,
    )
    assert ssim(a, b, whole) == pytest.approx(map_.mean(), abs=1e-5)
    assert ssim(b, a, whole) == pytest.approx(ssim(a, b, whole), abs=1e-6)


def test_ssim_of_flat_images_is_that_of_scikit_image() -> None:
    # Differences of two large, nearly equal numbers: the variances are all rounding.
    a, b = (Image.new("RGB", (64, 64), (value, value, value)) for value in (254, 255))
    expected = structural_similarity(
        np.asarray(a),
        np.asarray(b),
        gaussian_weights=True,
        use_sample_covariance=False,
        channel_axis=2,
    )
    assert ssim(a, b, np.ones((64, 64), bool)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((100, 75), (42, 32), (5, 0)),  # 42.67 is cut to 42
        ((75, 100), (32, 42), (0, 5)),
        ((33, 32), (33, 32), (0, 0)),  # half a pixel: to the even number, 0
        ((35, 32), (35, 32), (2, 0)),  # 1.5: to 2
        ((16, 16), (32, 32), (0, 0)),
    ],
)
def test_resizing_and_cropping_round_as_torchvision_does(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    given_ = picture(0, size)
    x, y = corner
    expected = given_.resize(resized, Image.Resampling.BICUBIC).crop((x, y, x + 32, y + 32))
    cut = Preprocessing(32, 32, MEAN, STD).crop_image(given_)
    assert np.array_equal(cut, np.asarray(expected))


# -- models --------------------------------------------------------------------------------------


def test_identity_follows_what_changes_values(models: Path, tmp_path: Path) -> None:
    def identity(grounder: Any = None, root: Path = models, **both: Any) -> dict[str, Any]:
        return Metrics(options(root, **both), grounder).fingerprint_facts()

    known = identity()
    assert TypeAdapter(dict[str, Any]).dump_json(known)
    moved = shutil.copytree(models, tmp_path / "moved")
    assert identity(root=moved) == known
    assert identity(device="cpu", batch_size=2, cache_dir=tmp_path) == known
    assert identity(dtype="bfloat16") != known
    assert identity(grounder=FakeGrounder(Options())) != known
    write_dino(moved / "dino", seed=5)
    assert identity(root=moved) != known


def test_preprocessing_belongs_to_the_identity(models: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(models, tmp_path / "changed")
    config = changed / "clip" / "preprocessor_config.json"
    config.write_text(config.read_text().replace("0.25", "0.26"))
    assert (
        Metrics(options(changed)).fingerprint_facts()
        != Metrics(options(models)).fingerprint_facts()
    )


def test_models_may_be_checkpoints_that_a_plugin_carries(
    models: Path, folder: Path, distribution: Distribution
) -> None:
    source = (
        "from pathlib import Path\nfrom reasonpix.plugin.hookspecs import hookimpl\n"
        "@hookimpl\ndef checkpoints():\n"
        f"    return {{'carrier/' + it: Path({str(models)!r}, it) for it in ('clip', 'dino')}}"
    )
    distribution("carrier-plugin", {"carrier": "carrier_plugin"}, carrier_plugin=source)
    asked = MetricsOptions.model_validate({"clip": "carrier/clip", "dino": "carrier/dino"})
    carried = Metrics(asked)
    carried.load()
    assert carried.fingerprint_facts() == Metrics(options(models)).fingerprint_facts()
    assert carried.measure(cases_of(folder), edits_of(folder))
    with pytest.raises(PluginError, match="did you mean 'carrier/clip'"):
        Metrics(MetricsOptions.model_validate({"clip": "carrier/clop"}))


def test_models_are_names_or_mappings_with_defaults() -> None:
    known = MetricsOptions.model_validate({"clip": "some/clip", "dino": {"batch_size": 4}})
    assert (known.clip.model, known.clip.dtype) == ("some/clip", "float32")
    assert (known.dino.model, known.dino.batch_size) == ("facebook/dino-vits16", 4)
    assert MetricsOptions().clip.model == "openai/clip-vit-base-patch32"
    assert MetricsOptions.model_validate(known.model_dump(mode="json")) == known
    with pytest.raises(ValidationError):
        MetricsOptions.model_validate({"clip": {"name": "some/clip"}})
    kinds = MetricsOptions.model_json_schema()["properties"]["clip"]["anyOf"]
    assert {"type": "string"} in kinds and len(kinds) == 2


def test_a_model_that_cannot_serve_is_found_before_anything_is_measured(
    models: Path, tmp_path: Path
) -> None:
    def check(**changed: Path) -> None:
        paths = {"clip": models / "clip", "dino": models / "dino"} | changed
        Metrics(MetricsOptions.model_validate({k: str(v) for k, v in paths.items()})).check()

    with pytest.raises(WeightsError, match=r"no folder '.*none'"):
        check(clip=tmp_path / "none")
    with pytest.raises(WeightsError, match="is of type 'vit', not 'clip'"):
        check(clip=models / "dino")
    with pytest.raises(WeightsError, match="is of type 'clip', not 'vit'"):
        check(dino=models / "clip")
    with pytest.raises(WeightsError, match="the folder is empty"):
        check(dino=tmp_path)


def test_preprocessing_that_is_not_clips_is_refused(models: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(models, tmp_path / "changed")
    config = changed / "clip" / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"shortest_edge": 32', '"shortest_edge": 30'))
    with pytest.raises(WeightsError, match="shortest_edge and crop a square"):
        loaded(changed)
