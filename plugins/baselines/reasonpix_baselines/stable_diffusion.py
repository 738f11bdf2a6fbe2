"""A text-to-image model as methods of inversion see it: noise predicted, steps up and down.

Whatever the UNet was trained to predict, here it predicts the noise (epsilon).
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
    """(steps,), falling."""
    signal: Tensor
    """ᾱ at each timestep, float64."""
    cleaner: Tensor
    """ᾱ after the step that starts at each timestep, float64."""

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> Schedule:
        """`steps` of them, spaced as DDIM does ("leading"). Raises `ReasonpixError`.

        Where a schedule ends in nothing but noise (zero terminal SNR), no image can be inverted
        that far: such a timestep is left out.
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
        """How many steps there are."""
        return len(self.timesteps)

    def down(self, latents: Tensor, noise: Tensor, number: int) -> Tensor:
        """One step of DDIM towards the image, from timestep `number` of the schedule."""
        return _moved(latents, noise, self.signal[number], self.cleaner[number])

    def up(self, latents: Tensor, noise: Tensor, number: int) -> Tensor:
        """The same step backwards: `down` undoes it, given the same noise."""
        return _moved(latents, noise, self.cleaner[number], self.signal[number])


def _moved(latents: Tensor, noise: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 without its random noise)."""
    image = (latents - (1 - here).sqrt().item() * noise) / here.sqrt().item()
    return there.sqrt().item() * image + (1 - there).sqrt().item() * noise


class StableDiffusion:
    """The loaded pipeline. Raises `WeightsError` for one that does not draw from text."""

    def __init__(self, options: InversionOptions) -> None:
        self.device = choose_device(options)
        self.dtype = choose_dtype(options, self.device)
        parts = read_parts(options)
        unet = parts.unet
        if parts.text is None or unet.config.in_channels != unet.config.out_channels:
            raise WeightsError(
                f"model: {options.model!r} is no text-to-image pipeline: its UNet takes "
                f"{unet.config.in_channels} channels and gives {unet.config.out_channels}"
                + ("" if parts.text else ", and it has no text encoder")
            )
        kind = parts.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise WeightsError(
                f"model: {options.model!r} predicts {kind!r}; epsilon and v_prediction are known"
            )
        self._predicts_velocity = kind == "v_prediction"
        self._text = parts.text
        self._text.encoder.to(self.device, self.dtype)
        # Not by its own `to`, which warns of parts that it has none of.
        self.unet = nn.Module.to(unet, self.device, self.dtype).eval().requires_grad_(False)
        self.schedule = Schedule.of(parts.scheduler, options.num_inference_steps)
        self.latents = Latents(options, parts.vae, unet, self.device, self.dtype)
        self.rows = rows_of(unet, self.device, options.batch_size)
        # Each text by itself: its states shall not depend on the batch.
        self.states = lru_cache(maxsize=256)(self._states)

    def _states(self, prompt: str) -> Tensor:
        """(tokens, width) of one prompt."""
        states: Tensor = self._text([prompt])[0]
        return states

    def tokens(self, text: str) -> list[int]:
        """Token ids without start, end and padding, however many they are."""
        # Too many are cut where they are used; no warning is needed.
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
