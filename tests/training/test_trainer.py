"""Training: exact to the byte when it goes on, and careful with what it is given."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reasonpix.core.images import decode
from reasonpix.datasets.training_data import TrainingData, image_hash, read_training_data
from reasonpix.editing.checkpoint import load_checkpoint
from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.errors import RecipeError, RunError, SourceError, WeightsError
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.fakes import FakeEncoder
from reasonpix.training.loss import DiffusionLoss
from reasonpix.training.randomness import StepSampler
from reasonpix.training.session import prepare_session
from reasonpix.training.tracking import TrainingLog
from reasonpix.training.trainer import Progress, train
from tests.datasets.test_publishing import largest_file
from tests.editing.test_checkpoint import needs_clip_text, plain
from tests.support.pair_files import parquet, picture, png, rows
from tests.support.tiny_model import RESOLUTION, write_tiny
from tests.support.tiny_training import (
    LONG,
    ROOT,
    ROWS,
    files,
    log,
    losses,
    recipe,
    run,
    start,
    write_training,
)

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
}

# Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """One thread, and an accelerator that has chosen nothing yet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in `out` that nobody disturbed, through alignment and training."""
    folder = tmp_path_factory.mktemp("whole")
    AcceleratorState._reset_state(True)
    run(folder, **LONG)
    return folder


def near(one: Path, other: Path, tolerance: float) -> bool:
    pairs = zip(losses(one), losses(other), strict=True)
    return all(a[:2] == b[:2] and abs(a[2] - b[2]) <= tolerance * a[2] for a, b in pairs)


# -- what comes out ------------------------------------------------------------------------------


def test_a_run_gives_a_model_with_averaged_weights(whole: Path) -> None:
    out = whole / "out"
    trained = load_checkpoint(ModelOptions(model=str(out / "model")))
    assert trained.settings.model_dump() == {
        "resolution": RESOLUTION,
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
    }
    assert trained.encoder.name == "fake-encoder"
    average = load_file(out / "state" / "00000010" / "average.safetensors")
    weights = load_file(out / "state" / "00000010" / "weights.safetensors")
    named = dict(trained.model.named_parameters())
    assert named.keys() == average.keys() == weights.keys()
    assert all(torch.equal(named[name], value) for name, value in average.items())
    moved = [name for name in average if not torch.equal(average[name], weights[name])]
    assert len(moved) == len(average)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["ema_decay"] == 0.9999
    assert list((out / "tensorboard").rglob("events.*"))


def test_a_model_records_what_it_was_trained_on(whole: Path) -> None:
    recorded = read_training_data(whole / "out" / "model" / "training_data.json")
    (dataset,) = recorded.datasets
    assert (dataset.name, dataset.pairs) == ("pairs.parquet", ROWS - 2)  # without validation's
    assert recorded.unrecorded == ("start",)
    table = pq.read_table(whole / "pairs.parquet").to_pylist()
    shared = [
        recorded.has_image([image_hash(decode(row["input_image"]["bytes"]))]) for row in table
    ]
    assert shared.count(False) == 2
    for row, is_trained in zip(table, shared, strict=True):
        if is_trained:
            assert recorded.has_instruction(row["edit_prompt"])
            assert recorded.has_instruction(row["plain"])
            assert recorded.has_image([image_hash(decode(row["edited_image"]["bytes"]))])
    assert not recorded.has_instruction("turn it and again")  # a column that was not used


def test_a_model_inherits_the_record_of_what_it_started_from(tmp_path: Path) -> None:
    write_training(tmp_path)
    TrainingData.of_dataset("before", 5, phrases=["long ears"]).write(tmp_path / "start")
    run(tmp_path, steps=1, save_every=1)
    file = tmp_path / "out" / "model" / "training_data.json"
    recorded = read_training_data(file)
    assert [dataset.name for dataset in recorded.datasets] == ["before", "pairs.parquet"]
    assert recorded.unrecorded == () and recorded.has_instruction("Give it long ears")
    first = file.read_bytes()
    run(tmp_path, steps=1, save_every=1)  # again: images are not read once more
    assert file.read_bytes() == first


def test_alignment_comes_first_and_is_no_part_of_the_average(whole: Path) -> None:
    stages = [one["stage"] for one in log(whole / "out")]
    assert stages == ["align"] * 4 + ["train"] * 6
    assert [one["step"] for one in log(whole / "out")] == list(range(1, 11))
    assert sorted(path.name for path in (whole / "out/state").iterdir()) == ["00000009", "00000010"]


def test_alignment_lowers_its_loss(tmp_path: Path) -> None:
    align = {"steps": 30, "batch_size": 8, "learning_rate": 0.03}
    run(tmp_path, data__align="plain", data__flip=False, align=align, steps=0)
    found = [loss for _, _, loss, _ in losses(tmp_path / "out")]
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    before = load_file(tmp_path / "start/unet/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "out/model/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_without_text_are_not_aligned_to(tmp_path: Path) -> None:
    content = [row | {"plain": "rain" if n == 3 else None} for n, row in enumerate(rows(6))]
    parquet(tmp_path / "pairs.parquet", content)
    align = {"steps": 2, "batch_size": 4}
    seen = noted(StepSampler, "draw", tmp_path, data__align="plain", align=align, steps=1)
    examples = [draw.example for draw in seen]
    assert examples[:8] == [3] * 8 and len(set(examples[8:])) == 2
    parquet(tmp_path / "pairs.parquet", [row | {"plain": None} for row in content])
    with pytest.raises(SourceError, match=r"data\.align: no row has text in 'plain'"):
        run(tmp_path, out="other", data__align="plain", align=align, steps=1)


def noted(cls: type[Any], method: str, folder: Path, **changes: Any) -> list[Any]:
    """What a method gave while a run was made."""
    seen: list[Any] = []
    original = getattr(cls, method)

    def noting(self: Any, *arguments: Any) -> Any:
        seen.append(original(self, *arguments))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, method, noting)
        run(folder, **changes)
    return seen


def test_training_lowers_its_loss(tmp_path: Path) -> None:
    run(tmp_path, steps=40, batch_size=4, micro_batch_size=4, learning_rate=5e-3, save_every=100)
    found = [loss for _, _, loss, _ in losses(tmp_path / "out")]
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


def test_the_average_is_its_formula(tmp_path: Path) -> None:
    """Of all the weights there were, by decay min(0.6, (1 + n) / (10 + n))."""
    run(tmp_path, steps=0)
    average = dict(load_checkpoint(model(tmp_path)).model.named_parameters())
    for n in range(1, 8):
        run(tmp_path, steps=n, ema_decay=0.4, save_every=1)
        weights = load_file(tmp_path / "out" / "state" / f"{n:08}" / "weights.safetensors")
        decay = min(0.4, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    found = dict(load_checkpoint(model(tmp_path)).model.named_parameters())
    for name, value in average.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def model(folder: Path, out: str = "out") -> ModelOptions:
    return ModelOptions(model=str(folder / out / "model"))


def test_validation_shows_what_was_never_trained_on(whole: Path) -> None:
    sheets = sorted((whole / "out" / "validation").glob("*.png"))
    assert [sheet.stem for sheet in sheets] == ["00000004"]
    (lines,) = (path.read_text().splitlines() for path in (whole / "out/validation").glob("*.txt"))
    shown = [int(re.findall(r"\d+", line)[0]) for line in lines]
    assert len(set(shown)) == 2
    with Image.open(sheets[0]) as sheet:
        assert sheet.size == (3 * RESOLUTION + 16, 2 * RESOLUTION + 8)
    used = noted(StepSampler, "draw", whole, out="noted", **LONG)
    assert {draw.example for draw in used}.isdisjoint(shown)
    assert len({draw.example for draw in used}) == 8


@pytest.mark.parametrize(
    ("size", "shown"), [((64, 40), (32, 16)), ((27, 48), (16, 32)), ((90, 30), (32, 8))]
)
@pytest.mark.parametrize("cache", [True, False])
def test_validation_edits_images_as_inference_does(
    size: tuple[int, int], shown: tuple[int, int], cache: bool, tmp_path: Path
) -> None:
    """Its states of h are found by the image that inference gives the encoder."""
    parquet(tmp_path / "pairs.parquet", rows(6, size=size))
    run(tmp_path, steps=1, cache=cache, validation={"examples": 2, "every": 1})
    (sheet,) = (tmp_path / "out" / "validation").glob("*.png")
    with Image.open(sheet) as grid:
        assert grid.size == (3 * shown[0] + 16, 2 * shown[1] + 8)


def test_learning_rates(tmp_path: Path) -> None:
    run(tmp_path, steps=6, schedule="cosine", warmup=3, learning_rate=1e-3)
    found = [rate * 1000 for *_, rate in losses(tmp_path / "out")]
    assert found == pytest.approx([0.3333, 0.6220, 0.75, 0.5, 0.25, 0.0670], abs=1e-4)


# -- the same by other ways ----------------------------------------------------------------------


def test_a_run_is_the_same_each_time_and_without_a_cache(tmp_path: Path) -> None:
    """A fresh connector, too, comes of the recipe's seed."""
    for number, (out, cache) in enumerate({"one": True, "two": True, "online": False}.items()):
        torch.manual_seed(number)
        run(tmp_path, out, cache=cache)
    expected = files(tmp_path / "one" / "model")
    assert files(tmp_path / "two" / "model") == expected
    assert files(tmp_path / "online" / "model") == expected
    assert losses(tmp_path / "online") == losses(tmp_path / "two") == losses(tmp_path / "one")
    assert not (tmp_path / "online" / "features").exists()
    run(tmp_path, "seed", seed=1)
    assert losses(tmp_path / "seed") != losses(tmp_path / "one")


