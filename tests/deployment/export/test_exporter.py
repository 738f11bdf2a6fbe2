"""Exports of a tiny model, written, proven and run; and all that is refused."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from reasonpix.cli.main import cli
from reasonpix.deployment.export.converters import profile, quiet
from reasonpix.deployment.export.exporter import ExportRequest, export_model
from reasonpix.editing.checkpoint import load_checkpoint, save_checkpoint
from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.editing.pipeline_parts import vae_scale_factor, working_size
from reasonpix.editing.runtimes import onnx as runtime_onnx
from reasonpix.editing.runtimes.manifest import Export, Precision, read_export
from reasonpix.editing.runtimes.modules import UNetGraph
from reasonpix.editing.runtimes.names import Format
from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.evaluation.benchmark import BenchmarkOptions
from reasonpix.evaluation.metrics import MetricsOptions
from reasonpix.plugin.components import ModelOptions
from tests.support.benchmark_rows import benchmark, row
from tests.support.tiny_metrics import write_clip, write_dino
from tests.support.tiny_model import RESOLUTION, STRIDE, WIDTH, tiny_model

# Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def write_model(folder: Path, seed: int = 2, first_layer_times: float = 1) -> Path:
    """A tiny editing model with even fewer layers: tracing takes time for each of them.

    CLIP with random weights exaggerates small differences, and of some seeds so much that int8
    exceeds the limits; the default has a margin.
    """
    checkpoint = tiny_model(num_inference_steps=2)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        in_channels=8,
        out_channels=4,
        cross_attention_dim=WIDTH,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    with torch.no_grad():
        unet.conv_in.weight.mul_(first_layer_times)
        unet.conv_out.weight.mul_(3)
    checkpoint.model.unet = unet
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
        scaling_factor=0.5,
    )
    folder.mkdir()
    save_checkpoint(folder, replace(checkpoint, vae=vae))
    return folder


class Room:
    """A model, a benchmark, and models that measure."""

    def __init__(self, folder: Path) -> None:
        self.model = write_model(folder / "tiny")
        self.benchmark = benchmark(folder / "benchmark", [row(number) for number in range(3)])
        self.clip = write_clip(folder / "clip")
        self.dino = write_dino(folder / "dino")

    def request(
        self, model: Path | str, format: Format, precision: Precision = "fp32", **more: bool
    ) -> ExportRequest:
        metrics = {"clip": str(self.clip), "dino": str(self.dino)}
        return ExportRequest(
            ModelOptions(model=str(model), device="cpu"),
            format,
            BenchmarkOptions(path=str(self.benchmark), limit=1),
            precision,
            metrics=MetricsOptions.model_validate(metrics),
            **more,
        )


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def said(room: Room) -> Result:
    """What the command says that exports the model, with its VAE, into its own folder."""
    words = ["export", room.model, "--to", "onnx", "--vae", "--samples", room.benchmark,
             "--count", 2, "--clip", room.clip, "--dino", room.dino, "--device", "cpu"]  # fmt: skip
    return CliRunner().invoke(cli, [str(it) for it in words])


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def picture(size: tuple[int, int] = (40, 32)) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


# -- one that is good -----------------------------------------------------------------------------


def test_the_command_proves_what_it_writes(room: Room, said: Result) -> None:
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()
    assert lines[0] == "4 edits of 2 steps, compared with PyTorch in float32:"
    for name in ("UNet, relative", "vae_decoder, relative", "UNet at", "PSNR", "L1", "CLIP-T"):
        assert sum(line.strip().startswith(name) for line in lines) >= 1, name
    assert lines[-1].endswith(f"--model {room.model} --runtime onnx")
    assert "torchvision" not in said.output
    assert "Warning" not in said.output


def test_the_manifest_says_it_all(room: Room, said: Result) -> None:
    found = read_export(room.model, "onnx")
    assert found is not None
    manifest = found.manifest
    assert set(manifest.files) == {
        f"{name}.onnx{data}"
        for name in ("unet", "vae_encoder", "vae_decoder")
        for data in ("", ".data")
    }
    assert {"torch", "onnx", "onnxruntime", "reasonpix"} <= set(manifest.packages)
    assert manifest.source == str(room.model)
    ports = {port.name: port for port in manifest.graphs["unet"].inputs}
    assert ports["encoder_hidden_states"].shape == ("batch", "sequence", 16)
    assert ports["encoder_attention_mask"].dtype == "bool"
    assert manifest.graphs["vae_decoder"].output.shape == ("batch", 3, "2*height", "2*width")
    parity = manifest.parity
    assert (parity["cases"], parity["edits"], parity["steps"]) == (2, 4, 2)
    assert max(step["relative"] for step in parity["unet"]) < 1e-4
    assert parity["psnr"]["worst"] >= 45
    assert set(parity["metrics"]["export"]) == {"l1", "l2", "clip_i", "dino", "clip_t"}


def test_its_weights_lie_outside_and_its_sides_are_free(room: Room, said: Result) -> None:
    file = room.model / "onnx" / "unet.onnx"
    model = onnx.load(file, load_external_data=False)
    weights = [it for it in model.graph.initializer if np.prod(it.dims) > 1000]
    assert weights
    assert all(it.data_location == onnx.TensorProto.EXTERNAL for it in weights)
    sides = [
        [side.dim_param or side.dim_value for side in it.type.tensor_type.shape.dim]
        for it in model.graph.input
    ]
    assert sides == [
        ["batch", 8, "height", "width"], ["batch"], ["batch", "sequence", 16], ["batch", "sequence"]
    ]  # fmt: skip
    assert str(Path.cwd()).encode() not in file.read_bytes()


@pytest.mark.parametrize("size", [(1, 8, 8, 12), (2, 2, 14, 1), (7, 12, 6, 40)])
def test_it_computes_other_sizes(room: Room, said: Result, size: tuple[int, int, int, int]) -> None:
    batch, height, width, tokens = size
    found = read_export(room.model, "onnx")
    assert found is not None
    network = runtime_onnx.load(found, torch.device("cpu"))["unet"]
    draw = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(batch, 8, height, width, generator=draw),
        "timestep": torch.linspace(0.5, 900, batch),
        "encoder_hidden_states": torch.randn(batch, tokens, 16, generator=draw),
        "encoder_attention_mask": torch.rand(batch, tokens, generator=draw) > 0.3,
    }
    inputs["encoder_attention_mask"][:, 0] = True
    unet = load_checkpoint(ModelOptions(model=str(room.model))).model.unet.eval()
    with torch.no_grad():
        expected = UNetGraph(unet)(**inputs)
    assert torch.allclose(network.bind(**inputs)(), expected, rtol=0, atol=1e-5)


def test_a_folder_that_can_be_deployed(room: Room, said: Result, tmp_path: Path) -> None:
    """It edits without the UNet's weights; a second format is added; another model's is not."""
    linked = tmp_path / "linked"
    shutil.copytree(room.model, linked, ignore=shutil.ignore_patterns("onnx"))
    (linked / "vae" / "config.json").unlink()
    (linked / "vae" / "config.json").symlink_to(room.model / "vae" / "config.json")
    out = tmp_path / "out"
    done = export_model(room.request(linked, "onnx"), out)
    # The same model gives the same files, wherever it lies; here without those of the VAE.
    before = read_export(room.model, "onnx")
    assert before is not None
    assert set(done.manifest.files) == {"unet.onnx", "unet.onnx.data"}
    assert done.manifest.files.items() <= before.manifest.files.items()

    names = listing(out).keys()
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert {"model_index.json", "reasonpix.json", "unet/config.json", "vae/config.json"} <= names
    assert not any(name.startswith("unet/diffusion") for name in names)
    edits = [
        ReasonPix2Pix.from_pretrained(folder, device="cpu", runtime=runtime)
        for folder, runtime in ((out, "onnx"), (linked, "torch"))
    ]
    ours, torchs = (np.asarray(it([picture()], "make it rain")[0], int) for it in edits)
    assert np.abs(ours - torchs).max() <= 1
    with pytest.raises(WeightsError, match=r"no PyTorch weights of the UNet; give the model"):
        export_model(room.request(out, "openvino"))

    (out / "openvino").mkdir()
    (out / "openvino" / "stale.xml").write_text("of an earlier export")
    with pytest.raises(ReasonpixError, match="already exists; --force replaces it"):
        export_model(room.request(linked, "openvino", "int8"), out)
    with pytest.raises(ReasonpixError, match="is not an export, so --force does not replace it"):
        export_model(room.request(linked, "openvino", "int8"), out, force=True)
    shutil.copy(out / "onnx" / "export.json", out / "openvino")
    done = export_model(room.request(linked, "openvino", "int8"), out, force=True)
    assert done.folder == out / "openvino"
    assert {path.name for path in done.folder.iterdir()} == {"unet.xml", "unet.bin", "export.json"}
    assert "nncf" in done.manifest.packages
    size = [(out / it).stat().st_size for it in ("onnx/unet.onnx.data", "openvino/unet.bin")]
    assert size[1] < 0.5 * size[0]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]

    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(ReasonpixError, match=r"onnx was exported from different weights"):
        export_model(room.request(other, "openvino"), out, force=True)
    assert read_export(out, "openvino") == Export(done.folder, done.manifest)


# -- one that is not ------------------------------------------------------------------------------


def test_an_export_that_is_wrong_is_refused(room: Room, tmp_path: Path) -> None:
    """Weights that float16 cannot hold: PyTorch's edits are fine, and those of the export not."""
    model = write_model(tmp_path / "large", first_layer_times=1e7)
    before = listing(tmp_path)
    with pytest.raises(ReasonpixError) as refused:
        export_model(room.request(model, "onnx", "fp16"))
    told = str(refused.value)
    assert told.startswith(
        "onnx fp16: the edits differ too much from PyTorch's, so nothing was written"
    )
    assert "UNet, relative difference, step 1 of 2: nan; must be ≤ 1e-02" in told
    assert told.endswith("use a higher precision, such as fp32")
    assert listing(tmp_path) == before


