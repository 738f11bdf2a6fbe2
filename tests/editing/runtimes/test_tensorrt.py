"""What of TensorRT needs neither TensorRT nor a GPU: keys, profiles, kept engines, and messages."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reasonpix.editing.runtimes.manifest import Export, Graph, Manifest, Port, Shapes
from reasonpix.editing.runtimes.tensorrt import (
    check_shapes,
    driver_version,
    engine_key,
    load,
    load_or_build_engine,
    profile_shapes,
)
from reasonpix.errors import ReasonpixError, WeightsError

PROFILE = Shapes(batch=(1, 3, 12), height=(32, 64, 96), width=(32, 64, 96), sequence=(1, 77, 77))
UNET = Graph(
    file="unet.onnx",
    inputs=(
        Port(name="sample", dtype="float16", shape=("batch", 8, "height", "width")),
        Port(name="timestep", dtype="float32", shape=("batch",)),
        Port(name="encoder_hidden_states", dtype="float16", shape=("batch", "sequence", 768)),
        Port(name="encoder_attention_mask", dtype="bool", shape=("batch", "sequence")),
    ),
    output=Port(name="prediction", dtype="float16", shape=("batch", 4, "height", "width")),
)
ENCODER = Graph(
    file="vae_encoder.onnx",
    inputs=(Port(name="pixels", dtype="float16", shape=("batch", 3, "8*height", "8*width")),),
    output=Port(name="latents", dtype="float16", shape=("batch", 4, "height", "width")),
)
PLATFORM = {"gpu": "NVIDIA L4", "capability": "8.9", "driver": "580.65.06", "tensorrt": "10.13.3"}
FILES = {
    "unet.onnx": "a" * 64,
    "unet.onnx.data": "b" * 64,
    "vae_encoder.onnx": "c" * 64,
}


def manifest(profile: Shapes | None = PROFILE, files: dict[str, str] = FILES) -> Manifest:
    return Manifest(
        format="tensorrt",
        precision="fp16",
        source="some/model",
        weights="0" * 64,
        packages={},
        files=files,
        graphs={"unet": UNET, "vae_encoder": ENCODER},
        profile=profile,
        parity={},
    )


def key(**changes: object) -> str:
    """Of the UNet's engine with one thing that is other than usual."""
    platform = PLATFORM | {name: str(it) for name, it in changes.items() if name in PLATFORM}
    rest = {name: it for name, it in changes.items() if name not in PLATFORM}
    return engine_key(Export(Path("model/tensorrt"), manifest(**rest)), "unet", platform)  # type: ignore[arg-type]


def inputs(batch: int = 3, side: int = 64, tokens: int = 77) -> dict[str, Tensor]:
    return {
        "sample": torch.zeros(batch, 8, side, side, dtype=torch.float16),
        "timestep": torch.zeros(batch),
        "encoder_hidden_states": torch.zeros(batch, tokens, 768, dtype=torch.float16),
        "encoder_attention_mask": torch.ones(batch, tokens, dtype=torch.bool),
    }


def test_a_profile_has_the_least_the_usual_and_the_most_of_each_input() -> None:
    found = profile_shapes("unet", UNET, PROFILE)
    assert found["sample"] == ((1, 8, 32, 32), (3, 8, 64, 64), (12, 8, 96, 96))
    assert found["timestep"] == ((1,), (3,), (12,))
    assert found["encoder_attention_mask"] == ((1, 1), (3, 77), (12, 77))


def test_a_vae_computes_one_image_and_counts_pixels() -> None:
    found = profile_shapes("vae_encoder", ENCODER, PROFILE)
    assert found == {"pixels": ((1, 3, 256, 256), (1, 3, 512, 512), (1, 3, 768, 768))}


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "NVIDIA L40"},
        {"capability": "9.0"},
        {"driver": "580.65.07"},
        {"tensorrt": "11.4.0"},
        {"profile": PROFILE.model_copy(update={"batch": (1, 3, 24)})},
        {"files": FILES | {"unet.onnx": "d" * 64}},
        {"files": FILES | {"unet.onnx.data": "d" * 64}},
    ],
    ids=lambda change: "-".join(change),
)
def test_an_engine_is_of_its_network_profile_gpu_driver_and_tensorrt(
    change: dict[str, object],
) -> None:
    assert key() == key()
    assert key(**change) != key()