def test_gradients_add_up_and_can_be_computed_again(tmp_path: Path) -> None:
    given: dict[str, Any] = {"steps": 3, "batch_size": 8}
    run(tmp_path, "whole", micro_batch_size=8, **given)
    run(tmp_path, "micro", micro_batch_size=2, **given)
    run(tmp_path, "checkpointing", micro_batch_size=8, gradient_checkpointing=True, **given)
    assert near(tmp_path / "whole", tmp_path / "micro", 2e-5)
    assert near(tmp_path / "whole", tmp_path / "checkpointing", 2e-5)


@pytest.mark.parametrize("kind", ["text_tokens", "full_sequence", "clip_residual", "codebook"])
def test_every_connector_is_trained(kind: str, tmp_path: Path) -> None:
    connector = {"kind": kind, "heads": 2, "depth": 1}
    trained = run(tmp_path, model__connector=connector, steps=2, dropout=0)
    before = run(tmp_path, "before", model__connector=connector, steps=0)
    for name, value in load_file(trained.model / "connector/model.safetensors").items():
        old = load_file(before.model / "connector/model.safetensors")[name]
        # A gate that is just opening lets no gradient through to what lies behind it.
        still = kind == "clip_residual" and name != "gate"
        fixed = {"null", "location", "scale"}
        assert torch.equal(value, old) <= (name in fixed or still), name


