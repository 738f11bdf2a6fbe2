"""Grounded inpainting in batches: each edit with a box, a phrase and a seed of its own.

The steps are those of diffusers' `StableDiffusionGLIGENPipeline` (deprecated, one image a call),
with four differences: the input's latents are the mode of the VAE's posterior instead of a sample,
all noise comes from the edit's own generator, every latent cell that the box touches is repainted,
and the known latents replace those outside the box before decoding.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from reasonpix.editing import decoded_image, read_scheduler
from reasonpix.plugin import Problem, WeightsError
from reasonpix.plugin.weights import choose_device, choose_dtype, pretrained
from reasonpix_gligen.geometry import cells

if TYPE_CHECKING:
    from reasonpix_gligen import GligenOptions

CPU_BATCH_SIZE = 4
"""Edits that the network sees on a CPU, always: for other numbers kernels round differently."""

GROUNDING_TOKENS = 30
"""GLIGEN attends to this many; those without a box carry learned null features."""


@dataclass(frozen=True)
class Task:
    """One edit of a square RGB `image`; `box` is XYXY as shares of its side, in [0, 1]."""

    image: Image.Image
    box: tuple[float, float, float, float]
    phrase: str
    prompt: str
    seed: int


class Sampler:
    """A loaded GLIGEN inpainting checkpoint. Raises `WeightsError` when it is none.

    The network always sees `batch_size` edits, the last ones padded. On a CPU that number is fixed,
    so that a record's result depends neither on its neighbours nor on how many they are; on a GPU
    it is an option, and may move the last bits.
    """

    def __init__(self, options: GligenOptions) -> None:
        self.options = options
        self.device = choose_device(options)
        self.dtype = choose_dtype(options, self.device)
        self.batch_size = CPU_BATCH_SIZE if self.device.type == "cpu" else options.batch_size
        self._tokenizer = pretrained(CLIPTokenizer, options, subfolder="tokenizer")
        self._scheduler = read_scheduler(options)
        self._text_encoder = self._network(CLIPTextModel, "text_encoder")
        self._vae = self._network(AutoencoderKL, "vae")
        self._unet = self._network(UNet2DConditionModel, "unet")
        self._check()
        # Grounding tokens do not change from step to step: compute them once, outside the UNet.
        self._position_net = self._unet.position_net
        self._unet.position_net = _Ready()
        self._fusers = [m for m in self._unet.modules() if isinstance(m, GatedSelfAttentionDense)]
        self._text = lru_cache(maxsize=256)(self._encode_text)

    def _check(self) -> None:
        """Raise `WeightsError` when the parts are not those of one GLIGEN for inpainting."""
        model, config = self.options.model, self._unet.config
        channels = 2 * self._vae.config.latent_channels + 1
        if config.attention_type != "gated" or config.in_channels != channels:
            raise WeightsError(
                f"model: {model!r} is no GLIGEN for inpainting with text boxes: its UNet has "
                f"attention_type={config.attention_type!r} and {config.in_channels} input "
                f"channels, needed are 'gated' and {channels}"
            )
        # transformers makes an empty tokenizer where it finds no vocabulary.
        words, vocabulary = len(self._tokenizer), self._text_encoder.config.vocab_size
        if words != vocabulary:
            raise WeightsError(
                f"model: {model!r} holds no usable CLIPTokenizer (tokenizer): it knows {words} "
                f"tokens, the text encoder {vocabulary}"
            )

    @property
    def side(self) -> int:
        """Side of the images the model works on, in pixels."""
        shrink: int = 2 ** (len(self._vae.config.block_out_channels) - 1)
        side: int = self._unet.config.sample_size * shrink
        return side

    def sample(self, tasks: Sequence[Task]) -> list[Image.Image | Problem]:
        """The edited squares of at most `batch_size` tasks, in their order.

        A `Problem` takes the place of one whose numbers are not finite.
        """
        spare = self.batch_size - len(tasks)
        with torch.inference_mode():
            latents = self.latents([*tasks, *[tasks[0]] * spare])
            return [self._decode(one) for one in latents[: len(tasks)]]

    def latents(self, tasks: Sequence[Task]) -> torch.Tensor:
        """What `tasks` become: scaled latents (tasks, channels, height, width)."""
        scheduler, guided = self._scheduler, self.options.guidance_scale > 1
        generators = [torch.Generator().manual_seed(task.seed) for task in tasks]
        known = torch.cat([self._encode_image(task.image) for task in tasks])
        mask = torch.ones_like(known[:, :1])  # 1 where the latents are known
        for keep, task in zip(mask, tasks, strict=True):
            x0, y0, x1, y1 = cells(task.box, keep.shape[-1])
            keep[:, y0:y1, x0:x1] = 0
        inpainting = torch.cat([known * mask, mask], 1)
        states = torch.cat([self._text(task.prompt)[0] for task in tasks])
        grounding = self._grounding(tasks, present=True)
        if guided:  # the unconditional half first
            inpainting = torch.cat([inpainting] * 2)
            empty = self._text(self.options.negative_prompt)[0].expand(len(tasks), -1, -1)
            states = torch.cat([empty, states])
            grounding = torch.cat([self._grounding(tasks, present=False), grounding])

        scheduler.set_timesteps(self.options.num_inference_steps, device=self.device)
        grounded_steps = int(self.options.beta * len(scheduler.timesteps))
        extra = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = generators
        latents = self._noise(generators, known) * scheduler.init_noise_sigma
        for number, timestep in enumerate(scheduler.timesteps):
            for fuser in self._fusers:
                fuser.enabled = number < grounded_steps
            noise = self._noise(generators, known)
            outside = scheduler.add_noise(known, noise, timestep.reshape(1))
            latents = outside * mask + latents * (1 - mask)
            seen = scheduler.scale_model_input(torch.cat([latents] * (1 + guided)), timestep)
            predicted = self._unet(
                torch.cat([seen, inpainting], 1),
                timestep,
                encoder_hidden_states=states,
                cross_attention_kwargs={"gligen": {"objs": grounding}},
                return_dict=False,
            )[0]
            if guided:
                without, with_text = predicted.chunk(2)
                predicted = without + self.options.guidance_scale * (with_text - without)
            latents = scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]
        return known * mask + latents * (1 - mask)

    def _network(self, loader: Any, part: str) -> Any:
        network = pretrained(loader, self.options, subfolder=part, dtype=self.dtype)
        return network.to(self.device).eval().requires_grad_(False)

    def _noise(self, generators: Sequence[torch.Generator], like: torch.Tensor) -> torch.Tensor:
        # Drawn on the CPU in float32: the same numbers whatever the device and precision.
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(noise).to(like)

    def _encode_text(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """States (1, tokens, width) and pooled (1, width), each text by itself."""
        ids = self._tokenizer(
            text,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        encoded = self._text_encoder(ids)
        return encoded.last_hidden_state, encoded.pooler_output

    def _grounding(self, tasks: Sequence[Task], present: bool) -> torch.Tensor:
        """Grounding tokens (tasks, 30, width): the task's box and phrase first, the rest null."""
        shape = (len(tasks), GROUNDING_TOKENS)
        options = {"device": self.device, "dtype": self.dtype}
        masks, boxes = torch.zeros(shape, **options), torch.zeros(*shape, 4, **options)
        phrases = torch.cat([self._text(task.phrase)[1] for task in tasks])
        embeddings = torch.zeros(*shape, phrases.shape[1], **options)
        if present:
            masks[:, 0] = 1
            boxes[:, 0] = torch.tensor([task.box for task in tasks], **options)
            embeddings[:, 0] = phrases
        tokens: torch.Tensor = self._position_net(
            boxes=boxes, masks=masks, positive_embeddings=embeddings
        )
        return tokens

    def _encode_image(self, image: Image.Image) -> torch.Tensor:
        """Scaled latents (1, channels, height, width): the posterior's mode."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        scaled = pixels.to(self.device, self.dtype) / 127.5 - 1
        latents: torch.Tensor = self._vae.encode(scaled).latent_dist.mode()
        return latents * self._vae.config.scaling_factor

    def _decode(self, latents: torch.Tensor) -> Image.Image | Problem:
        decoded = self._vae.decode(latents[None] / self._vae.config.scaling_factor).sample[0]
        return decoded_image(decoded, latents)


class _Ready(nn.Module):
    """Stands in for the UNet's `position_net`: the grounding tokens are given, not computed."""

    def forward(self, objs: torch.Tensor) -> torch.Tensor:
        return objs
