"""Which runtime a model is computed by, and what its exports say of themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from reasonpix.editing.checkpoint import load_checkpoint
from reasonpix.editing.method import EditingModelMethod, EditingModelOptions
from reasonpix.editing.pipeline import CPU_ROWS, EditTask, ReasonPix2Pix
from reasonpix.editing.runtimes.base import Network
from reasonpix.editing.runtimes.manifest import (
    Export,
    Graph,
    Manifest,
    Port,
    file_sha256,
    read_export,
)
from reasonpix.editing.runtimes.modules import PlainAttention, UNetGraph, torch_networks
from reasonpix.editing.runtimes.names import Format
from reasonpix.editing.runtimes.select import RuntimeChoice, choose_runtime
from reasonpix.errors import WeightsError
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions, Options
from reasonpix.plugin.fakes import FakeEncoder
from reasonpix.plugin.weights import digest
from tests.support.tiny_model import RESOLUTION, tiny_model, write_tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def exported(model: Path, format: Format, data: bytes = b"graph") -> Path:
    """An export as far as one can see without computing it."""
    folder = model / format
    folder.mkdir()
    (folder / "unet.onnx").write_bytes(data)
    port = Port(name="sample", dtype="float32", shape=("batch", 8, "height", "width"))
    manifest = Manifest(
        format=format,
        precision="fp32",
        source="model",
        weights="0" * 64,
        packages={"torch": "2"},
        files={"unet.onnx": file_sha256(folder / "unet.onnx")},
        graphs={"unet": Graph(file="unet.onnx", inputs=(port,), output=port)},
        parity={},
    )
    (folder / "export.json").write_text(manifest.model_dump_json())
    return folder


def options(model: Path, **more: str) -> ModelOptions:
    return ModelOptions.model_validate({"model": str(model), "device": "cpu"} | more)


# -- manifests -----------------------------------------------------------------------------------


def test_an_export_is_read_as_it_was_written(model: Path) -> None:
    assert read_export(model, "onnx") is None
    exported(model, "onnx")
    export = read_export(model, "onnx")
    assert isinstance(export, Export)
    assert export.file("unet") == model / "onnx" / "unet.onnx"
    assert export.manifest.graphs["unet"].inputs[0].shape == ("batch", 8, "height", "width")
    assert read_export(model, "openvino") is None


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda folder: (folder / "unet.onnx").write_bytes(b"other"), "is not the file"),
    "absent": (lambda folder: (folder / "unet.onnx").unlink(), "cannot be read: No such file"),
    "no json": (lambda folder: (folder / "export.json").write_text("{"), "is not a valid manifest"),
    "no manifest": (lambda folder: (folder / "export.json").write_text("{}"), "Field required"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_says_what_is_wrong_and_how_to_mend_it(model: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(exported(model, "onnx"))
    with pytest.raises(WeightsError, match=message) as raised:
        read_export(model, "onnx")
    assert f"reasonpix export {model} --to onnx --samples BENCHMARK --force" in str(raised.value)


def test_a_manifest_of_another_version_is_not_guessed_at(model: Path) -> None:
    folder = exported(model, "onnx")
    facts = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(facts | {"version": 2}))
    with pytest.raises(WeightsError, match="is not a valid manifest"):
        read_export(model, "onnx")


# -- the choice of a runtime ---------------------------------------------------------------------

CPU = torch.device("cpu")


def test_without_exports_pytorch_computes(model: Path) -> None:
    assert choose_runtime("auto", options(model)) == RuntimeChoice("torch", CPU)
    assert choose_runtime("compile", options(model)) == RuntimeChoice("compile", CPU)


def test_auto_takes_the_fastest_that_is_at_hand(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(model, "onnx")
    exported(model, "tensorrt")  # not for a CPU
    assert choose_runtime("auto", options(model)).runtime == "onnx"
    exported(model, "openvino")
    assert choose_runtime("auto", options(model)).runtime == "openvino"
    assert choose_runtime("auto", options(model, dtype="bfloat16")).runtime == "torch"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose_runtime("auto", options(model)).runtime == "onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert choose_runtime("auto", options(model)).runtime == "torch"
    for weights in (model / "unet").glob("*.safetensors"):
        weights.unlink()
    # The message says how to install the runtime that has an export.
    assert choose_runtime("auto", options(model)).runtime == "onnx"


def test_an_export_without_weights_is_computed_by_its_runtime_alone(model: Path) -> None:
    exported(model, "openvino")
    for weights in (model / "unet").glob("*.safetensors"):
        weights.unlink()
    assert choose_runtime("auto", options(model, dtype="float32")).runtime == "openvino"
    with pytest.raises(WeightsError, match="without PyTorch weights; choose --runtime openvino"):
        choose_runtime("torch", options(model))


def test_a_missing_export_is_told_with_the_command_that_makes_it(model: Path) -> None:
    with pytest.raises(WeightsError, match=f"there are no exports.*export {model} --to onnx"):
        choose_runtime("onnx", options(model))
    exported(model, "onnx")
    with pytest.raises(WeightsError, match="there are exports for onnx"):
        choose_runtime("openvino", options(model))
    with pytest.raises(WeightsError, match=r"is not a local folder.*--out DIR"):
        choose_runtime("onnx", options(Path("someone/model")))


def test_a_runtime_is_not_put_on_a_device_it_is_not_made_for(model: Path) -> None:
    exported(model, "tensorrt")
    exported(model, "openvino")
    with pytest.raises(WeightsError, match="tensorrt computes on cuda, not on cpu"):
        choose_runtime("tensorrt", options(model))
    with pytest.raises(WeightsError, match="openvino computes on cpu, not on cuda"):
        choose_runtime("openvino", options(model, device="cuda"))
    assert choose_runtime("openvino", options(model, device="auto")).device == CPU


def test_weights_are_not_read_where_an_export_holds_them(model: Path) -> None:
    for weights in (model / "unet").glob("*.safetensors"):
        weights.unlink()
    checkpoint = load_checkpoint(options(model), unet_weights=False)
    unet = checkpoint.model.unet
    assert {it.device.type for it in unet.parameters()} == {"meta"}
    assert unet.config.in_channels == 8
    assert checkpoint.model.uncond_states.device == CPU


# -- evaluations know what computed them ---------------------------------------------------------


def test_an_export_is_part_of_what_a_method_is(model: Path) -> None:
    before = digest(model)
    folder = exported(model, "onnx")
    (folder / "engines").mkdir()
    (folder / "engines" / "one.engine").write_bytes(b"x")
    assert digest(model) == before, "the model itself is what it was"
    by_torch, by_onnx = (
        EditingModelMethod(EditingModelOptions(model=str(model), device="cpu", runtime=runtime))
        for runtime in ("torch", "onnx")
    )
    assert "export" not in by_torch.fingerprint_facts()
    known = by_onnx.fingerprint_facts()
    shutil.rmtree(folder)
    exported(model, "onnx", b"exported anew")
    assert by_onnx.fingerprint_facts() != known
    assert registry.fingerprint_facts(
        "method", "editing-model", by_onnx.options
    ) != registry.fingerprint_facts("method", "editing-model", by_torch.options)


def test_an_evaluation_wants_the_export_before_it_starts(model: Path) -> None:
    method = EditingModelMethod(
        EditingModelOptions(model=str(model), device="cpu", runtime="openvino")
    )
    with pytest.raises(WeightsError, match="has no export for openvino"):
        method.check()


# -- what is computed once -----------------------------------------------------------------------


class Counted(Network):
    """Counts how often it is bound and computed, and sees what it is bound to."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.bound: list[dict[str, Tensor | None]] = []
        self.computed = 0

    @property
    def device(self) -> torch.device:
        return self._network.device

    @property
    def dtype(self) -> torch.dtype:
        return self._network.dtype

    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        self.bound.append(inputs)
        compute = self._network.bind(**inputs)

        def counted() -> Tensor:
            self.computed += 1
            return compute()

        return counted


