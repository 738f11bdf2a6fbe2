"""The stages of training, and the batches of their optimizer steps."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reasonpix.training.feature_cache import CachedFeatures
from reasonpix.training.features import OnlineFeatures
from reasonpix.training.loss import Batch
from reasonpix.training.randomness import StepSampler


@dataclass(frozen=True)
class Stage:
    """A range of optimizer steps that share a loss."""

    name: Literal["align", "train"]
    first: int
    """Optimizer steps before it."""
    steps: int
    sampler: StepSampler

    @property
    def aligning(self) -> bool:
        """Whether the connector alone learns, to match CLIP's states."""
        return self.name == "align"


@dataclass(frozen=True)
class BatchLoader:
    """Makes this process's share of every batch, as micro-batches on `device`."""

    stages: Sequence[Stage]
    features: CachedFeatures | OnlineFeatures
    scaling_factor: float
    """Of the VAE's latents."""
    micro_batch_size: int
    device: torch.device
    rank: int
    processes: int

    def stage_at(self, step: int) -> Stage:
        """The stage of an optimizer step."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    def steps(self, begin: int, end: int) -> Generator[list[Batch]]:
        """The micro-batches of each step in a range.

        With cached features, those of the next step are read while the current one is computed.
        """
        if isinstance(self.features, OnlineFeatures):
            yield from map(self._step, range(begin, end))
            return
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(self._step, begin) if begin < end else None
            for step in range(begin, end):
                assert upcoming is not None
                batches = upcoming.result()
                upcoming = pool.submit(self._step, step + 1) if step + 1 < end else None
                yield batches

    def _step(self, step: int) -> list[Batch]:
        stage = self.stage_at(step)
        share = stage.sampler.batch_size // self.processes
        first = self.rank * share
        size = min(self.micro_batch_size, share)
        return [
            self._batch(stage, step - stage.first, range(start, min(start + size, first + share)))
            for start in range(first, first + share, size)
        ]

    def _batch(self, stage: Stage, step: int, positions: range) -> Batch:
        draws = [stage.sampler.draw(step, position) for position in positions]
        features = self.features.get([(draw.example, draw.view) for draw in draws])
        examples = [self.features.pairs.examples[draw.example] for draw in draws]

        def stack(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(tensors)).to(self.device, torch.float32)

        deviation = (0.5 * stack([feature.logvar for feature in features])).exp()
        posterior = stack([draw.posterior for draw in draws])
        mean = stack([feature.mean for feature in features])
        return Batch(
            h=[feature.h.to(self.device) for feature in features],
            instructions=[example.instruction for example in examples],
            source=stack([feature.source for feature in features]),
            target=(mean + deviation * posterior) * self.scaling_factor,
            noise=stack([draw.noise for draw in draws]),
            timesteps=torch.tensor([draw.timestep for draw in draws], device=self.device),
            drop_text=[draw.drop_text for draw in draws],
            drop_image=torch.tensor([draw.drop_image for draw in draws], device=self.device),
            align_text=[example.plain or "" for example in examples],
        )
