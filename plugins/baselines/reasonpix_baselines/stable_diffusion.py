"""A text-to-image model for inversion methods: noise prediction, and DDIM steps both ways.

Whatever the UNet predicts is converted to noise (epsilon).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from reasonpix.editing import read_parts
from reasonpix.plugin import ReasonpixError, WeightsError
from reasonpix.plugin.weights import choose_device, choose_dtype
from reasonpix_baselines import InversionOptions
from reasonpix_baselines.latents import Latents, rows_of


@dataclass(frozen=True)
class Schedule:
    """The timesteps of DDIM, from noise to image, and how much signal there is at each."""

    timesteps: Tensor
    """(steps,), decreasing."""
    signal: Tensor
    """ᾱ at each timestep, float64."""
    cleaner: Tensor
    """ᾱ after the step that starts at each timestep, float64."""

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> Schedule:
        """`steps` timesteps, spaced as in DDIM ("leading"). Raises `ReasonpixError`.

        A timestep of pure noise (zero terminal SNR) is left out, because no image can be inverted
        that far.
        """
        ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading")
        trained = int(ddim.config.num_train_timesteps)
        if steps > trained:
            raise ReasonpixError(
                f"num_inference_steps: {steps} are more than the {trained} of training"
            )
        ddim.set_timesteps(steps)
        every = ddim.alphas_cumprod.double()
        last = torch.as_tensor(ddim.final_alpha_cumprod).double()
        timesteps = ddim.timesteps[every[ddim.timesteps] > 0]
        before = timesteps - trained // steps
        cleaner = torch.where(before >= 0, every[before.clamp(min=0)], last)
        return cls(timesteps, every[timesteps], cleaner)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    def down(self, latents: Tensor, noise: Tensor, number: int) -> Tensor:
        """One step of DDIM towards the image, from timestep `number` of the schedule."""
        return _moved(latents, noise, self.signal[number], self.cleaner[number])

    def up(self, latents: Tensor, noise: Tensor, number: int) -> Tensor:
        """The reverse step: with the same noise, `down` undoes it."""
        return _moved(latents, noise, self.cleaner[number], self.signal[number])


def _moved(latents: Tensor, noise: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 without its random noise)."""
    image = (latents - (1 - here).sqrt().item() * noise) / here.sqrt().item()
    return there.sqrt().item() * image + (1 - there).sqrt().item() * noise


class StableDiffusion:
    """The loaded pipeline. Raises `WeightsError` if it is not a text-to-image pipeline."""

    def __init__(self, options: InversionOptions) -> None:
        self.device = choose_device(options)
        self.dtype = choose_dtype(options, self.device)
        parts = read_parts(options)
        unet = parts.unet
        if parts.text is None or unet.config.in_channels != unet.config.out_channels:
            raise WeightsError(
                f"model: {options.model!r} is not a text-to-image pipeline: its UNet takes "
                f"{unet.config.in_channels} channels and returns {unet.config.out_channels}"
                + ("" if parts.text else ", and it has no text encoder")
            )
        kind = parts.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise WeightsError(
                f"model: {options.model!r} predicts {kind!r}; supported: epsilon, v_prediction"
            )
        self._predicts_velocity = kind == "v_prediction"
        self._text = parts.text
        self._text.encoder.to(self.device, self.dtype)
        # Not the UNet's own `to`, which warns about parts that it does not have.
        self.unet = nn.Module.to(unet, self.device, self.dtype).eval().requires_grad_(False)
        self.schedule = Schedule.of(parts.scheduler, options.num_inference_steps)
        self.latents = Latents(options, parts.vae, unet, self.device, self.dtype)
        self.rows = rows_of(unet, self.device, options.batch_size)
        # One text at a time, so that its states do not depend on the batch.
        self.states = lru_cache(maxsize=256)(self._states)

    def _states(self, prompt: str) -> Tensor:
        """(tokens, width) of one prompt."""
        states: Tensor = self._text([prompt])[0]
        return states

    def tokens(self, text: str) -> list[int]:
        """Token ids without start, end and padding; not truncated."""
        # Callers truncate them; without `verbose=False` the tokenizer would warn.
        tokenized = self._text.tokenizer(text, add_special_tokens=False, verbose=False)
        ids: list[int] = tokenized.input_ids
        return ids

    def noise(self, latents: Tensor, number: int, states: Tensor) -> Tensor:
        """ε (rows, c, h, w) at timestep `number` of the schedule, in the precision of `latents`."""
        predicted = self.unet(
            latents.to(self.dtype), self.schedule.timesteps[number], states.to(self.dtype)
        ).sample.to(latents.dtype)
        if not self._predicts_velocity:
            return predicted
        signal = self.schedule.signal[number]
        return signal.sqrt().item() * predicted + (1 - signal).sqrt().item() * latents
