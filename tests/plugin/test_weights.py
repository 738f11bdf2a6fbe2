from __future__ import annotations

from pathlib import Path

import pytest

from reasonpix.errors import ReasonpixError, WeightsError
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.weights import check_weights, digest, pretrained


def weights(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_digest_is_of_names_and_bytes_wherever_they_lie(tmp_path: Path) -> None:
    one = weights(tmp_path / "one", a="1", b="2")
    assert digest(weights(tmp_path / "two", b="2", a="1")) == digest(one)
    assert digest(weights(tmp_path / "three", a="12", b="")) != digest(one)
    assert digest(weights(tmp_path / "four", a="1", c="2")) != digest(one)
    (one / "README.md").write_text("a card")
    assert digest(one) == digest(tmp_path / "two")
    (one / "vae").mkdir()
    (one / "vae" / "a").write_text("1")
    assert digest(one) != digest(tmp_path / "two")


def test_what_is_no_weight_is_not_in_the_digest(tmp_path: Path) -> None:
    folder = weights(tmp_path / ".cache", a="1")
    before = digest(folder)
    for name in ("__pycache__", ".cache", ".git"):
        weights(folder / name, a="2")
    (folder / ".DS_Store").write_text("3")
    assert digest(folder) == before, "and a hidden folder above it does not matter"
    (folder / "b").write_text("")
    assert digest(folder) != before


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert digest(tmp_path / "a.gguf") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize("model", ["./weights", "/no/such/folder", "~/weights", "a/b/c"])
def test_a_folder_that_is_none(model: str) -> None:
    with pytest.raises(WeightsError, match=f"no folder '{model}'; give a hub id"):
        check_weights(ModelOptions(model=model))


def test_a_hub_id_or_a_folder_may_be_there(tmp_path: Path) -> None:
    check_weights(ModelOptions(model="Salesforce/blip2-opt-2.7b"))
    check_weights(ModelOptions(model=str(weights(tmp_path / "one", **{"model.safetensors": "1"}))))


def test_a_proxy_to_the_hub_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("ALL_PROXY", "socks5://me:recognisable@127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    options = ModelOptions(model="nobody/nothing", cache_dir=tmp_path)
    with pytest.raises(ReasonpixError, match=r"^ALL_PROXY names a SOCKS proxy") as error:
        pretrained(AutoTokenizer, options)
    assert "recognisable" not in str(error.value)
