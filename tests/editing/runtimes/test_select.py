from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from reasonpix.deployment.export.converters import convert
from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.editing.runtimes.base import Network, Networks
from reasonpix.editing.runtimes.binding import match_inputs, resolve_shape
from reasonpix.editing.runtimes.manifest import Export, Graph, Manifest, Part, Port
from reasonpix.editing.runtimes.modules import torch_networks
from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.components import Options
from reasonpix.plugin.fakes import FakeEncoder
from tests.support.tiny_model import RESOLUTION, WIDTH, tiny_model, tiny_scheduler

# Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")
FORMATS = ("onnx", "openvino")
EXACT = 1e-4
"""Largest difference, of the largest value."""


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Part, Graph]]:
    """All networks of the tiny model."""
    folder = tmp_path_factory.mktemp("onnx")
    return folder, convert(tiny_model(), "onnx", "fp32", get_args(Part), folder)


@pytest.fixture(scope="module", params=FORMATS)
def export(request: pytest.FixtureRequest, onnx_files: tuple[Path, dict[Part, Graph]]) -> Export:
    """OpenVINO reads ONNX too, which saves a second tracing."""
    folder, graphs = onnx_files
    return Export(folder, manifest(request.param, graphs))


def manifest(format: Any, graphs: dict[Part, Graph]) -> Manifest:
    files = {graph.file: "0" for graph in graphs.values()} or {"unet": "0"}
    return Manifest(
        format=format,
        precision="fp32",
        source="tiny",
        weights="0",
        packages={},
        files=files,
        graphs=graphs,
        parity={},
    )


def load(export: Export, threads: int | None = None) -> dict[str, Network]:
    runtime = import_module(f"reasonpix.editing.runtimes.{export.manifest.format}")
    networks: dict[str, Network] = runtime.load(export, CPU, threads)
    return networks


@pytest.fixture(scope="module")
def networks(export: Export) -> dict[str, Network]:
    return load(export)


@pytest.fixture(scope="module")
def own() -> Networks:
    """The same, computed by PyTorch."""
    checkpoint = tiny_model()
    return torch_networks(checkpoint.model.unet.eval(), checkpoint.vae.eval())


def unet_inputs(
    batch: int = 2, height: int = 8, width: int = 8, sequence: int = 6, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Without a mask."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 8, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(batch, sequence, WIDTH, generator=generator),
    }


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def computed(network: Network, **inputs: torch.Tensor | None) -> torch.Tensor:
    return network.bind(**inputs)().clone()


# -- the same as PyTorch, for any size ------------------------------------------------------------


@pytest.mark.parametrize("seen", ["all", "some", "first", "no mask"])
@pytest.mark.parametrize("size", [(1, 8, 8, 1), (3, 4, 12, 7), (5, 16, 10, 33)])
def test_unet(
    size: tuple[int, int, int, int], seen: str, networks: dict[str, Network], own: Networks
) -> None:
    inputs: dict[str, torch.Tensor | None] = dict(unet_inputs(*size))
    mask = torch.ones(size[0], size[3], dtype=torch.bool)
    if seen == "some":  # another part in each row
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) > 0.4
    if seen == "first":
        mask[:, 1:] = False
    inputs["encoder_attention_mask"] = None if seen == "no mask" else mask
    assert difference(computed(networks["unet"], **inputs), computed(own.unet, **inputs)) < EXACT


def test_the_mask_hides(networks: dict[str, Network]) -> None:
    inputs = unet_inputs(sequence=6)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    found = computed(networks["unet"], **inputs, encoder_attention_mask=mask)
    inputs["encoder_hidden_states"][:, 4:] = 9
    assert torch.equal(found, computed(networks["unet"], **inputs, encoder_attention_mask=mask))
    assert difference(found, computed(networks["unet"], **inputs)) > 0.01


@pytest.mark.parametrize("size", [(1, 32, 32), (2, 64, 40)])
def test_vae(size: tuple[int, int, int], networks: dict[str, Network], own: Networks) -> None:
    batch, height, width = size
    pixels = torch.rand(batch, 3, height, width) * 2 - 1
    latents = computed(own.vae_encoder, pixels=pixels).contiguous()
    assert difference(computed(networks["vae_encoder"], pixels=pixels), latents) < EXACT
    decoded = computed(own.vae_decoder, latents=latents)
    assert difference(computed(networks["vae_decoder"], latents=latents), decoded) < EXACT


