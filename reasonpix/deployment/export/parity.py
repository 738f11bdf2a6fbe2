"""Whether an export computes what PyTorch computes, on real instructions: measured, and judged.

Every case of a benchmark is edited by PyTorch in float32. In each step the export's networks are
given the very same tensors; how far their outputs are apart is noted, and PyTorch's are gone on
with, so that each step is judged by itself. Then the export edits on its own, and its images are
held against PyTorch's: there, differences of all steps add up. What must hold stands in `LIMITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reasonpix.editing.checkpoint import LoadedModel
from reasonpix.editing.config import SamplingSettings
from reasonpix.editing.pipeline import EditTask, ReasonPix2Pix
from reasonpix.editing.runtimes.base import Network, Networks
from reasonpix.editing.runtimes.manifest import Part, Precision
from reasonpix.editing.runtimes.modules import torch_networks
from reasonpix.errors import ReasonpixError
from reasonpix.evaluation.cases import Case
from reasonpix.evaluation.metrics import METRICS, Metrics
from reasonpix.evaluation.pixel_metrics import psnr
from reasonpix.plugin.components import MLLMEncoder
from reasonpix.plugin.types import Problem

FIVE = ("l1", "l2", "clip_i", "dino", "clip_t")
"""The keys of the paper's metrics."""


@dataclass(frozen=True)
class Limits:
    """What an export must keep to."""

    relative: float
    """Of a network's output, in every step and at every size: the largest difference, as a share of
    the largest absolute value that PyTorch has."""
    psnr: float
    """Of every edited image to PyTorch's, in dB, at least."""
    l1: float
    """Mean over the edits, at most; the truth is PyTorch's edit, as for all that follows."""
    l2: float
    clip_i: float
    """Mean over the edits, at least."""
    dino: float
    clip_t: float
    """How far the mean may be from that of PyTorch's edits."""


_ROUNDED = {"l1": 1e-2, "l2": 1e-3, "clip_i": 0.98, "dino": 0.98, "clip_t": 1e-2}

LIMITS: Mapping[Precision, Limits] = {
    "fp32": Limits(1e-4, 45, l1=1e-3, l2=5e-5, clip_i=0.999, dino=0.999, clip_t=1e-3),
    "fp16": Limits(1e-2, 40, l1=3e-3, l2=1e-4, clip_i=0.99, dino=0.99, clip_t=5e-3),
    "bf16": Limits(5e-2, 30, **_ROUNDED),
    "int8": Limits(1e-1, 30, **_ROUNDED),
}
"""float32 differs by the order of sums alone. Of the others, `mini/reasonpix2pix` showed on a CPU,
on 16 edits of 10 steps: fp16 1.5e-3 and 67 dB (onnx), 7e-4 and 74 dB (openvino); bf16 1.6e-2 and
55 dB (openvino); int8 3e-3 and 61 dB (onnx), 4e-2 and 48 dB (openvino). Guidance adds
up the errors of its branches, each times its weight: scales of 7.5 and 1.5 do so seven times as
much as that model's 1.5 and 1.2, which is 17 dB. Hence the room left. An edit at 45 dB cannot be
told from PyTorch's, at 30 dB only side by side."""


@dataclass
class Difference:
    """How far a network's outputs are from those of PyTorch, over all that were added."""

    largest: float = 0.0
    reference: float = 0.0
    """The largest absolute value of PyTorch's."""
    total: float = 0.0
    values: int = 0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Take one more output into account. Anything that is no number stays one."""
        expected = expected.float()
        apart = (found.to(expected) - expected).abs()
        self.largest = float(np.max([self.largest, apart.max().item()]))
        self.reference = float(np.max([self.reference, expected.abs().max().item()]))
        self.total += apart.sum(dtype=torch.float64).item()
        self.values += apart.numel()

    @property
    def relative(self) -> float:
        """The largest difference, as a share of PyTorch's largest value."""
        return self.largest / self.reference if self.reference else self.largest

    def facts(self) -> dict[str, float]:
        """As the report has it."""
        mean = self.total / max(1, self.values)
        return {"max": self.largest, "mean": mean, "relative": self.relative}


