"""What training sees of a pair: h of the frozen encoder, and the moments of the frozen VAE.

Both are of a view, so that flips and crops are right. `OnlineFeatures` computes them each time;
`CachedFeatures` computes them once and reads them from then on. Either way they are rounded to
float16 and have the same bits, so that a loss does not depend on which of the two it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from reasonpix.core.atomic import write_atomically
from reasonpix.core.parallel import THREADS, Report, Size, prefetch, quiet
from reasonpix.core.tensor_store import SHARD, Shards
from reasonpix.datasets.pairs import Pairs
from reasonpix.errors import PluginError, RunError, SourceError
from reasonpix.plugin import registry
from reasonpix.plugin.components import MLLMEncoder
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.types import Problem

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

Request = tuple[int, int]
"""The number of an example, and of a view of it."""

Seen = tuple[Image.Image, Image.Image]
"""A view of the input image, and the same of the edited one."""

VAE_IMAGES = 8
"""Images that the VAE sees at a time, always: for other numbers kernels round differently."""

VERSION = "1"
"""Raise it when views or features are made in another way: what is cached goes stale."""

_MANY = 10


class Feature(NamedTuple):
    """What training sees of a view of an example. All is float16, on the CPU."""

    h: Tensor
    """States of the encoder, before the connector: (tokens, width)."""
    source: Tensor
    """Mode of the input image's latents, not scaled: (channels, s, s)."""
    mean: Tensor
    """Of the edited image's latents, not scaled: (channels, s, s)."""
    logvar: Tensor


class OnlineFeatures:
    """Features that are computed whenever they are asked for.

    `encoder` is loaded when it is first needed; `vae` is loaded, and stays where it is. `batch`
    examples are given to the encoder at a time.
    """

    def __init__(
        self, pairs: Pairs, encoder: ComponentSpec, vae: AutoencoderKL, batch: int = 32
    ) -> None:
        self.pairs = pairs
        self.use = encoder
        self.vae = vae
        self.batch = batch
        self._encoder: MLLMEncoder[Any] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of encoder and VAE: all that changes a feature of the same view and instruction."""
        identity = registry.fingerprint_facts("encoder", self.use.name, self.use.options)
        return _hash(VERSION, identity, digest_of(self.vae))

    def compute(self, report: Report = quiet) -> None:
        """See that every image can be decoded: see `Pairs.check`."""
        self.pairs.check(report)

    def usable(self) -> list[int]:
        """The examples whose features can be asked for."""
        return self.pairs.usable()

    def get(self, requests: Sequence[Request]) -> list[Feature]:
        """The features of some views of examples.

        Raises `SourceError` for an image that cannot be read, and for an example that the encoder
        has a problem with: it is known too late to be skipped.
        """
        seen = dict(prefetch(self._seen, iter(requests), THREADS))
        pairs = {self._shown(*request): seen[request] for request in requests}
        moments = dict(zip(pairs, self.moments(list(pairs.values())), strict=True))
        examples = self.pairs.examples
        texts = [examples[i].instruction for i, _ in requests]
        states = self.states([seen[request][0] for request in requests], texts)
        features: list[Feature] = []
        for request, text, h in zip(requests, texts, states, strict=True):
            if isinstance(h, Problem):
                raise SourceError(
                    f"{examples[request[0]].row}: the encoder has a problem with {text!r}: "
                    f"{h.reason}; remove the row, or compute features once, where "
                    "`broken: skip` leaves it out"
                )
            features.append(Feature(h, *moments[self._shown(*request)]))
        return features

    def _seen(self, request: Request) -> tuple[Request, Seen]:
        return request, self.pairs.view(*request)

    def _shown(self, example: int, view: int) -> tuple[object, ...]:
        """What is alike when two requests show the same pixels."""
        it = self.pairs.examples[example]
        return it.input_image, it.edited_image, self.pairs.geometry(example, view)

    def states(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Tensor | Problem]:
        """h of each image with its instruction, float16."""
        results: list[Tensor | Problem] = []
        for first in range(0, len(texts), self.batch):
            some = slice(first, first + self.batch)
            # Images that a component is given are its own.
            given = self.encoder.encode([image.copy() for image in images[some]], texts[some])
            if len(given) != len(texts[some]):
                raise PluginError(
                    f"encoder {self.use.name!r} gave {len(given)} results for "
                    f"{len(texts[some])} pairs"
                )
            results += map(_rounded, given)
        return results

    @property
    def encoder(self) -> MLLMEncoder[Any]:
        """The encoder, loaded."""
        if self._encoder is None:
            encoder = self.use.build()
            assert isinstance(encoder, MLLMEncoder)
            encoder.load()
            self._encoder = encoder
        return self._encoder

    def close(self) -> None:
        """Give back what the encoder took; it is loaded again when it is needed."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def moments(self, pairs: Sequence[Seen]) -> list[Tensor]:
        """Of each pair (3, channels, s, s), float16: source, mean and logvar as `Feature` has them.

        Raises `RunError` when the VAE gives no numbers.
        """
        import torch

        images = [image for pair in pairs for image in pair]
        parameters: list[Tensor] = []
        for first in range(0, len(images), VAE_IMAGES):
            some = images[first : first + VAE_IMAGES]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in some]))
            x = torch.zeros(VAE_IMAGES, *pixels.shape[1:])
            x[: len(some)] = pixels / 127.5 - 1
            with torch.no_grad():
                x = x.permute(0, 3, 1, 2).contiguous().to(self.vae.device, self.vae.dtype)
                found = self.vae.encode(x).latent_dist
            both = torch.stack([found.mean, found.logvar], 1)[: len(some)]
            parameters += both.to("cpu", torch.float16)
        results = [
            torch.stack([before[0], *after])
            for before, after in zip(parameters[::2], parameters[1::2], strict=True)
        ]
        if not all(result.isfinite().all() for result in results):
            raise RunError(
                f"the VAE gives latents that are no numbers in {self.vae.dtype}; load it in float32"
            )
        return results


