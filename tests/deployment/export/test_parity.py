"""What is told of networks that stand for an export: right ones, and wrong ones of many kinds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from reasonpix.deployment.export.parity import (
    LIMITS,
    Difference,
    InputShape,
    ParityReport,
    measure_parity,
)
from reasonpix.editing.checkpoint import LoadedModel
from reasonpix.editing.runtimes.base import Network, TorchNetwork
from reasonpix.editing.runtimes.manifest import Part
from reasonpix.editing.runtimes.modules import UNetGraph, VaeDecoderGraph, VaeEncoderGraph
from reasonpix.evaluation.benchmark import BenchmarkOptions, read_benchmark
from reasonpix.evaluation.metrics import Metrics, MetricsOptions
from reasonpix.plugin.components import MLLMEncoder
from reasonpix.plugin.spec import ComponentSpec
from tests.support.benchmark_rows import benchmark, row
from tests.support.tiny_metrics import write_clip, write_dino
from tests.support.tiny_model import tiny_model

# Schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 3
SHAPES = [InputShape(1, 6, 10, 12), InputShape(5, 10, 4, 17)]
EXACT = LIMITS["fp32"]
Compare = Callable[..., ParityReport]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    folder = tmp_path_factory.mktemp("metrics")
    options = {"clip": str(write_clip(folder / "clip")), "dino": str(write_dino(folder / "dino"))}
    made = Metrics(MetricsOptions.model_validate(options))
    made.load()
    return made


@pytest.fixture(scope="module")
def checkpoint() -> LoadedModel:
    made = tiny_model(num_inference_steps=STEPS)
    for module in (made.model.unet, made.vae):
        nn.Module.to(module, torch.device("cpu")).eval().requires_grad_(False)
    return made


@pytest.fixture
def compared(checkpoint: LoadedModel, metrics: Metrics, tmp_path: Path) -> Compare:
    """Compare networks with the tiny model on two cases of a benchmark."""

    def run(
        networks: Mapping[Part, Network], rows: list[dict[str, object]] | None = None
    ) -> ParityReport:
        data = benchmark(tmp_path / "benchmark", rows or [row(1), row(2)])
        cases = read_benchmark(BenchmarkOptions(path=str(data)), Path()).cases
        encoder = ComponentSpec("encoder", "fake-encoder", checkpoint.encoder.options).build()
        assert isinstance(encoder, MLLMEncoder)
        device = torch.device("cpu")
        return measure_parity(
            checkpoint, encoder, networks, cases, SHAPES, metrics, EXACT, device=device
        )

    return run


def changed(checkpoint: LoadedModel, change: Callable[[UNet2DConditionModel], object]) -> Network:
    """The UNet, after `change` of a copy."""
    unet = copy.deepcopy(checkpoint.model.unet)
    change(unet)
    return TorchNetwork(UNetGraph(unet))


class Wrong(Network):
    """The network, but that `break_it` is given each input, result, and the number of the step."""

    def __init__(
        self, right: Network, break_it: Callable[[dict[str, Tensor | None], int], object]
    ) -> None:
        self._right, self._break = right, break_it

    @property
    def device(self) -> torch.device:
        return self._right.device

    @property
    def dtype(self) -> torch.dtype:
        return self._right.dtype

    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        steps = count(1)

        def compute() -> Tensor:
            own = dict(inputs)
            by = self._break(own, next(steps))
            return self._right.bind(**own)() + (by if isinstance(by, float) else 0)

        return compute


def test_the_same_networks_differ_in_nothing(compared: Compare, checkpoint: LoadedModel) -> None:
    vae = copy.deepcopy(checkpoint.vae)
    parity = compared(
        {
            "unet": changed(checkpoint, lambda unet: None),
            "vae_encoder": TorchNetwork(VaeEncoderGraph(vae)),
            "vae_decoder": TorchNetwork(VaeDecoderGraph(vae)),
        }
    )
    assert parity.problems == []
    assert parity.edits == 4  # two cases, each with a direct and a reasoning instruction
    assert [it.largest for it in parity.unet] == [0.0] * STEPS
    assert set(parity.vae) == {"vae_encoder", "vae_decoder"}
    assert all(it.reference > 0 for it in (*parity.unet, *parity.vae.values()))
    assert parity.psnr == [100.0] * 4
    five = {"l1": 0, "l2": 0, "clip_i": pytest.approx(1), "dino": pytest.approx(1)}
    assert parity.export == five | {"clip_t": parity.torch["clip_t"]}
    facts = json.loads(json.dumps(parity.as_dict(), allow_nan=False))
    assert [it["step"] for it in facts["unet"]] == [1, 2, 3]
    assert facts["sizes"][1] == {
        "batch": 5, "height": 10, "width": 4, "sequence": 17, "max": 0, "mean": 0, "relative": 0
    }  # fmt: skip


def test_other_weights_are_found_in_every_figure(
    compared: Compare, checkpoint: LoadedModel
) -> None:
    parity = compared({"unet": changed(checkpoint, lambda unet: unet.conv_out.weight.mul_(1.3))})
    assert all(it.relative > EXACT.relative for it in parity.unet)
    told = "\n".join(parity.problems)
    for name in ("UNet, relative difference, step", "UNet at 5x10x4, 17 tokens", "PSNR", "L1"):
        assert name in told
    assert "must be ≤ 1e-04" in told
    assert "dB; must be ≥ 45 dB" in told


def test_each_step_is_judged_by_itself(compared: Compare, checkpoint: LoadedModel) -> None:
    """A difference in one step does not show in the next ones; it does in the images."""
    right = changed(checkpoint, lambda unet: None)
    parity = compared({"unet": Wrong(right, lambda _, step: 0.5 if step == 2 else None)})
    assert [it.largest for it in parity.unet] == [0, pytest.approx(0.5, abs=1e-6), 0]
    assert min(parity.psnr) < EXACT.psnr
    assert [it.split(",")[0] for it in parity.problems[:1]] == ["UNet"]
    assert "step 2 of 3" in parity.problems[0]


def test_what_is_no_number_does_not_pass(compared: Compare, checkpoint: LoadedModel) -> None:
    parity = compared(
        {"unet": changed(checkpoint, lambda unet: unet.conv_out.bias.fill_(float("nan")))}
    )
    assert any("nan" in problem for problem in parity.problems)
    assert parity.problems[0].startswith("UNet, relative difference, step 1 of 3: nan")
    failed = f"Edits: {parity.edits} of {parity.edits} failed: the network's output is not finite"
    assert any(problem.startswith(failed) for problem in parity.problems)


def test_a_network_that_forgets_the_mask_is_found(
    compared: Compare, checkpoint: LoadedModel
) -> None:
    """Its edits are right: the tiny model's connector pads them with states that are all seen."""

    def forget(inputs: dict[str, Tensor | None], step: int) -> None:
        inputs["encoder_attention_mask"] = None

    parity = compared({"unet": Wrong(changed(checkpoint, lambda unet: None), forget)})
    assert all(difference.relative > EXACT.relative for _, difference in parity.shapes)
    assert any(problem.startswith("UNet at") for problem in parity.problems)