class ParityProbe(Network):
    """PyTorch's network; another one computes the same beside it, and is compared with it."""

    def __init__(self, reference: Network, other: Network) -> None:
        self.calls: list[Difference] = []
        """By how often it was computed since it was bound: the steps of an edit."""
        self.seen: dict[str, Tensor | None] = {}
        """What it was given first."""
        self._reference, self._other = reference, other

    @property
    def device(self) -> torch.device:
        """PyTorch's."""
        return self._reference.device

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's."""
        return self._reference.dtype

    def bind(self, **inputs: Tensor | None) -> Callable[[], Tensor]:
        """What computes both, and gives PyTorch's."""
        expected, found = self._reference.bind(**inputs), self._bound(inputs)
        steps = count()

        def compute() -> Tensor:
            if not self.seen:
                self.seen = {
                    name: None if it is None else it.clone() for name, it in inputs.items()
                }
            step, result = next(steps), expected()
            if step == len(self.calls):
                self.calls.append(Difference())
            self.calls[step].add(result, found())
            return result

        return compute

    def at(self, batch: int, height: int, width: int, sequence: int) -> Difference:
        """The difference for the first input, brought to another size, its last tokens masked."""
        sample, timestep, states = (
            self.seen[name] for name in ("sample", "timestep", "encoder_hidden_states")
        )
        assert sample is not None and timestep is not None and states is not None
        rows = torch.arange(batch, device=sample.device) % len(sample)
        tokens = torch.arange(sequence, device=sample.device)
        inputs: dict[str, Tensor | None] = {
            "sample": F.interpolate(sample[rows], (height, width)).contiguous(),
            "timestep": timestep[rows],
            "encoder_hidden_states": states[rows][:, tokens % states.shape[1]].contiguous(),
            "encoder_attention_mask": (tokens < max(1, sequence - 2)).repeat(batch, 1),
        }
        difference = Difference()
        difference.add(self._reference.bind(**inputs)(), self._bound(inputs)())
        return difference

    def _bound(self, inputs: Mapping[str, Tensor | None]) -> Callable[[], Tensor]:
        """The other network, in its own precision, given what is in `inputs` at each call."""
        other = self._other
        own: dict[str, Tensor | None] = {}
        for name, tensor in inputs.items():
            is_cast = tensor is not None and tensor.is_floating_point() and name != "timestep"
            own[name] = (
                tensor
                if tensor is None
                else tensor.to(other.device, other.dtype if is_cast else tensor.dtype)
            )
        compute = other.bind(**own)

        def found() -> Tensor:
            for name, tensor in inputs.items():
                copied = own[name]
                if tensor is not None and copied is not None and copied is not tensor:
                    copied.copy_(tensor)
            return compute()

        return found


@dataclass(frozen=True)
class Sizes:
    """Sizes of the UNet's input, in latents, beside those that edits have."""

    batch: int
    height: int
    width: int
    sequence: int


@dataclass
class Parity:
    """What was measured of an export."""

    limits: Limits
    edits: int
    steps: int
    unet: list[Difference] = field(default_factory=list)
    """By step."""
    vae: dict[str, Difference] = field(default_factory=dict)
    sizes: list[tuple[Sizes, Difference]] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    """Of each edit."""
    export: dict[str, float] = field(default_factory=dict)
    """Means of the five metrics; those that the cases have no words for are left out."""
    torch: dict[str, float] = field(default_factory=dict)
    """Those of PyTorch's own edits."""

    def rows(self) -> Iterator[tuple[str, str, str, bool]]:
        """What was measured, how much, how much is wanted, and whether it is kept to."""
        limits = self.limits
        steps = [it.relative for it in self.unet]
        worst = int(np.argmax(steps))  # nothing is worse than no number
        told = [(f"UNet, relative difference, step {worst + 1} of {len(steps)}", steps[worst])]
        told += [(f"{name}, relative difference", it.relative) for name, it in self.vae.items()]
        for at, found in self.sizes:
            size = f"{at.batch}x{at.height}x{at.width}, {at.sequence} tokens"
            told.append((f"UNet at {size}", found.relative))
        for what, share in told:
            yield what, f"{share:.1e}", f"≤ {limits.relative:.0e}", share <= limits.relative
        decibel = float(np.min(self.psnr))
        what = f"PSNR, the worst of {len(self.psnr)} edits"
        yield what, f"{decibel:.1f} dB", f"≥ {limits.psnr:.0f} dB", decibel >= limits.psnr
        for measure in METRICS:
            if measure.key not in FIVE or measure.key not in self.export:
                continue
            mean, limit = self.export[measure.key], float(getattr(limits, measure.key))
            if measure.key == "clip_t":
                own = self.torch[measure.key]
                wanted, kept = f"{own:.5f} ± {limit}", abs(mean - own) <= limit
            elif measure.better == "lower":
                wanted, kept = f"≤ {limit:g}", mean <= limit
            else:
                wanted, kept = f"≥ {limit:g}", mean >= limit
            yield measure.title, f"{mean:.5f}", wanted, kept

    @property
    def problems(self) -> list[str]:
        """What is not kept to; nothing of a good export."""
        return [
            f"{what}: {is_so}, {wanted} wanted"
            for what, is_so, wanted, kept in self.rows()
            if not kept
        ]

    def facts(self) -> dict[str, Any]:
        """The report, JSON values, as it stands in the manifest."""
        return {
            "edits": self.edits,
            "steps": self.steps,
            "unet": [{"step": step} | it.facts() for step, it in enumerate(self.unet, 1)],
            **{name: it.facts() for name, it in self.vae.items()},
            "sizes": [asdict(at) | it.facts() for at, it in self.sizes],
            "psnr": {"worst": float(np.min(self.psnr)), "mean": float(np.mean(self.psnr))},
            "metrics": {"export": self.export, "torch": self.torch},
            "limits": asdict(self.limits),
        }