def _rounded(h: object) -> Tensor | Problem:
    import torch

    if isinstance(h, Problem):
        return h
    if not isinstance(h, np.ndarray) or h.ndim != 2 or not h.size:
        what = f"an array of {h.shape}" if isinstance(h, np.ndarray) else type(h).__name__
        return Problem(status="failed", reason=f"the encoder gave {what}, not (tokens, width)")
    rounded = torch.from_numpy(np.ascontiguousarray(h)).to(torch.float16)
    if not rounded.isfinite().all():
        return Problem(
            status="failed", reason="the encoder gave numbers that are not finite in float16"
        )
    return rounded


class _Work(NamedTuple):
    """What lacks of a row: by view the examples without h, and the views without latents."""

    example: int
    states: list[tuple[int, list[int]]]
    moments: list[int]


class CachedFeatures:
    """Features that are computed once, in shards of `folder`, and read from there.

    ```
    folder/h-<fingerprint>/          what the encoder says, and encoder.json: what it is
    folder/latents-<fingerprint>/    what the VAE says
    ```
    Fingerprints cover all that changes a result: the component with its version, options, prompt
    and weights. Keys in them cover the image's bytes, the view and the instruction. So what is
    stale is never read, and what is still right is never computed again. Folders of other
    fingerprints may be removed at any time.
    """

    def __init__(
        self,
        folder: Path,
        pairs: Pairs,
        encoder: ComponentSpec,
        vae: AutoencoderKL,
        batch: int = 32,
        size: Size = SHARD,
    ) -> None:
        self.pairs = pairs
        self._online = OnlineFeatures(pairs, encoder, vae, batch)
        self._identity = registry.fingerprint_facts("encoder", encoder.name, encoder.options)
        self._fingerprints = (_hash(VERSION, self._identity), _hash(VERSION, digest_of(vae)))
        self._h = Shards(folder / f"h-{self._fingerprints[0][:12]}", size)
        self._latents = Shards(folder / f"latents-{self._fingerprints[1][:12]}", size)

    @property
    def fingerprint(self) -> str:
        """Of encoder and VAE, as that of `OnlineFeatures`."""
        return self._online.fingerprint

    def _keys(self, example: int, view: int) -> tuple[str, str]:
        """The keys of h and of the latents of a view of an example."""
        it, shown = self.pairs.examples[example], self.pairs.geometry(example, view)
        square = (it.input_image, *shown, self.pairs.data.resolution)
        h, latents = self._fingerprints
        return _hash(h, square, it.instruction)[:32], _hash(latents, square, it.edited_image)[:32]

    def compute(self, report: Report = quiet, rank: int = 0, world: int = 1) -> None:
        """Compute what is missing; `world` processes can share it, each as another `rank`.

        What is finished stays so when the process is killed. The encoder is loaded only if h is
        missing, and closed again. A broken image stops it at once where it is to stop, with all
        broken rows in one error; the encoder's problems stop it when they are many, or at the end.
        Raises `SourceError` for these and `RunError` when the folder cannot be written.
        """
        self._refresh()
        work = list(self._missing(rank, world))
        if not work:
            return
        facts = json.dumps(self._identity, indent=1, ensure_ascii=False, default=str)
        write_atomically(self._h.folder / "encoder.json", f"{facts}\n".encode())
        problems: dict[str, str] = {}  # by the key of h
        try:
            self._work_off(work, problems, report)
        finally:
            self._online.close()
            for shards in (self._h, self._latents):
                shards.flush()
        self.pairs.skip(self._told(problems))

    def _told(self, problems: Mapping[str, str]) -> dict[str, str]:
        """The examples that have a problem; some may be alike, and were asked about once."""
        told: dict[str, str] = {}
        for i in self.pairs.usable() if problems else ():
            for view in range(self.pairs.views):
                if (key := self._keys(i, view)[0]) in problems:
                    example = self.pairs.examples[i]
                    told[f"{example.row} ({example.column})"] = problems[key]
        return told

    def _refresh(self) -> None:
        self._h.refresh()
        self._latents.refresh()

    def _missing(self, rank: int, world: int) -> Iterator[_Work]:
        """Row by row, so that each image is decoded once for all its views and instructions."""
        rows = groupby(self.pairs.usable(), lambda i: self.pairs.examples[i].row)
        for number, (_, group) in enumerate(rows):
            if number % world != rank:
                continue
            examples = list(group)
            states: list[tuple[int, list[int]]] = []
            moments: list[int] = []
            for view in range(self.pairs.views):
                keys = [(i, *self._keys(i, view)) for i in examples]
                if lacking := [i for i, key, _ in keys if key not in self._h]:
                    states.append((view, lacking))
                if keys[0][2] not in self._latents:
                    moments.append(view)
            if states or moments:
                yield _Work(examples[0], states, moments)

    def _load(self, work: _Work) -> tuple[_Work, dict[int, Seen] | str]:
        """The views that are wanted of a row, or why there are none."""
        images = self.pairs.opened(work.example)
        if isinstance(images, str):
            return work, images
        views = {view for view, _ in work.states} | set(work.moments)
        return work, {view: self.pairs.cut(images, work.example, view) for view in views}

    def _work_off(self, work: Sequence[_Work], problems: dict[str, str], report: Report) -> None:
        """Fills `problems` with what the encoder says."""
        stop = self.pairs.data.broken == "stop"
        states: list[tuple[str, Image.Image, str]] = []
        moments: list[tuple[str, Seen]] = []
        asked: set[str] = set()  # rows may be alike
        for done, (one, seen) in enumerate(prefetch(self._load, iter(work), THREADS), 1):
            last = done == len(work)
            if isinstance(seen, str):
                if stop:
                    self.pairs.check()  # raises, with all such rows
                self.pairs.skip({self.pairs.examples[one.example].row: seen})
            else:
                for view, examples in one.states:
                    for i in examples:
                        if (key := self._keys(i, view)[0]) not in asked:
                            instruction = self.pairs.examples[i].instruction
                            states.append((key, seen[view][0], instruction))
                            asked.add(key)
                for view in one.moments:
                    if (key := self._keys(one.example, view)[1]) not in asked:
                        moments.append((key, seen[view]))
                        asked.add(key)
            while len(states) >= (batch := self._online.batch) or (last and states):
                self._encode(states[:batch], problems)
                del states[:batch]
            while 2 * len(moments) >= VAE_IMAGES or (last and moments):
                some = moments[: VAE_IMAGES // 2]
                found = self._online.moments([pair for _, pair in some])
                for (key, _), latents in zip(some, found, strict=True):
                    self._latents.add(key, latents)
                del moments[: VAE_IMAGES // 2]
            report(done, len(work))
            if stop and len(problems) >= _MANY:
                return

    def _encode(
        self, some: Sequence[tuple[str, Image.Image, str]], problems: dict[str, str]
    ) -> None:
        keys, images, texts = zip(*some, strict=True)
        for key, h in zip(keys, self._online.states(images, texts), strict=True):
            if isinstance(h, Problem):
                problems[key] = h.reason
            else:
                self._h.add(key, h)

    def usable(self) -> list[int]:
        """The examples that have features for all their views.

        Raises `RunError` when one has none and nothing was to be skipped, or when all lack them.
        """
        self._refresh()
        views, known = range(self.pairs.views), self.pairs.usable()
        found = [i for i in known if all(self._has(i, view) for view in views)]
        if not found or (self.pairs.data.broken == "stop" and len(found) < len(known)):
            raise RunError(
                f"{self._h.folder.parent} lacks features of {len(known) - len(found)} of "
                f"{len(known)} examples; compute them"
            )
        return found

    def _has(self, example: int, view: int) -> bool:
        h, latents = self._keys(example, view)
        return h in self._h and latents in self._latents

    def get(self, requests: Sequence[Request]) -> list[Feature]:
        """The features of some views of examples, read. Raises `RunError` for what is not there."""
        features: list[Feature] = []
        for example, view in requests:
            h, latents = self._keys(example, view)
            try:
                features.append(Feature(self._h[h], *self._latents[latents]))
            except KeyError as error:
                raise RunError(
                    f"{self._h.folder.parent} lacks features of "
                    f"{self.pairs.examples[example].row}; compute them"
                ) from error
        return features


def digest_of(vae: AutoencoderKL) -> str:
    """SHA-256 over a VAE's configuration and its weights as they are, in hex."""
    import torch

    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(vae.state_dict().items()):
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        total.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _hash(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
