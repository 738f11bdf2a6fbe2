"""Weights as variants are loaded; what cannot be loaded is named, with what mends it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from transformers import AutoModel, CLIPTextModel, ViTConfig, ViTModel  # noqa: E402

from reasonpix.errors import WeightsError  # noqa: E402
from reasonpix.plugin import registry  # noqa: E402
from reasonpix.plugin.components import ModelOptions  # noqa: E402
from reasonpix.plugin.model_files import automatic_variants, variants_of  # noqa: E402
from reasonpix.plugin.weights import check_weights, pretrained  # noqa: E402
from tests.support.tiny_model import tiny_text, tiny_vae  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"transformers": tiny_text().encoder, "diffusers": tiny_vae()}


def options(folder: Path, **more: Any) -> ModelOptions:
    return ModelOptions(model=str(folder), **more)


def load(folder: Path, network: Any, **more: Any) -> Any:
    return pretrained(type(network), options(folder, **more))


def same(one: Any, other: Any) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_the_only_variant_is_loaded_and_said_once(
    library: str,
    variant: str,
    size: str,
    networks: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = networks[library]
    network.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    with caplog.at_level(logging.WARNING, "reasonpix"):
        assert same(network, load(tmp_path, network))
        assert same(network, load(tmp_path, network))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"model: {str(tmp_path)!r} has weights only as the variant {variant}, which is loaded"
    ]
    assert automatic_variants(options(tmp_path)) == [variant]
    check_weights(options(tmp_path))


def test_a_variant_is_chosen_by_name_and_plain_weights_by_default(
    networks: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = networks["diffusers"]
    plain.save_pretrained(tmp_path)
    other = tiny_vae()
    other.save_pretrained(tmp_path, variant="fp16")
    assert same(plain, load(tmp_path, plain))
    assert same(other, load(tmp_path, plain, variant="fp16"))
    assert automatic_variants(options(tmp_path)) == [] and not caplog.records
    with pytest.raises(
        WeightsError, match=r"^variant: .* no weights of the variant 'bf16'; it has plain.* fp16"
    ):
        load(tmp_path, plain, variant="bf16")


def test_of_two_variants_one_must_be_named(networks: dict[str, Any], tmp_path: Path) -> None:
    network = networks["transformers"]
    for variant in ("fp16", "bf16"):
        network.save_pretrained(tmp_path, variant=variant)
    with pytest.raises(WeightsError, match="only as variants: bf16, fp16; choose one with `vari"):
        load(tmp_path, network)
    assert same(network, load(tmp_path, network, variant="bf16"))


def test_a_part_without_the_variant_is_loaded_from_its_plain_files(
    networks: dict[str, Any], tmp_path: Path
) -> None:
    vae = networks["diffusers"]
    vae.save_pretrained(tmp_path / "vae")
    vae.save_pretrained(tmp_path / "other", variant="fp16")
    for part in ("vae", "other"):
        loaded = pretrained(AutoencoderKL, options(tmp_path, variant="fp16"), subfolder=part)
        assert same(vae, loaded)


def test_names_of_variants() -> None:
    names = [
        "model.safetensors.index.fp16.json",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16.non_ema.safetensors",
        "model-00001-of-00002.safetensors",  # without its index
        "diffusion_pytorch_model.safetensors",
        "optimizer.safetensors",
    ]
    assert variants_of(names, "model") == {"fp16", "fp16.non_ema"}
    assert variants_of(names, "diffusion_pytorch_model") == {None}


def test_the_variant_is_a_fact_of_the_fingerprint(networks: dict[str, Any], tmp_path: Path) -> None:
    networks["transformers"].save_pretrained(tmp_path / "text_encoder", variant="fp16")
    encoder = registry.find("encoder", "clip-text")

    def facts(**more: Any) -> dict[str, Any]:
        given = encoder.Options.model_validate({"model": str(tmp_path)} | more)
        return registry.fingerprint_facts("encoder", "clip-text", given)

    assert facts()["variants"] == {"model": ["fp16"]}
    assert facts(variant="fp16")["options"]["variant"] == "fp16"


# -- What lies there instead ----------------------------------------------------------------------


def touch(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")

    return make


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )


def missing_shard(folder: Path) -> None:
    tiny_text().encoder.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*-00002-of-*.safetensors"))[0].unlink()


LIES = {
    "empty": (touch(), "the folder is empty"),
    "pickle": (touch("pytorch_model.bin"), r"pickles only \(pytorch_model.bin\), .* convert"),
    "checkpoint": (touch("last.ckpt", "a.pt"), r"pickles only \(a.pt, last.ckpt\)"),
    "onnx": (touch("model.onnx", "config.json"), r"ONNX only \(model.onnx\); name the model in sa"),
    "openvino": (touch("openvino_model.xml", "openvino_model.bin"), "OpenVINO only"),
    "gguf": (touch("tiny.Q4.gguf"), r"GGUF only \(tiny.Q4.gguf\); GGUF is read by the planner"),
    "flax": (touch("flax_model.msgpack"), "Flax only"),
    "keras": (touch("tf_model.h5"), "TensorFlow only"),
    "config": (touch("config.json", "README.md"), "has README.md, config.json and no weights"),
    "pointer": (pointer, "model.safetensors' is a Git LFS pointer, .* `git lfs pull`"),
    "no index": (touch("model-00001-of-00002.safetensors"), "shards .* without their index"),
    "shard": (missing_shard, r"lacks model-00002-of-\d+.safetensors, of .* download"),
    "library": (
        touch("diffusion_pytorch_model.safetensors"),
        "transformers and diffusers name their weights diff",
    ),
    "one file": (touch("v1-5-pruned.safetensors"), "from_single_file"),
    "cache": (
        touch("snapshots/ab12/model.safetensors", "refs/main"),
        "lie in snapshots/ab12; name a folder such as '.*/snapshots/ab12'",
    ),
    "pickled part": (touch("unet/diffusion_pytorch_model.bin"), "in unet/ it has pickles only"),
}


@pytest.mark.parametrize("name", LIES)
def test_what_lies_there_is_named(name: str, tmp_path: Path) -> None:
    make, message = LIES[name]
    make(tmp_path)
    with pytest.raises(WeightsError, match=f"(?s){message}") as caught:
        pretrained(CLIPTextModel, options(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["empty", "pickle", "onnx", "flax", "config", "pointer"])
def test_it_is_named_before_anything_is_computed(name: str, tmp_path: Path) -> None:
    make, message = LIES[name]
    make(tmp_path)
    with pytest.raises(WeightsError, match=message):
        check_weights(options(tmp_path))


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_the_command_converts_pickles(
    library: str, networks: dict[str, Any], tmp_path: Path
) -> None:
    network = networks[library]
    network.save_pretrained(tmp_path)
    [plain] = tmp_path.glob("*.safetensors")
    plain.unlink()
    name = {"transformers": "pytorch_model.bin", "diffusers": "diffusion_pytorch_model.bin"}
    torch.save(network.state_dict(), tmp_path / name[library])
    with pytest.raises(WeightsError, match="pickles only") as caught:
        load(tmp_path, network)
    command = re.search(r'`python -c "(.+)"`', str(caught.value))
    assert command
    exec(command[1], {})
    assert same(network, load(tmp_path, network))


def test_weights_of_another_class_are_refused(networks: dict[str, Any], tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(num_hidden_layers=1, **shape)).save_pretrained(tmp_path / "vit")
    with pytest.raises(
        WeightsError, match=r"another class than CLIPTextModel: .* its config.json names ViTModel"
    ):
        pretrained(CLIPTextModel, options(tmp_path / "vit"))
    networks["diffusers"].save_pretrained(tmp_path / "vae")
    with pytest.raises(WeightsError, match=r"UNet2DConditionModel.*names AutoencoderKL"):
        pretrained(UNet2DConditionModel, options(tmp_path / "vae"))
    assert isinstance(pretrained(AutoModel, options(tmp_path / "vit")), ViTModel)


def test_tensors_that_are_missing_are_not_made_up(networks: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    network = networks["transformers"]
    network.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    save_file({name: it for name, it in tensors.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=f"1 of {len(tensors)} tensors are missing, such as"):
        load(tmp_path, network)


def test_a_damaged_file_is_one_line(networks: dict[str, Any], tmp_path: Path) -> None:
    for library, network in networks.items():
        network.save_pretrained(tmp_path / library)
        [file] = (tmp_path / library).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:99])
        with pytest.raises(WeightsError, match="holds no usable") as caught:
            load(tmp_path / library, network)
        assert "\n" not in str(caught.value)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weights": 1}))
    touch("model-00001-of-00002.safetensors", "config.json")(tmp_path)
    with pytest.raises(WeightsError, match=r"index.json' is damaged; download"):
        pretrained(CLIPTextModel, options(tmp_path))