def counted() -> tuple[ReasonPix2Pix, Counted]:
    checkpoint = tiny_model()
    networks = torch_networks(checkpoint.model.unet, checkpoint.vae)
    unet = Counted(networks.unet)
    return ReasonPix2Pix(
        checkpoint,
        FakeEncoder(Options()),
        device=CPU,
        dtype=torch.float32,
        networks=replace(networks, unet=unet),
    ), unet


def test_an_edit_is_bound_once_with_all_its_branches_in_one_batch() -> None:
    from tests.editing.test_pipeline import picture

    model, unet = counted()
    settings = model.resolve_settings(
        guidance_scale=4, image_guidance_scale=1.5, num_inference_steps=3
    )
    tasks = [EditTask(picture(number), "make it rain", seed=number) for number in range(CPU_ROWS)]
    assert len(list(model.edit(tasks, settings))) == CPU_ROWS
    assert (len(unet.bound), unet.computed) == (1, 3)
    sample = unet.bound[0]["sample"]
    assert sample is not None and sample.shape[:2] == (3 * CPU_ROWS, 8)
    # Of the three branches the last does not see the image.
    image = sample[:, 4:].unflatten(0, (3, CPU_ROWS))
    assert torch.equal(image[0], image[1])
    assert image[0].abs().max() > 0
    assert image[2].abs().max() == 0


