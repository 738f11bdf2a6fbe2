"""The text encoder of a diffusers pipeline, on its own.

On a CPU it always computes `CPU_ROWS` instructions and pads smaller batches by repetition: kernels
round differently for other batch sizes, but states must depend on their instruction only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTextModel, CLIPTokenizer

from reasonpix.plugin import WeightsError
from reasonpix.plugin.weights import choose_device, choose_dtype, pretrained

if TYPE_CHECKING:
    from reasonpix_llava import ClipTextOptions

CPU_ROWS = 4
"""Batch size on a CPU, always."""


class TextEncoder:
    """A loaded CLIP text encoder. Raises `WeightsError` if the pipeline has none."""

    def __init__(self, options: ClipTextOptions) -> None:
        self.device = choose_device(options)
        self.rows = CPU_ROWS if self.device.type == "cpu" else options.batch_size
        self._tokenizer = pretrained(CLIPTokenizer, options, subfolder="tokenizer")
        model = pretrained(
            CLIPTextModel,
            options,
            subfolder="text_encoder",
            dtype=choose_dtype(options, self.device),
        )
        self._model = model.to(self.device).eval()
        tokens, vocabulary = len(self._tokenizer), model.config.vocab_size
        longest, positions = self._tokenizer.model_max_length, model.config.max_position_embeddings
        # transformers creates an empty tokenizer if it finds no vocabulary.
        if tokens != vocabulary or longest > positions:
            raise WeightsError(
                f"model: tokenizer and text_encoder of {options.model!r} do not match: "
                f"vocabularies of {tokens} and {vocabulary}, texts of "
                f"{longest} and {positions} tokens"
            )

    @torch.inference_mode()
    def encode(self, instructions: Sequence[str]) -> list[NDArray[np.float32]]:
        """The last hidden states of each instruction: float32 (`model_max_length`, width)."""
        states: list[NDArray[np.float32]] = []
        for start in range(0, len(instructions), self.rows):
            batch = list(instructions[start : start + self.rows])
            ids = self._tokenizer(
                batch + batch[:1] * (self.rows - len(batch)),
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            # No mask, as in diffusers: the model was trained to attend to padding.
            hidden = self._model(ids.to(self.device)).last_hidden_state
            states.extend(hidden[: len(batch)].float().cpu().numpy())
        return states