def test_sd15_is_a_start(tmp_path: Path) -> None:
    plain(tmp_path / "sd15", 4)
    run(tmp_path, steps=1, model__init="sd15", model__model=str(tmp_path / "sd15"))
    unet = load_file(tmp_path / "out/model/unet/diffusion_pytorch_model.safetensors")
    assert unet["conv_in.weight"].shape[1] == 8
    with pytest.raises(WeightsError, match="init: sd15"):
        run(tmp_path, "other", model__model=str(tmp_path / "sd15"))


@needs_clip_text
def test_instruct_pix2pix_itself_is_trained(tmp_path: Path) -> None:
    """The baseline: the model's own text encoder, and nothing between it and the UNet."""
    start = str(plain(tmp_path / "ip2p", 8))
    run(
        tmp_path, steps=2, model__model=start, model__connector="identity",
        encoder={"use": "clip-text", "model": start},
    )  # fmt: skip
    (tmp_path / "ip2p").rename(tmp_path / "gone")
    trained = load_checkpoint(model(tmp_path))
    assert trained.own_text and trained.encoder.options.model == model(tmp_path).model
    edited = ReasonPix2Pix.from_pretrained(model(tmp_path).model, device="cpu")
    assert edited([picture(1)], "make it rain")[0].size == (32, 32)