def test_an_engine_does_not_depend_on_other_networks() -> None:
    assert key(files=FILES | {"vae_encoder.onnx": "d" * 64}) == key()


def test_an_engine_is_built_once(tmp_path: Path) -> None:
    built: list[bytes] = []

    def build() -> bytes:
        built.append(b"an engine")
        return built[-1]

    file = tmp_path / "engines" / "key.engine"
    assert load_or_build_engine(file, build) == b"an engine"
    assert load_or_build_engine(file, build) == b"an engine"
    assert len(built) == 1
    assert os.listdir(file.parent) == ["key.engine"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_engine_is_built_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "key.engine"
    load_or_build_engine(file, lambda: b"an engine")
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-1], "changed": whole[:-1] + b"?", "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert load_or_build_engine(file, lambda: b"another") == b"another"
    assert f"{file} is damaged" in caplog.text
    assert load_or_build_engine(file, lambda: b"never") == b"another"


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path) -> None:
    def build() -> bytes:
        raise WeightsError("no")

    with pytest.raises(WeightsError, match="no"):
        load_or_build_engine(tmp_path / "key.engine", build)
    assert os.listdir(tmp_path) == []


def test_two_may_build_the_same_engine_at_once(tmp_path: Path) -> None:
    file, both = tmp_path / "key.engine", threading.Barrier(2, timeout=30)
    got: list[bytes] = []

    def build() -> bytes:
        both.wait()  # both have found none
        return b"an engine" * 100_000

    threads = [
        threading.Thread(target=lambda: got.append(load_or_build_engine(file, build))) for _ in "12"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [b"an engine" * 100_000] * 2
    assert os.listdir(tmp_path) == ["key.engine"]
    assert load_or_build_engine(file, lambda: b"never") == got[0]


def test_a_folder_that_cannot_be_written_is_told_before_minutes_are_spent(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("no folder")
    built: list[None] = []

    def build() -> bytes:
        built.append(None)
        return b"an engine"

    with pytest.raises(WeightsError, match=r"engines: .*cannot be kept.*REASONPIX_ENGINES"):
        load_or_build_engine(tmp_path / "engines" / "key.engine", build)
    assert not built


def test_inputs_within_the_profile_are_taken() -> None:
    profile = profile_shapes("unet", UNET, PROFILE)
    for given in (inputs(batch=12, side=96, tokens=77), inputs(batch=1, side=32, tokens=1)):
        check_shapes(UNET, profile, given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (inputs(batch=24), r"sample is 24x8x64x64, .* 1x8x32x32 to 12x8x96x96"),
        (inputs(side=16), r"sample is 3x8x16x16"),
        (inputs(tokens=100), r"encoder_hidden_states is 3x100x768, .* 12x77x768"),
    ],
    ids=["batch", "size", "tokens"],
)
def test_what_is_outside_the_profile_is_an_error_that_says_so(
    given: dict[str, Tensor], told: str
) -> None:
    with pytest.raises(ReasonpixError, match=told):
        check_shapes(UNET, profile_shapes("unet", UNET, PROFILE), given)


def _nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_the_driver_is_as_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    _nvidia_smi(tmp_path, 'echo "580.65.06"; echo "580.65.06"')  # a line for each GPU
    assert driver_version() == "580.65.06"


@pytest.mark.parametrize("script", [None, "exit 9", "true"])
def test_without_nvidia_smi_it_says_what_a_container_needs(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        _nvidia_smi(tmp_path, script)
    with pytest.raises(ReasonpixError, match="NVIDIA_DRIVER_CAPABILITIES=compute,utility"):
        driver_version()


def test_without_a_gpu_it_says_what_is_needed() -> None:
    export = Export(Path("model/tensorrt"), manifest())
    with pytest.raises(ReasonpixError, match=r"NVIDIA GPU, not on cpu.*reasonpix\[tensorrt\]"):
        load(export, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_none() -> None:
    with pytest.raises(ReasonpixError, match=r"not on cuda.*CUDA build of PyTorch"):
        load(Export(Path("model/tensorrt"), manifest()), torch.device("cuda"))
