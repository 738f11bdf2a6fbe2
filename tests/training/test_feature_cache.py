"""h and latents: the same whether cached or not, and computed no more than once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from reasonpix.core.parallel import Size
from reasonpix.datasets.pairs import Data, Pairs, read_pairs
from reasonpix.datasets.views import VISIBLE_CHANGE
from reasonpix.editing.pipeline_parts import working_image
from reasonpix.errors import PluginError, RunError, SourceError
from reasonpix.plugin import registry
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.training.feature_cache import CachedFeatures
from reasonpix.training.features import Feature, OnlineFeatures, vae_digest
from tests.conftest import Distribution
from tests.datasets.test_publishing import largest_file
from tests.support.pair_files import pair, parquet, picture, png, rows

SMALL = Size(rows=4, bytes=1_000_000)
STRIDE = 4

ENCODER = '''
import hashlib, os
from pathlib import Path
import numpy as np
from pydantic import Field
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.types import Problem
from reasonpix.plugin.components import MLLMEncoder, ModelOptions

class Options(ModelOptions):
    prompt: str = Field("USER: {}", description="Prompt")

class Noted(MLLMEncoder):
    """Notes in a file what it does, and has odd answers to odd instructions."""
    name = "noted-encoder"
    Options = Options

    def note(self, line):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(line + "\\n")

    def load(self):
        self.note("load")

    def close(self):
        self.note("close")

    def encode(self, images, instructions):
        assert len(images) == len(instructions) <= 4
        results = []
        for image, text in zip(images, instructions):
            self.note(f"encode {text}")
            seed = hashlib.sha256(image.tobytes() + self.options.prompt.encode() + text.encode())
            rng = np.random.default_rng(list(seed.digest()))
            states = rng.standard_normal((len(text) % 5 + 1, 6), np.float32)
            image.paste(0, (0, 0, *image.size))  # it is its own
            if "reject" in text:
                states = Problem(status="rejected", reason="too odd")
            elif "infinite" in text:
                states[0, 0] = 1e6
            elif "flat" in text:
                states = states[0]
            results.append(states)
        return results[1:] if "lost" in instructions[0] else results

@hookimpl
def encoders():
    return [Noted]
'''


@pytest.fixture
def notes(distribution: Distribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the encoder `noted-encoder` notes what it does."""
    distribution("noting", {"noted-encoder": "noting"}, noting=ENCODER)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    (tmp_path / "notes").touch()
    return tmp_path / "notes"


def noted(**options: Any) -> ComponentSpec:
    cls = registry.find("encoder", "noted-encoder")
    return ComponentSpec(
        "encoder", "noted-encoder", cls.Options.model_validate({"model": "a/b", **options})
    )


def fake() -> ComponentSpec:
    return ComponentSpec(
        "encoder", "fake-encoder", registry.find("encoder", "fake-encoder").Options()
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3,
        sample_size=16,
        mid_block_add_attention=False,
    ).eval()