def test_bfloat16_is_near(tmp_path: Path) -> None:
    run(tmp_path, "full", steps=3)
    AcceleratorState._reset_state(True)
    run(tmp_path, "bf16", steps=3, precision="bf16")
    assert near(tmp_path / "full", tmp_path / "bf16", 0.05)
    assert losses(tmp_path / "full") != losses(tmp_path / "bf16")
    weights = load_file(tmp_path / "bf16/model/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def two_processes(folder: Path) -> subprocess.CompletedProcess[str]:
    """Train in `folder`/two, as `accelerate launch` does on two GPUs; on CPUs it would want MPI."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "-m", "reasonpix", "train", "recipe.yaml", "--out", "two"]  # fmt: skip
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def test_two_processes_give_the_losses_of_one(whole: Path) -> None:
    write_training(whole, **LONG)
    done = two_processes(whole)
    assert done.returncode == 0, done.stdout + done.stderr
    shards = (whole / "two" / "features").glob("h-*/*.safetensors")
    assert len(list(shards)) == 2, "each process computes a share"
    assert done.stdout.count("two/model") == 2, "only the main process tells, where and how"
    assert near(whole / "out", whole / "two", 1e-4)
    one, two = (load_file(whole / out / "model/connector/model.safetensors") for out in OUTS)
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


OUTS = ("out", "two")


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_a_broken_image_that_another_process_finds_is_told(broken: str, tmp_path: Path) -> None:
    content = rows(4)
    content[1]["edited_image"] = {"bytes": b"no image", "path": None}
    parquet(tmp_path / "pairs.parquet", content)
    write_training(tmp_path, data__broken=broken, steps=1)
    done = two_processes(tmp_path)
    told = {"stop": done.stderr, "skip": done.stdout}[broken]
    assert "pairs.parquet row 1: edited image: not an image" in told, done.stdout + done.stderr
    assert (done.returncode == 0) == (broken == "skip")
    assert "distributed_c10d" not in done.stderr, "the first process was left waiting"


# -- killed, stopped, gone on --------------------------------------------------------------------


def test_kills_change_no_byte(whole: Path) -> None:
    """SIGKILL at any time, until it is done: the model and the losses are those of `whole`."""
    out, chance = whole / "killed", random.Random(0)
    lines = out / "log.jsonl"
    given = recipe(whole, **LONG)
    # While features are computed, before the first checkpoint, while aligning, while training.
    for wanted in (-1, 2, 4, 6, 8):
        process = start(train, given, out)
        while process.is_alive():
            text = lines.read_bytes() if lines.exists() else b""
            if text.count(b"\n") >= wanted >= 0 or (wanted < 0 and (out / "features").is_dir()):
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "model").exists()
    train(given, out)
    assert files(out / "model") == files(whole / "out" / "model")
    assert losses(out) == losses(whole / "out")
    assert not [path for path in out.rglob("*") if path.suffix in (".draft", ".old")]


@pytest.mark.parametrize("after", [2, 4, 7])
def test_a_stop_saves_and_the_same_call_goes_on(whole: Path, after: int) -> None:
    out = whole / f"stopped-{after}"
    told: list[Progress] = []
    given = recipe(whole, **LONG)
    steps: list[int] = []

    def report(progress: Progress) -> None:
        told.append(progress)
        if progress.stage in ("align", "train"):
            steps.append(1)

    with pytest.raises(KeyboardInterrupt):
        train(given, out, report, lambda: len(steps) >= after)
    # The step after which it was told is the one that it was at.
    assert sorted((out / "state").iterdir())[-1].name == f"{after + 1:08}"
    assert not (out / "model").exists()
    train(given, out)
    assert files(out / "model") == files(whole / "out" / "model")
    assert losses(out) == losses(whole / "out")
    assert {one.stage for one in told} >= {"rows", "features", "align"}
    assert told[-1].done <= told[-1].total and told[-1].rate


def test_what_draws_by_itself_goes_on_too(tmp_path: Path) -> None:
    """A UNet with dropout draws from the process's own generator."""
    config = tmp_path / "start" / "unet" / "config.json"
    write_training(tmp_path)
    config.write_text(config.read_text().replace('"dropout": 0.0', '"dropout": 0.3'))
    run(tmp_path, "once", steps=4)
    for steps in (2, 4):
        torch.manual_seed(steps)
        run(tmp_path, steps=steps)
    assert files(tmp_path / "out" / "model") == files(tmp_path / "once" / "model")
    config.write_text(config.read_text().replace('"dropout": 0.3', '"dropout": 0.0'))
    run(tmp_path, "without", steps=4)
    assert losses(tmp_path / "without") != losses(tmp_path / "once")


def test_more_steps_are_learnt_and_less_are_refused(tmp_path: Path) -> None:
    run(tmp_path, "once", steps=5)
    run(tmp_path, steps=3)
    run(tmp_path, steps=5)
    assert files(tmp_path / "out" / "model") == files(tmp_path / "once" / "model")
    assert losses(tmp_path / "out") == losses(tmp_path / "once")
    with pytest.raises(RunError, match="already trained for 5 steps, and the recipe asks for 4"):
        run(tmp_path, steps=4)
    run(tmp_path, steps=5)
    assert files(tmp_path / "out" / "model") == files(tmp_path / "once" / "model")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"data__resolution": 16}, "data.resolution"),
        ({"data__fit": "crop", "data__crops": 2}, "data.crops, data.fit"),
        ({"model__connector__depth": 2, "betas": [0.5, 0.9]}, "betas, model.connector.depth"),
        ({"validation": {"examples": 1, "every": 100}}, "validation.examples"),
        ({"steps": 9, "schedule": "cosine"}, "schedule, steps"),
    ],
)
def test_another_recipe_is_refused(whole: Path, change: dict[str, Any], name: str) -> None:
    before = files(whole / "out" / "state")
    with pytest.raises(RunError, match=f"trained by a recipe that differs in {name}"):
        run(whole, **LONG | change)
    assert files(whole / "out" / "state") == before