def test_a_network_of_another_precision_is_given_its_own_tensors(
    compared: Compare, checkpoint: LoadedModel
) -> None:
    parity = compared({"unet": changed(checkpoint, lambda unet: unet.to(torch.bfloat16))})
    worst = max(it.relative for it in parity.unet)
    assert EXACT.relative < worst < LIMITS["bf16"].relative
    # Of each step: had it kept the first one's tensors, the last step's would be far off.
    assert parity.unet[-1].relative < LIMITS["bf16"].relative


def test_cases_without_captions_have_no_clip_t(compared: Compare, checkpoint: LoadedModel) -> None:
    rows = [row(1, caption=None, edited_caption=None)]
    parity = compared({"unet": changed(checkpoint, lambda unet: None)}, rows)
    assert set(parity.export) == {"l1", "l2", "clip_i", "dino"}
    assert parity.problems == []


def test_differences_are_of_all_that_was_seen() -> None:
    difference = Difference()
    difference.add(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0]))
    difference.add(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0], dtype=torch.float16))
    assert difference.as_dict() == {"max": 1.0, "mean": 1.5 / 4, "relative": 0.25}


def test_lower_precisions_are_given_no_tighter_limits() -> None:
    exact, *others = (LIMITS[precision] for precision in ("fp32", "fp16", "bf16", "int8"))
    assert (exact.relative, exact.psnr) == (1e-4, 45)
    for limits in others:
        assert limits.relative > exact.relative
        assert limits.psnr < exact.psnr