def test_what_is_there_survives_a_refusal(room: Room, said: Result) -> None:
    """The samples are found to be none after the place was seen to be free."""
    request = room.request(room.model, "onnx")
    nowhere = BenchmarkOptions(path=str(room.model / "nowhere"))
    before = listing(room.model)
    with pytest.raises(ReasonpixError, match="nowhere"):
        export_model(
            ExportRequest(request.model, "onnx", nowhere, metrics=request.metrics), force=True
        )
    assert listing(room.model) == before


@pytest.mark.parametrize(
    ("model", "out", "message"),
    [
        ("mini/reasonpix2pix", None, "comes with a plugin, so the export cannot go into it"),
        (
            "somebody/model",
            None,
            "is not a local folder, so the export cannot go into it; add --out",
        ),
        ("mini/reasonpix2pix", "taken", "taken holds something else; give a new folder"),
        ("mini/reasonpix2pix", "taken/file", "is a file; give a folder"),
        ("mini/clip", "new", "is not an editing model"),
    ],
)
def test_places_that_are_not_free(
    room: Room, tmp_path: Path, model: str, out: str | None, message: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ReasonpixError, match=message):
        export_model(room.request(model, "onnx"), out and tmp_path / out)
    assert listing(tmp_path) == {"taken/file": b"mine"}