def test_what_changes_nothing_learnt_may_change(tmp_path: Path) -> None:
    run(tmp_path, steps=2, validation={"examples": 1, "every": 5})
    free = {"save_every": 7, "micro_batch_size": 1, "gradient_checkpointing": True, "cache": False}
    validation = {"examples": 1, "every": 3}
    sampling = {"num_inference_steps": 2, "guidance_scale": 3}
    run(tmp_path, steps=3, validation=validation, sampling=sampling, **free)
    assert (tmp_path / "out" / "validation" / "00000003.png").exists()
    assert load_checkpoint(model(tmp_path)).settings.guidance_scale == 3


def test_a_recipe_that_never_took_a_step_may_be_mended(tmp_path: Path) -> None:
    content = rows(6)
    content[2]["edit_prompt"] = " "
    parquet(tmp_path / "pairs.parquet", content)
    with pytest.raises(SourceError, match="broken: skip"):
        run(tmp_path)
    trained = run(tmp_path, data__broken="skip", steps=1)
    assert len(trained.skipped) == 1


def test_another_encoder_of_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, steps=2)
    monkeypatch.setattr(FakeEncoder, "version", "2")
    with pytest.raises(RunError, match="with another encoder or VAE"):
        run(tmp_path, steps=3)


def test_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    parquet(tmp_path / "pairs.parquet", rows(7))
    with pytest.raises(RunError, match="trained on other data, or with another encoder or VAE"):
        run(tmp_path, steps=3)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    for name, text in {"thesis.txt": "all of it", "recipe.yaml": "source: fake-source\n"}.items():
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text(text)
        with pytest.raises(RunError, match="is not empty and is not the folder of a training run"):
            run(tmp_path, out.name)
        assert (out / name).read_text() == text


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "holder").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        holder.write("process 5 on here")
        holder.flush()
        with pytest.raises(RunError, match="out is in use by process 5 on here"):
            run(tmp_path)


def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    expected = files(tmp_path / "out" / "model")
    last = tmp_path / "out" / "state" / "00000004"
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(RunError, match=r"state/00000004 is damaged.*the one before"):
            run(tmp_path, steps=4)
        (last / name).write_bytes(content)
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    run(tmp_path, steps=4)
    assert files(tmp_path / "out" / "model") == expected


