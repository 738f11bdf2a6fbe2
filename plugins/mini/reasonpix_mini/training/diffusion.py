"""Training the mini diffusion models from scratch: UNet and text encoder together."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer


def scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR and trailing steps (Lin et al. 2024)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


class Training(ABC):
    """The state of a training run and one step of it.

    `network` has a `unet` and a `text_encoder`.
    """

    seed: ClassVar[int]
    warmup: ClassVar[int]
    decay: ClassVar[float]
    """Of the average of the weights."""

    def __init__(self, words: CLIPTokenizer, network: nn.Module, learning_rate: float) -> None:
        self.words = words
        self.network = network
        self.ema = copy.deepcopy(network).requires_grad_(False).eval()
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.AdamW(
            network.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.cumulated = scheduler().alphas_cumprod
        self.usual_norm = 1.0
        self.done = 0
        self.seconds = 0.0

    @abstractmethod
    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Of a new batch, drawn from `rng` and torch's own generator."""

    def step(self, progress: float) -> float:
        """One optimizer step; `progress` in [0, 1] sets the learning rate. Returns the loss."""
        rng = np.random.default_rng([self.seed, self.done])
        torch.manual_seed(self.done)
        rate = min(1.0, (self.done + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * max(rate, 0.01)
        loss = self.loss(rng)
        self.optimizer.zero_grad()
        loss.backward()
        # Relative to the usual norm: one bad batch at a high rate costs minutes of recovery.
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 2 * self.usual_norm).item()
        self.usual_norm += 0.02 * (min(norm, 2 * self.usual_norm) - self.usual_norm)
        self.optimizer.step()
        self.done += 1
        keep = min(self.decay, self.done / (self.done + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.network.parameters()), 1 - keep
            )
        return float(loss)

    def save(self, folder: Path) -> None:
        """The averaged weights as a diffusers folder, and the state to resume from."""
        self.ema.unet.save_pretrained(folder / "unet")
        self.ema.text_encoder.save_pretrained(folder / "text_encoder")
        self.words.save_pretrained(folder / "tokenizer")
        scheduler().save_pretrained(folder / "scheduler")
        state = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{k}": v for k, v in moments.items()}
        state |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        state["progress"] = torch.tensor([self.done, self.seconds], dtype=torch.float64)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.safetensors")

    def resume(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = load_file(folder / "state.safetensors")

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        self.ema.load_state_dict(part("ema."))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in part("optimizer.").items():
            number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        done, self.seconds = state["progress"].tolist()
        self.done = int(done)