def test_another_number_of_threads_computes_the_same(
    export: Export, networks: dict[str, Network]
) -> None:
    inputs = unet_inputs()
    found = computed(load(export, threads=2)["unet"], **inputs)
    assert difference(found, computed(networks["unet"], **inputs)) < EXACT


# -- tensors are read and written where they lie --------------------------------------------------


def test_what_is_written_into_an_input_is_seen(networks: dict[str, Network], own: Networks) -> None:
    inputs = unet_inputs()
    mask = torch.ones(2, 6, dtype=torch.bool)
    with torch.inference_mode():
        compute = networks["unet"].bind(**inputs, encoder_attention_mask=mask)
        results = [compute().clone()]
        for tensor, value in (
            (inputs["sample"], 0.5),
            (inputs["timestep"], 3.25),
            (inputs["encoder_hidden_states"], -1.0),
        ):
            tensor[1:] = value
            results.append(compute().clone())
        mask[1:, 1:] = False
        inputs["encoder_hidden_states"][1, 2] = 7.0  # unseen
        results.append(compute().clone())
    for before, after in pairwise(results[:4]):
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])
    assert difference(results[4], results[3]) < EXACT, "all tokens were alike"
    expected = computed(own.unet, **inputs, encoder_attention_mask=mask)
    assert difference(results[4], expected) < EXACT


def test_the_result_lies_in_one_buffer(networks: dict[str, Network]) -> None:
    inputs = unet_inputs()
    compute = networks["unet"].bind(**inputs)
    first = compute()
    kept = first.clone()
    inputs["sample"].mul_(2)
    second = compute()
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(second, kept)
    other = networks["unet"].bind(**unet_inputs(seed=1))()
    assert other.data_ptr() != second.data_ptr()


def test_what_is_bound_stays_alive_and_apart(networks: dict[str, Network]) -> None:
    shapes = [(1, 8, 8, 6), (2, 4, 8, 6), (1, 8, 4, 3)]  # more than stay compiled
    bound = [networks["unet"].bind(**unet_inputs(*shape)) for shape in shapes]
    results = [compute().clone() for compute in bound]
    for compute, result in zip(reversed(bound), reversed(results), strict=True):
        assert torch.equal(compute(), result)


# -- what cannot be computed is said --------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sample": torch.zeros(2, 8, 8, 8, dtype=torch.float16)}, "sample is torch.float16, not"),
        ({"timestep": torch.zeros(2, dtype=torch.int64)}, "timestep is torch.int64, not torch.flo"),
        ({"encoder_attention_mask": torch.ones(2, 6)}, "mask is torch.float32, not torch.bool"),
        ({"sample": torch.zeros(2, 4, 8, 8)}, r"sample has 4 for side 1 \(8\), not 8"),
        ({"sample": torch.zeros(2, 8, 8)}, "sample has 3 sides, not 4"),
        ({"sample": torch.zeros(2, 8, 8, 0)}, r"0 for side 3 \(width\), not more"),
        ({"timestep": torch.zeros(3)}, r"timestep has 3 for side 0 \(batch\), not 2"),
        ({"encoder_attention_mask": torch.ones(2, 7) > 0}, r"7 for side 1 \(sequence\), not 6"),
        ({"sample": torch.zeros(2, 8, 8, 8).mT}, "sample is not contiguous"),
        ({"sample": torch.zeros(2, 8, 8, 8, device="meta")}, "sample is on meta, not on cpu"),
        ({"sample": None}, "sample is missing"),
        ({"samples": torch.zeros(1)}, "samples: unet.* has sample, timestep"),
    ],
)
def test_tensors_that_cannot_be_read(
    wrong: dict[str, Any], says: str, networks: dict[str, Network]
) -> None:
    with pytest.raises(ValueError, match=says):
        networks["unet"].bind(**unet_inputs() | wrong)