def test_a_log_that_was_cut_goes_on(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    expected = losses(tmp_path / "out")
    lines = (tmp_path / "out" / "log.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "log.jsonl").write_bytes(b"".join(lines[:2]) + b"\0" * 40 + b"\n")
    run(tmp_path, steps=4)
    assert losses(tmp_path / "out") == expected[:2]


def test_a_full_disk_is_told_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    before = files(tmp_path / "out" / "state")
    with largest_file(100_000), pytest.raises(RunError, match=r"cannot be written.*is kept"):
        run(tmp_path, steps=4)
    assert files(tmp_path / "out" / "state") == before
    run(tmp_path, steps=4)


def test_a_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"loss of step \d is (nan|inf); the last checkpoint is"):
        run(tmp_path, steps=9, learning_rate=1e20, max_gradient_norm=None, save_every=1)
    assert list((tmp_path / "out" / "state").iterdir())
    assert not (tmp_path / "out" / "model").exists()


# -- what it is given ----------------------------------------------------------------------------


def broken_image(row: dict[str, Any]) -> None:
    row["edited_image"] = {"bytes": b"no image", "path": None}


def broken_words(row: dict[str, Any]) -> None:
    row["edit_prompt"] = ""


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("spoil", "why"), [(broken_image, "not an image"), (broken_words, "no text in 'edit_prompt'")]
)
def test_broken_rows_stop_before_any_step_or_are_counted(
    spoil: Any, why: str, cache: bool, tmp_path: Path
) -> None:
    content = rows(8)
    for number in (2, 5):
        spoil(content[number])
    parquet(tmp_path / "pairs.parquet", content)
    with pytest.raises(SourceError, match=f"(?s)2 broken rows.*pairs.parquet.*{why}"):
        run(tmp_path, cache=cache)
    assert not (tmp_path / "out" / "state").exists()
    assert not (tmp_path / "out" / "log.jsonl").exists()
    assert log_is_empty(tmp_path)
    trained = run(tmp_path, cache=cache, data__broken="skip", steps=1)
    assert len(trained.skipped) == 2
    assert all(why in reason for _, reason in trained.skipped)


def painted(size: tuple[int, int], box: tuple[int, int, int, int]) -> dict[str, Any]:
    """A row whose edit is in the box alone."""
    edited = picture(1, size)
    edited.paste((255, 0, 0), box)
    images = {"input_image": picture(1, size), "edited_image": edited}
    cells = {name: {"bytes": png(image), "path": None} for name, image in images.items()}
    return cells | {"edit_prompt": "paint it red"}