def test_the_attention_that_is_exported_gives_the_same_bits() -> None:
    checkpoint = tiny_model()
    unet = checkpoint.model.unet
    given = (torch.randn(3, 8, 8, 12), torch.full((3,), 7.5), torch.randn(3, 9, 16))
    masks = (None, torch.ones(3, 9, dtype=torch.bool), torch.arange(9).expand(3, 9) < 5)
    with torch.inference_mode():
        expected = [UNetGraph(unet)(*given, mask) for mask in masks]
        unet.set_attn_processor(PlainAttention())
        for before, mask in zip(expected, masks, strict=True):
            assert torch.equal(UNetGraph(unet)(*given, mask), before)


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 1), (3, 3), (8, CPU_ROWS)])
def test_on_a_cpu_a_batch_is_at_most_so_large(batch_size: int, rows: int) -> None:
    model = ReasonPix2Pix(
        tiny_model(),
        FakeEncoder(Options()),
        device=CPU,
        dtype=torch.float32,
        batch_size=batch_size,
    )
    assert model.rows == rows
    wide = Image.new("RGB", (2 * RESOLUTION, RESOLUTION))
    assert model.working_image(wide, RESOLUTION).size == (RESOLUTION, RESOLUTION // 2)


def test_without_the_packages_of_exports_all_else_works(model: Path, tmp_path: Path) -> None:
    code = """if True:
        import sys
        names = ("onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "tensorrt")
        sys.modules |= dict.fromkeys(names)
        from reasonpix.cli.main import cli
        cli()
    """

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    Image.new("RGB", (40, 32), "teal").save(tmp_path / "photo.png")
    edit = ("edit", "photo.png", "--instruction", "x", "--model", model, "--device", "cpu")
    assert run("--help").returncode == 0
    exported(model, "onnx")
    done = run(*edit)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "photo-edited.png").exists()
    done = run(*edit, "--force", "--runtime", "onnx")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.endswith("onnxruntime: pip install 'reasonpix[onnx]'\n")
    done = run("export", model, "--to", "openvino", "--samples", "none")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pip install 'reasonpix[openvino]'" in done.stderr.splitlines()[-1]


def test_openvino_reports_to_nobody(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from reasonpix.editing.runtimes.openvino import import_openvino
        import_openvino()
        import nncf
        print("SENDS", sys.modules["openvino_telemetry"])
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.stdout.splitlines()[-1:] == ["SENDS None"], done.stderr
    assert not list(tmp_path.rglob("*ga_cid"))