def compare(
    checkpoint: LoadedModel,
    encoder: MLLMEncoder[Any],
    networks: Mapping[Part, Network],
    cases: Sequence[Case],
    sizes: Sequence[Sizes],
    metrics: Metrics,
    limits: Limits,
    *,
    steps: int | None = None,
    device: torch.device,
) -> Parity:
    """Measure the exported `networks` of a model against its own, on all instructions of `cases`.

    `encoder` and `metrics` are loaded; the model is moved to `device`. Raises `ReasonpixError` for
    a case that cannot be edited.
    """

    def model(computed_by: Networks | None = None) -> ReasonPix2Pix:
        return ReasonPix2Pix(
            checkpoint, encoder, device=device, dtype=torch.float32, networks=computed_by
        )

    settings = model().resolve_settings(num_inference_steps=steps)
    own = torch_networks(checkpoint.model.unet, checkpoint.vae)
    compared = {part: ParityProbe(getattr(own, part), it) for part, it in networks.items()}
    jobs = [
        (case, EditTask(case.read_input(), words, seed))
        for seed, case in enumerate(cases)
        for words in case.instructions.values()
    ]
    # Convolutions of float32 are exact on a GPU too.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.inference_mode():
        expected = _edited(model(_together(own, compared)), jobs, settings)
        found = _edited(model(_together(own, networks)), jobs, settings)
        unet = compared.pop("unet")
        return Parity(
            limits,
            edits=len(jobs),
            steps=settings.num_inference_steps,
            unet=unet.calls,
            vae={str(name): it.calls[0] for name, it in compared.items()},
            sizes=[(at, unet.at(**asdict(at))) for at in sizes],
            psnr=[
                psnr(one, other, np.ones(one.size[::-1], bool))
                for one, other in zip(found, expected, strict=True)
            ],
            export=_measured(metrics, jobs, expected, found),
            torch=_measured(metrics, jobs, expected, expected),
        )


def _together(own: Networks, others: Mapping[Part, Network]) -> Networks:
    """PyTorch's networks where there are no others."""
    return replace(
        own,
        unet=others.get("unet", own.unet),
        vae_encoder=others.get("vae_encoder", own.vae_encoder),
        vae_decoder=others.get("vae_decoder", own.vae_decoder),
    )


def _edited(
    model: ReasonPix2Pix, jobs: Sequence[tuple[Case, EditTask]], settings: SamplingSettings
) -> list[Image.Image]:
    edits: dict[int, Image.Image] = {}
    for number, edited in model.edit((task for _, task in jobs), settings):
        if isinstance(edited, Problem):
            raise ReasonpixError(f"{jobs[number][0].row}: {edited.reason}; choose other samples")
        edits[number] = edited
    return [edits[number] for number in range(len(jobs))]


def _measured(
    metrics: Metrics,
    jobs: Sequence[tuple[Case, EditTask]],
    truths: Sequence[Image.Image],
    edits: Sequence[Image.Image],
) -> dict[str, float]:
    """The means of the five metrics, with `truths` for the ground truth."""
    cases = [
        Case(case.id, case.row, case.read_input, {}, truth.copy, "", case.edited_caption)
        for (case, _), truth in zip(jobs, truths, strict=True)
    ]
    values: dict[str, list[float]] = {}
    for one in metrics.measure(cases, [edit.copy for edit in edits]):
        if isinstance(one, Problem):
            raise ReasonpixError(one.reason)
        for key in set(FIVE) & one.keys():
            values.setdefault(key, []).append(one[key])
    return {key: float(np.mean(values[key])) for key in FIVE if key in values}
