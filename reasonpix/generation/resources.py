"""The resources that a stage needs, and those of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field


class Resources(BaseModel):
    """The resources a stage needs. They do not affect results, so fingerprints ignore them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_gpus: float = Field(0, ge=0, description="GPUs, such as 0.5, for each worker")
    num_cpus: float = Field(1, ge=0, description="Processors for each worker, with Ray")
    memory_gb: float = Field(0, ge=0, description="Memory of the machine for each worker, in GB")
    actors: int = Field(1, ge=1, description="Workers, with Ray")
    timeout_s: float | None = Field(
        None, gt=0, description="Longest time for a shard, with Ray; a second time-out fails it"
    )
    recycle_after: int | None = Field(
        None, ge=1, description="Shards after which a worker is replaced, with Ray"
    )


def fit_here(stages: Sequence[Resources]) -> bool:
    """Whether the models of several stages fit on this machine at once, with one worker each.

    A single stage always fits: it may need less than it declares.
    """
    if len(stages) == 1:
        return True
    gpus = sum(stage.num_gpus for stage in stages)
    if gpus and (available := _gpus()) and gpus > available:
        return False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum(stage.memory_gb for stage in stages) * 1e9 <= memory


def _gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    count: int = torch.cuda.device_count()
    return count
