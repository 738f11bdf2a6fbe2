"""The folder of an editing model: diffusers read it, we read diffusers', and mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from reasonpix.editing.checkpoint import (
    LoadedModel,
    initialize_model,
    load_checkpoint,
    save_checkpoint,
)
from reasonpix.editing.config import ConnectorConfig, ConnectorKind, SamplingSettings
from reasonpix.editing.pipeline_parts import read_parts
from reasonpix.errors import WeightsError
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions, Options
from reasonpix.plugin.spec import ComponentSpec
from tests.support.tiny_model import (
    H_WIDTH,
    TOKENS,
    WIDTH,
    tiny_model,
    tiny_scheduler,
    tiny_text,
    tiny_unet,
    tiny_vae,
    write_tiny,
)

needs_clip_text = pytest.mark.skipif(
    find_spec("reasonpix_llava") is None, reason="the plugin of clip-text is not installed"
)
KINDS: tuple[ConnectorKind, ...] = get_args(ConnectorKind)
FAKE = ComponentSpec("encoder", "fake-encoder", Options())
SETTINGS = SamplingSettings(resolution=32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ip2p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain InstructPix2Pix pipeline, written by diffusers."""
    return plain(tmp_path_factory.mktemp("plain") / "ip2p", 8)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text-to-image pipeline."""
    return plain(tmp_path_factory.mktemp("plain") / "sd15", 4)


def plain(folder: Path, channels: int) -> Path:
    kind = StableDiffusionInstructPix2PixPipeline if channels == 8 else StableDiffusionPipeline
    text = tiny_text()
    unet = tiny_unet(channels)
    scheduler = tiny_scheduler(steps_offset=1, clip_sample=False)  # or diffusers warns
    with torch.no_grad():
        unet.conv_in.bias.normal_()
    kind(
        tiny_vae(), text.encoder, text.tokenizer, unet, scheduler, None, None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def options(folder: Path | str) -> ModelOptions:
    return ModelOptions(model=str(folder))


def start(
    folder: Path, init: Any, kind: ConnectorKind, encoder: ComponentSpec = FAKE, **config: Any
) -> LoadedModel:
    width = WIDTH if kind == "identity" else H_WIDTH
    given = {"h_width": width, "width": WIDTH, "tokens": TOKENS, "heads": 2} | config
    chosen, h = ConnectorConfig(kind=kind, **given), [torch.zeros(3, width)]
    return initialize_model(read_parts(options(folder)), init, encoder, chosen, SETTINGS, h)


def inputs() -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 8, 8, 8),
        "timestep": torch.tensor([7, 800]),
        "encoder_hidden_states": torch.randn(2, TOKENS, WIDTH),
    }


def output(unet: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = unet(**given).sample
    return found


def weights(checkpoint: LoadedModel) -> dict[str, torch.Tensor]:
    return {
        **checkpoint.model.state_dict(),
        **{f"vae.{name}": value for name, value in checkpoint.vae.state_dict().items()},
    }


# -- step 0 --------------------------------------------------------------------------------------


def test_clip_residual_begins_as_instruct_pix2pix(ip2p: Path) -> None:
    theirs = StableDiffusionInstructPix2PixPipeline.from_pretrained(ip2p, safety_checker=None)
    words = ["make it rain", "what if it were night by the sea"]
    given = inputs()
    with torch.no_grad():
        ids = theirs.tokenizer(
            words, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        given["encoder_hidden_states"] = theirs.text_encoder(ids)[0]
        expected = output(theirs.unet, given)
        model = start(ip2p, "ip2p", "clip_residual").model
        states = model.condition([torch.randn(3, H_WIDTH), torch.randn(9, H_WIDTH)], words)
        found = model(given["sample"][:, :4], given["sample"][:, 4:], given["timestep"], states)
    assert torch.equal(found, expected)


def test_sd15_is_widened_and_ip2p_is_not(sd15: Path, ip2p: Path) -> None:
    narrow = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None).unet
    given = inputs()
    wide = start(sd15, "sd15", "text_tokens").model.unet
    expected = output(narrow, given | {"sample": given["sample"][:, :4]})
    assert torch.allclose(output(wide, given), expected, atol=2e-6)
    theirs = StableDiffusionInstructPix2PixPipeline.from_pretrained(ip2p, safety_checker=None).unet
    ours = start(ip2p, "ip2p", "text_tokens").model.unet
    assert torch.equal(output(ours, given), output(theirs, given))


@pytest.mark.parametrize(("init", "other"), [("sd15", "ip2p"), ("ip2p", "sd15")])
def test_the_wrong_init_is_explained(init: str, other: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(WeightsError, match=rf"takes \d channels.*init: {other}"):
        start(request.getfixturevalue(other), init, "text_tokens")


def test_a_known_connector_goes_on_and_another_is_fresh(tmp_path: Path) -> None:
    known = tiny_model("query_resampler")
    folder = write_tiny(tmp_path / "known", "query_resampler")
    config = known.model.connector.config
    again = start(folder, "ip2p", **config.model_dump())
    for name, value in known.model.connector.state_dict().items():
        assert torch.equal(again.model.connector.state_dict()[name], value), name
    other = start(folder, "ip2p", **config.model_dump() | {"kind": "text_tokens"})
    assert "queries" not in other.model.connector.state_dict()
    assert torch.equal(other.model.uncond_states, known.model.uncond_states)


# -- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(kind: ConnectorKind, tmp_path: Path) -> None:
    made = tiny_model(kind, num_inference_steps=7, guidance_scale=3.5)
    save_checkpoint(tmp_path, made)
    loaded = load_checkpoint(options(tmp_path))
    assert loaded.settings == made.settings
    assert loaded.encoder == made.encoder
    assert loaded.own_text == made.own_text
    assert loaded.model.connector.config == made.model.connector.config
    assert type(loaded.scheduler) is type(made.scheduler)
    assert loaded.scheduler.config.beta_end == 0.012
    expected, found = weights(made), weights(loaded)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (tmp_path / "text_encoder").is_dir() == (kind == "clip_residual")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_half_precision_stays_on_disk_and_computes_in_full(tmp_path: Path) -> None:
    made = tiny_model()
    made.model.half()
    save_checkpoint(tmp_path, made)
    for file in ("unet/diffusion_pytorch_model.safetensors", "connector/model.safetensors"):
        assert {it.dtype for it in load_file(tmp_path / file).values()} == {torch.float16}
    loaded = load_checkpoint(options(tmp_path)).model
    assert {it.dtype for it in loaded.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["text_tokens", "clip_residual"])
def test_diffusers_loads_what_we_save(kind: ConnectorKind, tmp_path: Path) -> None:
    made = tiny_model(kind)
    save_checkpoint(tmp_path, made)
    absent = {} if kind == "clip_residual" else {"text_encoder": None, "tokenizer": None}
    theirs = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path, **absent)
    given = inputs()
    assert torch.equal(output(theirs.unet, given), output(made.model.unet, given))
    assert (theirs.text_encoder is not None) == (kind == "clip_residual")
    images = theirs(
        image=torch.rand(1, 3, 32, 32),
        prompt_embeds=torch.randn(1, TOKENS, WIDTH),
        negative_prompt_embeds=made.model.uncond_states[None],
        num_inference_steps=2,
    ).images
    assert images[0].size == (32, 32)


@needs_clip_text
def test_a_plain_pipeline_is_an_editing_model(ip2p: Path) -> None:
    loaded = load_checkpoint(options(ip2p))
    assert loaded.encoder.name == "clip-text" and loaded.own_text
    assert loaded.encoder.options.model == str(ip2p)
    assert loaded.model.connector.config.kind == "identity"
    assert loaded.settings == SamplingSettings(resolution=32)
    encoder = loaded.encoder.build()
    encoder.load()
    words = "make it rain"
    (h,) = encoder.encode([Image.new("RGB", (32, 32))], [words])
    assert loaded.model.text is not None
    with torch.no_grad():
        states, mask = loaded.model.condition([torch.from_numpy(h)], [words])
        null = loaded.model.text([""])[0]
    assert mask is None
    assert torch.equal(states, loaded.model.text([words]))
    assert torch.equal(loaded.model.uncond_states, null)


@needs_clip_text
def test_a_folder_that_reads_its_own_text_may_move(ip2p: Path, tmp_path: Path) -> None:
    kind = registry.find("encoder", "clip-text").Options
    encoder = ComponentSpec("encoder", "clip-text", kind(model=str(ip2p)))
    made = start(ip2p, "ip2p", "identity", encoder)
    assert made.own_text
    (tmp_path / "a").mkdir()
    save_checkpoint(tmp_path / "a", made)
    assert json.loads((tmp_path / "a/reasonpix.json").read_text())["encoder"]["model"] == "."
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load_checkpoint(options(tmp_path / "b"))
    assert moved.own_text and moved.encoder.options.model == str(tmp_path / "b")
    other = ComponentSpec("encoder", "clip-text", kind(model=str(ip2p), revision="old"))
    assert not start(ip2p, "ip2p", "identity", other).own_text


# -- mistakes ------------------------------------------------------------------------------------


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | values))

    return spoil


def without_null(folder: Path) -> None:
    file = folder / "connector/model.safetensors"
    tensors = load_file(file)
    del tensors["null"]
    save_file(tensors, file)


def short_file(folder: Path) -> None:
    file = folder / "connector/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lose("model_index.json"), "it has no model_index.json"),
    "index": (write("model_index.json", "{"), "model_index.json of .* is not valid JSON"),
    "facts": (write("reasonpix.json", "[]"), "reasonpix.json of .* is not a JSON object"),
    "settings": (
        change("reasonpix.json", settings={"steps": 3}),
        "reasonpix.json of .*: settings.steps: no such option",
    ),
    "no settings": (change("reasonpix.json", settings=[1]), "settings: .*mapping"),
    "encoder": (change("reasonpix.json", encoder="gone"), "no encoder 'gone'"),
    "option": (
        change("reasonpix.json", encoder={"use": "fake-encoder", "size": 3}),
        "encoder.size: no such option",
    ),
    "no encoder": (write("reasonpix.json", "{}"), "encoder: expected a plugin's name"),
    "no weights": (lose("connector/model.safetensors"), "lacks connector/"),
    "no config": (lose("connector/config.json"), "lacks connector/"),
    "kind": (change("connector/config.json", kind="q-former"), "is damaged.*kind"),
    "another kind": (change("connector/config.json", kind="query_resampler"), "is damaged"),
    "width": (change("connector/config.json", h_width=4), "is damaged.*size mismatch"),
    "no null": (without_null, "is damaged.*null"),
    "short": (short_file, "is damaged"),
    "no unet": (
        lose("unet/diffusion_pytorch_model.safetensors"),
        "no usable UNet2DCondition",
    ),
    "scheduler": (
        change("model_index.json", scheduler=["diffusers", "UNet2DModel"]),
        "scheduler UNet2DModel in .*, which is not a scheduler of diffusers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_damaged_is_explained(name: str, tmp_path: Path) -> None:
    spoil, message = WRONG[name]
    folder = write_tiny(tmp_path / "model")
    spoil(folder)
    with pytest.raises(WeightsError, match=f"(?s){message}") as caught:
        load_checkpoint(options(folder))
    assert str(folder) in str(caught.value)


def test_the_folder_of_a_run_is_no_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    with pytest.raises(WeightsError, match="an unfinished run"):
        load_checkpoint(options(run))
    write_tiny(run / "model")
    with pytest.raises(WeightsError, match=r"folder of a run; its model is '.*run/model'"):
        load_checkpoint(options(run))


def test_what_the_hub_cannot_give_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        WeightsError, match="'owner/gone' is neither a local folder nor in the cache"
    ):
        load_checkpoint(options(Path("owner/gone")))


def test_a_connector_of_another_model_is_explained(tmp_path: Path) -> None:
    folder, other = write_tiny(tmp_path / "model"), tmp_path / "other"
    made = start(folder, "ip2p", "text_tokens")
    made.model.connector = type(made.model.connector)(
        ConnectorConfig(kind="text_tokens", h_width=H_WIDTH, width=24, tokens=TOKENS)
    )
    other.mkdir()
    save_checkpoint(other, made)
    with pytest.raises(WeightsError, match="states of width 24 to a UNet that reads 16"):
        load_checkpoint(options(other))


def test_a_text_to_image_model_is_no_editing_model(sd15: Path) -> None:
    with pytest.raises(WeightsError, match=r"takes 4 channels.*`init: sd15`"):
        load_checkpoint(options(sd15))


def test_nothing_says_what_no_instruction_is(ip2p: Path, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    (folder / "connector" / "config.json").unlink()
    (folder / "reasonpix.json").unlink()
    with pytest.raises(WeightsError, match="neither a connector nor a text encoder"):
        load_checkpoint(options(folder))


def test_no_such_folder() -> None:
    with pytest.raises(WeightsError, match=r"no folder './nowhere'"):
        load_checkpoint(options("./nowhere"))