def test_sides_that_are_multiples() -> None:
    port = Port(name="pixels", dtype="float32", shape=("batch", 3, "8*height", "8*width"))
    graph = Graph(file="x", inputs=(port,), output=port)
    tensors, sizes = match_inputs(graph, {"pixels": torch.zeros(2, 3, 16, 40)}, CPU)
    assert sizes == {"batch": 2, "height": 2, "width": 5}
    assert resolve_shape(port, sizes) == tensors["pixels"].shape
    with pytest.raises(ValueError, match=r"pixels has 20 for side 2 \(8\*height\), not 16"):
        match_inputs(graph, {"pixels": torch.zeros(2, 3, 20, 40)}, CPU)


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_package_that_is_missing(
    format: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    runtime = import_module(f"reasonpix.editing.runtimes.{format}")
    with pytest.raises(ReasonpixError, match=rf"pip install 'reasonpix\[{format}\]'"):
        runtime.load(Export(tmp_path, manifest(format, {})), CPU)


def test_an_onnxruntime_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = import_module("reasonpix.editing.runtimes.onnx")
    gpu = torch.device("cuda")
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this one has CUDA")
    with pytest.raises(ReasonpixError, match=r"pip install 'reasonpix\[onnx-gpu\]'"):
        runtime.load(Export(tmp_path, manifest("onnx", {})), gpu)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ReasonpixError, match=r"pip install 'reasonpix\[onnx-gpu\]'"):
        runtime.load(Export(tmp_path, manifest("onnx", {})), gpu)


def test_openvino_has_no_gpu_here(tmp_path: Path) -> None:
    runtime = import_module("reasonpix.editing.runtimes.openvino")
    with pytest.raises(ReasonpixError, match="openvino computes on the CPU here, not on cuda"):
        runtime.load(Export(tmp_path, manifest("openvino", {})), torch.device("cuda"))


def test_a_file_that_is_no_network(export: Export, tmp_path: Path) -> None:
    file = tmp_path / export.manifest.graphs["unet"].file
    file.write_bytes(b"no network")
    with pytest.raises(WeightsError, match=f"{file.name}: .* cannot (load|read) it"):
        load(replace(export, folder=tmp_path))


# -- whole edits ----------------------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def editing(networks: dict[str, Network] | None, scheduler: str = "DDIMScheduler") -> ReasonPix2Pix:
    checkpoint = tiny_model(scheduler=tiny_scheduler(scheduler))
    torchs = torch_networks(checkpoint.model.unet, checkpoint.vae)
    return ReasonPix2Pix(
        checkpoint,
        FakeEncoder(Options()),
        device=CPU,
        dtype=torch.float32,
        networks=replace(torchs, **networks) if networks else None,
    )


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Decibels."""
    a, b = (np.asarray(image, dtype=np.float64) for image in (one, other))
    return float(10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9)))


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_edits(scheduler: str, networks: dict[str, Network]) -> None:
    wide = (RESOLUTION * 2, RESOLUTION)
    images = [picture(0), picture(1, wide), picture(2)]
    words = ["make it red", "it got cold over night", "the one with wings is gone"]
    ours, torchs = (
        editing(it, scheduler)(images, words, seed=[1, 2, 3], num_inference_steps=4)
        for it in (networks, None)
    )
    for image, found, expected in zip(images, ours, torchs, strict=True):
        assert found.size == image.size
        assert psnr(found, expected) >= 45
        assert psnr(found, image) < 40, "nothing was edited"


def test_an_edit_does_not_depend_on_its_neighbours(networks: dict[str, Network]) -> None:
    model = editing(networks)
    images = [picture(number) for number in range(6)]
    together = model(images, "make it red", seed=list(range(6)))
    for number in (5, 0, 3):
        (alone,) = model([images[number]], "make it red", seed=number)
        assert alone.tobytes() == together[number].tobytes()


def test_timesteps_that_are_fractions(networks: dict[str, Network], own: Networks) -> None:
    """Euler's are; a network that takes whole numbers would compute the nearest."""
    scheduler = tiny_scheduler("EulerDiscreteScheduler", timestep_spacing="linspace")
    scheduler.set_timesteps(5)
    assert any(float(step) % 1 for step in scheduler.timesteps)
    inputs = unet_inputs()
    results = {}
    for step in (2.0, 2.5, 3.0):
        inputs["timestep"][:] = step
        results[step] = computed(networks["unet"], **inputs)
        assert difference(results[step], computed(own.unet, **inputs)) < EXACT
    assert difference(results[2.5], results[2.0]) > 5 * EXACT
    assert difference(results[2.5], results[3.0]) > 5 * EXACT