HIDDEN = {
    "nothing": painted((40, 40), (0, 0, 0, 0)),
    "left": painted((80, 32), (0, 0, 16, 32)),
    "right": painted((57, 32), (48, 4, 57, 30)),
    "above": painted((32, 64), (0, 0, 32, 12)),
    "below": painted((30, 90), (2, 70, 20, 90)),
    "centre": painted((80, 32), (30, 0, 60, 32)),
}
"""Edits in nothing but a part, the sides of which a square from the centre does not hold."""


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("fit", "left_out"),
    [("stretch", ["nothing"]), ("crop", ["nothing", "left", "right", "above", "below"])],
)
def test_pairs_without_a_visible_edit_are_named_and_not_trained_on(
    fit: str, left_out: list[str], cache: bool, tmp_path: Path
) -> None:
    file = parquet(tmp_path / "pairs.parquet", list(HIDDEN.values()))
    numbers = [list(HIDDEN).index(name) for name in left_out]
    expected = [f"{file} row {number}" for number in numbers]
    trained = run(tmp_path, data__fit=fit, cache=cache, steps=1)
    assert [row for row, _ in trained.skipped] == expected
    assert all("no edit is visible" in reason for _, reason in trained.skipped)
    lines = (tmp_path / "out" / "left-out.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == expected
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f"## Left out: {len(expected)} rows, 0 views of other rows" in card
    assert all(f"- {row}: no edit is visible" in card for row in expected)
    assert f"`fit: {fit}`" in card
    AcceleratorState._reset_state(True)
    session = prepare_session(
        recipe(tmp_path, data__fit=fit, cache=cache, steps=1),
        tmp_path / "out",
        Accelerator(cpu=True),
        lambda stage: lambda done, total: None,
    )
    used = session.batches.stages[-1].sampler.examples
    assert used == [number for number in range(len(HIDDEN)) if number not in numbers]


def test_views_without_a_visible_edit_are_left_out_of_rows_with_others(tmp_path: Path) -> None:
    content = [painted((80, 32), (0, 0, 20, 32)), painted((80, 32), (30, 0, 60, 32))]
    file = parquet(tmp_path / "pairs.parquet", content)
    options = {"data__fit": "crop", "data__crops": 5, "data__flip": False, "steps": 1}
    trained = run(tmp_path, **options)
    session = prepare_session(
        recipe(tmp_path, **options),
        tmp_path / "out",
        Accelerator(cpu=True),
        lambda stage: lambda done, total: None,
    )
    views = session.batches.stages[-1].sampler.views
    assert views[1] == [0, 1, 2, 3, 4]
    assert 0 not in views[0] and views[0]  # the centre shows nothing, a crop does
    hidden = [f"{file} row 0 view {view}" for view in range(5) if view not in views[0]]
    assert trained.views_without_edit == hidden
    assert not trained.skipped
    draws = [session.batches.stages[-1].sampler.draw(step, 0) for step in range(60)]
    assert {draw.view for draw in draws if draw.example == 0} == set(views[0])
    lines = (tmp_path / "out" / "left-out.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == hidden
    assert f"{len(hidden)} views of other rows" in (tmp_path / "out/model/README.md").read_text()


def test_data_without_any_visible_edit_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "pairs.parquet", [HIDDEN["nothing"]] * 3)
    with pytest.raises(SourceError, match=r"no row can be used\n.*no edit is visible.*by 0 of 255"):
        run(tmp_path, steps=1)


def log_is_empty(folder: Path) -> bool:
    file = folder / "out" / "log.jsonl"
    return not file.exists() or not file.read_text()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"data__instructions": ["wish"]}, SourceError, "'wish'"),
        ({"data__resolution": 20}, RecipeError, "20 is not a multiple of 8"),
        ({"validation": {"examples": 10}}, SourceError, "10 input images are too few"),
        ({"model__connector__heads": 3}, WeightsError, "3 heads do not divide"),
        (
            {"model__connector": {"kind": "clip_residual", "tokens": 5, "heads": 2}},
            WeightsError,
            "has 5 tokens, and CLIP's text 12",
        ),
        ({"model__connector": "identity"}, WeightsError, "states of width 8 to a UNet"),
        (
            {"model__connector__tokens": 5, "align": {"steps": 1}, "data__align": "plain"},
            RecipeError,
            "5 tokens cannot be aligned one by one to the 12",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_told(
    change: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        run(tmp_path, **change)
    assert log_is_empty(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__connector__heads": 3}, "3 heads do not divide"),
        ({"model__connector": {"kind": "clip_residual", "tokens": 5, "heads": 2}}, "has 5 tokens"),
        ({"model__init": "sd15"}, "set `init: ip2p`"),
        ({"trackers": ["wandb"]}, "trackers: wandb is not installed"),
        ({"sampling__num_inference_steps": 1001}, "1001 steps exceed the model's 1000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_features_are_not_computed_for_a_model_that_cannot_be_trained(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, WeightsError), match=message):
        run(tmp_path, **change)
    assert not (tmp_path / "out" / "features").exists()


def test_curves_forget_what_is_trained_again(tmp_path: Path) -> None:
    for done, end in ((0, 6), (3, 5)):
        AcceleratorState._reset_state(True)
        project = tmp_path / "tensorboard"
        log = TrainingLog(tmp_path, done, Accelerator(log_with="tensorboard", project_dir=project))
        for step in range(done + 1, end + 1):
            log.step(step, "train", 10.0 * done + step, 0.1, 1.0)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "reasonpix")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0)]


def test_another_cache_of_downloads_is_no_other_recipe(tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    run(tmp_path, steps=2, model__cache_dir=str(tmp_path))
    assert len(log(tmp_path / "out")) == 2


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionLoss, "forward", full)
        with pytest.raises(RunError, match="memory ran out; lower micro_batch_size"):
            run(tmp_path, steps=1)
    assert run(tmp_path, steps=1, micro_batch_size=1).model.is_dir()


def test_nothing_to_align_to(tmp_path: Path) -> None:
    write_tiny(tmp_path / "wordless")
    align = {"align": {"steps": 1}, "data__align": "plain"}
    with pytest.raises(WeightsError, match="no text encoder, so there is nothing to align to"):
        run(tmp_path, model__model=str(tmp_path / "wordless"), **align)


def test_a_model_keeps_its_purpose_and_other_images_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_training(tmp_path)
    purpose = {"description": "photographs of faces", "domain": "faces"}
    (tmp_path / "start/intended_images.json").write_text(json.dumps(purpose))
    run(tmp_path, steps=1)
    [line] = [message for message in caplog.messages if "made for" in message]
    assert "made for photographs of faces only; if the training images show" in line
    assert json.loads((tmp_path / "out/model/intended_images.json").read_text()) == purpose