@pytest.fixture
def vae() -> AutoencoderKL:
    return tiny_vae()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Six pairs of 48x32 pixels with two instructions each."""
    content = rows(6, size=(48, 32))
    for number, row in enumerate(content):
        row["direct_instruction"] = "turn it " + "and again " * number
    return parquet(tmp_path / "pairs.parquet", content)


def read(path: Path, **options: Any) -> Pairs:
    columns = ["edit_prompt", "direct_instruction"]
    return read_pairs(
        Data(path=str(path), **{"resolution": 16, "instructions": columns, **options})
    )


def everything(pairs: Pairs) -> list[tuple[int, int]]:
    return [(i, view) for i in range(len(pairs.examples)) for view in range(pairs.views)]


def equal(features: list[Feature], others: list[Feature]) -> bool:
    return len(features) == len(others) and all(
        torch.equal(one, two)
        for feature, other in zip(features, others, strict=True)
        for one, two in zip(feature, other, strict=True)
    )


def encoded(notes: Path) -> list[str]:
    """What the encoder was asked since last time."""
    lines = notes.read_text().splitlines()
    notes.write_text("")
    return [line.removeprefix("encode ") for line in lines if line.startswith("encode")]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- What they are --------------------------------------------------------------------------------


def test_features_are_those_of_the_models(path: Path, vae: AutoencoderKL) -> None:
    pairs = read(path, flip=True)
    online = OnlineFeatures(pairs, fake(), vae, STRIDE)
    features = online.get([(3, 1)])
    [(h, source, mean, logvar)] = features
    shown, before, after = online.view(3, 1)
    encoder = fake().build()
    [states] = encoder.encode([shown], [pairs.examples[3].instruction])  # type: ignore[attr-defined]
    assert torch.equal(h, torch.from_numpy(states).half())
    assert all(tensor.dtype == torch.float16 for tensor in features[0])
    assert source.shape == mean.shape == logvar.shape == (4, 8, 8)
    for image, found in ((before, (source,)), (after, (mean, logvar))):
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            wanted = vae.encode(pixels).latent_dist
        moments = (wanted.mode(), wanted.logvar)
        for one, other in zip(found, moments, strict=False):
            torch.testing.assert_close(one.float(), other[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("size", "at_inference"),
    [
        ((24, 24), (16, 16)),
        ((24, 16), (16, 12)),
        ((32, 18), (16, 8)),
        ((18, 32), (8, 16)),
        ((42, 18), (16, 8)),
        ((64, 4), (16, 4)),
    ],
)
@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_training_sees_what_is_seen_at_inference(
    fit: str,
    size: tuple[int, int],
    at_inference: tuple[int, int],
    vae: AutoencoderKL,
    tmp_path: Path,
) -> None:
    """The encoder gets the very image, the VAE the same part of it as a square."""
    pairs = read(parquet(tmp_path / "p.parquet", rows(1, size=size)), instructions=None, fit=fit)
    seen = OnlineFeatures(pairs, fake(), vae, STRIDE).view(0, 0)
    image, edited = pairs.images(0)
    if fit == "crop":
        side, (left, top) = min(size), ((length - min(size)) // 2 for length in size)
        box = (left, top, left + side, top + side)
        image, edited = image.crop(box), edited.crop(box)
        at_inference = (16, 16)
    shown = working_image(image, 16, STRIDE)
    assert shown.size == seen.shown.size == at_inference
    assert seen.shown.tobytes() == shown.tobytes()
    for square, whole in ((seen.before, image), (seen.after, edited)):
        assert square.tobytes() == whole.resize((16, 16), Image.Resampling.LANCZOS).tobytes()
    if image.width == image.height:
        assert seen.before.tobytes() == seen.shown.tobytes()


def test_how_much_an_edit_changes_is_known_of_every_view(
    vae: AutoencoderKL, tmp_path: Path
) -> None:
    content = rows(3)
    content[1]["edited_image"] = content[1]["input_image"]
    pairs = read(parquet(tmp_path / "p.parquet", content), instructions=None, crops=3)
    online = OnlineFeatures(pairs, fake(), vae, STRIDE)
    online.compute()
    cached = CachedFeatures(tmp_path / "f", pairs, fake(), vae, STRIDE)
    cached.compute()
    again = CachedFeatures(tmp_path / "f", pairs, fake(), vae, STRIDE)
    again.compute()  # from files
    for example, view in everything(pairs):
        change = online.change(example, view)
        assert change == cached.change(example, view) == again.change(example, view)
        assert (change > VISIBLE_CHANGE) == (example != 1)


def test_h_is_ragged(path: Path, vae: AutoencoderKL, tmp_path: Path) -> None:
    pairs = read(path)
    features = CachedFeatures(tmp_path / "f", pairs, fake(), vae, STRIDE)
    features.compute()
    lengths = [len(feature.h) for feature in features.get([(i, 0) for i in range(1, 12, 2)])]
    assert lengths == [2, 4, 6, 8, 10, 12]


def test_cached_features_are_the_computed_ones(
    path: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    pairs = read(path, flip=True, crops=3)
    online, cached = (
        OnlineFeatures(pairs, fake(), vae, STRIDE),
        CachedFeatures(tmp_path / "f", pairs, fake(), vae, STRIDE),
    )
    cached.compute()
    requests = everything(pairs)
    assert len(requests) == 72
    read_back = cached.get(requests)
    assert equal(read_back, online.get(requests))
    order = np.random.default_rng(0).permutation(72).tolist()
    shuffled = [requests[i] for i in order]
    for size in (1, 3, 7):  # what is computed together changes nothing
        some = [f for at in range(0, 72, size) for f in online.get(shuffled[at : at + size])]
        assert equal(some, [read_back[i] for i in order])
    distinct = {online.view(*request).after.tobytes() for request in requests}
    assert len({feature.mean.numpy().tobytes() for feature in read_back}) == len(distinct) > 30


def test_a_reader_may_write_into_what_it_got(
    path: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    pairs = read(path)
    cached = CachedFeatures(tmp_path / "f", pairs, fake(), vae, STRIDE)
    cached.compute()
    [first] = cached.get([(0, 0)])
    kept = Feature(*(tensor.clone() for tensor in first))
    for tensor in first:
        tensor.zero_()
    assert equal(cached.get([(0, 0)]), [kept])


# -- Once -----------------------------------------------------------------------------------------


def test_nothing_is_computed_twice(
    path: Path, vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    pairs = read(path, flip=True)
    seen: list[int] = []
    vae.encoder.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    told: list[tuple[int, int]] = []
    cached = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, batch=4)
    cached.compute(lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
    assert notes.read_text().splitlines()[0] == "load"
    assert notes.read_text().splitlines()[-1] == "close"
    assert len(encoded(notes)) == 24
    assert sum(seen) == 6 * 2 * 2  # two instructions share the latents of a view
    cached.compute()
    again = CachedFeatures(tmp_path / "f", read(path, flip=True), noted(), vae, STRIDE, batch=4)
    again.compute()
    assert equal(again.get(everything(pairs)), cached.get(everything(pairs)))
    assert notes.read_text() == ""  # not even loaded
    assert sum(seen) == 24


def test_more_data_computes_what_is_new(
    path: Path, vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    columns = ["edit_prompt"]
    CachedFeatures(
        tmp_path / "f", read(path, limit=4, instructions=columns), noted(), vae, STRIDE, 4
    ).compute()
    assert encoded(notes) == [f"make it number {i}" for i in range(4)]
    more = CachedFeatures(tmp_path / "f", read(path, instructions=columns), noted(), vae, STRIDE, 4)
    with pytest.raises(RunError, match="lacks features of 2 of 6 examples; compute them"):
        more.usable()
    more.compute()
    assert encoded(notes) == ["make it number 4", "make it number 5"]
    assert more.usable() == list(range(6))
    flipped = CachedFeatures(
        tmp_path / "f", read(path, instructions=columns, flip=True), noted(), vae, STRIDE, 4
    )
    flipped.compute()
    assert len(encoded(notes)) == 6


def test_another_encoder_is_another_cache(
    path: Path, vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    def computed(**options: Any) -> int:
        pairs = read(path, instructions=["edit_prompt"])
        CachedFeatures(tmp_path / "f", pairs, noted(**options), vae, STRIDE, 4).compute()
        return len(encoded(notes))

    assert computed() == 6
    assert computed(batch_size=3, device="cuda:7") == 0  # changes no result
    assert computed(prompt="Q: {}") == 6
    assert computed(revision="abc") == 6
    assert computed(model="a/c") == 6
    assert computed() == computed(prompt="Q: {}") == 0  # and the others are still there
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_text("one")
    assert computed(model=str(weights)) == 6
    (weights / "model.safetensors").write_text("two")
    assert computed(model=str(weights)) == 6
    weights.rename(tmp_path / "elsewhere")
    assert computed(model=str(tmp_path / "elsewhere")) == 0
    assert len(list((tmp_path / "f").glob("latents-*"))) == 1


def test_another_image_or_instruction_is_computed(
    path: Path, vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    content = rows(6, size=(24, 16))
    seen: list[int] = []
    vae.encoder.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))

    def computed(**options: Any) -> tuple[int, int]:
        seen.clear()
        pairs = read(parquet(path, content), instructions=["edit_prompt"], **options)
        CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4).compute()
        return len(encoded(notes)), sum(seen)

    assert computed() == (6, 16)  # padded to eights
    content[2]["edit_prompt"] = "another one"
    assert computed() == (1, 0)
    content[3]["edited_image"]["bytes"] = png(picture(77, (24, 16)))
    assert computed() == (0, 8)
    content[4]["input_image"]["bytes"] = png(picture(78, (24, 16)))
    assert computed() == (1, 8)
    content.reverse()
    assert computed() == (0, 0)
    assert computed(resolution=8) == (6, 16)


def test_another_vae_is_another_cache(path: Path, notes: Path, tmp_path: Path) -> None:
    pairs = read(path)
    one, two = tiny_vae(0), tiny_vae(1)
    assert vae_digest(one) == vae_digest(tiny_vae(0)) != vae_digest(two)
    assert vae_digest(tiny_vae(0).half()) != vae_digest(one)
    for vae in (one, two):
        cached = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4)
        cached.compute()
        wanted = OnlineFeatures(pairs, noted(), vae, STRIDE, 4).get([(0, 0)])
        assert equal(cached.get([(0, 0)]), wanted)
    assert len(list((tmp_path / "f").glob("latents-*"))) == 2
    assert len(list((tmp_path / "f").glob("h-*"))) == 1


def test_equal_requests_are_computed_once(vae: AutoencoderKL, notes: Path, tmp_path: Path) -> None:
    content = rows(1, size=(24, 16)) * 3
    pairs = read(parquet(tmp_path / "a.parquet", content), instructions=["edit_prompt"])
    cached = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4)
    cached.compute()
    assert len(encoded(notes)) == 1
    assert cached.usable() == [0, 1, 2]


def test_processes_can_share_the_work(
    path: Path, vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    pairs = read(path, flip=True)
    ranks = [CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4) for _ in range(2)]
    ranks[0].compute(rank=0, world=2)
    assert len(encoded(notes)) == 12
    ranks[1].compute(rank=1, world=2)
    assert len(encoded(notes)) == 12
    alone = CachedFeatures(tmp_path / "g", pairs, noted(), vae, STRIDE, 4)
    alone.compute()
    for rank in ranks:
        assert rank.usable() == list(range(12))
        assert equal(rank.get(everything(pairs)), alone.get(everything(pairs)))


# -- Kills and damage -----------------------------------------------------------------------------

KILLED = """if True:
    import os, signal
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from diffusers import AutoencoderKL
    from reasonpix.plugin import registry
    from reasonpix.training.feature_cache import CachedFeatures
    from reasonpix.core.parallel import Size
    from reasonpix.datasets.pairs import Data, read_pairs
    from reasonpix.plugin.spec import ComponentSpec
    def kill(done, total):
        if done == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    columns = ["edit_prompt", "direct_instruction"]
    data = Data(path="pairs.parquet", resolution=16, instructions=columns, flip=True)
    options = registry.find("encoder", "noted-encoder").Options(model="a/b")
    use = ComponentSpec("encoder", "noted-encoder", options)
    vae = AutoencoderKL.from_pretrained("vae")
    CachedFeatures(Path("f"), read_pairs(data), use, vae, 4, 4, Size(3, 1_000_000)).compute(kill)
