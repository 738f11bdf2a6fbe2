"""GGUF files are unpacked once into a cache, whole, and give the same model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonpix.errors import WeightsError
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.weights import check_weights, find_gguf, pretrained, unpack_gguf

SMALL = [chr(code) for code in range(97, 123)]


def weights(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def tiny_gguf(path: Path, seed: int = 0) -> Path:
    """A random Llama of one layer and width 32, with an alphabet for a tokenizer."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    tokens = ["<|end|>", *SMALL, "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 27])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    widths = {"token_embd": len(tokens)} | {
        f"blk.0.{name}": 32
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    for name, width in widths.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=(width, 32)).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def test_a_gguf_file_is_named_in_several_ways(tmp_path: Path) -> None:
    def found(model: Path, gguf_file: str | None = None) -> Path | None:
        return find_gguf(ModelOptions(model=str(model)), gguf_file)

    folder = weights(tmp_path / "one", **{"a.gguf": "1", "__init__.py": ""})
    assert found(folder / "a.gguf") == found(folder) == found(folder, "a.gguf") == folder / "a.gguf"
    check_weights(ModelOptions(model=str(folder / "a.gguf")))
    with pytest.raises(WeightsError, match=r"no 'b\.gguf' in folder .*; it has a\.gguf"):
        found(folder, "b.gguf")
    with pytest.raises(WeightsError, match=r"model is the file .* itself; leave one out"):
        found(folder / "a.gguf", "b.gguf")
    with pytest.raises(WeightsError, match=r"no file .*b\.gguf"):
        found(folder / "b.gguf")
    (folder / "b.gguf").write_text("2")
    with pytest.raises(WeightsError, match=r"has a\.gguf, b\.gguf; choose one with gguf_file"):
        found(folder)
    assert found(folder, "b.gguf") == folder / "b.gguf"
    (folder / "model.safetensors").write_text("3")
    assert found(folder) is None, "safetensors are the plainer choice"
    assert found(Path("owner/name")) is None


def test_a_file_of_the_hub_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"cannot get 'a\.gguf' of 'nobody/nothing'"):
        find_gguf(ModelOptions(model="nobody/nothing"), "a.gguf")


def test_other_loaders_do_not_read_gguf(tiny: Path) -> None:
    with pytest.raises(WeightsError, match="is a GGUF file, but AutoModelForCausalLM needs"):
        pretrained(AutoModelForCausalLM, ModelOptions(model=str(tiny)))


def test_an_unpacked_file_is_the_same_model(tiny: Path, tmp_path: Path) -> None:
    folder = unpack_gguf(tiny, torch.float32, tmp_path)
    unpacked = AutoModelForCausalLM.from_pretrained(folder)
    packed = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name).state_dict()
    assert unpacked.state_dict().keys() == packed.keys()
    for name, tensor in unpacked.state_dict().items():
        assert torch.equal(tensor, packed[name]), name
    assert unpacked.generation_config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abc")["input_ids"] == [27, 3]
    turns = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "abc"
    assert not any(path.suffix in (".bin", ".pt", ".gguf") for path in folder.iterdir())


def test_a_file_is_unpacked_once(tiny: Path, tmp_path: Path) -> None:
    folder = unpack_gguf(tiny, torch.float32, tmp_path)
    model = folder / "model.safetensors"
    made = model.stat().st_mtime_ns
    assert unpack_gguf(tiny, torch.float32, tmp_path) == folder
    assert model.stat().st_mtime_ns == made
    half = unpack_gguf(tiny, torch.bfloat16, tmp_path)
    assert half != folder
    assert next(AutoModelForCausalLM.from_pretrained(half).parameters()).dtype == torch.bfloat16
    other = tiny_gguf(tmp_path / tiny.name, seed=1)
    assert unpack_gguf(other, torch.float32, tmp_path) not in (folder, half)


def test_it_is_kept_where_the_user_keeps_such_things(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = unpack_gguf(tiny, torch.float32)
    assert folder.is_relative_to(tmp_path / "cache" / "reasonpix")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = unpack_gguf(tiny, torch.float32)
    assert folder.is_relative_to(tmp_path / "home" / ".cache" / "reasonpix")
    assert [path.name for path in tiny.parent.iterdir()] == [tiny.name]


def test_a_damaged_entry_is_made_anew(tiny: Path, tmp_path: Path) -> None:
    folder = unpack_gguf(tiny, torch.float32, tmp_path)
    model = folder / "model.safetensors"
    sound = model.read_bytes()
    flipped = bytes([sound[-1] ^ 1])
    for bad in (sound[:-1] + flipped, sound[:100], b""):
        model.write_bytes(bad)
        assert unpack_gguf(tiny, torch.float32, tmp_path) == folder
        assert model.read_bytes() == sound
    for name in ("config.json", "tokenizer.json", "../sha256"):
        (folder / name).unlink()
        unpack_gguf(tiny, torch.float32, tmp_path)
        assert (folder / name).exists()


def test_what_a_killed_process_left_does_no_harm(tiny: Path, tmp_path: Path) -> None:
    folder = unpack_gguf(tiny, torch.float32, tmp_path)
    draft = folder.parent.with_name(f".{folder.parent.name}.tmp")
    folder.parent.rename(draft)
    (draft / "model" / "model.safetensors").write_bytes(b"half")
    assert unpack_gguf(tiny, torch.float32, tmp_path) == folder
    assert AutoModelForCausalLM.from_pretrained(folder)
    assert not draft.exists()


def test_processes_may_unpack_at_once(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from reasonpix.plugin.weights import unpack_gguf; "
        "folder = unpack_gguf(Path(sys.argv[1]), torch.float32, Path(sys.argv[2])); "
        "print(folder, (folder / 'model.safetensors').stat().st_mtime_ns)"
    )
    command = [sys.executable, "-c", code, str(tiny), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != "", "the second took what the first had made"


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a model")
    with pytest.raises(WeightsError, match=r"cannot read .*a\.gguf' as a GGUF file"):
        unpack_gguf(tmp_path / "a.gguf", torch.float32, tmp_path)


def test_a_cache_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"cannot unpack tiny\.gguf into .*set cache_dir"):
        unpack_gguf(tiny, torch.float32, tmp_path / "file")
