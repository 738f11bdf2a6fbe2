"""Grounding DINO as a grounder: `b_k = DINO(x, y_k)`, Eq. 5 of the paper.

Liu et al., "Grounding DINO: Marrying DINO with Grounded Pre-Training for Open-Set Object
Detection", ECCV 2024. The network is the one of transformers; any checkpoint of
`GroundingDinoForObjectDetection` fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from reasonpix.plugin import Box, Grounder, Grounding, InvalidBox, ModelOptions, Problem, hookimpl
from reasonpix.plugin.weights import choose_device, choose_dtype, pretrained

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class GroundingDinoOptions(ModelOptions):
    """What a recipe may say about the grounder."""

    model: str = Field(
        "IDEA-Research/grounding-dino-base",
        description="Hub id, local folder, or checkpoint name such as mini/grounding-dino",
    )
    threshold: float = Field(0.35, ge=0, le=1, description="A box needs a score above this")
    text_threshold: float = Field(
        0.25, ge=0, le=1, description="A box needs a word of the category that scores above this"
    )


@dataclass(frozen=True)
class _Query:
    """One category to look for in one image: the unit of a batch."""

    image: int
    category: int
    """Index among the categories asked of the image."""
    tokens: tuple[int, ...]


class GroundingDino(Grounder[GroundingDinoOptions]):
    """Asks for one category at a time and takes the box with the highest score.

    A prompt of several categories would let them compete for boxes and merge into phrases. The
    best box of a category is never suppressed by another, so there is no non-maximum suppression.
    """

    name = "grounding-dino"
    Options = GroundingDinoOptions

    def load(self) -> None:
        """Read processor and weights. Raises `WeightsError` when they cannot be found or read."""
        import torch
        from transformers import (
            AutoImageProcessor,
            AutoTokenizer,
            GroundingDinoForObjectDetection,
        )

        options = self.options
        device = choose_device(options)
        # Pillow resizes alike everywhere; the default depends on whether torchvision is installed.
        self._images: Any = pretrained(AutoImageProcessor, options, backend="pil")
        self._tokenizer: Any = pretrained(AutoTokenizer, options)
        model = pretrained(
            GroundingDinoForObjectDetection,
            options,
            dtype=choose_dtype(options, device),
        )
        self._model: Any = model.to(device).eval()
        # The network subtracts the batch's largest attention weight, which moves the last bits of
        # everything. A CPU gains little from batches and gives them up for exact results.
        self._together = 1 if device.type == "cpu" else options.batch_size
        separators = {*self._tokenizer.all_special_ids, self._tokenizer.convert_tokens_to_ids(".")}
        # An unknown word is a word.
        separators.discard(self._tokenizer.unk_token_id)
        self._separators: Any = torch.tensor(sorted(separators), device=device)

    def close(self) -> None:
        """Let go of the weights."""
        self._model = self._tokenizer = self._separators = self._images = None

    def ground(
        self, images: Sequence[Image], categories: Sequence[Sequence[str]]
    ) -> list[tuple[Grounding, ...] | Problem]:
        """For each RGB image, of any size, one grounding per asked category, in the order asked.

        Boxes have two decimals and scores four. On a CPU results are the same bytes whatever the
        batch; on a GPU a last digit may differ where a value lies on the edge of rounding. An
        image so narrow that it has fewer locations than the network has queries gives a `Problem`.
        """
        found = [
            [Grounding(category=category) for category in asked]
            for _, asked in zip(images, categories, strict=True)
        ]
        problems: dict[int, Problem] = {}
        for queries, pixels in self._batches(images, categories, problems):
            for query, (scores, words, boxes) in zip(
                queries, self._predict(queries, pixels), strict=True
            ):
                if scores.isnan().any():
                    problems[query.image] = Problem(
                        status="failed",
                        reason=f"{self.name} overflows in {self._model.dtype}; set dtype: float32",
                    )
                    continue
                best = self._best(scores, words, boxes, images[query.image].size)
                if best is not None:
                    found[query.image][query.category] = Grounding(
                        category=categories[query.image][query.category],
                        score=best[0],
                        box=best[1],
                    )
        return [problems.get(i) or tuple(groundings) for i, groundings in enumerate(found)]

    def _batches(
        self,
        images: Sequence[Image],
        categories: Sequence[Sequence[str]],
        problems: dict[int, Problem],
    ) -> Iterator[tuple[list[_Query], list[torch.Tensor]]]:
        """Batches of queries with the pixels of each, (3, height, width).

        Within a batch all images have one shape and all texts one length, so nothing is padded.
        Sorting by aspect ratio brings together images that the processor resizes to one shape.
        """
        queries = [
            _Query(i, k, tuple(self._tokens(category)))
            for i, asked in enumerate(categories)
            for k, category in enumerate(asked)
        ]
        queries.sort(
            key=lambda q: (len(q.tokens), images[q.image].width / images[q.image].height, q.image)
        )
        # The two-stage head picks its queries among the locations; the finest map has a location
        # for every 8x8 pixels.
        least = 64 * self._model.config.num_queries
        batch: list[_Query] = []
        pixels: list[torch.Tensor] = []
        for query in queries:
            if query.image in problems:
                continue
            if batch and batch[-1].image == query.image:
                shown = pixels[-1]
            else:
                image = images[query.image].convert("RGB")
                shown = None if self._vanishes(image) else self._pixels(image)
                if shown is None or shown.shape[1] * shown.shape[2] < least:
                    problems[query.image] = Problem(
                        status="rejected",
                        reason=f"an image of {image.width}x{image.height} pixels is too narrow "
                        f"for {self.name}",
                    )
                    continue
            if batch and (
                len(batch) == self._together
                or shown.shape != pixels[-1].shape
                or len(query.tokens) != len(batch[-1].tokens)
            ):
                yield batch, pixels
                batch, pixels = [], []
            batch.append(query)
            pixels.append(shown)
        if batch:
            yield batch, pixels

    def _vanishes(self, image: Image) -> bool:
        """Whether the shorter side has no pixel left at the size that the processor resizes to."""
        longest = self._images.size.get("longest_edge")
        return bool(longest) and round(longest * min(image.size) / max(image.size)) == 0

    def _pixels(self, image: Image) -> torch.Tensor:
        """What the network sees of an RGB image, (3, height, width)."""
        pixels: torch.Tensor = self._images(images=image, return_tensors="pt").pixel_values[0]
        return pixels

    def _tokens(self, category: str) -> list[int]:
        """The prompt of one category: lower case, ends with a dot, and holds no other dot."""
        text = " ".join(category.lower().replace(".", " ").split()) + "."
        ids: list[int] = self._tokenizer(
            text, truncation=True, max_length=self._model.config.max_text_len
        ).input_ids
        return ids

    def _predict(
        self, queries: list[_Query], pixels: list[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each query the candidates' scores, best words' scores, boxes (n, 4; cxcywh)."""
        import torch

        model = self._model
        ids = torch.tensor([query.tokens for query in queries], device=model.device)
        with torch.inference_mode():
            output = model(
                pixel_values=torch.stack(pixels).to(model.device, model.dtype), input_ids=ids
            )
            scores = output.logits[..., : ids.shape[1]].float().sigmoid()
        is_word = ~torch.isin(ids, self._separators)
        best, words = scores.amax(-1), scores.masked_fill(~is_word[:, None], 0).amax(-1)
        return zip(best.cpu(), words.cpu(), output.pred_boxes.float().cpu(), strict=True)

    def _best(
        self,
        scores: torch.Tensor,
        words: torch.Tensor,
        boxes: torch.Tensor,
        size: tuple[int, int],
    ) -> tuple[float, Box] | None:
        """The box with the highest score that passes the thresholds and is a box, if any."""
        width, height = size
        candidates = []
        for score, word, (cx, cy, w, h) in zip(
            scores.tolist(), words.tolist(), boxes.tolist(), strict=True
        ):
            if score <= self.options.threshold or word <= self.options.text_threshold:
                continue
            corners = (
                round(min(max((cx - w / 2) * width, 0.0), width), 2),
                round(min(max((cy - h / 2) * height, 0.0), height), 2),
                round(min(max((cx + w / 2) * width, 0.0), width), 2),
                round(min(max((cy + h / 2) * height, 0.0), height), 2),
            )
            candidates.append((round(score, 4), corners))
        # Equal scores are settled by the boxes, not by the order of the network's queries.
        for score, (x0, y0, x1, y1) in sorted(candidates, reverse=True):
            try:
                return score, Box(x0=x0, y0=y0, x1=x1, y1=y1, width=width, height=height)
            except InvalidBox:
                continue  # Degenerate: no side left after clipping and rounding.
        return None


@hookimpl
def grounders() -> list[type[Grounder[Any]]]:
    """Grounding DINO."""
    return [GroundingDino]