@pytest.mark.parametrize(
    ("format", "precision", "message"),
    [
        ("onnx", "bf16", "onnxruntime has no bfloat16 on a CPU.*use --to openvino"),
        ("tensorrt", "int8", "TensorRT needs a calibration.*use fp16"),
    ],
)
def test_precisions_that_cannot_come_out(
    room: Room, format: Format, precision: Precision, message: str
) -> None:
    with pytest.raises(ReasonpixError, match=message):
        export_model(room.request(room.model, format, precision))


@pytest.mark.parametrize(
    ("format", "device", "message"),
    [
        ("onnx", "nonsense", "device: 'nonsense' cannot be used: "),
        ("onnx", "meta", "device: onnx computes on cpu or cuda, not on meta"),
        ("openvino", "meta", "device: openvino computes on cpu, not on meta"),
    ],
)
def test_devices_that_cannot_be_used(room: Room, format: Format, device: str, message: str) -> None:
    request = room.request(room.model, format)
    with pytest.raises(ReasonpixError, match=message):
        export_model(replace(request, model=request.model.model_copy(update={"device": device})))


@pytest.mark.parametrize("format", ["onnx", "openvino", "tensorrt"])
def test_a_missing_package_is_named_before_any_work(
    room: Room, monkeypatch: pytest.MonkeyPatch, format: Format
) -> None:
    package = {"onnx": "onnxruntime"}.get(format, format)
    monkeypatch.setitem(sys.modules, package, None)
    told: list[str] = []
    with pytest.raises(ReasonpixError, match=rf"{package}: pip install 'reasonpix\[{format}\]'"):
        export_model(room.request(room.model, format), log=told.append)
    assert told == []


@pytest.mark.parametrize("resolution", [8, 32, 44, 45, 200])
def test_the_profile_holds_the_model_s_own_sizes(resolution: int) -> None:
    checkpoint = tiny_model(resolution=resolution)
    sizes = working_size((100, 60), resolution, STRIDE)
    least, usual, most = profile(checkpoint).height
    assert (
        most * vae_scale_factor(checkpoint.vae)
        == usual * vae_scale_factor(checkpoint.vae)
        == max(sizes)
    )
    assert least * vae_scale_factor(checkpoint.vae) == STRIDE <= min(sizes)


def test_quiet_leaves_logging_as_it_was() -> None:
    import logging

    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.root.manager.disable)
    with pytest.raises(ValueError, match="through"), quiet():
        logging.basicConfig(level=logging.DEBUG, force=True)
        raise ValueError("through")
    assert (list(root.handlers), root.level, logging.root.manager.disable) == before