"""


def test_a_killed_computation_goes_on(
    path: Path, vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    pairs, size = read(path, flip=True), Size(3, 1_000_000)
    whole = CachedFeatures(tmp_path / "whole", pairs, noted(), vae, STRIDE, 4, size)
    whole.compute()
    assert len(encoded(notes)) == 24
    vae.save_pretrained(tmp_path / "vae")
    environment = {**os.environ, "PYTHONPATH": str(next(tmp_path.glob("site-*")))}
    before: dict[str, bytes] = {}
    for asked, kept in ((8, 6), (4, 9)):  # a row that was half done goes on in its middle
        done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment)
        assert done.returncode == -signal.SIGKILL
        assert len(encoded(notes)) == asked
        assert before.items() <= files(tmp_path / "f").items()
        before = files(tmp_path / "f")
        assert 3 * len(list(tmp_path.glob("f/h-*/*.safetensors"))) == kept
    resumed = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4, size)
    resumed.compute()
    assert len(encoded(notes)) == 24 - 9
    assert files(tmp_path / "f") == files(tmp_path / "whole")
    assert equal(resumed.get(everything(pairs)), whole.get(everything(pairs)))


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "text"])
def test_a_damaged_shard_is_computed_again(
    path: Path,
    vae: AutoencoderKL,
    notes: Path,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pairs = read(path)
    CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4, SMALL).compute()
    assert len(encoded(notes)) == 12
    whole = files(tmp_path / "f")
    shard = sorted(tmp_path.glob("f/h-*/*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    spoilt = {"bit": content, "cut": content[:-9], "empty": b"", "text": b"{}"}
    shard.write_bytes(spoilt[damage])
    again = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4, SMALL)
    with caplog.at_level(logging.WARNING):
        again.compute()
    assert f"{shard} is damaged; its tensors are computed again" in caplog.text
    assert len(encoded(notes)) == 4
    assert files(tmp_path / "f") == whole
    assert equal(
        again.get(everything(pairs)),
        OnlineFeatures(pairs, noted(), vae, STRIDE, 4).get(everything(pairs)),
    )


def test_a_full_disk_is_told_and_keeps_what_was_finished(
    path: Path, vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    pairs = read(path)
    cached = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4, SMALL)
    with (
        largest_file(3000),
        pytest.raises(RunError, match=r"cannot be written: .*; make room, then"),
    ):
        cached.compute()
    kept = files(tmp_path / "f")
    again = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4, SMALL)
    again.compute()
    assert kept.items() <= files(tmp_path / "f").items()
    assert not list(tmp_path.glob("f/*/.*"))
    assert again.usable() == list(range(12))


def test_drafts_of_killed_processes_are_removed(
    path: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    pairs = read(path)
    CachedFeatures(tmp_path / "f", pairs, fake(), vae, STRIDE).compute()
    folder = next(tmp_path.glob("f/h-*"))
    old, new = folder / ".a.safetensors.1.tmp", folder / ".b.safetensors.2.tmp"
    for draft in (old, new):
        draft.write_text("half")
    os.utime(old, (0, 0))
    CachedFeatures(tmp_path / "f", pairs, fake(), vae, STRIDE).compute()
    assert not old.exists()
    assert new.exists()  # somebody may be writing it


def test_features_that_were_not_computed(path: Path, vae: AutoencoderKL, tmp_path: Path) -> None:
    cached = CachedFeatures(tmp_path / "f", read(path), fake(), vae, STRIDE)
    with pytest.raises(RunError, match="f lacks features of 12 of 12 examples; compute them"):
        cached.usable()
    with pytest.raises(RunError, match=r"f lacks features of .*parquet row 0; compute them"):
        cached.get([(0, 0)])


# -- What cannot be encoded -----------------------------------------------------------------------


def odd(tmp_path: Path, *instructions: str) -> Path:
    content = rows(len(instructions), size=(24, 16))
    for row, text in zip(content, instructions, strict=True):
        row["edit_prompt"] = text
    return parquet(tmp_path / "odd.parquet", content)


ODD = ("fine", "reject it", "this is infinite", "fine too", "flat")


def test_the_encoders_problems_stop_when_all_else_is_computed(
    vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    path = odd(tmp_path, *ODD)
    cached = CachedFeatures(
        tmp_path / "f", read(path, instructions=["edit_prompt"]), noted(), vae, STRIDE, 4
    )
    with pytest.raises(SourceError) as raised:
        cached.compute()
    told = str(raised.value)
    assert told.startswith("data: 3 broken rows\n")
    assert f"{path} row 1 (edit_prompt): too odd" in told
    assert f"{path} row 2 (edit_prompt): the encoder returned numbers that are not finite" in told
    assert "row 4 (edit_prompt): the encoder returned an array of (6,), not (tokens, width)" in told
    assert len(encoded(notes)) == 5
    with pytest.raises(SourceError, match="3 broken rows"):
        cached.compute()
    assert len(encoded(notes)) == 3  # a later version may do better
    with pytest.raises(SourceError, match=r"row 1: .* problem with 'reject it': too odd"):
        OnlineFeatures(cached.pairs, noted(), vae, STRIDE, 4).get([(0, 0), (1, 0)])


def test_the_encoders_problems_are_skipped_and_counted(
    vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    path = odd(tmp_path, *ODD)
    pairs = read(path, instructions=["edit_prompt"], broken="skip")
    cached = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4)
    cached.compute()
    assert cached.usable() == [0, 3]
    assert dict(pairs.skipped)[f"{path} row 1 (edit_prompt)"] == "too odd"
    assert len(pairs.skipped) == 3
    again = CachedFeatures(
        tmp_path / "f",
        read(path, instructions=["edit_prompt"], broken="skip"),
        noted(),
        vae,
        STRIDE,
        4,
    )
    again.compute()
    assert again.usable() == [0, 3]
    assert again.pairs.skipped == pairs.skipped


def test_many_problems_stop_early(vae: AutoencoderKL, notes: Path, tmp_path: Path) -> None:
    path = odd(tmp_path, *["reject it"] * 40)
    cached = CachedFeatures(
        tmp_path / "f", read(path, instructions=["edit_prompt"]), noted(), vae, STRIDE, 4
    )
    with pytest.raises(SourceError, match=r"data: 12 broken rows\n"):
        cached.compute()
    assert len(encoded(notes)) == 12


def test_lost_results_are_the_plugins_fault(
    vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    pairs = read(odd(tmp_path, "lost", "found"), instructions=["edit_prompt"])
    with pytest.raises(PluginError, match="'noted-encoder' returned 1 results for 2 pairs"):
        CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4).compute()
    assert notes.read_text().endswith("close\n")


def test_a_vae_that_gives_no_numbers(path: Path, tmp_path: Path) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(RunError, match=r"infinity in torch.float32; load it in float32"):
        OnlineFeatures(read(path), fake(), vae, STRIDE).get([(0, 0)])


def broken_images(tmp_path: Path) -> Path:
    content = rows(8, size=(24, 16))
    for number in (2, 5):
        _, after = pair(number, (24, 16))
        content[number]["edited_image"]["bytes"] = after[: len(after) // 2]
    return parquet(tmp_path / "broken.parquet", content)


def test_broken_images_stop_before_any_more_is_computed(
    vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    path = broken_images(tmp_path)
    pairs = read(path, instructions=["edit_prompt"])
    for features in (
        CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4),
        OnlineFeatures(pairs, noted(), vae, STRIDE),
    ):
        with pytest.raises(SourceError) as raised:
            features.compute()
        told = str(raised.value)
        assert told.startswith("data: 2 broken rows\n")
        assert f"{path} row 2: edited image: damaged image" in told
        assert f"{path} row 5: edited image: damaged image" in told
    assert len(encoded(notes)) < 4


def test_broken_images_are_skipped(vae: AutoencoderKL, tmp_path: Path) -> None:
    path = broken_images(tmp_path)
    for times in range(2):
        pairs = read(path, instructions=["edit_prompt"], broken="skip")
        cached, online = (
            CachedFeatures(tmp_path / "f", pairs, fake(), vae, STRIDE),
            OnlineFeatures(pairs, fake(), vae, STRIDE),
        )
        cached.compute()
        assert cached.usable() == online.usable() == [0, 1, 3, 4, 6, 7], times
        assert [row for row, _ in pairs.skipped] == [f"{path} row 2", f"{path} row 5"]


def test_a_broken_row_takes_nothing_from_one_that_is_like_it(
    vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    content = rows(1, size=(24, 16)) * 2
    _, after = pair(0, (24, 16))
    content[0] = content[0] | {"edited_image": {"bytes": after[:200], "path": None}}
    path = parquet(tmp_path / "a.parquet", content)
    pairs = read(path, instructions=["edit_prompt"], broken="skip")
    cached = CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4)
    cached.compute()
    assert cached.usable() == [1]


def test_examples_that_are_alike_share_their_problem(
    vae: AutoencoderKL, notes: Path, tmp_path: Path
) -> None:
    path = parquet(tmp_path / "a.parquet", [row | {"edit_prompt": "reject"} for row in rows(1)] * 2)
    pairs = read(path, instructions=["edit_prompt"])
    with pytest.raises(SourceError, match=r"2 broken rows\n.*row 0 .*\n.*row 1 .*too odd"):
        CachedFeatures(tmp_path / "f", pairs, noted(), vae, STRIDE, 4).compute()
    assert encoded(notes) == ["reject"]
